"""The embedded set: six lines of Python's standard library; which package are they from?

Nothing is shipped or downloaded: the texts are the source files of the interpreter that runs. One text is one snippet, such as

    def close(self):
        if self._sock is not None:
            self._sock.close()
            self._sock = None
    def _read(self, size):
        return self._file.read(size)

that is, six lines in a row of one file with the blank lines left out. The files of a package are divided among the splits, so that no
file is in two of them, and a snippet that occurs more than once is kept once. Another Python version gives slightly other snippets.
"""

import sysconfig
from pathlib import Path

PACKAGES = (
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "http",
    "importlib",
    "json",
    "multiprocessing",
    "re",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)
LINES = 6
# The most snippets of one package in each split. The proportions also say how a package's files are divided.
LIMITS = {"train": 800, "validation": 100, "test": 100}


def read_pystdlib() -> dict[str, tuple[list[str], list[str]]]:
    """Read the snippets of each split, and the package that each is from.

    Raises: ValueError where the interpreter has no source files (an embedded or stripped Python).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    rows: dict[str, tuple[list[str], list[str]]] = {split: ([], []) for split in LIMITS}
    seen: set[str] = set()
    for package in PACKAGES:
        for split, texts in _divide(_snippets_by_file(folder / package)).items():
            fresh = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(fresh)
            kept = _thin(fresh, LIMITS[split])
            rows[split][0].extend(kept)
            rows[split][1].extend([package] * len(kept))
    return rows


def cut(source: str) -> list[str]:
    """Cut source code into snippets of six non-blank lines; what is left at the end is dropped.

    >>> cut("a\\nb\\n\\nc\\nd\\ne\\nf\\ng")
    ['a\\nb\\nc\\nd\\ne\\nf']
    """
    lines = [line.rstrip() for line in source.splitlines() if line.strip()]
    return ["\n".join(lines[start : start + LINES]) for start in range(0, len(lines) - LINES + 1, LINES)]


def _snippets_by_file(package: Path) -> list[list[str]]:
    paths = sorted(path for path in package.rglob("*.py") if "test" not in path.parts)  # some versions keep tests in the package
    if not paths:
        raise ValueError(f"pystdlib: the Python standard library must be there as source; got none in {package}. Give other data.")
    return [cut(path.read_text(encoding="utf-8")) for path in paths]


def _divide(files: list[list[str]]) -> dict[str, list[str]]:
    """Give each file, the largest first, to the split that is furthest below its share."""
    splits: dict[str, list[str]] = {split: [] for split in LIMITS}
    total = sum(map(len, files))
    for snippets in sorted(files, key=len, reverse=True):
        missing = {split: total * limit / sum(LIMITS.values()) - len(splits[split]) for split, limit in LIMITS.items()}
        splits[max(missing, key=missing.__getitem__)].extend(snippets)
    return splits


def _thin(texts: list[str], limit: int) -> list[str]:
    """Keep at most `limit` texts, evenly spaced."""
    count = min(len(texts), limit)
    return [texts[i * len(texts) // count] for i in range(count)]
