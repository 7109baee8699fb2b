"""What all pictures have in common: ink, axes, and how a picture becomes a file."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#222222"


def literal(name: str) -> str:
    """A name as a picture shows it: a pair of dollars in it would be read as a formula."""
    return name.replace("$", r"\$")


def clean(axes: "Axes") -> None:
    """Take away the frame's upper and right side, and draw faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def save(figure: "Figure", path: Path) -> None:
    """Write a picture as its suffix says; the same picture is the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.stem}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be in any script: a box stands for them
        figure.savefig(path, dpi=160, metadata={"Date": None})
