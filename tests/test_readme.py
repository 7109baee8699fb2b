"""What the README says runs, and its figures are the measured ones."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from resseq import SCHEMES
from resseq.ablation.report import Findings, table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["x"].shape == (2, 10, 64)
    assert names["weights"].shape == (2, 10, 10)


def test_every_scheme_has_a_row():
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE) == list(SCHEMES)


def test_the_custom_scheme_is_that_of_the_example_and_learns():
    path = ROOT / "examples" / "custom_scheme.py"
    scheme = re.search(r"^class Fading.*?(?=\n\n\n)", path.read_text(), re.DOTALL | re.MULTILINE).group()
    assert len(scheme.splitlines()) < 15
    assert scheme in README
    spec = importlib.util.spec_from_file_location("custom_scheme", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main()
    assert losses[0] > 0.9
    assert losses[-1] < 0.1


def test_both_commands_pin_torch_and_make_their_environment():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    for command in commands:
        assert command.index("torch==2.13.0") < command.index("-e ")


def test_the_table_of_results_is_what_was_measured():
    folder = ROOT / "examples" / "real_text"
    spec = importlib.util.spec_from_file_location("measure", folder / "measure.py")
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    assert measure.table(json.loads((folder / "results.json").read_text())) in README


def told(text: str) -> str:
    return " ".join(text.split())


ABLATIONS = ROOT / "examples" / "depth_ablation"


@pytest.mark.parametrize(
    ("name", "page", "summarised"),
    [
        ("first_command", ROOT, True),
        ("trec", ROOT, True),
        ("trec", ABLATIONS, True),
        ("five_seeds", ABLATIONS, False),
        ("wide", ABLATIONS, False),
        ("convnets", ABLATIONS, True),
    ],
)
def test_the_ablations_are_told_as_they_came_out(name, page, summarised):
    found = json.loads((ABLATIONS / name / "results.json").read_text())
    summary = found.pop("summary")
    text = (page / "README.md").read_text()
    assert table(Findings(**found, curves={})) in text
    assert (told(summary) in told(text)) == summarised


def test_the_starts_are_told_as_they_came_out():
    rows = json.loads((ABLATIONS / "inits" / "results.json").read_text())["rows"]
    text = (ABLATIONS / "README.md").read_text()
    for start in ("xavier", "torch", "normal"):
        cells = []
        for scheme in ("post", "pre"):
            found = [row for row in rows if (row["scheme"], row["init"]) == (scheme, start)]
            stuck = {"finished": "", "stuck": " (stuck)"}
            cells.append(", ".join(f"{100 * row['test_accuracy']:.1f}{stuck[row['status']]}" for row in found))
        assert f"| `{start}` | {' | '.join(cells)} |" in text


def test_the_claim_about_five_seeds_is_what_was_measured():
    rows = json.loads((ROOT / "examples" / "depth_ablation" / "five_seeds" / "results.json").read_text())["rows"]
    accuracy = {(row["scheme"], row["seed"]): row["test_accuracy"] for row in rows if row["depth"] == 12}
    behind = [100 * (accuracy["pre", seed] - accuracy["post", seed]) for seed in range(5)]
    assert f"by {min(behind):.0f} to {max(behind):.0f} points" in told(README)
    assert min(behind) > 10


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_the_cost_is_what_was_measured():
    measured = json.loads((ROOT / "tests" / "benchmarks" / "residual_overhead.json").read_text())
    assert f"{measured['microseconds_per_call']['median']:.1f} µs more a call" in README
    assert f"{100 * (measured['eager_ratio']['median'] - 1):+.1f} %, within the noise" in README
    assert measured["eager_ratio"]["low"] < 1 < measured["eager_ratio"]["high"]
    assert measured["different_operations"] == {}


def test_the_training_steps_are_what_was_measured():
    rows = json.loads((ROOT / "tests" / "benchmarks" / "training_step.json").read_text())["results"]
    for without, with_dropout in zip(rows[::2], rows[1::2], strict=True):
        cells = [
            f"{without['ratio_to_fastest_peer'][name]:.2f} / {with_dropout['ratio_to_fastest_peer'][name]:.2f}"
            for name in ("resseq", "torch.nn", "hugging face")
        ]
        shape = ", ".join(map(str, without["shape"].values()))
        assert f"| {shape} | {' | '.join(cells)} |" in README


def test_the_image_net_s_step_is_what_was_measured():
    measured = json.loads((ROOT / "tests" / "benchmarks" / "resnet_step.json").read_text())
    assert f"takes {measured['results']['resseq']['ratio_to_fastest_peer']:.2f} of Hugging Face's" in told(README)
    assert f"{measured['rounds']} rounds" in README
    assert measured["fastest_peer"] == "hugging face"


def test_inspect_prints_what_is_shown(tmp_path, capsys):
    """The same words, and numbers that differ from machine to machine by rounding alone."""
    from resseq.cli import main

    command, block = re.search(r"`resseq (inspect [^`]*)` prints\n\n```\n(.*?)```", README, re.DOTALL).groups()
    assert main([*command.split(), "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "gradients.png").exists()
    printed = capsys.readouterr().out.split()
    shown = block.split()
    assert len(shown) > 100
    for told, found in zip(shown, printed, strict=False):
        try:
            assert float(found.strip(".,;()")) == pytest.approx(float(told.strip(".,;()")), rel=0.02, abs=1e-3)
        except ValueError:
            assert told == found
