import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path

import pytest
import test_kill
import torch
import tyro

import resseq
from resseq.ablation import engines, runner, start
from resseq.ablation.cell import chance_loss, judge, last_tenth, read_record, run_cell
from resseq.ablation.grid import AblateOptions, as_options, cells_of
from resseq.ablation.plan import plan
from resseq.cli import main
from resseq.data.batching import Tokens
from resseq.data.corpus import data_options, prepare
from resseq.diagnostics.memory import saved_storages
from resseq.models import build_model
from resseq.options import TrainOptions
from resseq.stack import Stack

SMALL = {
    "dim": 8,
    "heads": 2,
    "vocab_size": 100,
    "max_length": 32,
    "per_device_train_batch_size": 8,
    "learning_rates": 1e-2,
    "num_train_epochs": 1,
    "logging_steps": 4,
    "eval_steps": 8,
    "device": "cpu",
}
WORDS = {"fruit": ["apple", "pear", "plum"], "tool": ["hammer", "saw", "drill"], "sea": ["wave", "tide", "reef"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes that a word tells apart, in one file without splits."""
    path = tmp_path_factory.mktemp("data") / "things.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "category"])
        for i in range(240):
            name = list(WORDS)[i % 3]
            rows.writerow([f"{'this and ' * (i % 5)} a {WORDS[name][i // 3 % 3]} it is", name])
    return str(path)


@pytest.fixture(scope="module")
def corpus(data):
    return prepare(data_options(cells_of(as_options(data=data, **SMALL))[0].options))


def small(data, folder, **options):
    return {"data": data, "output_dir": str(folder), "schemes": ("post", "pre"), "depths": (1, 2), **SMALL, **options}


def numbers(found):
    """The rows without what a clock says."""
    return [{**row, "seconds": None} for row in found.findings.rows]


def attempts(folder):
    return {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (folder / "cells").glob("*/attempts.jsonl")
    }


class Here:
    """An engine that runs the cells in this process, and whose first tasks die."""

    deaths = 0

    def __init__(self, options):
        self.left = self.deaths

    def submit(self, cell, pickled):
        future = Future()
        self.left -= 1
        if self.left >= 0:
            future.set_exception(RuntimeError("a process in the pool was terminated abruptly"))
        else:
            future.set_result(run_cell(cell, pickled))
        return future

    def release(self, future):
        pass

    def close(self, stop):
        assert not stop


@pytest.fixture
def here(monkeypatch):
    """No test of what is in the rows needs to wait for new processes."""
    monkeypatch.setitem(engines.ENGINES, "local", Here)
    monkeypatch.setattr(runner, "POLL", 0.01)


def starts(folder):
    return sum(each["event"] == "start" for events in attempts(folder).values() for each in events)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A grid that nothing disturbed, by two processes."""
    folder = tmp_path_factory.mktemp("whole")
    return resseq.ablate(**small(data, folder), workers=2)


def test_the_product_of_all_lists_is_the_grid(tmp_path):
    options = as_options(schemes=("post", "pre"), depths=2, seeds=range(3), warmup_steps=(0, 200), output_dir=tmp_path)
    cells = cells_of(options)
    assert len(cells) == len({cell.name for cell in cells}) == 12
    assert [(cell.options.scheme, cell.options.seed, cell.options.warmup_steps) for cell in cells[:3]] == [
        ("post", 0, 0),
        ("post", 0, 200),
        ("post", 1, 0),
    ]
    assert options.axes == ["warmup_steps"]
    assert cells[0].folder == tmp_path / "cells" / cells[0].name
    assert len(cells_of(as_options(depths=(2, 2)))) == 3, "a cell named twice is one"


def test_the_folder_s_name_is_that_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (".", f"../{tmp_path.name}", f"{tmp_path}/"):
        assert as_options(data=data).folder == Path(f"runs/ablate-{tmp_path.name}")
    assert as_options(data=("a/b.csv", "owner/name", "pystdlib")).folder == Path("runs/ablate-b-name-pystdlib")


def test_columns_may_be_a_list(tmp_path):
    given = {"schemes": "pre", "depths": 2, "data": "things.csv"}
    options = as_options(text_column=["title", "body"], **given)
    assert options.command.endswith("--data things.csv --text-column title body")
    (cell,), (other,) = cells_of(options), cells_of(as_options(text_column=("title", "body"), **given))
    assert cell.name == other.name
    assert {data_options(cell.options): "they are a key"}[data_options(other.options)]


def test_an_option_that_there_is_not_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"those of resseq ablate; got scheme='pre'\. Use schemes=\.$"):
        resseq.ablate(scheme="pre")
    with pytest.raises(ValueError, match=r"got learning_rate=0.1\. Use learning_rates=\.$"):
        resseq.ablate(learning_rate=0.1)


def test_a_cell_is_what_its_numbers_follow_from(tmp_path):
    def name(**options):
        return cells_of(as_options(schemes="pre", depths=2, **options))[0].name

    assert name() == name(output_dir=str(tmp_path), device="cpu", workers=3, inits="xavier", activation="gelu")
    assert len({name(), name(threads=2), name(seeds=1), name(bf16=True), name(data="other.csv")}) == 5


def test_the_model_s_own_defaults_are_spelt_out_and_another_model_is_spared_the_transformer_s():
    transformer, convnet = cells_of(as_options(model=("transformer", "convnet"), schemes=None, depths=None))
    assert (transformer.options.scheme, transformer.options.depth, transformer.options.kernel_size) == ("pre", 2, 0)
    assert (convnet.options.scheme, convnet.options.depth, convnet.options.kernel_size) == ("residual", 9, 3)
    (vdcnn,) = cells_of(as_options(model="vdcnn", schemes="plain", depths=17))
    assert (vdcnn.options.depth, vdcnn.options.dim, vdcnn.options.dropout) == (17, None, None)
    usual = cells_of(as_options(model="vdcnn"))
    assert {(cell.options.scheme, cell.options.depth) for cell in usual} == {
        (scheme, depth) for scheme in ("plain", "residual") for depth in (9, 17, 29)
    }
    assert {cell.options.shortcut for cell in usual} == {"projection"}


def test_every_option_of_train_is_an_option_here_with_its_description(capsys):
    ours = {each.name for each in fields(AblateOptions)}
    plural = {
        "scheme": "schemes",
        "depth": "depths",
        "seed": "seeds",
        "learning_rate": "learning_rates",
        "init": "inits",
    }
    for each in fields(TrainOptions):
        if each.name not in ("resume", "dataloader_num_workers"):
            assert plural.get(each.name, each.name) in ours
    with pytest.raises(SystemExit):
        main(["ablate", "--help"])
    help = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "Optimizer steps over which the learning rate rises",
        "--inits {xavier,torch,normal} ...",
        "Cells at a",
    ):
        assert words in help


def test_the_command_gives_the_same_options_again():
    options = as_options(schemes=("post",), warmup_steps=(0, 2), data="my reviews.csv", bf16=True, lowercase=False)
    assert options.command == (
        "resseq ablate --schemes post --warmup-steps 0 2 --data 'my reviews.csv' --bf16 --no-lowercase"
    )
    words = ["--schemes", "post", "--warmup-steps", "0", "2", "--data", "my reviews.csv", "--bf16", "--no-lowercase"]
    assert tyro.cli(AblateOptions, args=words) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schemes": ("post", "pots")}, "Did you mean 'post'"),
        ({"schemes": ()}, "ablate: every flag needs a value; got --schemes with none. Give one"),
        ({"schemes": resseq.SCHEMES["pre"]}, "ablate: a scheme is a name in resseq.SCHEMES; got schemes=<class"),
        ({"heads": (4, 5)}, "dim must be divisible by heads; got dim=64, heads=5"),
        ({"depths": (2, 0)}, "--depth must be 1 or more; got 0"),
        ({"inits": "he"}, "--init is one of xavier, torch, normal; got 'he'"),
        ({"workers": 0}, "ablate: --workers must be 1 or more; got 0"),
        ({"engine": "slurm"}, "ablate: --engine is one of local, ray; got 'slurm'. Use local."),
        ({"threads": "2"}, "ablate: --threads must be an integer; got '2'"),
        ({"device": "gpu"}, "device is auto or a device of this machine; got --device gpu"),
        ({"data": "nowhere.csv"}, "nowhere.csv' is neither pystdlib, nor a file"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_trained(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resseq.ablate(**{"output_dir": str(tmp_path / "out"), **options})
    assert not list(tmp_path.glob("out/cells/*"))


def test_a_mistake_is_answered_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--schemes", "post", "pots"], "Did you mean 'post'"),
        (["--output-dir", str(tmp_path / "file" / "out")], "ablate: the output folder must be writable"),
    ):
        assert main(["ablate", *words]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("resseq: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_the_start_is_measured_and_leaves_no_trace(corpus, data, class_weights):
    options = cells_of(as_options(**small(data, "out", schemes="plain", depths=4, class_weights=class_weights)))[
        0
    ].options
    torch.manual_seed(1)
    before = torch.get_rng_state()
    measured = start.measure_start(options, corpus)
    assert torch.equal(before, torch.get_rng_state())
    assert measured == start.measure_start(options, corpus)

    # by hand, on the same model and batch, as training builds them
    torch.manual_seed(options.seed)
    model = build_model(options, 3, **corpus.reader.shape)
    stack = next(module for module in model.modules() if isinstance(module, Stack))
    batch = start.first_batches(options, corpus)[0]
    streams = []
    stack.residuals[0].connection.register_forward_hook(lambda *_: None)
    stack.residuals[0].register_forward_hook(lambda module, args, out: streams.append(args[0]))
    stack.residuals[-1].register_forward_hook(lambda module, args, out: streams.append(out))
    logits, labels = model(batch["ids"], batch["mask"]), batch["labels"]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (losses * (corpus.class_weights(options)[labels] if class_weights else 1.0)).mean().backward()
    for name, residual in (("first", stack.residuals[0]), ("last", stack.residuals[-1])):
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in residual.sublayer.parameters()))
        assert measured[f"gradient_norm_{name}"] == pytest.approx(norm, rel=1e-5)
    growth = (streams[1].square().mean() / streams[0].square().mean()).sqrt().item()
    assert measured["stream_growth"] == pytest.approx(growth, rel=1e-5)


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    linear = torch.nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    with saved_storages(linear) as saved:
        y = linear(linear(x)).sigmoid() * 2  # keeps both inputs and the sigmoid, not the weight, twice
    assert sum(saved.values()) == 3 * 8 * 4
    assert y.shape == (2, 4)


def test_the_loss_of_chance_is_the_entropy_of_the_labels():
    tokens = Tokens(torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.int64), [0, 0, 1, 1], 0.0)
    assert chance_loss(tokens, 2, TrainOptions(label_smoothing_factor=0.0)) == pytest.approx(math.log(2))
    skewed = Tokens(tokens.ids, tokens.lengths, [0, 0, 0, 1], 0.0)
    expected = -sum(p * math.log(p) for p in (0.7, 0.3))
    assert chance_loss(skewed, 2, TrainOptions(label_smoothing_factor=0.2)) == pytest.approx(expected)


def test_rows_say_what_was_chosen_and_measured(whole, corpus):
    chance = chance_loss(corpus.splits["train"], 3, TrainOptions(label_smoothing_factor=0.0))
    frame = whole.frame
    assert list(frame.columns) == [
        *("model", "scheme", "depth", "seed", "learning_rate", "warmup_steps", "init", "status", "diverged_step"),
        *("validation_accuracy", "validation_weighted_accuracy", "validation_loss"),
        *("train_accuracy", "train_loss", "test_accuracy", "test_loss"),
        *("steps_to_loss", "steps", "seconds", "parameters", "saved_bytes"),
        *("gradient_norm_first", "gradient_norm_last", "stream_growth", "cell", "error"),
    ]
    assert list(zip(frame.scheme, frame.depth, strict=True)) == [("post", 1), ("post", 2), ("pre", 1), ("pre", 2)]
    for row in whole.findings.rows:
        folder = whole.folder / "cells" / row["cell"]
        result = json.loads((folder / "result.json").read_text())
        assert row["test_accuracy"] == result["test"]["accuracy"]
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
        assert whole.findings.curves[row["cell"]] == losses
        assert row["train_loss"] == losses[-1][1], "the only row of the last tenth of 24 steps"
        assert row["status"] == ("stuck" if row["train_loss"] > 0.98 * chance else "finished")
        assert (row["steps"], row["init"], row["error"]) == (24, "xavier", None)
        assert not list(folder.glob("checkpoint-*")), "a finished cell keeps no checkpoint"
        assert not list(folder.glob(".*.partial"))
    assert whole.findings.setting["dim"] == 8
    assert whole.findings.setting["steps"] == 24
    assert "scheme" not in whole.findings.setting
    assert whole.findings.seconds > 0
    assert whole.table
    assert whole.summary


def test_what_an_ablation_and_a_report_show_of_themselves_is_what_is_printed(whole):
    assert repr(whole) == f"{whole.table}\n\n{whole.summary}"
    report = resseq.diagnostics.inspect(Stack([torch.nn.Linear(4, 4)], dim=4), torch.randn(2, 4))
    assert repr(report) == "\n".join([report.text, *report.verdict])


def test_a_cell_that_learns_is_finished_and_one_that_cannot_is_stuck(data, tmp_path, here):
    options = small(data, tmp_path, schemes="pre", depths=1, num_train_epochs=12, learning_rates=(1e-2, 1e-9))
    learns, stuck = resseq.ablate(**options).findings.rows
    assert (learns["status"], learns["test_accuracy"]) == ("finished", 1.0)
    assert 0 < learns["steps_to_loss"] < learns["steps"]
    assert (stuck["status"], stuck["steps_to_loss"]) == ("stuck", None)


def test_the_same_grid_gives_the_same_numbers_one_after_the_other(whole, data, tmp_path, here):
    assert numbers(resseq.ablate(**small(data, tmp_path))) == numbers(whole)
    done = starts(tmp_path)
    assert numbers(resseq.ablate(**small(data, tmp_path))) == numbers(whole)
    assert starts(tmp_path) == done == 4, "and again: nothing is trained twice"


def test_only_what_is_new_runs_when_the_grid_changes(data, tmp_path, here):  # case 43
    first = resseq.ablate(**small(data, tmp_path, depths=1))
    more = resseq.ablate(**small(data, tmp_path, depths=(1, 2)))
    assert starts(tmp_path) == 4
    assert [row for row in numbers(more) if row["depth"] == 1] == numbers(first)
    other = resseq.ablate(**small(data, tmp_path, schemes=("pre", "highway"), depths=1, warmup_steps=(0, 2)))
    assert len(other.findings.rows) == 4
    assert other.frame.warmup_steps.tolist() == [0, 2, 0, 2]
    assert starts(tmp_path) == 7, "pre at depth 1 without warm-up was there"
    assert len(attempts(tmp_path)) == 7, "what the grid no longer asks for is kept"


def test_a_grid_does_not_mix_cells_of_changed_data(data, tmp_path, here):
    path = tmp_path / "things.csv"
    path.write_text(Path(data).read_text())
    resseq.ablate(**small(str(path), tmp_path / "out", schemes="pre", depths=1))
    path.write_text(Path(data).read_text().replace("pear", "plum"))
    message = "got another .*train.* in .*things.csv than the cells there began with. Restore it, or use another"
    with pytest.raises(ValueError, match=message):
        resseq.ablate(**small(str(path), tmp_path / "out", schemes="pre", depths=(1, 2)))
    next(tmp_path.glob("out/cells/*/cell.json")).unlink()  # as a kill leaves it that came after the result
    with pytest.raises(ValueError, match=message):
        resseq.ablate(**small(str(path), tmp_path / "out", schemes="pre", depths=1))
    assert starts(tmp_path / "out") == 1


def test_a_damaged_result_is_computed_again(data, tmp_path, here):  # case 42
    options = small(data, tmp_path, schemes="pre")
    first = resseq.ablate(**options)
    one, two = (tmp_path / "cells" / row["cell"] for row in first.findings.rows)
    (one / "result.json").write_text('{"output')
    for times, damaged in enumerate((b"\xff\x00", b"", b"[]", b'{"measured": {}}', b'{"measured": 1}'), 1):
        (two / "cell.json").write_bytes(damaged)
        assert numbers(resseq.ablate(**options)) == numbers(first)
        assert starts(tmp_path) == 3 + times


def test_validation_does_not_choose_between_values_that_are_one(data, tmp_path, here):
    found = resseq.ablate(**small(data, tmp_path, depths=1, learning_rates=(1e-2, 1e-2), inits=("xavier", None)))
    assert len(found.findings.rows) == 2
    assert "chose" not in repr(found)
    with pytest.raises(ValueError, match=r"--save-steps must be an integer; got \(5, 10\)"):
        resseq.ablate(save_steps=(5, 10))  # no number follows from it


def test_what_goes_wrong_in_a_cell_stays_in_it(data, tmp_path, here):  # cases 23 and 24
    options = small(
        data, tmp_path, schemes="pre", depths=1, learning_rates=(1e-2, 1e38), max_grad_norm=1e30, optim="sgd"
    )
    fine, diverged = resseq.ablate(**options).findings.rows
    assert fine["status"] in ("finished", "stuck")
    assert diverged["status"] == "diverged"
    assert 1 <= diverged["diverged_step"] <= 24
    assert "the gradient must be finite" in diverged["error"]
    assert diverged["test_accuracy"] is None
    assert diverged["parameters"] == fine["parameters"] > 0
    assert resseq.ablate(**options).findings.rows[1] == diverged
    assert starts(tmp_path) == 2, "what diverged once would diverge again"


def test_weights_that_the_last_step_spoils_have_diverged(data, tmp_path, here):
    options = {"schemes": "pre", "depths": 1, "learning_rates": 1e38, "optim": "sgd", "max_grad_norm": 0.0}
    (row,) = resseq.ablate(**small(data, tmp_path, max_steps=1, **options)).findings.rows
    assert (row["status"], row["diverged_step"], row["test_accuracy"]) == ("diverged", 1, None)


def test_post_norm_at_depth_100_ends_with_a_result(data, tmp_path, here):  # case 27
    options = small(data, tmp_path, schemes="post", depths=100, max_steps=4)
    (row,) = resseq.ablate(**options).findings.rows
    assert row["status"] in ("finished", "stuck", "diverged")


def test_an_error_in_a_cell_is_its_row_and_it_is_tried_again(data, tmp_path, corpus, monkeypatch):
    import pickle

    (cell,) = cells_of(as_options(**small(data, tmp_path, schemes="pre", depths=1)))
    cell.folder.mkdir(parents=True)

    def fail(options, corpus):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("resseq.classification.train_with", fail)
        record = run_cell(cell, pickle.dumps(corpus))
    assert record["measured"]["status"] == "failed"
    assert record["measured"]["error"] == "RuntimeError: out of memory"
    assert read_record(cell) is None
    assert run_cell(cell, pickle.dumps(corpus))["measured"]["status"] in ("finished", "stuck")
    assert [each["event"] for each in attempts(tmp_path)[cell.name]] == ["start", "failed", "start", "finished"]


def test_a_cell_is_run_by_one_process_alone(data, tmp_path, corpus):  # case 41
    import pickle

    (cell,) = cells_of(as_options(**small(data, tmp_path, schemes="pre", depths=1)))
    with test_kill.in_use(cell.folder):
        assert run_cell(cell, pickle.dumps(corpus)) is None
    assert run_cell(cell, pickle.dumps(corpus)) is not None
    assert run_cell(cell, b"not looked at, as it is done") is not None
    assert starts(tmp_path) == 1


def test_a_sweep_whose_every_cell_failed_says_so_to_the_shell_and_a_torn_line_does_not_end_it(
    data, tmp_path, here, monkeypatch, capsys
):
    monkeypatch.setattr(Here, "deaths", 3)
    words = command(data, tmp_path, schemes="pre", depths=1)[3:]
    assert main(words) == 1
    with open(tmp_path / "commands.jsonl", "a") as file:
        file.write('{"command": "resseq abl')
    monkeypatch.setattr(Here, "deaths", 0)
    assert main(words) == 0


def test_what_a_command_takes_is_noted_while_a_cell_is_at_work(data, tmp_path, here, monkeypatch):
    noted = []
    monkeypatch.setattr(Here, "deaths", 2)  # no cell has ended by then
    monkeypatch.setattr(runner, "NOTE", 0)
    monkeypatch.setattr(runner._Sweep, "note_seconds", lambda sweep: noted.append(len(sweep.records)))
    resseq.ablate(**small(data, tmp_path, schemes="pre", depths=1))
    assert noted == [0, 0, 1, 1, 1], "and as it ends, and at the end"


@pytest.mark.parametrize(("times", "status"), [(2, "finished"), (3, "failed")])
def test_a_cell_may_kill_its_process_twice(data, tmp_path, here, monkeypatch, times, status):
    monkeypatch.setattr(Here, "deaths", times)
    options = small(data, tmp_path, schemes="pre", depths=1, num_train_epochs=12)
    (row,) = resseq.ablate(**options).findings.rows
    assert row["status"] == status
    events = [each["event"] for each in next(iter(attempts(tmp_path).values()), [])]
    assert events.count("died") == times
    if status == "failed":
        assert "its process died 3 times (a process in the pool was terminated" in row["error"]


def command(data, folder, **options):
    words = [sys.executable, "-m", "resseq", "ablate"]
    for name, value in small(data, folder, **options).items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


LONG = {"num_train_epochs": 6}


@pytest.fixture(scope="module")
def long(data, tmp_path_factory):
    """A longer grid that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engines.ENGINES, "local", Here)
        return resseq.ablate(**small(data, tmp_path_factory.mktemp("long"), **LONG))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def no_finished_cell_ran_again(folder):
    for events in attempts(folder).values():
        names = [each["event"] for each in events]
        assert "start" not in names[names.index("finished") :]
        assert names.count("finished") == 1


def children(pid):
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def checkpointed(folder):
    return list(folder.glob("cells/*/checkpoint-*"))


def test_a_worker_that_is_killed_is_replaced_and_its_cell_goes_on(data, tmp_path, long, here):  # case 40
    process = subprocess.Popen(command(data, tmp_path, schemes="pre", **LONG), stdout=subprocess.PIPE, text=True)
    until(lambda: checkpointed(tmp_path))
    cell = checkpointed(tmp_path)[0].parent.name
    os.kill(attempts(tmp_path)[cell][-1]["pid"], signal.SIGKILL)
    assert process.wait(60) == 0
    process.stdout.close()
    found = resseq.ablate(**small(data, tmp_path, schemes="pre", **LONG))
    assert numbers(found) == [row for row in numbers(long) if row["scheme"] == "pre"]
    events = attempts(tmp_path)[cell]
    assert [each["event"] for each in events] == ["start", "died", "start", "finished"]
    assert events[2]["step"] > 0, "it went on from its checkpoint"
    no_finished_cell_ran_again(tmp_path)


def kill_and_go_on(data, folder, long, kills):
    generator = random.Random(kills)
    for _ in range(kills):
        begun = starts(folder)
        process = subprocess.Popen(command(data, folder, **LONG), stdout=subprocess.DEVNULL)
        until(lambda: starts(folder) > begun or process.poll() is not None)  # noqa: B023
        time.sleep(generator.random() * 1.5)
        workers = children(process.pid)
        process.kill()
        process.wait()
        until(lambda: not [pid for pid in workers if os.path.exists(f"/proc/{pid}") and alive(pid)])  # noqa: B023
    assert numbers(resseq.ablate(**small(data, folder, **LONG))) == numbers(long)
    no_finished_cell_ran_again(folder)


def alive(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_command_that_is_killed_loses_nothing(data, tmp_path, long, here):
    kill_and_go_on(data, tmp_path, long, kills=1)
    assert starts(tmp_path) > 4, "the kill met a cell at work"


@pytest.mark.slow
def test_a_command_that_is_killed_ten_times_loses_nothing(data, tmp_path, long, here):
    kill_and_go_on(data, tmp_path, long, kills=10)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_command_that_is_stopped_goes_on_later(data, tmp_path, long, here, number, status):
    process = subprocess.Popen(
        command(data, tmp_path, **LONG),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: starts(tmp_path))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert "stopping: cells are saved; the same command goes on from here" in output
    assert error == ""
    assert numbers(resseq.ablate(**small(data, tmp_path, **LONG))) == numbers(long)
    no_finished_cell_ran_again(tmp_path)


@pytest.mark.slow
def test_two_commands_share_a_folder(data, tmp_path, whole):  # case 41
    both = [subprocess.Popen(command(data, tmp_path), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert starts(tmp_path) == 4, "each cell ran once"
    assert numbers(resseq.ablate(**small(data, tmp_path))) == numbers(whole)
    assert all("report.html" in each for each in lines)


@pytest.mark.slow
def test_from_a_script_without_a_guard(data, tmp_path, whole):
    (tmp_path / "script.py").write_text(
        f"import resseq\nprint(len(resseq.ablate(**{small(data, tmp_path / 'out', depths=1)!r}).frame))\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=paths())
    assert (done.stdout, done.stderr) == ("2\n", "")


def paths():
    root = os.path.dirname(os.path.dirname(resseq.__file__))
    return {**os.environ, "PYTHONPATH": root}


def test_the_command_prints_each_cell_and_the_table(data, whole, capsys):
    words = command(data, whole.folder)[3:]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert whole.table in printed
    assert whole.summary in printed
    assert str(whole.folder) in printed


def test_a_dry_run_trains_nothing(data, tmp_path, capsys):
    assert main([*command(data, tmp_path / "out")[3:], "--dry-run", "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "schemes: post pre\ndepths: 1 2\nseeds: 0\n" in printed
    assert "4 cells, 4 of them not done yet; with 2 at a time about 0.1 minutes" in printed
    assert printed.count(" parameters ") == 4
    from_python = resseq.ablate(**small(data, tmp_path / "out"), workers=2, dry_run=True)
    assert from_python.splitlines()[0] == "schemes: post pre"
    assert from_python.splitlines()[-1] in printed
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_the_parameters_of_each_shape(data, whole):
    text = plan(as_options(**small(data, whole.folder)))
    assert "4 cells, 0 of them not done yet" in text
    for row in whole.findings.rows:
        assert f"{row['parameters']:,} parameters" in text


def test_ray_is_asked_for_where_it_is_missing(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="--engine ray needs Ray; .* Type pip install ray"):
        resseq.ablate(**small(data, tmp_path), engine="ray")


@pytest.mark.slow
def test_ray_gives_the_same_numbers(data, tmp_path, whole):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert numbers(resseq.ablate(**small(data, tmp_path), engine="ray")) == numbers(whole)
    finally:
        ray.shutdown()
    assert starts(tmp_path) == 4


def test_inspection_does_not_make_another_cell_of_it():
    """What it writes beside a cell's numbers does not change them."""
    (plain,), (inspected,) = (cells_of(as_options(schemes="pre", depths=2, inspect_every=every)) for every in (None, 5))
    assert (plain.name, inspected.options.inspect_every) == (inspected.name, 5)


def test_the_start_is_that_of_the_first_step(data, corpus):
    """Admin has seen its first batch by then, and the clocks of those that fade in stand at 1."""
    cells = cells_of(as_options(data=data, **{**SMALL, "schemes": ("post", "admin", "prores"), "depths": (4,)}))
    post, admin, prores = (start.measure_start(cell.options, corpus) for cell in cells)
    assert admin["gradient_norm_last"] < 0.9 * post["gradient_norm_last"]
    assert prores["gradient_norm_first"] > 0


@pytest.mark.parametrize("scheme", ["hyper", "attnres", "denseformer", "dense", "resi_dual", "reversible"])
def test_the_start_is_measured_whatever_the_stream_is(scheme, data, corpus):
    (cell,) = cells_of(as_options(data=data, **{**SMALL, "schemes": (scheme,), "depths": (2,)}))
    measured = start.measure_start(cell.options, corpus)
    assert all(value is not None and value > 0 for value in measured.values()), measured


@pytest.mark.parametrize(
    ("losses", "end", "status"),
    [
        ([2.0, 1.9, 1.99], 1.99, "stuck"),
        ([2.0, 1.9, 1.7], 1.7, "finished"),  # slow, but it learns
        ([2.0, 0.9, 0.3], 0.3, "finished"),
        ([2.0, 0.9, 9.0, 0.5], 0.5, "unstable"),  # as a mean over its last steps shows nothing of
        ([2.0, 0.9, 1.99], 1.99, "unstable"),
        ([9.0, 1.5, 0.5], 0.5, "finished"),  # a bad start is none
    ],
)
def test_what_became_of_a_run(losses, end, status):
    assert judge(losses, end, chance=2.0) == status


def test_the_end_of_a_training_is_the_mean_of_its_last_tenth_by_steps():
    rows = [(10, 9.0, 0.0), (20, 3.0, 0.1), (30, 2.0, 0.5), (31, 1.0, 0.6)]
    assert last_tenth(rows, 31) == pytest.approx(((10 * 2.0 + 1.0) / 11, (10 * 0.5 + 0.6) / 11))
    assert last_tenth(rows[:1], 31) == (9.0, 0.0)


def test_a_cell_trains_for_300_steps_unless_it_is_told_otherwise(tmp_path):
    def steps(**given):
        (cell,) = cells_of(as_options(schemes="pre", depths=1, output_dir=str(tmp_path), **given))
        return cell.options.max_steps, cell.options.num_train_epochs

    assert steps() == (300, 8)
    assert steps(max_steps=7) == (7, 8)
    assert steps(num_train_epochs=2) == (None, 2)
    assert as_options(num_train_epochs=2).command == "resseq ablate --num-train-epochs 2"


def test_what_is_given_is_never_taken_for_a_default():
    given = {"schemes": ("post", "pre", "highway"), "depths": (2, 6, 12), "num_train_epochs": 2, "dropout": 0.1}
    options = as_options(task="image", **given)
    assert (options.schemes, options.depths, options.num_train_epochs) == (given["schemes"], given["depths"], (2,))
    words = "--schemes post pre highway --depths 2 6 12 --num-train-epochs 2 --dropout 0.1 --task image"
    assert options.command == f"resseq ablate {words}"
    usual = as_options(task="image")
    assert (usual.schemes, usual.depths, usual.model) == (("plain", "residual"), (20, 56), ("cifar-resnet",))
    assert as_options(task="image", model="resnet18").depths == (None,)  # its name says it


def test_chance_weighs_classes_as_training_does():
    tokens = Tokens(torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.int64), [0, 0, 0, 1], 0.0)
    options = TrainOptions(class_weights="balanced", label_smoothing_factor=0.0)
    assert chance_loss(tokens, 3, options) == pytest.approx(math.log(2))  # of the two classes that are there


def test_a_finished_grid_is_not_served_for_data_that_changed(tmp_path, data):
    file = tmp_path / "data.csv"
    file.write_text(Path(data).read_text())
    options = small(str(file), tmp_path / "out", schemes="pre", depths=1)
    resseq.ablate(**options)
    assert len(resseq.ablate(**options).findings.rows) == 1
    file.write_text(Path(data).read_text().replace("apple", "quince"))
    with pytest.raises(ValueError, match="all cells of a folder share their data; got another"):
        resseq.ablate(**options)
