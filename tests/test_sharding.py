import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from resseq import SCHEMES, TextConvNet, TextTransformer


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
