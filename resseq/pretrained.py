"""What somebody published: a file, a folder, or a repository on the Hugging Face hub."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("model.safetensors", "pytorch_model.bin")
HUB = "hf://"  # before OWNER/NAME, where a name alone would be a folder


@contextmanager
def quiet_hub() -> Iterator[None]:
    """The hub's client logs each attempt that fails; here they go unsaid, and the caller says what came of them."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def find_file(source: str | Path, *names: str) -> Path | None:
    """The first of the named files that exists, in a local folder or else in a hub repository; None without any."""
    if Path(source).is_dir():
        return next((file for name in names if (file := Path(source) / name).is_file()), None)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    for name in names:
        # offline is the first of them too
        with suppress(EntryNotFoundError, HFValidationError, RepositoryNotFoundError), quiet_hub():
            return Path(hf_hub_download(str(source), name))
    return None


def find_weights(source: str | Path) -> Path:
    """The file of weights that ``source`` is, or holds, or names: an id on the hub, whose file is then fetched.

    Raises: ValueError where there is none.
    """
    file = Path(source) if Path(source).is_file() else find_file(source, *FILES)
    if file is None:
        raise ValueError(
            f"from_pretrained: the source is a file of weights, or a folder or an id on the hub with "
            f"{' or '.join(FILES)}; got {source}, where there is none. Name the file itself, or check the network."
        )
    return file


def read_weights(file: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, or of a torch file, of which nothing but tensors is read.

    Raises: ValueError for a file that is neither.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        return found.get("state_dict", found)  # training scripts save it beside their optimizer's
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError, AttributeError) as error:
        raise ValueError(
            f"from_pretrained: the file must hold tensors alone, in safetensors or torch's format; got {file} "
            f"({type(error).__name__}). Save model.state_dict()."
        ) from error


def read_config(source: str | Path) -> dict[str, Any]:
    """The config.json beside a file of weights, in a folder or on the hub; empty where there is none."""
    file = find_file(Path(source).parent if Path(source).is_file() else source, "config.json")
    return json.loads(file.read_text(encoding="utf-8")) if file else {}


def fetch_run(address: str) -> Path:
    """The folder on this machine with a finished run from the hub, hf://OWNER/NAME.

    Raises: ValueError where there is none.
    """
    repository = address.removeprefix(HUB)
    manifest = find_file(repository, "manifest.json")
    if manifest is None:
        raise ValueError(
            f"Run: {HUB}OWNER/NAME is a finished run on the hub; got {address}, where none is to be had. "
            f"Check the name and the network."
        )
    for name in (*json.loads(manifest.read_text(encoding="utf-8"))["files"], "result.json"):
        find_file(repository, name)
    return manifest.parent
