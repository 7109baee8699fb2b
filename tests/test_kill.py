"""Runs that are killed at any moment, and go on as if they had not been.

The processes are forked from one that has imported everything, so that a kill costs no start.
"""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import resseq
from resseq.training.checkpoint import checkpoints, claim, load_state, newest_checkpoint, save_checkpoint, verify

KILLS = 200  # of the long test
SAVE_STEPS = 4
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["resseq.classification", "resseq.data.corpus", "resseq.training.loop", "datasets"])
OPTIONS = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dropout": 0.2,
    "drop_path": 0.3,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "eval_steps": 10,
    "save_steps": SAVE_STEPS,
    "logging_steps": 3,
    "max_length": 16,
    "vocab_size": 60,
    "device": "cpu",
    "resume": "auto",
}
STEPS = 36


def work(folder: Path, data: str, workers: int, die: int | None, notes: Path) -> None:
    """Train; note each step; die at a file operation if a number is given."""
    from resseq.training.loop import Trainer

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # a loader's workers then end with this process
    step = Trainer.take_step

    def noted(self, window):
        with open(notes, "a") as file:
            file.write(f"{self.step}\n")
        step(self, window)

    Trainer.take_step = noted
    if die is not None:
        die_at_file_operation(die)
    resseq.train(data=data, output_dir=str(folder), dataloader_num_workers=workers, **OPTIONS)


def die_at_file_operation(number: int) -> None:
    """End this process, as a kill would, before its n-th change of the disk; in the middle of it, if it is a write."""
    left = [number]

    def count() -> bool:
        left[0] -= 1
        return left[0] < 0

    def dying(operation):
        def act(*args, **kwargs):
            if count():
                os._exit(9)
            return operation(*args, **kwargs)

        return act

    write_bytes = Path.write_bytes

    def dying_write(path, content):
        if count():
            write_bytes(path, content[: len(content) // 2])
            os._exit(9)
        return write_bytes(path, content)

    Path.write_bytes = dying_write
    for name in ("fsync", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, dying(getattr(os, name)))


def finish(process) -> int:
    process.join(120)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def start(*arguments):
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def hold(folder: Path, ready) -> None:
    with claim(folder):
        ready.set()
        threading.Event().wait()


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Another process has the run folder, until it is killed."""
    ready = FORK.Event()
    other = FORK.Process(target=hold, args=(folder, ready))
    other.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        other.kill()
        other.join()


def steps_in(notes: Path) -> list[int]:
    return [int(line) for line in notes.read_text().split()] if notes.exists() else []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "things.csv"
    words = {"fruit": ["apple", "pear"], "tool": ["hammer", "saw"]}
    rows = [f"{'so ' * (i % 7)}{words[name][i % 2]},{name}" for i in range(60) for name in words]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder / "run", data, 0, None, folder / "notes")) == 0
    assert steps_in(folder / "notes") == list(range(STEPS))
    return folder / "run"


def same(run: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "model.safetensors", "tokenizer.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = checkpoints(run)[-1], checkpoints(whole)[-1]
    assert ours.name == theirs.name
    for name in ("model.safetensors", "kept.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    ours, theirs = load_state(ours), load_state(theirs)
    assert torch.equal(ours["rng"], theirs["rng"])
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for key, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(value, ours["optimizer"]["state"][key][name]) for name, value in state.items())


def kill_at_step(folder: Path, data: str, workers: int, notes: Path, rng: random.Random) -> None:
    """SIGKILL from outside, some while after a random later step has begun."""
    before = len(steps_in(notes))
    process = start(folder, data, workers, None, notes)
    ahead = rng.randint(SAVE_STEPS + 1, 12)
    while process.is_alive() and len(steps_in(notes)) < before + ahead:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.02))
    process.kill()
    assert finish(process) in (-signal.SIGKILL, 0)


def killed_and_resumed(folder: Path, data: str, workers: int, kills: int, rng: random.Random) -> None:
    run, notes = folder / "run", folder / "notes"
    resumed = 0
    for kill in range(kills):
        seen = len(steps_in(notes))
        if kill == 0 or rng.random() < 0.6:
            kill_at_step(run, data, workers, notes, rng)
        else:
            finish(start(run, data, workers, rng.randint(20, 120), notes))
        resumed += check_resume(steps_in(notes), seen)
    seen = len(steps_in(notes))
    assert finish(start(run, data, workers, None, notes)) == 0
    resumed += check_resume(steps_in(notes), seen)
    assert resumed > 0
    assert not list(run.glob(".*")), "nothing partial is left"


def check_resume(steps: list[int], seen: int) -> int:
    """1 if, after this many steps, the run went on from a step > 0; it recomputes one save interval at most."""
    if not 0 < seen < len(steps):
        return 0
    assert steps[seen - 1] + 1 - steps[seen] <= SAVE_STEPS, steps
    return int(steps[seen] > 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_three_times_and_resumed_bit_for_bit(data, whole, tmp_path, workers):
    killed_and_resumed(tmp_path, data, workers, 3 if workers == 0 else 1, random.Random(workers))
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS // 4))
def test_killed_many_times_and_resumed_bit_for_bit(data, whole, tmp_path, seed):
    killed_and_resumed(tmp_path, data, 2 if seed % 5 == 0 else 0, 4, random.Random(1000 + seed))
    same(tmp_path / "run", whole)


def save_four(folder: Path, die: int) -> None:
    torch.set_num_threads(1)
    for step in (1, 2, 3):
        save_checkpoint(folder, step, {"model": {"w": torch.full((3,), float(step))}}, {"step": step})
    die_at_file_operation(die)
    save_checkpoint(folder, 4, {"model": {"w": torch.full((3,), 4.0)}}, {"step": 4})
    os._exit(7)


def test_killed_at_each_file_operation_of_a_save(tmp_path):
    newest = []
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = FORK.Process(target=save_four, args=(folder, number))
        process.start()
        status = finish(process)
        found = newest_checkpoint(folder)
        assert load_state(found)["step"] == int(found.name.split("-")[1])
        newest.append(load_state(found)["step"])
        kept = [path for path in checkpoints(folder) if path.name != "checkpoint-2"]  # the one that was to go
        for path in kept:
            verify(path)
        assert len(kept) >= 1 if status == 9 else len(checkpoints(folder)) == 2
        save_checkpoint(folder, 5, {"model": {"w": torch.zeros(3)}}, {"step": 5})
        assert not list(folder.glob(".*")), "what was left in the middle is cleaned"
        if status == 7:
            break
    assert number > 10
    assert newest == sorted(newest)
    assert {3, 4} == set(newest)
