"""A report as one page: pictures inside, nothing to load."""

import html
from pathlib import Path
from typing import Any

Block = tuple[str, Any]  # what it is ("title", "heading", "text", "table", "picture", "code") and what it holds
TAGS = {"title": "h1", "heading": "h2", "text": "p", "code": "pre"}
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { line-height: 1.2; }
figure, .wide { margin: 1rem 0; overflow-x: auto; }
svg { max-width: 100%; min-width: 34rem; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
pre { background: #f4f4f4; padding: 1rem; white-space: pre-wrap; }
"""


def page(blocks: list[Block], folder: Path) -> str:
    """The blocks as HTML, the first of them the title; a picture is the name of an SVG in the folder, and a caption."""
    parts = []
    for kind, content in blocks:
        if kind == "table":
            parts.append(f'<div class="wide"><table>{_rows(content)}</table></div>')
        elif kind == "picture":
            drawing = (folder / f"{content[0]}.svg").read_text(encoding="utf-8")
            drawing = drawing[drawing.index("<svg") :]  # without the XML declaration, which has no place inside a page
            parts.append(f'<figure role="img" aria-label="{html.escape(content[1])}">{drawing}</figure>')
        else:
            parts.append(f"<{TAGS[kind]}>{html.escape(content)}</{TAGS[kind]}>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(blocks[0][1])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def shown(value: Any) -> str:
    """A value in a table; nothing for None and for NaN."""
    if value is None or value != value:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.4g}"  # 12346, such as seconds, not 1.235e+04


def _rows(rows: list[list[str]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        lines.append(f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>")
    return "\n".join(lines)
