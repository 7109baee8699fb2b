"""The report of a grid says what its rows say."""

import csv
import dataclasses
import html.parser
import json
import math
import re
import statistics

import pytest
import test_kill

from resseq.ablation import pictures, report
from resseq.ablation.report import Findings, summary, table, write_report
from resseq.page import shown


def row(scheme="pre", depth=2, seed=0, status="finished", test=0.8, **more):
    given = {
        "model": "transformer",
        "scheme": scheme,
        "depth": depth,
        "seed": seed,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "init": "xavier",
        "status": status,
        "diverged_step": None,
        "validation_accuracy": test,
        "validation_weighted_accuracy": None,
        "test_accuracy": test,
        "steps": 100,
        "seconds": 2.0,
        "gradient_norm_first": 0.5,
        "gradient_norm_last": 0.1,
        "cell": f"{scheme}-{depth}-{seed}-{more.get('learning_rate', 1e-3)}",
        "error": None,
    }
    return given | more


def findings(rows, axes=(), **more):
    return Findings(
        rows=rows,
        curves={each["cell"]: [(10, 1.5), (20, 1.0 + 0.1 * each["seed"])] for each in rows},
        baselines={"majority": 0.2, "linear": 0.7},
        axes=list(axes),
        setting={"data": "reviews.csv", "dim": 64},
        command="resseq ablate --data reviews.csv",
        seconds=12.5,
        **more,
    )


MIXED = [
    *(row("post", 12, seed, "stuck", 0.2 + 0.01 * seed) for seed in (0, 1)),
    row("post", 12, 2, "finished", 0.6),
    *(row("pre", 12, seed, test=0.8) for seed in range(3)),
    *(row("gru", 12, seed, "diverged", None) for seed in range(3)),
    *(row(scheme, 2, seed, test=0.85) for scheme in ("post", "pre", "gru") for seed in range(3)),
]


@pytest.mark.parametrize(
    ("rows", "setting", "said"),
    [
        ([row(steps=30)], {}, "30 steps (too few to tell: give --max-steps 300), 1 seed"),
        ([row(steps=30)], {"early_stopping_patience": 2}, "30 steps, 1 seed"),
        ([row(steps=1)], {}, "1 step (too few to tell: give --max-steps 300), 1 seed"),
        ([row(steps=1, status="diverged", test=None)], {"max_steps": 20}, "at most 20 steps, 1 seed"),
        ([row(steps=1, status="diverged", test=None)], {}, "no cell came to its end, 1 seed"),
        ([row(steps=300), row(seed=1, steps=1, status="diverged", test=None)], {}, "at most 300 steps, 2 seeds"),
    ],
)
def test_the_summary_says_the_budget_and_where_it_was_too_small(rows, setting, said):
    found = findings(rows)
    found.setting.update(setting)
    assert f"no warm-up, {said}." in summary(found)


def test_the_table_has_means_spreads_and_faults():
    lines = [line.split("  ") for line in table(findings(MIXED)).split("\n\n")[1].splitlines()]
    legend = " ".join(table(findings(MIXED)).split("\n\n")[0].split())
    assert "Stuck: the training loss never fell 20 % below" in legend
    assert legend.endswith("Diverged: the gradient or the validation loss was no longer finite.")
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    spread = statistics.stdev([20, 21, 60])
    assert cells == [
        ["scheme", "2 layers", "12 layers"],
        ["post", "85.0 ± 0.0", f"{101 / 3:.1f} ± {spread:.1f} (2 of 3 stuck)"],
        ["pre", "85.0 ± 0.0", "80.0 ± 0.0"],
        ["gru", "85.0 ± 0.0", "3 of 3 diverged"],
    ]


def test_a_single_seed_has_no_spread_and_a_cell_that_was_not_asked_for_is_a_dash():
    text = table(findings([row("post", 2, status="stuck", test=0.2), row("pre", 6)]))
    assert "±" not in text
    rows = [line.split() for line in text.split("\n\n")[1].splitlines()[1:]]
    assert rows == [["post", "20.0", "(stuck)", "–"], ["pre", "–", "80.0"]]


def test_the_summary_is_about_the_deepest_and_names_the_conditions():
    assert summary(findings(MIXED)) == (
        "At 12 layers: post 33.7 ± 22.8 % (2 of 3 stuck), pre 80.0 ± 0.0 %, gru 3 of 3 diverged. "
        "Beside them: the majority class 20.0 %, a linear bag of tokens 70.0 %. "
        "Start xavier, learning rate 0.001, no warm-up, 100 steps, 3 seeds."
    )


def test_a_model_that_has_not_all_depths_is_told_at_its_own_deepest():
    rows = [row("residual", depth, model="cifar-resnet") for depth in (20, 56)]
    found = findings([row("residual", 18, model="resnet18", test=0.6), *rows], ["model"])
    assert summary(found).startswith(
        "At 56 layers: residual (model resnet18) at 18 layers 60.0 %, residual (model cifar-resnet) 80.0 %. "
    )


def test_the_best_setting_is_chosen_on_validation_not_on_test():
    rows = [
        row(learning_rate=1e-3, validation_accuracy=0.9, test=0.5),
        row(learning_rate=1e-2, validation_accuracy=0.6, test=0.99),
    ]
    found = findings(rows, ["learning_rate"])
    assert [each["learning_rate"] for each in found.chosen("pre", 2)] == [1e-3]
    assert "50.0" in table(found)
    assert "99.0" not in table(found)
    assert "with the learning rate that validation chose for each scheme and depth, in brackets" in table(found)
    assert "50.0 [0.001]" in table(found)
    assert summary(found).startswith("At 2 layers, each with the learning rate that validation chose: pre 50.0 %. ")
    assert "learning rate 0.001 or 0.01" in summary(found)


def test_a_warm_up_that_nobody_gave_is_the_usual_one():
    usual, none = row(warmup_steps=None, test=0.9), row(warmup_steps=0)
    assert "learning rate 0.001, the usual warm-up, 100 steps" in summary(findings([usual]))
    both = findings([usual, none], ["warmup_steps"])
    assert "learning rate 0.001, warm-up usual or 0 steps, 100 steps" in summary(both)
    assert table(both).endswith(" 90.0 [usual]")


def test_validation_chose_nothing_where_nothing_was_validated():
    rows = [
        row(status="diverged", test=None, learning_rate=rate, cell=f"pre-{rate}", gradient_norm_first=None)
        for rate in (0.1, 0.2)
    ]
    found = findings(rows, ["learning_rate"])
    assert "chose" not in table(found) + summary(found)
    assert table(found).splitlines()[-1].split() == ["pre", "diverged"]


def test_a_name_with_dollars_is_no_formula(tmp_path):
    rows = [row(data=name, cell=name, gradient_norm_first=0.0) for name in ("cost$\\q$.csv", "b.csv")]
    write_report(findings(rows, ["data"]), tmp_path)
    assert r"cost$\q$" in (tmp_path / "accuracy.csv").read_text()
    assert (tmp_path / "gradients.png").exists()


def test_where_classes_have_weights_the_weighted_accuracy_chooses():
    rows = [
        row(learning_rate=1e-3, validation_accuracy=0.9, validation_weighted_accuracy=0.5),
        row(learning_rate=1e-2, validation_accuracy=0.8, validation_weighted_accuracy=0.7),
    ]
    assert [each["learning_rate"] for each in findings(rows, ["learning_rate"]).chosen("pre", 2)] == [1e-2]
    apart = findings([row(class_weights=None), row(class_weights="balanced")], ["class_weights"])
    assert apart.lines == ["pre (class weights None)", "pre (class weights balanced)"]


def test_validation_chooses_by_the_mean_over_seeds_and_a_fault_counts_as_nothing():
    rows = [
        *(row(seed=seed, learning_rate=1e-3, validation_accuracy=0.7, test=0.7) for seed in (0, 1)),
        row(seed=0, learning_rate=1e-2, validation_accuracy=0.9, test=0.9),
        row("pre", 2, 1, "diverged", None, learning_rate=1e-2),
    ]
    assert {each["learning_rate"] for each in findings(rows, ["learning_rate"]).chosen("pre", 2)} == {1e-3}


def test_validation_never_chooses_between_data_sets():
    rows = [row(data=data, test=test) for data, test in (("folder/easy.csv", 0.9), ("hard.csv", 0.6))]
    found = findings(rows, ["data"])
    assert found.lines == ["pre (data easy)", "pre (data hard)"]
    assert "chose" not in table(found) + summary(found)
    assert summary(found).startswith("At 2 layers: pre (data easy) 90.0 %, pre (data hard) 60.0 %. ")


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.loaded = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("rows", [MIXED, [row()], [row(status="failed", test=None, error="<b>no</b> | room")]])
def test_files_hold_the_rows(tmp_path, rows):
    found = findings(rows)
    write_report(found, tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        assert [line["cell"] for line in csv.DictReader(file)] == [each["cell"] for each in rows]
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["rows"] == rows
    assert told["summary"] == summary(found)
    for name in ("accuracy", "curves", "gradients"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.svg").exists()
    with open(tmp_path / "accuracy.csv", newline="") as file:
        drawn = [line["test_accuracy"] for line in csv.DictReader(file)]
    expected = ["" if each["test_accuracy"] is None else str(100 * each["test_accuracy"]) for each in rows]
    assert sorted(drawn) == sorted(expected)
    text = (tmp_path / "report.md").read_text()
    for part in (summary(found), found.command, "# Which residual scheme", "12 seconds over all calls"):
        assert part in text


def note_and_write(folder):
    """Write the report in a process that notes when it began and ended."""

    def noted(write, event):
        def written(*arguments):
            with open(folder / "notes", "a") as file:
                file.write(f"{event}\n")
            return write(*arguments)

        return written

    pictures.draw_accuracy = noted(pictures.draw_accuracy, "begin")
    report.page = noted(report.page, "end")
    write_report(findings([row()]), folder)


def test_two_processes_write_the_report_in_turn(tmp_path):
    both = [test_kill.FORK.Process(target=note_and_write, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    assert [test_kill.finish(process) for process in both] == [0, 0]
    assert (tmp_path / "notes").read_text().split() == ["begin", "end"] * 2


def test_the_page_stands_alone_and_escapes(tmp_path):
    write_report(findings([row(error="<b>no</b>", status="failed", test=None)]), tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "b" not in page.tags
    assert "<b>no</b>" in "".join(page.words)
    assert page.tags.count("figure") == 3
    assert all(target.startswith("#") for target in page.loaded)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((12345.6, "12346"), (9999.6, "10000"), (1234.56, "1235"), (4.2e9, "4.2e+09")),
        *((0.00012344, "0.0001234"), (12345, "12345"), (None, ""), (math.nan, ""), (math.inf, "inf")),
    ],
)
def test_how_a_value_is_shown(value, said):
    assert shown(value) == said


def test_a_cell_of_the_markdown_table_stays_one_cell(tmp_path):
    write_report(findings([row(error="a | b\nc", status="failed", test=None)]), tmp_path)
    assert "a \\| b c" in (tmp_path / "report.md").read_text()


def words(picture):
    """The texts of an SVG, which matplotlib leaves as comments beside their outlines."""
    return set(re.findall(r"<!-- (.*?) -->", picture.read_text()))


def test_pictures_name_the_lines_the_faults_and_the_baselines(tmp_path):
    write_report(findings(MIXED), tmp_path)
    named = words(tmp_path / "accuracy.svg")
    assert {"post", "pre", "gru", "stuck", "diverged", "of tokens 70 %", "class 20 %", "2", "12"} <= named
    assert "failed" not in named
    assert {"diverged", "2 layers", "12 layers"} <= words(tmp_path / "curves.svg")
    with open(tmp_path / "curves.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(MIXED)


def test_what_is_drawn_at_0_and_100_per_cent_is_whole(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    pictures.draw_accuracy(findings([row("pre", 2, test=1.0), row("pre", 4, test=0.0)]), tmp_path)
    (axes,) = figures[0].axes
    drawn = [artist for artist in (*axes.lines, *axes.collections) if artist.get_transform() != axes.transData]
    assert len(drawn) > 4
    assert not any(line.get_clip_on() for line in axes.lines if line.get_marker() != "None")
    assert not any(bars.get_clip_on() for bars in axes.collections)


def test_a_divergence_beyond_the_edge_is_marked_on_it(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    found = findings([row(status="diverged", test=None)])
    pictures.draw_curves(dataclasses.replace(found, curves={found.rows[0]["cell"]: [(10, 1.5), (20, 50.0)]}), tmp_path)
    (axes,) = figures[0].axes
    marked = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == pictures.MARKS["diverged"]]
    assert [20, axes.get_ylim()[1]] in marked
    assert axes.get_ylim()[1] < 3


def test_a_panel_without_a_loss_says_so_and_has_no_numbers(tmp_path):
    from resseq.ablation.pictures import draw_curves

    found = findings([row("pre", depth, status="diverged", test=None) for depth in (1, 2)])
    none = dataclasses.replace(found, curves={})
    draw_curves(none, tmp_path)
    assert words(tmp_path / "curves.svg") == {"pre", "step", "training loss (nats)", "1 layer", "2 layers", SILENT}
    some = dataclasses.replace(found, curves={found.rows[0]["cell"]: [(10, 1.5), (20, math.nan)]})
    draw_curves(some, tmp_path)
    assert (tmp_path / "curves.svg").read_text().count(f"<!-- {SILENT} -->") == 1
    assert "1.0" in words(tmp_path / "curves.svg")


SILENT = "no finite loss"


def test_one_layer_is_one(tmp_path):
    found = findings([row("pre", 1), row("post", 1)])
    assert summary(found).startswith("At 1 layer: ")
    assert "1 layer\n" in table(found)


def test_a_gradient_of_zero_is_said_not_dropped(tmp_path):
    write_report(findings([row("rezero", gradient_norm_first=0.0), row("pre")]), tmp_path)
    assert "zero: rezero" in words(tmp_path / "gradients.svg")
    with open(tmp_path / "gradients.csv", newline="") as file:
        norms = {(line["scheme"], line["residual"]): float(line["gradient_norm"]) for line in csv.DictReader(file)}
    assert norms == pytest.approx(
        {("rezero", "first"): 0.0, ("rezero", "last"): 0.1, ("pre", "first"): 0.5, ("pre", "last"): 0.1}
    )


def test_a_cell_that_failed_before_it_was_measured(tmp_path):
    write_report(
        findings([row(status="failed", test=None, gradient_norm_first=None, gradient_norm_last=None)]), tmp_path
    )
    assert "failed" in words(tmp_path / "accuracy.svg")
    assert (tmp_path / "gradients.csv").read_text().splitlines() == ["scheme,depth,residual,gradient_norm"]


def test_two_data_sets_of_one_name_are_told_apart():
    rows = [row(seed=seed, data=f"{folder}/train.csv") for folder in "ab" for seed in (0, 1)]
    assert findings(rows, axes=["data"]).lines == ["pre (data a/train.csv)", "pre (data b/train.csv)"]
    rows = [row(seed=0, data=f"{name}.csv") for name in "ab"]
    assert findings(rows, axes=["data"]).lines == ["pre (data a)", "pre (data b)"]
