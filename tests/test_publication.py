"""A trained classifier in one file, which is run and compared; and on a hub, which is a folder here."""

import importlib.util
import json
import shutil

import pytest
import torch

import resseq
from resseq.cli import main
from resseq.run import Run

SMALL = {"vocab_size": 200, "max_length": 32, "max_steps": 2, "max_train_samples": 40}
MODELS = {
    "transformer": {"dim": 16, "depth": 2},
    "convnet": {"dim": 16, "depth": 7, "stages": 3},
    "vdcnn": {"shortcut": "projection", "scheme": "highway", "tokenizer": "character"},
}
ONNX = pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="the extra [onnx] is not installed")


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    resseq.train(model=request.param, output_dir=str(folder), device="cpu", **SMALL, **MODELS[request.param])
    return folder


def test_the_file_says_what_the_run_says_for_any_batch_and_length(run, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    assert main(["export", str(run), "--output", str(file)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["texts"] == 64
    assert said["largest_difference"] < 1e-5
    program, model = torch.export.load(file).module(), Run.load(run, "cpu").model
    for batch, length in ((1, 2), (3, 5), (2, 8), (3, 32)):
        ids = torch.randint(3, 40, (batch, length))
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 4:] = False
        torch.testing.assert_close(program(ids, mask), model(ids, mask))


def test_the_file_s_name_says_its_format(run, tmp_path, capsys):
    assert main(["export", str(run), "--output", str(tmp_path / "model.onnx"), "--format", "torch"]) == 1
    assert "got --format torch with --output" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a format is torch .*got --format pt. Leave it out"):
        resseq.export(run, format="pt")
    assert main(["export", str(run), "--output", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err


def test_what_cannot_be_traced_is_one_line_and_leaves_no_file(run, tmp_path, monkeypatch):
    short = tmp_path / "short"
    resseq.train(output_dir=str(short), device="cpu", **SMALL | {"dim": 16, "max_length": 2})
    with pytest.raises(
        ValueError, match="the length of a text must be free; got a run with --max-length 2. Train with"
    ):
        resseq.export(short)

    def fail(*args, **options):
        raise ValueError("no such operator")

    monkeypatch.setattr(torch.export, "export", fail)
    file, old = tmp_path / "model.pt2", tmp_path / "old.pt2"
    old.write_bytes(b"of an earlier run")
    for output in (file, old):
        with pytest.raises(ValueError, match="no such operator"):
            resseq.export(run, output)
    assert not file.exists()
    assert old.exists()


def test_texts_of_one_token_are_enough_to_trace_with(tmp_path):
    rows = "".join(f"{letter},{'vowel' if letter in 'aeiou' else 'consonant'}\n" for letter in "abcdefghijklmnoprstu")
    (tmp_path / "letters.csv").write_text("text,label\n" + rows)
    resseq.train(data=tmp_path / "letters.csv", output_dir=tmp_path / "run", **SMALL | {"max_steps": 1})
    assert resseq.export(tmp_path / "run")["largest_difference"] < 1e-5


@ONNX
@pytest.mark.slow
def test_onnx_says_the_same(run, tmp_path):
    said = resseq.export(str(run), str(tmp_path / "model.onnx"))
    assert said["format"] == "onnx"
    assert said["largest_difference"] < 1e-4
    inputs = onnxruntime_inputs(tmp_path / "model.onnx")
    assert inputs == {"ids": ["batch", "length"], "mask": ["batch", "length"]}


def onnxruntime_inputs(file):
    session = importlib.import_module("onnxruntime").InferenceSession(file)
    return {each.name: each.shape for each in session.get_inputs()}


def test_without_the_extra_it_says_what_to_type(run, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main(["export", str(run), "--format", "onnx"]) == 1
    assert "Type pip install onnx onnxruntime onnxscript." in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one folder per repository."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    class Api:
        def create_repo(self, repository, private, exist_ok):
            if repository.startswith("someone-else/"):
                raise PermissionError
            (tmp_path / repository).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, **patterns):
            names = [str(file.relative_to(folder_path)) for file in folder_path.rglob("*") if file.is_file()]
            for name in filter_repo_objects(names, **patterns):
                shutil.copy(folder_path / name, tmp_path / repo_id / name)  # fails for a file in a subfolder
            return "a link"

    def download(repository, name):
        if not (tmp_path / repository / name).is_file():
            raise LocalEntryNotFoundError(name)
        return str(tmp_path / repository / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path


def test_a_run_on_the_hub_is_the_run(run, hub, capsys):
    assert any(run.glob("checkpoint-*"))
    assert main(["push-to-hub", str(run), "me/tickets"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "hf://me/tickets", "commit": "a link"}
    card = (hub / "me/tickets/README.md").read_text()
    assert "library_name: resseq" in card
    assert all((hub / "me/tickets" / name).is_file() for name in pictures(card))
    texts = ["import os", "def f(x): return x"]
    assert list(resseq.predict("hf://me/tickets", texts)) == list(resseq.predict(str(run), texts))
    assert resseq.evaluate("hf://me/tickets")["accuracy"] == resseq.evaluate(str(run))["accuracy"]


def pictures(card):
    found = [line.partition("](")[2].rstrip(")") for line in card.splitlines() if line.startswith("![")]
    assert len(found) == 2
    return found


def test_what_the_hub_refuses_is_one_line(run, hub, capsys):
    assert main(["push-to-hub", str(run), "someone-else/tickets"]) == 1
    assert "got someone-else/tickets (PermissionError). Type hf auth login" in capsys.readouterr().err
    assert main(["evaluate", "hf://me/nothing"]) == 1
    assert "got hf://me/nothing, where none is to be had. Check the name" in capsys.readouterr().err
    assert main(["push-to-hub", str(hub), "me/tickets"]) == 1
    assert "the folder must hold a finished run" in capsys.readouterr().err
