import pytest
import torch
from torch import nn

from resseq import Stack, TextConvNet, TextTransformer, TransformerEncoder
from resseq.diagnostics.memory import saved_storages


def step(checkpointing: bool, **options):
    """Output, gradients and saved bytes of one pass with dropout."""
    torch.manual_seed(0)
    net = TransformerEncoder(16, 6, 2, dropout=0.2, activation_checkpointing=checkpointing, **options)
    x = torch.randn(4, 12, 16, requires_grad=True)
    mask = torch.arange(12) < torch.tensor([[12], [3], [2], [5]])
    torch.manual_seed(1)
    with saved_storages(net) as saved:
        out = net(x, mask)
    out.square().sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in net.parameters())], sum(saved.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "post", "attention_dropout": 0.1},
        {"drop_path": 0.3, "layer_drop": 0.2},
        {"scheme": "hyper"},
        {"scheme": "denseformer"},
        {"value_residual": True},
        {"pack": False},
    ],
    ids=str,
)
def test_gradients_are_the_same_with_dropout_and_less_is_kept(options):
    out, gradients, kept = step(False, **options)
    again, same, less = step(True, **options)
    assert torch.equal(out, again)
    for a, b in zip(gradients, same, strict=True):
        assert torch.equal(a, b)
    assert less < kept / 2


def test_it_rests_where_nothing_is_learnt():
    net = TextTransformer(50, 2, 8, 1, 2, 8, activation_checkpointing=True).eval()
    calls = []
    net.encoder.residuals[0].register_forward_hook(lambda *_: calls.append(1))
    net(torch.randint(50, (2, 8))).sum().backward()
    assert calls == [1]


def test_batch_norm_is_refused():
    norms = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))]
    with pytest.raises(ValueError, match="a batch norm would count each batch twice"):
        Stack(norms, dim=8, activation_checkpointing=True)
    with pytest.raises(TypeError):
        TextConvNet(50, 2, activation_checkpointing=True)


def test_torch_func_keeps_everything():
    """Per-sample gradients: torch.func cannot run a checkpoint."""
    torch.manual_seed(0)
    net, plain = (TransformerEncoder(8, 2, 2, activation_checkpointing=given) for given in (True, False))
    plain.load_state_dict(net.state_dict())
    x, weights = torch.randn(3, 5, 8), torch.randn(5, 8)

    def gradients(model):
        def loss(parameters, one):
            return (torch.func.functional_call(model, parameters, (one[None],)) * weights).sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), x)

    torch.testing.assert_close(gradients(net), gradients(plain))
