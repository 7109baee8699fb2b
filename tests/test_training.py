import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from resseq import Stack, TextConvNet
from resseq.data.batching import LengthBatches, Tokens, collate
from resseq.training.checkpoint import Damaged, checkpoints, load_state, load_weights, save_checkpoint, save_weights
from resseq.training.config import TrainingOptions
from resseq.training.loop import Diverged, Trainer, calibrate, choose_device, chunks, make_optimizer, schedule
from resseq.training.metrics import Metrics, logits_of, measure

VOCAB, CLASSES, ROWS = 20, 3, 40


class Classifier(nn.Module):
    def __init__(self, p=0.2):
        super().__init__()
        self.embedding, self.dropout, self.head = nn.Embedding(VOCAB, 8), nn.Dropout(p), nn.Linear(8, CLASSES)

    def forward(self, ids, mask):
        return self.head(self.dropout((self.embedding(ids) * mask.unsqueeze(-1)).sum(1)))


def tokens(rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (rows,), generator=generator)
    ids = torch.randint(1, VOCAB, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    return Tokens(ids, lengths, torch.randint(CLASSES, (rows,), generator=generator).tolist(), 0.0)


class Residuals(Classifier):
    def __init__(self, scheme):
        super().__init__()
        self.stack = Stack([nn.Linear(8, 8) for _ in range(4)], dim=8, scheme=scheme)

    def forward(self, ids, mask):
        return self.head(self.stack((self.embedding(ids) * mask.unsqueeze(-1)).sum(1)))


def trainer(folder, p=0.2, scheme=None, **options):
    folder.mkdir(exist_ok=True)
    options = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 3,
        "warmup_steps": 2,
        **options,
    }
    torch.manual_seed(0)
    data = tokens()
    loader = DataLoader(
        data,
        batch_sampler=LengthBatches(data.lengths, options["per_device_train_batch_size"], seed=1),
        collate_fn=collate,
        generator=torch.Generator(),
    )
    validation = [collate([data[i] for i in range(start, start + 5)]) for start in range(0, 20, 5)]
    model = Classifier(p) if scheme is None else Residuals(scheme)
    return Trainer(model, loader, validation, TrainingOptions(**options), folder, torch.device("cpu"))


class Killed(Exception):
    pass


class Normed(Residuals):
    """With everything that a forward pass in training mode could leave behind: dropout and batch statistics."""

    def __init__(self):
        super().__init__("prores")
        self.stack.residuals[1].sublayer = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}])
def test_inspection_leaves_no_trace_in_the_run(tmp_path, monkeypatch, options):
    monkeypatch.setitem(globals(), "Classifier", lambda p: Normed())
    runs = {every: trainer(tmp_path / f"{every}", inspect_every=every, **options) for every in (None, 3)}
    for run in runs.values():
        run.train()
    for name, value in runs[None].model.state_dict().items():
        assert torch.equal(value, runs[3].model.state_dict()[name]), name
    rows = [json.loads(line) for line in runs[3].log_file.read_text().splitlines()]
    found = [row for row in rows if "inspect" in row]
    assert [row["step"] for row in found] == list(range(0, runs[3].steps, 3))
    first, last = found[0]["inspect"], found[-1]["inspect"]
    assert {name: len(values) for name, values in first.items() if name.startswith(("stream_rms", "branch_ratio"))} == {
        "stream_rms": 5,
        "branch_ratio": 4,
    }
    assert first["gradient_norm"] != last["gradient_norm"]
    assert first["branch_ratio"][3] > 0, "at the step's own clock, not before the first"
    assert [row for row in rows if "inspect" not in row] == [
        json.loads(line) for line in runs[None].log_file.read_text().splitlines()
    ]


def test_inspection_differentiates_the_loss_that_is_trained(tmp_path):
    run = trainer(tmp_path, scheme="pre", max_steps=1, inspect_every=1, max_grad_norm=0.0)
    run.class_weights = torch.tensor([1.0, 0.1, 20.0])
    run.train()
    inspected = json.loads(run.log_file.read_text().splitlines()[0])["inspect"]["block_gradient_norm"]
    again = trainer(tmp_path, scheme="pre")
    batch = next(again.remaining())[0]
    weights = torch.tensor([1.0, 0.1, 20.0])[batch["labels"]]
    each = F.cross_entropy(
        again.model(batch["ids"], batch["mask"]), batch["labels"], reduction="none", label_smoothing=0.1
    )
    (each * weights).mean().backward()
    gradients = [parameter.grad for parameter in again.model.stack.residuals[0].parameters()]
    assert inspected[0] == pytest.approx(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"optim": "sgd"}, {"eval_steps": 7}])
@pytest.mark.parametrize("killed_at", [11, 17, 25])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch, options, killed_at):
    if "gradient_accumulation_steps" in options:
        killed_at = {11: 5, 17: 6, 25: 9}[killed_at]
    whole = trainer(tmp_path / "whole", **options)
    best = whole.train()

    stopped, step = trainer(tmp_path / "stopped", **options), Trainer.take_step

    def die(self, window):
        if self.step == killed_at:
            raise Killed
        step(self, window)

    monkeypatch.setattr(Trainer, "take_step", die)
    with pytest.raises(Killed):
        stopped.train()
    monkeypatch.undo()

    torch.rand(7)  # whatever the new process did before
    resumed = trainer(tmp_path / "stopped", **options)
    started = resumed.resume()
    interval = options.get("eval_steps", resumed.per_epoch)
    assert 0 < started <= killed_at <= started + interval, "resumed, and recomputes one save interval at most"
    assert resumed.train() == best
    for (name, ours), theirs in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    last = [load_state(checkpoints(tmp_path / name)[-1])["optimizer"]["state"] for name in ("whole", "stopped")]
    for key, state in last[0].items():
        assert all(torch.equal(value, last[1][key][name]) for name, value in state.items())
    assert resumed.log_file.read_text() == whole.log_file.read_text()


def test_the_same_seed_gives_the_same_log(tmp_path):
    logs = []
    for name in ("a", "b"):
        run = trainer(tmp_path / name)
        run.train()
        logs.append(run.log_file.read_text())
    assert logs[0] == logs[1]


def test_accumulation_equals_one_large_batch_also_in_a_short_window(tmp_path):
    data = tokens()
    items = [data[i] for i in range(7)]
    windowed, whole = trainer(tmp_path / "a", p=0.0), trainer(tmp_path / "b", p=0.0)
    windowed.take_step([collate(items[:2]), collate(items[2:6]), collate(items[6:])])
    whole.take_step([collate(items)])
    for ours, theirs in zip(windowed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [len(chunk) for chunk in chunks(range(7), 3)] == [3, 3, 1]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path, broken):
    run, data = trainer(tmp_path / "run"), tokens()
    before = [parameter.clone() for parameter in run.model.parameters()]
    run.model.head.weight.register_hook(lambda gradient: gradient * broken)
    with pytest.raises(Diverged, match="gradient must be finite; got norm=.* at step 1. Use a lower --learning-rate"):
        run.take_step([collate([data[0]])])
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_what_diverges_says_how_long_it_trained_before_a_resumption_too(tmp_path):
    run = trainer(tmp_path / "run", max_steps=4, eval_steps=2)
    run.train()
    run.seconds = 100.0
    run.save()
    resumed = trainer(tmp_path / "run", max_steps=8, eval_steps=2)
    assert resumed.resume() == 4
    resumed.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(Diverged, match="at step 5") as raised:
        resumed.train()
    assert raised.value.seconds == pytest.approx(100.0, abs=10)


def test_where_asking_waits_for_the_device_a_gradient_is_looked_at_before_anything_is_kept(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", max_steps=20, eval_steps=10, logging_steps=4)
    assert run.checks_each_step
    run.checks_each_step = False
    monkeypatch.setattr(
        Trainer, "take_step", lambda self, window, own=Trainer.take_step: own(self, spoil(self, window))
    )

    def spoil(self, window):
        if self.step == 9:
            self.model.head.weight.data.fill_(float("nan"))
        return window

    with pytest.raises(Diverged, match="at step 10"):
        run.train()
    assert not checkpoints(tmp_path / "run")
    run = trainer(tmp_path / "other", max_steps=20, eval_steps=10, logging_steps=4)
    run.checks_each_step = False
    run.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(Diverged, match="at step 4"):
        run.train()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 2}, [2]),
        ({"max_steps": 6}, [3, 6]),
        ({"max_steps": 7}, [3, 6, 7]),
        ({"max_steps": 20, "early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 0.0}, [2]),
    ],
)
def test_the_log_holds_all_steps_once_however_the_training_ends(tmp_path, options, steps):
    def logged(run):
        run.train()
        rows = [json.loads(line) for line in run.log_file.read_text().splitlines()]
        return [row["step"] for row in rows if "loss" in row]

    assert logged(trainer(tmp_path / "run", **options)) == steps
    again = trainer(tmp_path / "run", **options)  # killed after its last checkpoint
    assert again.resume() == steps[-1]
    assert logged(again) == steps


def test_early_stopping(tmp_path):
    run = trainer(tmp_path / "run", early_stopping_patience=2, num_train_epochs=50, learning_rate=0.05)
    kept = run.train()
    rows = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    seen = [
        (row["validation_accuracy"], -row["validation_loss"], row["step"]) for row in rows if "validation_loss" in row
    ]
    assert len(seen) < 50
    assert seen[-1][2] - max(seen, key=lambda row: row[:2])[2] == 2 * run.per_epoch
    assert measure(logits_of(run.model, run.validation, run.device)).loss == kept["loss"]


@pytest.mark.parametrize(
    ("right", "kept"),
    [
        ([70, 90, 88, 86, 80], 3),  # the standard error of 90 in 100 is 3
        ([70, 90, 86, 91, 89], 5),
        ([90, 70, 60, 50, 40], 1),
        ([50, 51, 52, 53, 54], 5),
        ([100, 100, 99, 98, 97], 2),
    ],
)
def test_the_latest_weights_within_a_standard_error_of_the_highest_accuracy_are_kept(
    right, kept, tmp_path, monkeypatch
):
    run, found, weights = trainer(tmp_path / "run", max_steps=5, eval_steps=1), iter(right), []

    def measure_next(batches):
        weights.append(run.model.head.weight.detach().clone())
        count = next(found)
        return Metrics(0.5, count / 100, 0.5, [[count, 100 - count], [0, 0]])

    monkeypatch.setattr("resseq.training.loop.measure", measure_next)
    assert run.train()["step"] == kept
    assert torch.equal(run.model.head.weight, weights[kept - 1])


def test_weights_that_are_nan_are_never_kept(tmp_path, monkeypatch):
    """No gradient follows the last step: the weights that it spoilt are seen where they are validated."""
    run = trainer(tmp_path / "run", max_steps=4, eval_steps=2)

    def take_step(window, own=run.take_step):
        own(window)
        if run.step == 3:
            run.model.head.weight.data.fill_(math.nan)

    monkeypatch.setattr(run, "take_step", take_step)
    with pytest.raises(Diverged, match=r"validation loss must be finite; got loss=nan at step 4\. Use a lower"):
        run.train()
    assert run.kept["step"] == 2
    assert "NaN" not in run.log_file.read_text()


def test_where_classes_have_weights_right_answers_have_them_too():
    always_common = Metrics(0.3, 0.9, 0.47, [[90, 0], [10, 0]])
    balanced = Metrics(0.6, 0.8, 0.63, [[72, 18], [2, 8]])
    weights = torch.tensor([100 / 180, 100 / 20])
    found = [metrics.weighted_accuracy(weights)[0] for metrics in (always_common, balanced)]
    assert found == pytest.approx([0.5, 0.8])
    assert always_common.weighted_accuracy(None) == pytest.approx((0.9, math.sqrt(0.9 * 0.1 / 100)))


def test_the_standard_error_of_a_weighted_accuracy():
    """It is the spread of the accuracy over samples like this one."""
    torch.manual_seed(0)
    weights, labels = torch.tensor([0.5, 2.0, 4.0]), torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 400, True)
    chances = torch.tensor([0.9, 0.6, 0.3])
    found = []
    for _ in range(500):
        drawn = labels[torch.randint(len(labels), (len(labels),))]
        right = torch.bincount(drawn[torch.rand(len(drawn)) < chances[drawn]], minlength=3)
        wrong = torch.bincount(drawn, minlength=3) - right
        confusion = [[right[0], wrong[0], 0], [wrong[1], right[1], 0], [wrong[2], 0, right[2]]]
        found.append(Metrics(0.0, 0.0, 0.0, [[int(n) for n in row] for row in confusion]).weighted_accuracy(weights))
    accuracies, errors = torch.tensor(found).T
    assert errors.mean().item() == pytest.approx(accuracies.std().item(), rel=0.15)


def test_class_weights_choose_the_weights_that_are_kept(tmp_path):
    run = trainer(tmp_path / "run", num_train_epochs=8, learning_rate=0.05)
    run.class_weights = torch.tensor([5.0, 1.0, 0.1])
    kept = run.train()
    rows = [json.loads(line) for line in run.log_file.read_text().splitlines() if "validation_loss" in line]
    scores = [row["validation_weighted_accuracy"] for row in rows]
    assert run.highest[0] == max(scores) > min(scores)
    assert kept["weighted_accuracy"] >= max(scores) - run.highest[2]
    logits, labels = (torch.cat(parts) for parts in zip(*logits_of(run.model, run.validation, run.device), strict=True))
    counts = run.class_weights[labels]
    assert kept["weighted_accuracy"] == pytest.approx((counts[logits.argmax(1) == labels].sum() / counts.sum()).item())


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedule(kind):
    options = TrainingOptions(lr_scheduler_type=kind, warmup_steps=4)
    rates = [schedule(options, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    share = 8 / 16
    assert rates[12] == pytest.approx({"linear": 1 - share, "cosine": 0.5, "constant": 1.0}[kind])
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False))
    assert schedule(TrainingOptions(warmup_steps=0), 0, 1) == 1.0


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (80, 8), (299, 29), (300, 100), (5000, 100)])
def test_a_short_training_warms_up_for_a_tenth_of_it(steps, warmup):
    rates = [schedule(TrainingOptions(), step, steps) for step in range(steps)]
    assert rates.index(1.0) == max(warmup - 1, 0)


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_weight_decay_is_for_matrices(optim):
    model = Classifier()
    decayed, free = make_optimizer(model, TrainingOptions(optim=optim, weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {p.shape for p in decayed["params"]} == {model.embedding.weight.shape, model.head.weight.shape}
    assert free["params"][0] is model.head.bias


@pytest.mark.parametrize("scheme", ["hyper", "mhc"])
def test_what_mixes_lanes_does_not_decay(scheme):
    """It would pull the identity, at which mixing starts, to 0."""
    decayed, _ = make_optimizer(Residuals(scheme), TrainingOptions()).param_groups
    assert {len(parameter) for parameter in decayed["params"]}.isdisjoint({4, 16}), "4 lanes, in 4 x 4 or flat"


def test_gradients_are_cut_to_the_norm_that_is_asked_for_and_at_0_not_at_all(tmp_path):
    def moved(name, norm):
        run = trainer(tmp_path / name, p=0.0, optim="sgd", max_grad_norm=norm, max_steps=1, weight_decay=0.0)
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        run.take_step([next(iter(run.loader))])
        moves = zip(run.model.parameters(), before, strict=True)
        return math.sqrt(sum((parameter - earlier).square().sum().item() for parameter, earlier in moves))

    step, uncut = 1e-3 / 2, moved("uncut", 0.0)  # the first step of a warm-up of two
    assert uncut > 0.02 * step
    assert moved("cut", 0.01) == pytest.approx(0.01 * step, rel=1e-2)
    assert moved("high", 1e9) == pytest.approx(uncut)


def test_the_step_clock_follows_training_and_a_resume_keeps_it(tmp_path):
    seen = []
    run = trainer(tmp_path / "run", scheme="prores", max_steps=7, eval_steps=3)

    def look(stack, inputs):
        if stack.training:
            seen.append(stack.residuals[2].connection.scale.step.item())

    run.model.stack.register_forward_pre_hook(look)
    run.train()
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    resumed = trainer(tmp_path / "run", scheme="prores", max_steps=9, eval_steps=3)
    assert resumed.resume() == 7
    assert {clock.step.item() for clock in resumed.clocks} == {7}
    assert len(resumed.clocks) == 4


def test_training_calibrates_on_its_first_batch_alone(tmp_path, monkeypatch):
    batches = []
    calibrated = Stack.calibrate
    monkeypatch.setattr(Stack, "calibrate", lambda self, x: (batches.append(x.clone()), calibrated(self, x)))
    run = trainer(tmp_path / "run", scheme="admin", max_steps=5, learning_rate=1e-12)
    run.train()
    assert len(batches) == 1
    omega = [residual.connection.skip_scale.weight for residual in run.model.stack.residuals]
    assert torch.allclose(omega[0], torch.ones(8))
    assert all((later > earlier + 1e-3).all() for earlier, later in zip(omega, omega[1:], strict=False))
    assert run.model.stack._forward_pre_hooks == {}
    resumed = trainer(tmp_path / "run", scheme="admin", max_steps=7, learning_rate=1e-12)
    resumed.resume()
    resumed.train()
    assert len(batches) == 1


def test_batch_norms_norm_while_a_start_is_calibrated_and_forget_the_batch():
    """Else Admin's shortcuts start at 0.0001, or at a million: norms that have seen no batch change nothing."""
    torch.manual_seed(0)
    model = TextConvNet(VOCAB, CLASSES, depth=17, dim=8, scheme="admin")
    buffers = [buffer.clone() for buffer in model.buffers()]
    calibrate(model, {"ids": torch.randint(VOCAB, (8, 12))}, torch.device("cpu"))
    omega = [residual.connection.skip_scale.weight.mean().item() for residual in model.stack.residuals]
    assert all(0.5 < each < 2 for each in omega), omega
    assert all(map(torch.equal, buffers, model.buffers()))


def test_training_constrains_after_each_step(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(Stack, "constrain", lambda self: steps.append(run.step))
    run = trainer(tmp_path / "run", scheme="ngpt", max_steps=3)
    weight = run.model.stack.residuals[0].sublayer.weight
    run.optimizer.register_step_post_hook(lambda *_: steps.append(weight.clone()))
    run.train()
    assert len(steps) == 6
    assert all(isinstance(updated, torch.Tensor) for updated in steps[::2])
    assert steps[1::2] == [0, 1, 2]


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_a_scheme_may_scale_learning_rate_and_epsilon(tmp_path, optim):
    run = trainer(tmp_path / "run", scheme="depth_mup", max_steps=1, warmup_steps=1, optim=optim, learning_rate=0.5)
    run.train()
    groups = run.optimizer.param_groups
    branches = {id(p) for p in run.model.stack.residuals.parameters()}
    for group in groups:
        inside = [id(p) in branches for p in group["params"]]
        assert inside
        assert all(inside) or not any(inside)
        factor = 0.5 if inside[0] else 1.0  # four layers: 1/√4
        assert group["lr"] == pytest.approx(0.5 * factor)
        assert group["eps"] == pytest.approx(1e-8 * factor)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.0, 0.1, 0.1]
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(run.model.parameters()))


def test_metrics_by_hand():
    logits = F.one_hot(torch.tensor([0, 0, 1, 2, 1]), 4).float() * 5
    labels = torch.tensor([0, 1, 1, 2, 2])
    metrics = measure(zip(logits.split(2), labels.split(2), strict=True))
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert metrics.confusion == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert metrics.accuracy == 3 / 5
    # the fourth class is nowhere: no share
    assert metrics.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3, abs=1e-15)
    b = metrics.by_class(["a", "b", "c", "d"])["b"]
    assert b == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    weights = {"model": {"w": torch.ones(2)}}
    save_checkpoint(tmp_path, 1, weights, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, weights, {"step": 2})
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    save_checkpoint(tmp_path, 10, weights, {"step": 10})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-10"], (
        "no broken one is left"
    )
    save_checkpoint(tmp_path, 20, weights, {"step": 20})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"], "the last two are kept"
    assert load_state(tmp_path / "checkpoint-10") == {"step": 10}


def test_shared_weights_are_saved(tmp_path):
    weight = torch.arange(3.0)
    save_weights(tmp_path / "w.safetensors", {"a": weight, "b": weight})
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["b"], weight)


def test_a_pickle_offered_as_state_is_refused(tmp_path):
    import pickle

    (tmp_path / "state.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(Damaged, match="state.pt"):
        load_state(tmp_path)


def test_bf16_and_compile_train(tmp_path):
    torch._dynamo.reset()
    run = trainer(tmp_path / "run", bf16=True, num_train_epochs=1)
    assert run.train()["step"] == run.steps


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "classes",
    [
        ["no", "yes"],
        ["$_$", "ünï"],
        ["a" * 60, "W" * 60],
        ["中文类别" * 20, "한국어"],
        [f"{i}: a class with a name as long as this one" for i in range(25)],
        [str(i) for i in range(200)],
    ],
)
def test_the_confusion_of_awkward_classes_is_whole(tmp_path, monkeypatch, classes):
    from resseq import drawing
    from resseq.training import pictures

    figures = []
    monkeypatch.setattr(pictures, "save", lambda *given: (figures.append(given[0]), drawing.save(*given)))
    confusion = [[int(i == j) for i in range(len(classes))] for j in range(len(classes))]
    pictures.draw_confusion(confusion, classes, "texts", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    (figure,) = figures
    with warnings.catch_warnings(action="ignore"):
        figure.draw_without_rendering()  # anew: it was drawn at the resolution of the file
    axes, (width, height) = figure.axes[0], figure.bbox.size
    assert axes.get_window_extent().width > 60
    labels = [*axes.get_xticklabels(), *axes.get_yticklabels()] if len(classes) <= 40 else []
    boxes = [text.get_window_extent() for text in (*labels, axes.xaxis.label, axes.yaxis.label, *figure.texts)]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert all(len(label.get_text()) <= 27 for label in labels)


def test_the_confusion_of_images_says_so(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from resseq.card import draw_run
    from resseq.training import pictures

    titles = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: titles.append(figure.get_suptitle()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 1.0, "validation_accuracy": 0.5}\n')
    draw_run(
        tmp_path, 1, [[1, 0], [0, 1]], SimpleNamespace(classes=["a", "b"], reader=SimpleNamespace(inputs="images"))
    )
    assert titles == ["", "Test images (% of each class)"]


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cuda", "mps", "cpu")
