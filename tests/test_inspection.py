import json

import pytest
import torch

import resseq
from resseq.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection")
    data = folder / "things.csv"
    words = {"fruit": "apple pear plum", "tool": "hammer saw drill"}
    rows = [
        f"this is {'very ' * (i % 4)}a {name.split()[i % 3]},{kind}" for i in range(60) for kind, name in words.items()
    ]
    data.write_text("text,label\n" + "\n".join(rows))
    result = resseq.train(
        data=str(data),
        depth=2,
        dim=16,
        num_train_epochs=4,
        per_device_train_batch_size=8,
        vocab_size=60,
        max_length=16,
        warmup_steps=5,
        learning_rate=1e-2,
        dropout=0.0,
        inspect_every=20,
        device="cpu",
        output_dir=str(folder / "run"),
    )
    return folder / "run", result


def test_a_run_is_inspected_on_its_held_out_texts(run, capsys):
    folder, result = run
    assert main(["inspect", str(folder), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "encoder.residuals.3" in out
    assert "lesion drop" in out
    assert "Lesions: deleting a single block costs at most 0.01 for " in out
    for name in ("inspect.html", "inspect.csv", "lesions.svg", "signal.png", "gradients.csv"):
        assert (folder / "inspect" / name).stat().st_size > 0
    report = resseq.inspect(str(folder), device="cpu")
    assert set(report.frame["step"]) == {result["validation"]["step"]}
    whole = report.series("lesioned")[0] + report.series("lesion_drop")[0]
    assert whole == pytest.approx(result["validation"]["accuracy"])


def test_a_run_keeps_the_statistics_of_its_training(run):
    folder, result = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["inspect"] for row in rows if "inspect" in row}
    assert list(found) == list(range(0, result["steps"], 20))
    for statistics in found.values():
        lengths = {"stream_rms": 5, "gradient_norm": 5, "branch_ratio": 4, "gradient_gain": 4, "attention_entropy": 3}
        assert {name: len(statistics[name]) for name in lengths} == lengths
        assert [value is None for value in statistics["attention_entropy"]] == [False, True, False], "by depth"


def test_a_model_is_inspected_before_it_is_trained(tmp_path, capsys):
    arguments = ["--scheme", "post", "--depth", "3", "--dim", "16", "--heads", "2", "--device", "cpu"]
    assert main(["inspect", *arguments, "--output-dir", str(tmp_path)]) == 0
    assert "encoder.residuals.5" in capsys.readouterr().out
    assert (tmp_path / "inspect.html").exists()
    assert not (tmp_path / "lesions.png").exists(), "nothing is learnt that a lesion could harm"
    options = {"scheme": "post", "depth": 3, "dim": 16, "heads": 2, "device": "cpu", "output_dir": str(tmp_path)}
    again = resseq.inspect(**options)
    torch.testing.assert_close(again.rows[0][3], resseq.inspect(**options).rows[0][3])
    assert set(again.frame["step"]) == {0}
    fading = resseq.inspect(**options | {"scheme": "prores"}).frame  # as its first step finds it: at 1/1000
    assert (fading[fading["statistic"] == "branch_ratio"]["value"] > 0).all()


def test_options_that_do_not_go_together(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match="a trained run already fixes its model; got .* --depth 3. Leave out --depth,"):
        resseq.inspect(str(folder), depth=3)
    for name, value in {
        "data": "x.csv",
        "split": "nonsense",
        "text_column": "x",
        "label_column": "y",
        "texts": 9,
    }.items():
        flag = f"--{name.replace('_', '-')} {value}"
        with pytest.raises(ValueError, match=f"only a trained run reads data; got {flag} without a run. Give the run"):
            resseq.inspect(**{name: value})
    with pytest.raises(ValueError, match="^model: --model transformer has no stages; got --stages 2. Leave it out"):
        resseq.inspect(stages=2, device="cpu")
    with pytest.raises(ValueError, match=r"^inspect: --depth must be an integer; got 2.5 \(type float\)"):
        resseq.inspect(depth=2.5)
    with pytest.raises(ValueError, match="--texts must be 1 or more; got 0"):
        resseq.inspect(str(folder), texts=0)
    with pytest.raises(ValueError, match="the folder must hold a finished run"):
        resseq.inspect(str(tmp_path))
