"""The embedded set: six lines of Python's standard library; which package are they from?

Nothing is shipped or downloaded: the texts are cut from the source files of the Python that runs. One text is one
snippet: six lines in a row of one file, blank lines left out, such as this one of the class "multiprocessing":

        threading.Thread.start(self)
    @property
    def exitcode(self):
        if self._start_called and not self.is_alive():
            return 0
        else:

No file is in two splits, and a snippet that occurs more than once is kept once. Each Python version has slightly other
snippets.
"""

import sysconfig
from pathlib import Path

# Those of twenty files or more. The files of a small package have few words in common, and a split by file then leaves
# nothing to learn from: of "json", "http" or "logging" a bag of words gets about half right.
PACKAGES = ("asyncio", "email", "encodings", "importlib", "multiprocessing", "xml")
LINES = 6
# The most snippets of one package in each split. The proportions also say how a package's files are divided.
LIMITS = {"train": 960, "validation": 120, "test": 120}


def read_pystdlib() -> dict[str, tuple[list[str], list[str]]]:
    """Read the snippets of each split, and the package that each of them is from.

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
    # Some versions keep a package's tests inside it.
    paths = sorted(path for path in package.rglob("*.py") if "test" not in path.parts)
    if not paths:
        raise ValueError(
            f"pystdlib: Python's standard library must be here as source; got no files in {package}. Give other data."
        )
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
