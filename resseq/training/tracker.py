"""Measurements for somebody else's board, beside metrics.jsonl: a luxury that no training may fail for."""

import warnings
from pathlib import Path
from typing import Any


class Tracker:
    """TensorBoard's event files in a run folder.

    An absent package, a folder that cannot be written, a full disk: each is one warning, and from there on nothing is
    written. Of a run that goes on from a step, what an earlier process wrote beyond that step no longer counts.
    """

    def __init__(self, folder: Path, step: int):
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        except Exception as error:  # whatever it is, training goes on
            self._give_up(error)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """The numbers of a row of metrics.jsonl, each under its name."""
        if self.writer is None:
            return
        try:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(name, value, step)
            self.writer.flush()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.writer = None
        warnings.warn(
            f"train: --report-to tensorboard writes nothing ({type(error).__name__}: {error}); training goes on. "
            f"If the package is not there: pip install tensorboard.",
            stacklevel=2,
        )
