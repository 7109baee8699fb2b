"""A trained classifier for others: one file that runs without this package, or a repository on the hub."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from resseq.pretrained import HUB
from resseq.run import Run, RunFolder, evaluation_batches, held_out

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batch = dict[str, Tensor]

# files of the run folder itself: no checkpoints, no reports
PUBLISHED: dict[str, Any] = {
    "allow_patterns": ["*.json", "*.jsonl", "*.png", "model.safetensors", "README.md"],
    "ignore_patterns": ["*/*"],
}
FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
COMPARED = 64  # texts or images that the file is run on


def export(
    run: RunFolder,
    output: Annotated[
        str | os.PathLike[str] | None, arg(constructor=str, metavar="FILE", help_behavior_hint="(default: None)")
    ] = None,
    *,
    format: Literal["torch", "onnx"] | None = None,
) -> dict[str, Any]:
    """Write a trained classifier to one file, run the file on held-out texts or images, and compare.

    Inputs: ids (B, L) int64 and mask (B, L) bool, True = real token, or images (B, 3, H, W) of bytes; B and L are free.
    Output: logits (B, C). The run folder's tokenizer.json gives the ids, its image.json the images' height and width.

    Args:
        run: The run folder, or hf://OWNER/NAME.
        output: The file; RUN/model.pt2 or RUN/model.onnx unless given.
        format: torch (torch.export.load reads it) or onnx (needs the extra [onnx]); as the file's name ends, or torch.
    Returns: output, format, bytes, texts or images (how many were compared), largest_difference (of a logit).
    Raises: ValueError for a folder without a finished run; ImportError without the extra.
    """
    import torch

    loaded = Run.load(run, "cpu")
    longest = getattr(loaded.reader, "max_length", None)  # tokens; images have none
    if longest and longest < 3:  # two is what it is traced with
        raise ValueError(
            f"export: the length of a text must be free; got a run with --max-length {longest}. Train with 3 or more."
        )
    named = {".pt2": "torch", ".onnx": "onnx"}.get(Path(output or "").suffix)
    if format not in (None, *FILES) or named not in (None, format or named):
        where = f" with --output {output}" if output else ""
        raise ValueError(
            f"export: a format is torch (.pt2) or onnx (.onnx); got --format {format}{where}. Leave it out."
        )
    format = format or ("onnx" if named == "onnx" else "torch")
    file = Path(output or Path(str(run).removeprefix(HUB)) / FILES[format])
    if format == "onnx":
        _require_onnx()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.open("ab").close()  # whether it can be written is known before the work
    batches = _batches(loaded)
    try:
        _write(loaded.model, file, format, batches[-1], longest)
    finally:
        if not file.stat().st_size:  # nothing came of it
            file.unlink()
    run_file = _open(file, format)
    with torch.inference_mode():
        compared = [(run_file(*batch.values()), loaded.model(**batch)) for batch in batches]
    difference = max((found - expected).abs().max().item() for found, expected in compared)
    return {
        "output": str(file),
        "format": format,
        "bytes": file.stat().st_size,
        loaded.reader.inputs: sum(len(found) for found, _ in compared),
        "largest_difference": difference,
    }


def push_to_hub(
    run: RunFolder, repository: Annotated[str, arg(metavar="OWNER/NAME")], *, private: bool = False
) -> dict[str, str]:
    """Copy a finished run to the Hugging Face hub; ``hf://OWNER/NAME`` then stands for its folder.

    The run's README.md is the model card. The checkpoints stay here. config.json tells of the paths that the run had.

    Args:
        run: The run folder.
        repository: OWNER/NAME; made where it is not there. Log in first: hf auth login.
        private: Make it for you alone.
    Returns: run (the address, hf://OWNER/NAME), commit (a link).
    Raises: ValueError for a folder without a finished run, and where the hub refuses.
    """
    from huggingface_hub import HfApi

    folder = Run.load(run, "cpu").folder
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, **PUBLISHED)
    except Exception as error:  # no rights, no network, no such name: each library version has its own classes
        raise ValueError(
            f"push_to_hub: the hub must accept the upload; got {repository} ({type(error).__name__}). "
            f"Type hf auth login, and check the name and the network."
        ) from error
    return {"run": f"{HUB}{repository}", "commit": str(commit)}


def _batches(run: Run) -> list["Batch"]:
    """Batches of held-out inputs, or of made-up ones where the run's data is not to be had, the longest last."""
    try:
        inputs = held_out(run, None, "test")[1].inputs[:COMPARED]
    except (ValueError, OSError):
        inputs = run.reader.made_up()
    return list(evaluation_batches(run.reader.encode(inputs), 16))


def _require_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401 # pyright: ignore[reportMissingImports]
        import onnxscript  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"export: onnx needs packages of its own; got {error}. Type pip install onnx onnxruntime onnxscript."
        ) from error


def _write(model: "nn.Module", file: Path, format: str, batch: "Batch", longest: int | None) -> None:
    """Trace the model on one batch, with the number of rows free, and up to the longest the length of texts."""
    import torch
    import torch.nn.functional as F
    from torch.export import Dim

    # two rows and two tokens at least: what is 1 while tracing stays 1 for ever
    missing = max(0, 2 - next(iter(batch.values())).shape[1])
    example = tuple(F.pad(value, (0, missing)) if missing else value for value in batch.values())
    free: dict[int, Any] = {0: Dim("batch")} | ({1: Dim("length", min=2, max=longest)} if longest else {})
    program = torch.export.export(
        model,
        tuple(torch.cat([value, value]) for value in example),
        dynamic_shapes=tuple(free for _ in batch),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    if format == "torch":
        torch.export.save(program, file)
    else:
        named: Any = {"input_names": [*batch], "output_names": ["logits"]}
        named["dynamic_shapes"] = (free, *(None for _ in [*batch][1:]))  # the mask's sizes are those of the ids
        table: Any = {torch.ops.aten.sort.stable: _sort_in_onnx}
        torch.onnx.export(
            program,
            f=str(file),
            dynamo=True,
            external_data=False,
            verbose=False,
            custom_translation_table=table,
            **named,
        )


def _sort_in_onnx(x: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort for ONNX, which has TopK alone: of equal values it takes the earlier first."""
    from onnxscript import opset18  # pyright: ignore[reportMissingImports]

    op: Any = opset18
    return op.TopK(x, op.Shape(x, start=dim, end=None), axis=dim, largest=descending, sorted=True)


def _open(file: Path, format: str) -> "Callable[..., Tensor]":
    """The file as a function from a batch's entries to logits."""
    import torch

    if format == "torch":
        return torch.export.load(file).module()
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda *batch: torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in zip(names, batch, strict=True)})[0]
    )
