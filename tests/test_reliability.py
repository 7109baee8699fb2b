"""Faults and bad inputs, and the tests that show what becomes of them.

Checkpoint and run folder
    1 killed at random steps            test_kill: test_killed_three_times_and_resumed_bit_for_bit,
                                        test_killed_many_times_and_resumed_bit_for_bit
    2, 3 killed in a save               test_kill: test_killed_at_each_file_operation_of_a_save
    4 SIGTERM                           test_a_signal_saves_and_the_run_goes_on_exactly,
                                        test_a_second_signal_ends_at_once, test_sigterm_from_the_shell
    5 SIGINT in an evaluation           test_a_signal_in_validation_saves_too, test_ctrl_c_in_evaluate_and_predict
    6 disk full                         test_a_full_disk_is_one_line_and_costs_nothing, test_a_limit_on_file_sizes
    7 unwritable folder                 test_classification: test_an_unwritable_output_folder_is_refused_at_once
    8, 9, 10 cut, flipped, missing      test_damage_to_a_finished_run_is_named,
                                        test_damage_to_a_checkpoint_is_passed_over,
                                        test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one,
                                        test_a_damaged_result_is_written_anew, test_no_whole_checkpoint_is_refused
    11 stray temporary folder           test_a_stray_partial_folder_is_ignored_and_cleaned
    12 pickle                           test_a_pickle_is_refused_and_not_executed
    13 huge header                      test_a_header_that_claims_2_to_the_63_bytes
    14 format version                   test_an_unknown_format_is_refused
    15 another model, vocabulary, labels  test_other_weights_are_refused, test_other_data_is_refused
    16 another batch size               test_another_batch_size
    17 changed data                     test_other_data_is_refused, test_evaluate_notices_changed_data
    18 finished run                     test_a_finished_run_is_left_alone
    19 two processes                    test_two_processes_on_one_folder
    20 exception in serialising         test_training: test_a_checkpoint_appears_whole_or_not_at_all
    21 loader workers                   test_classification: test_the_order_does_not_depend_on_the_workers
                                        test_data: test_loader_workers_give_the_same_batches

Numbers
    22 gradient not finite              test_training: test_a_gradient_that_is_not_finite_stops_before_the_update
    24 metric NaN                       test_training: test_weights_that_are_nan_are_never_kept
    25 same seed                        test_training: test_the_same_seed_gives_the_same_log
    26 short last window                test_training: test_accumulation_equals_one_large_batch_also_in_a_short_window
                                        test_class_weights_are_scaled_over_a_window
                                        test_a_rare_class_does_not_take_over_the_smoothed_labels_of_others
    27 depth 100                        test_post_norm_at_depth_100_ends_with_a_result

Data
    28 NA, null, empty                  test_data: test_csv_texts_come_as_written
    29 label missing                    test_data: test_bad_file_is_refused, test_faults_in_many_rows_are_summed_up
    30 mixed labels                     test_data: test_labels_of_mixed_types_are_refused
    31 semicolons                       test_data: test_another_delimiter_is_recognised
    32 numbers as text                  test_data: test_jsonl_numbers_become_texts
    33 unreadable files                 test_data: test_bad_file_is_refused, test_bad_json_is_refused,
                                        test_missing_path_is_refused_without_asking_the_hub
    34 rewritten file                   test_data: test_rewritten_file_is_read_anew
    35 unseen label                     test_data: test_unknown_label_is_refused
    36 one class, one row, large batch  test_one_class_is_refused, test_a_batch_larger_than_the_data
                                        test_data: test_carving_needs_a_row_in_each_split
    37 awkward texts                    test_classification: test_predict_gives_a_row_for_each_line_in_order
    38 closed pipes                     test_classification: test_a_closed_output_pipe_is_no_error
                                        test_closed_standard_input_is_no_error
    39 sorted file, row limit           test_data: test_a_row_limit_draws_at_random

Elsewhere
    46 absent or unwritable tracker     test_a_tracker_that_fails_is_a_warning
    47 offline                          test_everything_local_works_offline
    48 fuzzed files                     test_fuzz: test_options, test_config, test_manifest, test_weights, test_tables
"""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
from pathlib import Path
from typing import ClassVar

import pytest
import test_kill
import torch
import torch.nn.functional as F

import resseq
from resseq.cli import main
from resseq.data.corpus import prepare
from resseq.data.text import TextOptions
from resseq.options import TrainOptions
from resseq.run import Run
from resseq.training import loop
from resseq.training.checkpoint import checkpoints, newest_checkpoint, save_checkpoint, verify, write_manifest
from resseq.training.loop import Stopped, Trainer

OPTIONS = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dropout": 0.1,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "save_steps": 5,
    "logging_steps": 4,
    "warmup_steps": 2,
    "max_length": 16,
    "vocab_size": 60,
    "device": "cpu",
}
ROWS = [
    f"{'so ' * (i % 7)}{word},{name}" for i in range(20) for word, name in (("apple", "x"), ("saw", "y"), ("sea", "z"))
]
STEPS = 12  # of 48 training rows


def write_rows(path: Path, rows=ROWS) -> str:
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "things.csv")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert resseq.train(data=data, output_dir=str(folder), **OPTIONS)["steps"] == STEPS
    return folder


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C as at a terminal: what runs in a shell's background is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def train(folder: Path, data: str, **options):
    return resseq.train(data=data, output_dir=str(folder), **{**OPTIONS, **options})


def flags(folder: Path, data: str, **options) -> list[str]:
    given = {"data": data, "output_dir": folder, **OPTIONS, **options}
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def same_run(ours: Path, theirs: Path) -> None:
    for name in ("model.safetensors", "metrics.jsonl", f"checkpoint-{STEPS}/model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def unfinish(run: Path) -> None:
    """As if the run had been killed after its last checkpoint."""
    for name in ("result.json", "manifest.json", "model.safetensors"):
        (run / name).unlink()


# Damage

DAMAGES = {
    "empty": lambda content: b"",
    "10 bytes": lambda content: content[:10],
    "half": lambda content: content[: len(content) // 2],
    "end": lambda content: content[:-5],
    "flip": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "missing": None,
}


def damage(path: Path, kind: str) -> None:
    change = DAMAGES[kind]
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(content))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_a_finished_run_is_named(run, name, kind):
    damage(run / name, kind)
    with pytest.raises(ValueError, match="^Run: ") as error:
        Run.load(run)
    if (name, kind) != ("manifest.json", "missing"):  # then it looks unfinished
        assert name in str(error.value) or name == "manifest.json"
        assert str(run) in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "kept.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_a_checkpoint_is_passed_over(run, name, kind, caplog):
    newest, before = reversed(checkpoints(run))
    damage(newest / name, kind)
    assert newest_checkpoint(run) == before
    assert str(newest) in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(run, finished, data, monkeypatch):
    unfinish(run)
    damage(run / f"checkpoint-{STEPS}" / "state.pt", "flip")
    began, step = [], Trainer.take_step
    monkeypatch.setattr(Trainer, "take_step", lambda self, window: (began.append(self.step), step(self, window)))
    train(run, data, resume="auto")
    assert began == [10, 11]
    same_run(run, finished)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "result.json", "manifest.json"])
def test_a_damaged_result_is_written_anew(run, finished, data, name):
    damage(run / name, "half")
    train(run, data, resume="auto")
    same_run(run, finished)
    Run.load(run)


def test_no_whole_checkpoint_is_refused(run, data):
    unfinish(run)
    for checkpoint in checkpoints(run):
        damage(checkpoint / "state.pt", "end")
    with pytest.raises(ValueError, match="a checkpoint must be whole; got none in .*Remove its checkpoints"):
        train(run, data, resume="auto")


def test_a_stray_partial_folder_is_ignored_and_cleaned(run):
    stray = run / ".checkpoint-99.partial"
    stray.mkdir()
    (stray / "model.safetensors").write_bytes(b"half")
    (run / "checkpoint-old").mkdir()  # not ours
    assert newest_checkpoint(run).name == f"checkpoint-{STEPS}"
    save_checkpoint(run, 20, {}, {})
    assert not stray.exists()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "kept.safetensors", "state.pt"])
def test_a_pickle_is_refused_and_not_executed(run, data, name, tmp_path):
    """Even where the manifest was made to fit."""
    unfinish(run)
    newest = newest_checkpoint(run)
    bomb = pickle.dumps(Touch(str(tmp_path / "executed")), protocol=2)
    (newest / name).write_bytes(bomb)
    write_manifest(newest, ["model.safetensors", "kept.safetensors", "state.pt"])
    with pytest.raises(ValueError, match=f"as it was written; got .*{name}"):
        train(run, data, resume="auto")
    torch.save(Touch(str(tmp_path / "executed")), newest / name)
    write_manifest(newest, ["model.safetensors", "kept.safetensors", "state.pt"])
    with pytest.raises(ValueError, match=f"as it was written; got .*{name}"):
        train(run, data, resume="auto")
    assert not (tmp_path / "executed").exists()


def test_a_header_that_claims_2_to_the_63_bytes(run):
    (run / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    write_manifest(run, ["model.safetensors", "config.json", "tokenizer.json"])
    tracemalloc.start()
    with pytest.raises(ValueError, match="model.safetensors"):
        Run.load(run)
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_an_unknown_format_is_refused(run, name):
    changed = json.loads((run / name).read_text()) | {"format": 99}
    (run / name).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"format \d.*; got .*format 99"):
        Run.load(run)


# What may not change


def test_other_weights_are_refused(run, data, tmp_path):
    train(tmp_path / "other", data, dim=32)
    unfinish(run)
    for checkpoint in checkpoints(run):
        shutil.rmtree(checkpoint)
    shutil.copytree(tmp_path / "other" / f"checkpoint-{STEPS}", run / f"checkpoint-{STEPS}")
    with pytest.raises(
        ValueError, match=r"must be those of the model; got .* of \[.*32.*\], where the model has \[.*16"
    ):
        train(run, data, resume="auto")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row.replace(",z", ",w") for row in ROWS], r"got classes=\['w', 'x', 'y'\] \(were \['x', 'y', 'z'\]\)"),
        ([row.replace("apple", "grape") for row in ROWS], "got another train, .*tokenizer than before"),
        ([*ROWS, "so,x"], "got another train, .* than before"),
    ],
)
def test_other_data_is_refused(run, data, rows, message):
    unfinish(run)
    original = Path(data).read_text()
    before = Path(data).stat()
    try:
        write_rows(Path(data), rows)
        os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(ValueError, match=f"train: a resumed run keeps its data; {message}"):
            train(run, data, resume="auto")
    finally:
        Path(data).write_text(original)


def test_evaluate_notices_changed_data(run):
    config = json.loads((run / "config.json").read_text())
    config["fingerprint"]["test"] = "0"
    (run / "config.json").write_text(json.dumps(config))
    write_manifest(run, ["model.safetensors", "config.json", "tokenizer.json"])
    with pytest.raises(ValueError, match="own data must be as it was in training; got another test in"):
        resseq.evaluate(str(run))


def test_another_batch_size(run, data):
    unfinish(run)
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    message = r"got per_device_train_batch_size=4 \(was 8\), gradient.*=2 \(was 1\)\. .*or --resume resized"
    with pytest.raises(ValueError, match=message):
        train(run, data, resume="auto", **sizes)
    with pytest.raises(ValueError, match=r"_size=16 \(was 8\)\. Give the earlier values, or another"):
        train(run, data, resume="resized", per_device_train_batch_size=16)  # its steps would be other steps
    with pytest.raises(ValueError, match=r"got dim=32 \(was 16\)\. Give the earlier values, or another"):
        train(run, data, resume="resized", dim=32)
    assert train(run, data, resume="resized", **sizes)["steps"] == STEPS


def test_a_finished_run_is_left_alone(run, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert main(flags(run, data, resume="auto")) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_finished_run_is_not_served_for_data_that_changed(tmp_path):
    data = write_rows(tmp_path / "things.csv")
    resseq.train(data=data, output_dir=tmp_path / "run", **OPTIONS | {"max_steps": 1})
    assert train(tmp_path / "run", data, resume="auto", max_steps=1)["steps"] == 1
    Path(data).write_text(Path(data).read_text().replace("apple", "quince"))
    with pytest.raises(ValueError, match="its own data must be as it was in training; got another"):
        train(tmp_path / "run", data, resume="auto", max_steps=1)


def test_two_processes_on_one_folder(run, data):
    with (
        test_kill.in_use(run),
        pytest.raises(ValueError, match="one process at a time may write to a run folder; got --output-dir"),
    ):
        train(run, data, resume="auto")
    train(run, data, resume="auto")  # the system let the folder go


# The disk


def test_a_full_disk_is_one_line_and_costs_nothing(data, finished, tmp_path, monkeypatch, capsys):
    write = Path.write_bytes
    run = tmp_path / "run"

    def full(path, content):
        if "checkpoint-10.partial/.state" in str(path):
            write(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(flags(run, data)) == 1
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert re.fullmatch(r"resseq: Run: the disk must take .*; got .*state.pt: No space left .*\n", error)
    assert not list(run.glob(".*"))
    verify(newest_checkpoint(run))
    train(run, data, resume="auto")
    same_run(run, finished)


def test_a_limit_on_file_sizes(data, tmp_path):
    import resource

    done = subprocess.run(
        [sys.executable, "-m", "resseq", *flags(tmp_path / "run", data, dim=64)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert not list((tmp_path / "run").glob(".*"))


# Signals


def send(monkeypatch, target, name: str, *numbers: int, at: int) -> None:
    """Have the n-th call of a function begin with signals to this process."""
    function, calls = getattr(target, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(target, name, signalled)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_exactly(data, finished, tmp_path, monkeypatch, capsys, number, status):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    send(monkeypatch, Trainer, "take_step", number, at=8)
    assert main(flags(tmp_path / "run", data)) == status
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert error == (
        f"resseq: train: {signal.Signals(number).name} at step 8 of 12; saved in {tmp_path / 'run'}. "
        f"Use the same command with --resume auto to go on.\n"
    )
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-8"
    assert main(flags(tmp_path / "run", data, resume="auto")) == 0
    same_run(tmp_path / "run", finished)


def test_a_signal_in_validation_saves_too(data, finished, tmp_path, monkeypatch):
    send(monkeypatch, loop, "measure", signal.SIGINT, at=1)
    with pytest.raises(Stopped) as stopped:
        train(tmp_path / "run", data)
    assert stopped.value.signal == signal.SIGINT
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-6"
    train(tmp_path / "run", data, resume="auto")
    same_run(tmp_path / "run", finished)


def test_a_second_signal_ends_at_once(data, tmp_path, monkeypatch):
    send(monkeypatch, Trainer, "take_step", signal.SIGTERM, signal.SIGINT, at=8)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(tmp_path / "run", data)
    assert not isinstance(stopped.value, Stopped)
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-6", "nothing was saved any more"


def test_sigterm_from_the_shell(data, tmp_path):
    command = [sys.executable, "-m", "resseq", *flags(tmp_path / "run", data, num_train_epochs=10**4)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not checkpoints(tmp_path / "run"):
            assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 143
        assert re.fullmatch("resseq: train: SIGTERM at step .*--resume auto to go on.\n", process.stderr.read())


def test_training_in_a_thread_listens_to_no_signal(data, finished, tmp_path):
    failed = []

    def work():
        try:
            train(tmp_path / "run", data)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    same_run(tmp_path / "run", finished)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with loop.caught_signals() as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert caught == []
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("verb", [["evaluate"], ["predict"]])
def test_ctrl_c_in_evaluate_and_predict(run, verb, tmp_path, monkeypatch, capsys):
    from resseq.training import metrics

    (tmp_path / "texts").write_text("a saw\n")
    send(monkeypatch, metrics, "logits_of", signal.SIGINT, at=1)
    assert main([*verb, str(run), *([str(tmp_path / "texts")] if verb == ["predict"] else [])]) == 130
    assert capsys.readouterr().err == ""


# Numbers


def test_class_weights_are_scaled_over_a_window(tmp_path):
    """The step of a window is that on Σ w·loss / n of all its n examples, whose gradient may be up to Σ w / n."""
    import test_training

    tokens = test_training.tokens()
    items = [tokens[i] for i in range(7)]
    weights = torch.tensor([3.0, 1.0, 0.25])
    windowed, whole = (test_training.trainer(tmp_path / name, p=0.0, optim="sgd") for name in "ab")
    windowed.class_weights = weights
    windowed.take_step([test_training.collate(part) for part in (items[:2], items[2:6], items[6:])])
    batch = test_training.collate(items)
    labels = batch.pop("labels")
    losses = F.cross_entropy(whole.model(**batch), labels, reduction="none", label_smoothing=0.1)
    (losses @ weights[labels] / 7).backward()
    norm = torch.nn.utils.clip_grad_norm_(whole.model.parameters(), weights[labels].sum().item() / 7)
    assert norm > weights[labels].sum() / 7, "it was cut"
    for parameter, before in zip(windowed.model.parameters(), whole.model.parameters(), strict=True):
        decayed = before * (1 - 5e-4 * 0.1 * (before.ndim > 1))
        torch.testing.assert_close(parameter, decayed - 5e-4 * before.grad, rtol=1e-5, atol=1e-7)


def test_a_rare_class_does_not_take_over_the_smoothed_labels_of_others(tmp_path):
    """Smoothing gives a class of weight 100 a thirtieth of a common example's label, not most of it."""
    import test_training

    trainer = test_training.trainer(tmp_path, p=0.0, optim="sgd", learning_rate=0.1, warmup_steps=0)
    trainer.class_weights = torch.tensor([1.0, 1.0, 100.0])
    batch = test_training.collate([test_training.tokens()[0]]) | {"labels": torch.tensor([0])}
    for _ in range(50):
        trainer.take_step([batch])
    assert trainer.model(batch["ids"], batch["mask"]).argmax() == 0


def test_a_class_that_training_lacks_has_no_weight():
    corpus = prepare(TextOptions(data="listops:rows=100", max_train_samples=9))
    labels = corpus.splits["train"].labels
    weights = corpus.class_weights(TrainOptions(class_weights="balanced"))
    assert corpus.class_weights(TrainOptions()) is None
    assert len(corpus.classes) > len(labels.unique()) == (weights > 0).sum()
    assert weights[labels].mean() == pytest.approx(1)
    assert weights[labels].sum() / len(labels.unique()) == pytest.approx(
        (weights * labels.bincount(minlength=10)).max()
    )


def test_a_class_that_most_batches_lack_is_learnt_if_classes_count_the_same(tmp_path):
    """Seven in ten of one class have a token that two in ten of the other, a hundred times as frequent, have too."""
    import test_training

    ids = torch.tensor([1] * 200 + [2] * 800 + [1] * 7 + [2] * 3)
    labels = torch.tensor([0] * 1000 + [1] * 10)
    trainer = test_training.trainer(tmp_path, p=0.0, learning_rate=1e-2, warmup_steps=0, max_steps=300)
    trainer.class_weights = 1010 / (2 * torch.tensor([1000.0, 10.0, 1.0]))
    order = torch.Generator().manual_seed(0)
    for _ in range(10):
        for rows in torch.randperm(1010, generator=order).split(32):
            batch = {"ids": ids[rows, None], "mask": torch.ones(len(rows), 1, dtype=torch.bool)}
            trainer.take_step([batch | {"labels": labels[rows]}])
            trainer.step += 1
    answers = trainer.model(torch.tensor([[1], [2]]), torch.ones(2, 1, dtype=torch.bool))
    assert answers.argmax(1).tolist() == [1, 0]


def test_balanced_class_weights_make_classes_count_the_same(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "train", lambda self: seen.append(self.class_weights) or 1 / 0)
    rows = [row for row in ROWS if not row.endswith("z")] + [row for row in ROWS if row.endswith("z")][:5]
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", write_rows(tmp_path / "rare.csv", rows), class_weights="balanced")
    weights = seen[0]
    assert weights[2] > 2 * weights[0]
    counts = torch.tensor([16.0, 16.0, 4.0])  # about: the splits are drawn
    assert (weights * counts).sum() / 36 == pytest.approx(1, abs=0.3)


def test_post_norm_at_depth_100_ends_with_a_result(data, tmp_path):
    result = train(tmp_path / "run", data, depth=100, scheme="post", max_steps=3, learning_rate=0.1)
    assert 0 <= result["test"]["accuracy"] <= 1


# Data and texts


def test_one_class_is_refused(tmp_path):
    rows = [f"text {i},x" for i in range(30)]
    with pytest.raises(ValueError, match=r"there must be two classes to tell apart; got classes=\['x'\] in"):
        train(tmp_path / "run", write_rows(tmp_path / "one.csv", rows))


def test_a_batch_larger_than_the_data(data, tmp_path):
    result = train(tmp_path / "run", data, per_device_train_batch_size=1000, gradient_accumulation_steps=3)
    assert result["steps"] == 2


def test_texts_that_are_cut_are_reported(data, tmp_path, capsys):
    assert main(flags(tmp_path / "run", data, max_length=4, num_train_epochs=1)) == 0
    line = r"^\d+\.\d% of the training texts are longer than 4 tokens, and cut there$"
    assert re.search(line, capsys.readouterr().out, re.M)


def test_evaluate_prints_json_and_a_table(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr()
    measured = json.loads(printed.out)
    assert printed.err.splitlines()[0].split() == ["class", "precision", "recall", "F1", "rows"]
    for line, (name, row) in zip(printed.err.splitlines()[1:], measured["classes"].items(), strict=True):
        assert line.split() == [name, *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")), str(row["rows"])]


def test_predict_streams_and_keeps_the_order(run, tmp_path):
    texts = [f"{'so ' * (i % 5)}{('apple', 'saw', 'sea')[i % 3]}" for i in range(20_000)]
    (tmp_path / "texts").write_text("\n".join(texts))
    few = [row["label"] for row in resseq.predict(str(run), texts[:30])]
    drawn = []

    def draw():
        for text in texts:
            drawn.append(text)
            yield text

    rows = resseq.predict(str(run), draw())
    next(rows)
    assert len(drawn) <= 1000, "texts are taken as they are needed"
    tracemalloc.start()
    for i, row in enumerate(resseq.predict(str(run), str(tmp_path / "texts"))):
        if i < 30:
            assert row["label"] == few[i]
        if i == 5000:
            half = tracemalloc.get_traced_memory()[0]
    assert i == len(texts) - 1
    assert tracemalloc.get_traced_memory()[0] < half + 10**6
    tracemalloc.stop()


def test_predict_reads_a_file_in_blocks(run, tmp_path, monkeypatch):
    from resseq import classification

    texts = [f"{'so ' * (i % 5)}{('apple', 'saw', 'sea')[i % 3]}" for i in range(500)]
    (tmp_path / "texts").write_text("\n".join(texts))
    whole = [row["label"] for row in resseq.predict(str(run), str(tmp_path / "texts"))]
    monkeypatch.setattr(classification, "BLOCK", 1000)
    blocks = [len(block) for block in classification._blocks(str(tmp_path / "texts"))]
    assert len(blocks) > 5
    assert max(blocks) < 500
    assert [row["label"] for row in resseq.predict(str(run), str(tmp_path / "texts"))] == whole


def test_closed_standard_input_is_no_error(run):
    line = f"{sys.executable} -m resseq predict {run} - <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_everything_local_works_offline(data, tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    train(tmp_path / "run", data)
    resseq.evaluate(str(tmp_path / "run"))
    assert list(resseq.predict(str(tmp_path / "run"), ["a saw"]))


def test_the_table_names_tests_that_exist():
    module, named = "test_reliability", 0
    for word in re.findall(r"\btest_\w+:?", __doc__):
        if word.endswith(":"):
            module = word[:-1]
            continue
        files = [Path(__file__).with_name(f"{name}.py").read_text() for name in {module, "test_reliability"}]
        assert any(f"def {word}(" in text for text in files), word
        named += 1
    assert named > 50


class Board:
    """What stands in for TensorBoard's writer, and for what may be wrong with it."""

    rows: ClassVar = []

    def __init__(self, folder, fault):
        self.fault = fault
        if fault == "unwritable":
            raise PermissionError(13, "Permission denied", folder)

    def add_scalar(self, name, value, step):
        if self.fault == "full" and len(self.rows) == 3:
            raise OSError(28, "No space left on device")
        self.rows.append((step, name, value))

    def flush(self):
        pass


@pytest.mark.parametrize("fault", [None, "absent", "unwritable", "full"])
def test_a_tracker_that_fails_is_a_warning(data, finished, tmp_path, monkeypatch, recwarn, fault):  # case 46
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder, purge_step: Board(folder, fault)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None if fault == "absent" else module)
    monkeypatch.setattr(Board, "rows", [])
    train(tmp_path / "run", data, report_to="tensorboard")
    told = [str(warning.message) for warning in recwarn if "report-to" in str(warning.message)]
    assert len(told) == (fault is not None)
    assert all("training goes on" in message for message in told)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    names = {name for _, name, _ in Board.rows}
    assert ({"loss", "validation_accuracy", "learning_rate"} <= names) == (fault is None)
    assert len(Board.rows) == {"absent": 0, "unwritable": 0, "full": 3}.get(fault, len(Board.rows))
