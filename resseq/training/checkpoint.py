"""What a run leaves on disk, written so that a crash never costs the last good state."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


def sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of files, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader finds the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def save_weights(path: Path, weights: Weights) -> None:
    """Replace a safetensors file as a whole."""
    partial = path.with_name(f".{path.name}.partial")
    # a copy of each: a parameter that two residuals share would be refused
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}, partial)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def load_weights(path: Path) -> Weights:
    return load_file(path)


def save_checkpoint(folder: Path, step: int, weights: dict[str, Weights], state: dict[str, Any]) -> None:
    """Write checkpoint-STEP into the run folder and remove the older ones.

    The checkpoint is written under another name and renamed when all of it is on the disk.
    """
    partial, final = folder / f".checkpoint-{step}.partial", folder / f"checkpoint-{step}"
    for stray in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(stray)
    partial.mkdir()
    for name, tensors in weights.items():
        save_weights(partial / f"{name}.safetensors", tensors)
    torch.save(state, partial / "state.pt")
    sync(partial / "state.pt")
    sync(partial)
    if final.exists():  # the same step again, by a run that went on from an older checkpoint
        shutil.rmtree(final)
    os.replace(partial, final)
    sync(folder)
    for old in checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint: tensors and plain values; nothing in it is executed."""
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
