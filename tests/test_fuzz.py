"""Whatever the bytes: an error that says what is wrong, or a result, and nothing else."""

import json
import shutil
import struct
from typing import get_args, get_type_hints

import pytest
import test_reliability
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import resseq
from resseq.data.text import TextOptions, load_text
from resseq.models import check_model
from resseq.options import TrainOptions
from resseq.run import Run
from resseq.training.checkpoint import load_weights, verify, write_manifest

EXAMPLES = 300
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
data = test_reliability.data
finished = test_reliability.finished


@pytest.fixture(autouse=True, scope="module")
def report(request):
    """Say how much was tried."""
    tried.clear()
    yield
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzzed: {', '.join(f'{count} {what}' for what, count in sorted(tried.items()))}")


tried: dict[str, int] = {}


def typed(what: str, call, *arguments, **options):
    """Call; a ValueError of one line is as good as a result."""
    tried[what] = tried.get(what, 0) + 1
    try:
        return call(*arguments, **options)
    except ValueError as error:
        if len(str(error).splitlines()) != 1 or isinstance(error, UnicodeError | json.JSONDecodeError):
            raise AssertionError("an error that is not ours") from error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)
ODD = st.integers(-2, 70) | st.floats() | st.booleans() | st.none() | st.text(max_size=5)


def fitting(name: str, hint) -> st.SearchStrategy:
    """Values that an option may have, one by one; whether they go together is another question."""
    choices = [choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)]
    if name == "scheme" or choices:
        return st.sampled_from(choices or sorted(resseq.SCHEMES))
    kinds = {bool: st.booleans(), int: st.integers(1, 12), float: st.floats(0, 0.99), str: st.text(max_size=5)}
    return next(kinds[part] for part in (hint, *get_args(hint)) if part in kinds)


def some_of(options: type, *left_out: str) -> st.SearchStrategy:
    """A few options of a class, most with fitting values."""
    hints = {name: hint for name, hint in get_type_hints(options).items() if name not in left_out}
    fit = {name: fitting(name, hint) for name, hint in hints.items()}
    fits = st.lists(st.sampled_from(sorted(fit)), max_size=6).flatmap(
        lambda names: st.fixed_dictionaries({name: fit[name] for name in names})
    )
    return fits | fits.flatmap(
        lambda given: st.tuples(st.sampled_from(sorted(fit)), ODD).map(lambda odd: {**given, odd[0]: odd[1]})
    )


@fuzzed
@given(some_of(TrainOptions))
def test_options(fields):
    options = typed("options", TrainOptions, **fields)
    if options is not None:
        typed("models", check_model, options)


LONG = {"torch_compile", "device", "output_dir", "dataloader_num_workers", "num_train_epochs", "max_steps"}


@settings(fuzzed, max_examples=40)
@given(some_of(TrainOptions, "data", *LONG))
def test_short_training(tmp_path_factory, data, fields):
    folder = tmp_path_factory.mktemp("run") / "run"
    options = {**test_reliability.OPTIONS, "max_steps": 2, **fields}
    typed("trainings", resseq.train, data=data, output_dir=str(folder), **options)
    shutil.rmtree(folder, ignore_errors=True)


def changed(content: bytes, draw) -> bytes:
    """Content with a piece cut out, put in, or replaced."""
    start = draw(st.integers(0, len(content)))
    length = draw(st.integers(0, 20) | st.integers(0, len(content)))
    return content[:start] + draw(st.binary(max_size=20)) + content[start + length :]


@fuzzed
@given(st.data(), JSON)
def test_config(finished, tmp_path_factory, draws, value):
    folder = tmp_path_factory.getbasetemp() / "config"
    if not folder.exists():
        shutil.copytree(finished, folder)
    config = json.loads((finished / "config.json").read_text())
    where = draws.draw(st.sampled_from(["bytes", "top", "options", "fingerprint", "all"]))
    if where == "bytes":
        content = changed((finished / "config.json").read_bytes(), draws.draw)
    else:
        inner = config if where == "top" else config.get(where, config)
        inner[draws.draw(st.sampled_from(sorted(inner)) | st.text())] = value
        content = json.dumps(value if where == "all" else config).encode()
    (folder / "config.json").write_bytes(content)
    write_manifest(folder, ["model.safetensors", "config.json", "tokenizer.json"])
    typed("configs", Run.load, folder, device="cpu")


@fuzzed
@given(st.data(), JSON)
def test_manifest(finished, tmp_path_factory, draws, value):
    folder = tmp_path_factory.getbasetemp() / "manifest"
    if not folder.exists():
        shutil.copytree(finished, folder)
    manifest = json.loads((finished / "manifest.json").read_text())
    where = draws.draw(st.sampled_from(["bytes", "top", "files", "file", "all"]))
    if where == "bytes":
        content = changed((finished / "manifest.json").read_bytes(), draws.draw)
    else:
        inner = {"top": manifest, "files": manifest["files"]}.get(where, manifest["files"]["config.json"])
        inner[draws.draw(st.sampled_from(sorted(inner)) | st.text())] = value
        content = json.dumps(value if where == "all" else manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    typed("manifests", verify, folder)


@fuzzed
@given(st.data())
def test_weights(finished, tmp_path_factory, draws):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    content = (finished / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    where = draws.draw(st.sampled_from(["bytes", "header", "size"]))
    if where == "header":
        header = changed(content[8 : 8 + size], draws.draw)
        content = struct.pack("<Q", len(header)) + header + content[8 + size :]
    elif where == "size":
        content = struct.pack("<Q", draws.draw(st.integers(0, 2**64 - 1))) + content[8:]
    else:
        content = changed(content, draws.draw)
    path.write_bytes(content)
    typed("weights", load_weights, path)


@fuzzed
@given(st.data(), st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]))
def test_tables(tmp_path_factory, draws, ending):
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{ending}"
    separator = "\t" if ending == "tsv" else ","
    lines = "".join(f'"so {i}"{separator}{i % 2}\n' for i in range(12))
    rows = [{"text": f"so {i}", "label": i % 2} for i in range(12)]
    if ending == "jsonl":
        content = "\n".join(map(json.dumps, rows))
    else:
        content = json.dumps(rows) if ending == "json" else f"text{separator}label\n{lines}"
    path.write_bytes(changed(content.encode(), draws.draw) if draws.draw(st.booleans()) else draws.draw(st.binary()))
    loaded = typed("tables", load_text, TextOptions(data=str(path)))
    if loaded is not None:
        assert all(isinstance(text, str) for split in loaded.splits.values() for text in split.inputs)
