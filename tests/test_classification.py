import csv
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import resseq
from resseq import classification, cli
from resseq.cli import main
from resseq.options import TrainOptions
from resseq.run import Run

SMALL = {
    "dim": 16,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "dropout": 0.0,
    "vocab_size": 100,
    "max_length": 32,
    "warmup_steps": 5,
    "learning_rate": 1e-2,
    "device": "cpu",
}
WORDS = {"fruit": ["apple", "pear", "plum"], "tool": ["hammer", "saw", "drill"], "sea": ["wave", "tide", "reef"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes that a word tells apart, in one file without splits."""
    path = tmp_path_factory.mktemp("data") / "things.csv"
    generator = torch.Generator().manual_seed(0)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "category"])
        for i in range(240):
            name = list(WORDS)[i % 3]
            filler = " and ".join(["this"] * int(torch.randint(1, 6, (), generator=generator)))
            rows.writerow([f"{filler}, a {WORDS[name][i // 3 % 3]} it is", name])
    return str(path)


@pytest.fixture(scope="module", params=["transformer", "convnet"])
def run(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    result = resseq.train(data=Path(data), model=request.param, depth=2, output_dir=folder, **SMALL)
    return folder, result


def test_it_learns_and_leaves_a_run_folder(run):
    folder, result = run
    assert result["test"]["accuracy"] == 1.0
    assert result["rows"] == {"train": 192, "validation": 24, "test": 24}
    assert result["carved"] == ["validation", "test"]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "README.md", "result.json"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("learning_curve.png", "confusion_matrix.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[0]["padding"] < 1
    assert [row["epoch"] for row in rows if "validation_loss" in row] == [1.0, 2.0]
    card = (folder / "README.md").read_text()
    assert f"| test | {result['test']['accuracy']:.4f} |" in card
    assert not list(folder.glob(".*")), "no temporary file is left"


def test_evaluate_measures_the_rows_held_out_from_training(run, data, tmp_path):
    folder, result = run
    own = resseq.evaluate(folder)
    assert {name: own[name] for name in ("loss", "accuracy", "macro_f1")} == pytest.approx(result["test"])
    assert (own["rows"], own["split"]) == (24, "test")
    assert resseq.evaluate(folder, data=Path(data))["rows"] == 24
    assert sum(row["rows"] for row in own["classes"].values()) == 24
    other = tmp_path / "other.csv"
    other.write_text('text,label\n"this, a pear it is",fruit\n"this, a wave it is",fruit\n')
    measured = resseq.evaluate(str(folder), data=str(other))
    assert (measured["rows"], measured["split"], measured["accuracy"]) == (2, "all", 0.5)


def test_other_columns_of_a_run_s_own_data_are_measured_on_the_same_rows(data, tmp_path):
    lines = Path(data).read_text().splitlines()
    wide = [f"title,{lines[0]}", *(f"short {i},{line}" for i, line in enumerate(lines[1:]))]
    (tmp_path / "wide.csv").write_text("\n".join(wide) + "\n")
    options = SMALL | {"num_train_epochs": 1, "text_column": "review"}
    result = resseq.train(data=tmp_path / "wide.csv", output_dir=tmp_path / "run", **options)
    measured = resseq.evaluate(tmp_path / "run", text_column="title")
    assert (measured["split"], measured["rows"]) == ("test", 24)
    assert measured["loss"] != result["test"]["loss"]
    assert resseq.evaluate(tmp_path / "run", text_column="review")["loss"] == pytest.approx(result["test"]["loss"])
    (tmp_path / "wide.csv").write_text("\n".join(wide[:-1]) + "\n")
    with pytest.raises(ValueError, match="its own data must be as it was in training"):
        resseq.evaluate(tmp_path / "run", text_column="title")


def test_a_run_s_own_data_may_be_elsewhere(data, tmp_path, monkeypatch, capsys):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (home / "a.csv").write_text(Path(data).read_text())
    monkeypatch.chdir(home)
    result = resseq.train(data="a.csv", output_dir=tmp_path / "run", **SMALL | {"num_train_epochs": 1})
    monkeypatch.chdir(away)
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == (
        f"resseq: Run: its own data, 'a.csv', is not here; got neither a file or folder in {away}, "
        "nor a Hugging Face dataset id. Give it by --data.\n"
    )
    measured = resseq.evaluate(tmp_path / "run", data=home / "a.csv")
    assert (measured["split"], measured["rows"]) == ("test", 24), "and no row of training is measured"
    assert measured["accuracy"] == result["test"]["accuracy"]
    (tmp_path / "renamed.csv").write_text(Path(data).read_text())
    assert resseq.evaluate(tmp_path / "run", data=tmp_path / "renamed.csv")["rows"] == 24
    (tmp_path / "a.csv").write_text('text,category\n"this, a pear it is",fruit\n')  # another of the same name
    assert resseq.evaluate(tmp_path / "run", data=tmp_path / "a.csv", text_column="text")["split"] == "all"
    with pytest.raises(ValueError, match="data='b.csv' is neither pystdlib, nor a file or folder here.* the spelling"):
        resseq.evaluate(tmp_path / "run", data="b.csv")


def test_evaluate_refuses(run, tmp_path):
    folder, _ = run
    other = tmp_path / "other.csv"
    other.write_text('text,label\n"this, a pear it is",vegetable\n')
    with pytest.raises(ValueError, match=r"got labels=\['vegetable'\]"):
        resseq.evaluate(str(folder), data=str(other))
    with pytest.raises(ValueError, match="the data has splits .*; got --split dev"):
        resseq.evaluate(str(folder), split="dev")


def test_predict_takes_of_a_file_no_more_at_once_than_of_a_list(tmp_path):
    (tmp_path / "lines.txt").write_text("a path\n" * 2500)
    assert [len(block) for block in classification._blocks(str(tmp_path / "lines.txt"))] == [1000, 1000, 500]


def test_predict_gives_a_row_for_each_line_in_order(run, tmp_path):
    folder, _ = run
    texts = [
        "this, a saw it is",
        "",
        "this and this and this, a plum it is",
        "\x00",
        "this, a reef it is",
        "x" * 10**6,
        "🙂",
    ]
    rows = list(resseq.predict(str(folder), texts))
    assert [rows[i]["label"] for i in (0, 2, 4)] == ["tool", "fruit", "sea"]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(max(row["probabilities"], key=row["probabilities"].get) == row["label"] for row in rows)
    alone = [next(iter(resseq.predict(str(folder), [text]))) for text in texts]
    for ours, theirs in zip(rows, alone, strict=True):
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)
    file = tmp_path / "texts.txt"
    for ending in ("", "\n"):
        file.write_bytes(("\n".join(texts) + ending).encode())
        from_file = list(resseq.predict(str(folder), str(file)))
        assert [row["label"] for row in from_file] == [row["label"] for row in rows]
    file.write_bytes(b"this, a saw it is\r\n\xff\xfe\n")
    assert [row["label"] for row in resseq.predict(str(folder), str(file))][0] == "tool"


def test_predict_reads_whatever_training_reads(run, monkeypatch):
    folder, _ = run
    odd = [3, np.float64(2.5), "a\ud800b", ("this", "a saw it is"), ""]
    plain = ["3", "2.5", "a?b", "this | a saw it is", ""]
    assert list(resseq.predict(folder, odd)) == list(resseq.predict(folder, plain))
    assert len(list(resseq.predict(folder, pd.Series(["None", "nan"])))) == 2
    message = r"data: every row must have a text; got none in rows 2, 4 of what is to be predicted\. Fill or delete"
    for missing in (None, float("nan"), np.nan, pd.NA, pd.NaT, ("a", None)):
        with pytest.raises(ValueError, match=message):
            list(resseq.predict(folder, ["a", missing, "b", missing]))
    monkeypatch.setattr("resseq.classification.CHUNK", 3)
    with pytest.raises(ValueError, match="got none in row 5 of"):
        list(resseq.predict(folder, ["a"] * 4 + [None]))


def test_predict_raises_when_it_is_called(run, tmp_path):
    with pytest.raises(ValueError, match="must hold a finished run; got .*nowhere: there is none"):
        resseq.predict(tmp_path / "nowhere", ["a text"])
    with pytest.raises(ValueError, match=r"got a gripping film\. .* from Python .*\['a gripping film'\]"):
        resseq.predict(run[0], "a gripping film")
    for table in (pd.DataFrame({"text": ["this"]}), {"text": ["this"]}, 1):
        with pytest.raises(ValueError, match=f"got a {type(table).__name__}. Give the texts in a list."):
            resseq.predict(run[0], table)
    assert list(resseq.predict(run[0], pd.Series(["this"]))) == list(resseq.predict(run[0], ["this"]))


def test_all_verbs_use_the_precision_of_training(data, tmp_path):
    folder = tmp_path / "run"
    result = resseq.train(data=data, output_dir=folder, depth=2, bf16=True, **SMALL | {"num_train_epochs": 1})
    loaded = Run.load(folder, "cpu")
    logits = loaded.logits(["this, a saw it is", "this and this, a plum it is"], 2)
    assert torch.equal(logits, logits.bfloat16().float())
    assert resseq.evaluate(folder)["loss"] == pytest.approx(result["test"]["loss"], abs=1e-9)
    seen = set()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu"))):
        report = resseq.inspect(folder, device="cpu", texts=8, output_dir=tmp_path / "inspect")
    assert True in seen, "its lesions too"
    assert report.series("lesion_drop")


def shell(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "resseq", *arguments], capture_output=True, text=True, **options)


def test_predict_from_the_shell(run):
    folder, _ = run
    done = shell("predict", str(folder), "-", input="this, a saw it is\nthis, a tide it is\n")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["tool", "sea"]


def test_predict_answers_a_slow_pipe_line_by_line(run):
    folder, _ = run
    with subprocess.Popen(
        [sys.executable, "-m", "resseq", "predict", str(folder), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        for text, label in (("this, a saw it is", "tool"), ("this, a plum it is", "fruit")):
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["label"] == label
        process.stdin.close()
        assert process.wait() == 0


def test_a_closed_output_pipe_is_no_error(run, tmp_path):
    folder, _ = run
    (tmp_path / "texts").write_text("this, a saw it is\n" * 5000)
    line = f"{sys.executable} -m resseq predict {folder} {tmp_path / 'texts'} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert json.loads(done.stdout)["label"] == "tool"
    assert done.stderr == ""


def test_train_and_evaluate_from_the_shell(data, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = shell("train", "--data", data, "--output-dir", str(tmp_path / "run"), "--scheme", "highway", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test accuracy ")
    assert done.stderr == "", "silent where the output is no terminal"
    measured = shell("evaluate", str(tmp_path / "run"))
    assert json.loads(measured.stdout)["rows"] == 24


def test_the_default_run_folder_names_what_is_in_it():
    options = TrainOptions(data="some/things.csv", model="convnet", scheme="pre")
    assert str(options.folder) == os.path.join("runs", "things-convnet-pre")


def test_a_run_folder_holds_one_run(run, data, capsys):
    folder, result = run
    given = {"data": data, "output_dir": str(folder), "model": folder.name, "depth": 2, **SMALL}
    with pytest.raises(ValueError, match="holds one run; got --output-dir .*Use --resume auto"):
        resseq.train(**given)
    again = resseq.train(**given, resume="auto")
    assert again["test"] == result["test"]
    with pytest.raises(ValueError, match=r"keeps its options; got learning_rate=0.5 \(was 0.01\)"):
        resseq.train(**{**given, "learning_rate": 0.5}, resume="auto")


def test_an_unfinished_run_says_how_to_go_on(tmp_path, data):
    with pytest.raises(ValueError, match="must hold a finished run; got .*: there is none"):
        Run.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json must be one that resseq train wrote"):
        resseq.train(data=data, output_dir=str(tmp_path), resume="auto")
    with pytest.raises(
        ValueError, match="it is not finished. Type the command that began it once more, with --resume auto"
    ):
        Run.load(tmp_path)


def test_a_new_run_overwrites_nothing(tmp_path, data):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(
        ValueError, match="would overwrite files; got --output-dir .* with README.md and no config.json"
    ):
        resseq.train(data=data, output_dir=str(tmp_path), **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": 0}, "--num-train-epochs must be 1 or more; got 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps must be 1 or more"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"lr_scheduler_type": "cosin"}, "--lr-scheduler-type is one of linear, cosine, constant; got 'cosin'"),
        ({"init": "he"}, "--init is one of xavier, torch, normal; got 'he'"),
        ({"device": "gpu"}, "device is auto or a device of this machine; got --device gpu"),
    ],
)
def test_a_bad_option_is_refused_and_the_folder_stays_free(options, message, data, tmp_path):
    given = {**SMALL, **options}
    with pytest.raises(ValueError, match=message):
        resseq.train(data=data, output_dir=str(tmp_path / "run"), **given)
    assert not (tmp_path / "run").exists()


def test_numbers_out_of_arrays_are_options(data, tmp_path):
    given = {"seed": np.int64(3), "learning_rate": np.float32(0.5), "bf16": np.bool_(False), "scheme": np.str_("pre")}
    options = TrainOptions(**given)
    assert {name: type(getattr(options, name)) for name in given} == {
        "seed": int,
        "learning_rate": float,
        "bf16": bool,
        "scheme": str,
    }
    with pytest.raises(ValueError, match=r"must be an integer; got array\(\[1, 2\]\) \(type ndarray\)\. Write seed=6"):
        TrainOptions(seed=np.array([1, 2]))
    given = {"schemes": "pre", "dim": np.int64(16), "heads": 2, "vocab_size": 100, "max_steps": 2, "workers": 1}
    found = resseq.ablate(data=data, depths=np.int64(1), seeds=np.arange(2), output_dir=str(tmp_path), **given)
    assert sorted(found.frame["seed"]) == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ("depht", "Use depth="),
        ("schemes", "Use scheme="),
        ("batch_size", "Use per_device_train_batch_size= or per_device_eval_batch_size="),
        ("zzz", "Type resseq train --help to see them all"),
    ],
)
def test_an_option_that_there_is_not_is_answered_with_the_nearest(wrong, fix):
    with pytest.raises(ValueError, match=rf"train: the options are those of resseq train; got {wrong}=2\. {fix}\.$"):
        resseq.train(**{wrong: 2})


def test_a_run_that_was_stopped_ends_as_if_it_was_not(data, tmp_path, monkeypatch):
    from resseq.training.loop import Trainer

    whole = resseq.train(data=data, output_dir=str(tmp_path / "whole"), **SMALL)
    step = Trainer.take_step

    def stop(self, window):
        if self.step == 30:
            raise KeyboardInterrupt
        step(self, window)

    monkeypatch.setattr(Trainer, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        resseq.train(data=data, output_dir=str(tmp_path / "stopped"), **SMALL)
    monkeypatch.undo()
    resumed = resseq.train(data=data, output_dir=str(tmp_path / "stopped"), resume="auto", **SMALL)
    assert resumed["test"] == whole["test"]
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_does_not_depend_on_the_workers(data, tmp_path, workers):
    logs = []
    for count in (0, workers):
        folder = tmp_path / f"{workers}-{count}-{len(logs)}"
        options = {**SMALL, "num_train_epochs": 1, "dataloader_num_workers": count}
        resseq.train(data=data, output_dir=str(folder), **options)
        logs.append((folder / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere.csv"], "nowhere.csv' is neither pystdlib, nor a file"),
        (["train", "--model", "convnet", "--heads", "4"], "--model convnet has no heads; got --heads 4. Leave it out."),
        (["train", "--scheme", "pots"], "Did you mean 'post'?"),
        (["predict", "nowhere", "-"], "must hold a finished run; got nowhere: there is none"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("resseq: ")
    assert error.count("\n") == 1


def test_the_names_of_classes_are_printed_as_they_are(monkeypatch, capsys):
    row = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "rows": 1}
    monkeypatch.setitem(cli.VERBS, "evaluate", lambda: {"classes": {"négatif": row, "中性": row}})
    assert main(["evaluate"]) == 0
    out = capsys.readouterr().out
    assert "négatif" in out
    assert "中性" in out


def test_the_table_of_short_class_names_stands_in_line(monkeypatch, capsys):
    row = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "rows": 1}
    monkeypatch.setitem(cli.VERBS, "evaluate", lambda: {"classes": {"0": row, "1": row}})
    assert main(["evaluate"]) == 0
    assert len({len(line) for line in capsys.readouterr().err.splitlines()}) == 1


@pytest.mark.parametrize("arguments", [["export", "--help"], ["evaluate", "--help"]])
def test_a_default_of_none_is_shown_as_such(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "['None']" not in capsys.readouterr().out


@pytest.mark.parametrize(("wrong", "right"), [("--lerning-rate", "--learning-rate"), ("--sheme", "--scheme")])
def test_a_misspelt_flag_is_answered_with_the_nearest(capsys, wrong, right):
    with pytest.raises(SystemExit) as stopped:
        main(["train", wrong, "3"])
    assert stopped.value.code == 2
    assert right in capsys.readouterr().err


def test_several_text_columns_from_the_shell(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,label\n" + "".join(f"so {i % 5},it {i % 2},{i % 2}\n" for i in range(40)))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    run = tmp_path / "run"
    given = ["train", "--data", str(path), "--text-column", "a", "b", "--output-dir", str(run), *flags]
    assert main(given) == 0, capsys.readouterr().err
    assert main([*given, "--resume", "auto"]) == 0, capsys.readouterr().err
    assert resseq.evaluate(str(run))["rows"] == 4
    assert len(list(resseq.predict(str(run), ["so 3 | it 1"]))) == 1


def test_an_unwritable_output_folder_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "--output-dir", str(tmp_path / "file" / "run")]) == 1
    assert "the run folder must be writable" in capsys.readouterr().err


def test_every_option_has_a_description():
    import inspect

    source = "".join(inspect.getsource(base) for base in TrainOptions.__mro__[:-1])
    for field in fields(TrainOptions):
        after = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
        assert after.strip().startswith('"""'), field.name


REAL = pytest.mark.skipif("RESSEQ_DATA" not in os.environ, reason="RESSEQ_DATA is not set")


@REAL
@pytest.mark.parametrize(("name", "chance"), [("trec", 0.26), ("sst2", 0.52)])
def test_a_minute_on_real_text_beats_the_majority_class(name, chance, tmp_path):
    result = resseq.train(
        data=os.path.join(os.environ["RESSEQ_DATA"], name), output_dir=str(tmp_path / "run"), max_steps=400, dim=64
    )
    assert result["test"]["accuracy"] > chance + 0.15


def test_what_is_to_be_known_before_trusting_the_numbers_is_said(tmp_path, capsys):
    data = tmp_path / "data.csv"
    rows = [f"text {i},{'ab'[i % 2]}" for i in range(40)]
    data.write_text("\n".join(["text,label", *rows, *rows]) + "\n")
    small = ["--dim", "16", "--vocab-size", "50", "--max-steps", "2", "--warmup-steps", "100", "--device", "cpu"]
    assert main(["train", "--data", str(data), "--output-dir", str(tmp_path / "run"), *small]) == 0
    said = capsys.readouterr().out
    repeated = json.loads((tmp_path / "run" / "result.json").read_text())["repeated"]
    assert 0 < repeated <= 8
    assert f"{repeated} of the test texts stand among those for training too" in said
    assert "a warm-up of 100 steps is long for a training of 2: try --warmup-steps 0, or a longer training" in said
    assert "are longer than" not in said


def test_a_run_s_config_says_every_option(run):
    options = json.loads((run[0] / "config.json").read_text())["options"]
    assert options["scheme"] in ("pre", "residual")
    assert None not in (options["depth"], options["dropout"], options["kernel_size"], options["pooling"])


def test_a_table_is_no_file_of_texts(run, data, capsys):
    assert main(["predict", str(run[0]), data]) == 1
    assert f"got the table {data}. Write its column of texts to a .txt file" in capsys.readouterr().err
