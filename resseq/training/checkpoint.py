"""What a run leaves on disk, written so that a crash never costs the last good state.

Every file goes through ``write``: to the disk under another name, then renamed. A folder of files that belong together
(a checkpoint, a finished run) has a manifest of their checksums, written last. Nothing is ever unpickled: weights are
safetensors, the state is tensors and plain values.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
FORMAT = 1  # of manifest.json
KEPT = 2  # checkpoints: one to fall back to


class Damaged(ValueError):
    """A file is missing, or is not as it was written."""

    def __init__(self, path: Path, got: str):
        super().__init__(
            f"Run: a file must be as it was written; got {path} {got}. Type the command that began the run once more, "
            f"with --resume auto, or fetch the run again."
        )


class InUse(ValueError):
    """Another process writes to a run folder."""

    def __init__(self, folder: Path):
        super().__init__(
            f"train: one process at a time may write to a run folder; got --output-dir {folder}, which is in use. "
            f"Wait until that run has ended, or use another --output-dir."
        )


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make the folder and be its only writer while the context lasts; the system frees it when the process dies.

    Raises: ValueError for a folder that cannot be written to; InUse.
    """
    path, made = folder / ".lock", not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"train: the run folder must be writable; got --output-dir {folder} ({error.strerror}). "
            f"Use another --output-dir."
        ) from error
    with file:
        try:
            # lockf, not flock: that one would live on in a loader's workers when this process is killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, PermissionError, FileNotFoundError):
            ours = False
        if not ours:
            raise InUse(folder)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # it holds something, as it should
                    folder.rmdir()


def sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of files, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader finds the old content or the new.

    Raises: OSError, in one line with the path, for a disk that is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"Run: the disk must take what a run leaves; got {path}: {error.strerror}. "
            f"Make room, then type the same command again (train: with --resume auto)."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    write(path, text.encode())


def save_weights(path: Path, weights: Weights) -> None:
    """Replace a safetensors file as a whole."""
    # a copy of each: a parameter that two residuals share would be refused
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    write(path, safetensors.torch.save(copies))


def load_weights(path: Path) -> Weights:
    """Read a safetensors file. Raises: Damaged for any other."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise Damaged(path, f"({str(error).splitlines()[0]})") from error


def restore(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a model. Raises: ValueError that names what another model's weights differ in."""
    weights, own = load_weights(path), model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        got, wanted = (list(tensors[name].shape) if name in tensors else "nothing" for tensors in (weights, own))
        if got != wanted:
            raise ValueError(
                f"Run: the weights must be those of the model; got {path} with {name} of {got}, where the model has "
                f"{wanted}. Use the folder of a run with the same options and data."
            )
    model.load_state_dict(weights)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint: tensors and plain values; nothing in it is executed. Raises: Damaged."""
    path = checkpoint / "state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes were: a pickle of code, no archive, …
        raise Damaged(path, f"({str(error).splitlines()[0]})") from error


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write manifest.json: the size and checksum of each of these files."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}
    write_text(folder / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=2))


def verify(folder: Path) -> None:
    """Compare a folder's files with its manifest.

    Raises: Damaged, naming the first that differs; ValueError for a manifest of another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format"]
        expected = [
            (folder / name, int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(path, "(no manifest of a run)" if path.exists() else "(missing)") from error
    if version != FORMAT:
        raise ValueError(
            f"Run: this version of resseq reads format {FORMAT}; got {path} of format {version!r}. "
            f"Use the version that wrote it, or another --output-dir."
        )
    for file, size, checksum in expected:
        if not file.is_file():
            raise Damaged(file, "(missing)")
        if file.stat().st_size != size:
            raise Damaged(file, f"({file.stat().st_size} bytes of {size})")
        if _sha256(file) != checksum:
            raise Damaged(file, "(another checksum)")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(folder: Path, step: int, weights: dict[str, Weights], state: dict[str, Any]) -> None:
    """Write checkpoint-STEP into the run folder and remove all older ones but the last.

    The checkpoint is written under another name and renamed when all of it is on the disk.
    """
    partial, final = folder / f".checkpoint-{step}.partial", folder / f"checkpoint-{step}"
    for stray in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(stray)
    try:
        partial.mkdir()
        for name, tensors in weights.items():
            save_weights(partial / f"{name}.safetensors", tensors)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(partial / "state.pt", buffer.getvalue())
        write_manifest(partial, sorted(path.name for path in partial.iterdir()))
        if final.exists():  # the same step again, by a run that went on from an older checkpoint
            shutil.rmtree(final)
        os.replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; of each newer one, a warning says what is wrong.

    Raises: ValueError if there are checkpoints and none is whole.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            verify(checkpoint)
            return checkpoint
        except Damaged as error:
            logging.getLogger("resseq").warning("passed over %s: %s", checkpoint.name, error)
    if found:
        raise ValueError(
            f"train: a checkpoint must be whole; got none in {folder}. Remove its checkpoints to start anew, or use "
            f"another --output-dir."
        )
    return None
