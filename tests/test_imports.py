"""Imports point one way, and the heavy ones stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resseq

PACKAGE = Path(resseq.__file__).parent
# what each part imports, and may: none but itself and those above it
MAY_IMPORT = {
    "drawing": set(),
    "page": set(),
    "packing": set(),
    "pretrained": set(),
    "products": set(),
    "reversible": set(),
    "merges": {"products"},
    "factors": {"merges"},
    "connections": {"factors", "merges"},
    "streams": {"connections", "merges"},
    "schemes": {"connections", "factors", "merges", "schemes", "streams"},
    "residual": {"connections"},
    "stack": {"connections", "residual", "reversible", "schemes"},
    "layers": {"layers", "products"},
    "transformer": {"layers", "packing", "products", "schemes", "stack"},
    "models": {"layers", "merges", "models", "pretrained", "residual", "schemes", "stack", "transformer"},
    "data": {"data", "pretrained"},
    "diagnostics": {"connections", "diagnostics", "drawing", "merges", "page", "residual", "stack"},
    "training": {"diagnostics", "drawing", "stack", "training"},
    "options": {"data", "training"},
    "run": {"data", "models", "options", "pretrained", "training"},
    "card": {"options", "training"},
    "classification": {"card", "data", "models", "options", "run", "training"},
    "publication": {"data", "pretrained", "run"},
    "inspection": {"diagnostics", "models", "options", "pretrained", "run", "training"},
    "ablation": {
        "ablation",
        "card",
        "classification",
        "data",
        "diagnostics",
        "drawing",
        "models",
        "options",
        "page",
        "residual",
        "run",
        "stack",
        "training",
    },
    "cli": {"ablation", "card", "classification", "inspection", "options", "publication", "run"},
    "__main__": {"cli"},
}
ONLY_IN = {name: {"data"} for name in ("datasets", "tokenizers", "pyarrow")} | {"pandas": {"ablation", "diagnostics"}}


def imports(source: str) -> set[str]:
    """Every module that a file imports, inside functions too, but not for the type checker alone."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "resseq":
                found.update(f"resseq.{alias.name}" for alias in node.names)
            else:
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def faults(path: str, source: str) -> list[str]:
    """What a file at this path inside the package may not import, but does."""
    part = path.split("/")[0].removesuffix(".py")
    wrong = []
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "resseq" and rest and rest[0] not in MAY_IMPORT[part]:
            wrong.append(name)
        if part not in ONLY_IN.get(top, {part}):
            wrong.append(name)
        if part == "models" and rest[:1] == ["models"] and path != "models/__init__.py":
            wrong.append(name)  # models never import each other
    return wrong


FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_what_a_part_may_import_stands_above_it():
    parts = list(MAY_IMPORT)
    for i, (part, may) in enumerate(MAY_IMPORT.items()):
        assert may <= {part, *parts[:i]}, part


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path):
    assert faults(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("merges.py", "from resseq.residual import Stack", ["resseq.residual"]),
        ("layers/attention.py", "def f():\n    from resseq import merges", ["resseq.merges"]),
        ("training/loop.py", "import datasets", ["datasets"]),
        ("models/bert.py", "from resseq.models.text_convnet import TextConvNet", ["resseq.models.text_convnet"]),
        ("stack.py", "from resseq.schemes import SCHEMES", []),
        ("residual.py", "from resseq.schemes import SCHEMES", ["resseq.schemes"]),
        ("diagnostics/report.py", "import pandas, datasets", ["datasets"]),
        ("diagnostics/lesion.py", "from resseq.models import MODELS", ["resseq.models"]),
    ],
)
def test_a_turned_arrow_is_found(path, source, wrong):
    assert faults(path, source) == wrong


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("statement", ["import resseq", "import resseq.cli", "import resseq; dir(resseq)"])
def test_torch_is_imported_only_to_work(statement):
    assert not imported_by(statement) & {"torch", "datasets", "tokenizers", "matplotlib", "numpy"}


def test_the_library_works_without_the_data_libraries():
    loaded = imported_by("import resseq; resseq.TextTransformer, resseq.TextConvNet, resseq.Bert, resseq.Stack")
    assert "torch" in loaded
    assert not loaded & {"datasets", "tokenizers", "safetensors", "huggingface_hub", "matplotlib", "pandas"}


def test_public_names():
    assert set(resseq.__all__) == set(resseq._HOME) <= set(dir(resseq))
    for name in resseq.__all__:
        assert name == "SCHEMES" or getattr(resseq, name).__module__.startswith("resseq.")
    with pytest.raises(AttributeError, match="module 'resseq' has no attribute 'Resdual'"):
        _ = resseq.Resdual
