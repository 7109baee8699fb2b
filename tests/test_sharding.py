import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from resseq import SCHEMES, TextConvNet, TextTransformer, TransformerEncoder


@pytest.fixture(scope="module", autouse=True)
def one_process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def models(scheme):
    yield TextTransformer(50, 3, 16, 2, 4, 16, scheme=scheme, dropout=0.0), "encoder"
    yield TextConvNet(50, 3, depth=5, dim=8, scheme=scheme, dropout=0.0), "stack"


def gradients(model, ids):
    nn.functional.cross_entropy(model(ids), torch.arange(len(ids)) % 3).backward()
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in named.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed_training_gives_the_same_gradients(scheme, kind):
    ids = torch.randint(50, (6, 9))
    for model, stack in models(scheme):
        expected = gradients(copy.deepcopy(model), ids)
        if kind == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            if scheme != "rezero":  # its factor belongs to two residuals, which cannot be sharded apart
                for residual in getattr(model, stack).residuals:
                    fully_shard(residual)
            wrapped = fully_shard(model)
        ours = gradients(wrapped, ids)
        assert ours.keys() == expected.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


# Run by two processes, below. What a rank holds is a part, of which a view or a chunk is a copy: with one process
# nothing of this would show.
SHARDED = [
    "pre",
    "gru",
    "highway",
    "layerscale",
    "laurel_lr",
    "hyper",
    "mhc",
    "denseformer",
    "attnres",
    "dense",
    "reversible",
]
BY_ROLE = ("subln", "deepnorm", "fixup", "tfixup", "ngpt")  # their starts are rules for whole matrices


def start_sharded(scheme):
    """Meta device, sharding, memory, starting weights: against a plain start, entry by entry where it is constant."""
    with torch.device("meta"):
        encoder = TransformerEncoder(32, 2, 2, scheme=scheme)
    for residual in encoder.residuals:
        fully_shard(residual)
    fully_shard(encoder).to_empty(device="cpu")
    for parameter in encoder.parameters():
        parameter.to_local().data.fill_(float("nan"))
    if scheme in BY_ROLE:
        with pytest.raises(ValueError, match="sharded SelfAttention. (Call reset_parameters before|Use Distributed)"):
            encoder.reset_parameters()
        return
    encoder.reset_parameters()
    plain = TransformerEncoder(32, 2, 2, scheme=scheme)
    for (name, ours), theirs in zip(encoder.named_parameters(), plain.parameters(), strict=True):
        ours = ours.full_tensor().detach()
        assert ours.isfinite().all(), (scheme, name)
        if theirs.numel() > 200 and theirs.std() > 0:
            torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.25, atol=0)
            assert len(ours.unique()) > 0.9 * ours.numel(), (scheme, name)  # no rank drew what another drew
        elif len(theirs.unique()) <= 2:
            torch.testing.assert_close(ours, theirs.detach())


def train_sharded(scheme):
    """One step on two halves of a batch against one step on the whole of it."""
    torch.manual_seed(0)
    plain = TransformerEncoder(32, 2, 2, scheme=scheme)
    encoder = copy.deepcopy(plain)
    for residual in encoder.residuals:
        fully_shard(residual)
    fully_shard(encoder)
    x = torch.randn(4, 5, 32)
    half = x[2 * dist.get_rank() :][:2]
    for model, batch in ((plain, x), (encoder, half)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        (model(batch) * torch.linspace(-1, 1, 32)).mean().backward()
        optimizer.step()
    for (name, ours), theirs in zip(encoder.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes(tmp_path):
    program = (
        "import sys, torch, torch.distributed as dist, test_sharding as tests; torch.set_num_threads(1);"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=int(sys.argv[1]), world_size=2);"
        "[tests.start_sharded(scheme) for scheme in (*tests.SHARDED, *tests.BY_ROLE)];"
        "[tests.train_sharded(scheme) for scheme in tests.SHARDED]; dist.barrier(); dist.destroy_process_group()"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, rank],
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors[0] + errors[1]
