"""BERT from its published checkpoints, in the residuals of this package."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from resseq.layers.dropout import Dropout
from resseq.layers.linear import Embedding, Init, Linear
from resseq.layers.pooling import find_pooling, real_tokens
from resseq.layers.positions import LearnedPositions
from resseq.pretrained import find_weights, read_config, read_weights
from resseq.residual import reset_children
from resseq.transformer import TransformerEncoder

# Hugging Face's config.json in our names
OPTIONS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_length",
    "intermediate_size": "hidden",
    "hidden_act": "activation",
    "type_vocab_size": "token_types",
    "layer_norm_eps": "eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# our modules in Hugging Face's names; several of theirs are one of ours, along the first axis
EMBEDDINGS = {
    "embedding": ("embeddings.word_embeddings",),
    "token_types": ("embeddings.token_type_embeddings",),
    "positions.table": ("embeddings.position_embeddings",),
    "norm": ("embeddings.LayerNorm",),
}
ATTENTION = {
    "sublayer.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "sublayer.out": ("attention.output.dense",),
    "connection.post": ("attention.output.LayerNorm",),
}
FEEDFORWARD = {
    "sublayer.into": ("intermediate.dense",),
    "sublayer.out": ("output.dense",),
    "connection.post": ("output.LayerNorm",),
}


class Bert(nn.Module):
    """BERT without a head: embeddings of token, place and segment, and a post-norm Transformer encoder.

    ``x_0 = N(E[ids] + P + S[token_types])``, ``x_L = TransformerEncoder(x_0)``, scheme "post".

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3 and figure 2.
    Shapes: ids (B, L) int64, mask (B, L) True = real token (all real unless given), token_types (B, L) int64 (all 0
        unless given) -> (B, L, D).
    Args:
        max_length: tokens of the longest text.
        token_types: number of segments that a text may have.
        eps: what each norm adds to the variance.
        dropout: probability for embeddings and branches alike; attention_dropout: that an attention weight is dropped.
    Raises: ValueError for a longer text.

    >>> Bert(100, dim=8, depth=2, heads=2)(torch.randint(100, (4, 16))).shape
    torch.Size([4, 16, 8])
    """

    def __init__(
        self,
        vocab_size: int = 30_522,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        max_length: int = 512,
        *,
        hidden: int | None = None,
        activation: Literal["gelu", "relu"] = "gelu",
        token_types: int = 2,
        eps: float = 1e-12,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        init: Init = "normal",
    ):
        super().__init__()
        self.embedding = Embedding(vocab_size, dim, init=init)
        self.token_types = Embedding(token_types, dim, init=init)
        self.positions = LearnedPositions(max_length, dim, init=init)
        self.norm = nn.LayerNorm(dim, eps)
        self.dropout = Dropout(dropout)
        self.encoder = TransformerEncoder(
            dim,
            depth,
            heads,
            scheme="post",
            hidden=hidden,
            activation=activation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            norm=partial(nn.LayerNorm, eps=eps),
            init=init,
        )
        self.options = {
            "vocab_size": vocab_size,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "max_length": max_length,
            "hidden": hidden or 4 * dim,
            "activation": activation,
            "token_types": token_types,
            "eps": eps,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
        }

    reset_parameters = reset_children

    def forward(self, ids: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        segments = self.token_types(torch.zeros_like(ids) if token_types is None else token_types)
        x = self.norm(self.positions(self.embedding(ids) + segments))
        return self.encoder(self.dropout(x), mask)

    def parts(self) -> list[list[nn.Module]]:
        """What gradients reach last, first: the embeddings, then layer by layer."""
        embeddings = [self.embedding, self.token_types, self.positions, self.norm]
        residuals = list(self.encoder.residuals)
        return [embeddings, *(residuals[i : i + 2] for i in range(0, len(residuals), 2))]

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path) -> Self:
        """A Hugging Face BERT or RoBERTa checkpoint; heads and pooler are left behind.

        RoBERTa keeps its first pad_token_id + 1 position embeddings for padding: they are dropped too, and the text
        must be padded on the right. Of its token types it uses the first alone, for pairs too.

        The folder or the hub's repository holds config.json and model.safetensors; a pytorch_model.bin is read where
        there is no other, tensors only.

        Raises: ValueError for a missing file, another kind of model, a missing tensor or one of an unknown name.
        """
        config = read_config(folder_or_hub_id)
        if not config:
            raise ValueError(
                f"Bert: a checkpoint holds config.json; got folder_or_hub_id={str(folder_or_hub_id)!r}, where there is "
                f"none. Check the spelling and, for an id on the hub, the network; or give a checkpoint's folder."
            )
        _require_bert(config)
        tensors = {_renamed(name): tensor for name, tensor in read_weights(find_weights(folder_or_hub_id)).items()}
        if config.get("model_type") == "roberta":
            places = "embeddings.position_embeddings.weight"
            tensors[places] = tensors[places][config.get("pad_token_id", 1) + 1 :]
            config["max_position_embeddings"] = len(tensors[places])
            types = "embeddings.token_type_embeddings.weight"
            tensors[types], config["type_vocab_size"] = tensors[types][:1], 1
        model = cls(**{ours: config[theirs] for theirs, ours in OPTIONS.items() if theirs in config})
        model.load_state_dict(_to_ours(tensors, model))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, as transformers' BertModel reads them."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "bert", "architectures": ["BertModel"], "position_embedding_type": "absolute"}
        config |= {theirs: self.options[ours] for theirs, ours in OPTIONS.items()}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(_to_theirs(self), folder / "model.safetensors", metadata={"format": "pt"})


class BertClassifier(nn.Module):
    """A text classifier on BERT: encoder, pooling, one linear map.

    A text or a pair of texts: what follows the first separator is a second text, with token type 1 where the encoder
    knows more than one. With a rate r of decay, layer l of L learns r^(L − l) times as fast as the head, and the
    embeddings, as layer 0, slowest.

    Source: layer-wise decay: Howard & Ruder 2018, arXiv:1801.06146, section 3.2; Clark et al. 2020, arXiv:2003.10555.
    Shapes: ids (B, L) int64, mask (B, L) True = real token (all real unless given) -> logits (B, C).
    Args:
        encoder: what Bert takes; its ``options``.
        separator: id of the token that ends each text.
        dropout: probability for embeddings, branches and the pooled vector; the encoder's own unless given, and
            attention_dropout too.
        frozen_layers: the embeddings and so many layers stay as they are; none, not even the embeddings, unless given.
    Raises: ValueError for more frozen layers than there are.

    >>> model = BertClassifier(3, {"vocab_size": 100, "dim": 8, "depth": 2, "heads": 2}, separator=3)
    >>> model(torch.randint(100, (4, 16))).shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        num_classes: int,
        encoder: Mapping[str, Any],
        separator: int,
        *,
        pooling: Literal["mean", "cls", "max"] = "mean",
        dropout: float | None = None,
        attention_dropout: float | None = None,
        frozen_layers: int | None = None,
        layerwise_lr_decay: float = 1.0,
    ):
        super().__init__()
        given = {"dropout": dropout, "attention_dropout": attention_dropout}
        self.encoder = Bert(**{**encoder, **{name: value for name, value in given.items() if value is not None}})
        self.pool = find_pooling(pooling)
        self.dropout = Dropout(self.encoder.options["dropout"])
        self.head = Linear(self.encoder.options["dim"], num_classes, init="normal")
        self.separator = separator
        self.layerwise_lr_decay = layerwise_lr_decay
        depth = self.encoder.options["depth"]
        if frozen_layers is not None and frozen_layers > depth:
            raise ValueError(
                f"BertClassifier: no more layers can be frozen than there are; got frozen_layers={frozen_layers}, "
                f"depth={depth}. Use {depth}."
            )
        for part in self.encoder.parts()[: 0 if frozen_layers is None else frozen_layers + 1]:
            for module in part:
                module.requires_grad_(False)

    reset_parameters = reset_children

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The encoder's parameters, with the share of the learning rate that their layer has."""
        parts = self.encoder.parts()
        return [
            {
                "params": [parameter for module in part for parameter in module.parameters()],
                "lr_scale": self.layerwise_lr_decay ** (len(parts) - 1 - layer),
                "eps_scale": 1.0,
            }
            for layer, part in enumerate(parts)
        ]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        ends = (ids == self.separator).long()
        types = (ends.cumsum(1) - ends).clamp(max=min(1, self.encoder.options["token_types"] - 1))
        x = self.encoder(ids, mask, types)
        real = real_tokens(ids, mask)
        return self.head(self.dropout(self.pool(x, real)))


def _require_bert(config: dict[str, Any]) -> None:
    """Raise for a configuration whose function is another than Bert's."""
    computed = {
        "model_type": ("bert", "roberta"),
        "hidden_act": ("gelu", "relu"),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
    }
    for name, values in computed.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(
                f"Bert: {name} is {' or '.join(map(repr, values))}; got {name}={config[name]!r}. "
                f"Give a checkpoint whose config.json says so, such as google-bert/bert-base-uncased."
            )


def _renamed(name: str) -> str:
    name = name.removeprefix("bert.").removeprefix("roberta.")
    # the first checkpoints call a norm's tensors by other names
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _names(model: Bert) -> dict[str, list[str]]:
    """Hugging Face's names of what each of our tensors is made of."""
    modules: dict[str, tuple[str, ...]] = {**EMBEDDINGS}
    for layer in range(model.options["depth"]):
        for part, table in enumerate((ATTENTION, FEEDFORWARD)):
            for ours, theirs in table.items():
                names = tuple(f"encoder.layer.{layer}.{name}" for name in theirs)
                modules[f"encoder.residuals.{2 * layer + part}.{ours}"] = names
    keys = (key.rpartition(".") for key in model.state_dict())
    return {f"{module}.{kind}": [f"{name}.{kind}" for name in modules[module]] for module, _, kind in keys}


def _to_ours(tensors: dict[str, Tensor], model: Bert) -> dict[str, Tensor]:
    names = _names(model)
    wanted = {name for several in names.values() for name in several}
    inside = {name for name in tensors if name.startswith(("embeddings.", "encoder."))} - {"embeddings.position_ids"}
    for problem, found in (("misses", wanted - set(tensors)), ("has no use for", inside - wanted)):
        if found:
            raise ValueError(
                f"Bert: a checkpoint holds the tensors that its config.json tells of; got one that {problem} "
                f"{', '.join(sorted(found)[:3])} ({len(found)} in all). Give the files of one and the same model."
            )
    return {ours: torch.cat([tensors[name] for name in several]) for ours, several in names.items()}


def _to_theirs(model: Bert) -> dict[str, Tensor]:
    theirs, state = {}, model.state_dict()
    for ours, several in _names(model).items():
        theirs |= zip(several, (part.clone() for part in state[ours].chunk(len(several))), strict=True)
    return theirs
