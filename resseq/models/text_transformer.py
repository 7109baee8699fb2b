"""A text classifier on top of a Transformer encoder."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from resseq.layers.convolution import hide_padding
from resseq.layers.dropout import Dropout
from resseq.layers.feedforward import Activation
from resseq.layers.linear import Conv1d, Embedding, Init, Linear
from resseq.layers.pooling import find_pooling, real_tokens
from resseq.layers.positions import LearnedPositions, SinusoidalPositions
from resseq.residual import Residual, reset_children
from resseq.schemes import Scheme
from resseq.transformer import TransformerEncoder


class Phrases(nn.Module):
    """What a token and its neighbours say together, as the sublayer of a residual over the embeddings.

    ``GELU(W ∗ x + b)``

    Source: the convolutional positions of Baevski et al. 2020, arXiv:2006.11477, section 2.
    Shapes: x (B, L, D), mask (B, L) True = real token -> (B, L, D).
    """

    def __init__(self, dim: int, kernel_size: int, *, init: Init = "xavier"):
        super().__init__()
        self.conv = Conv1d(dim, dim, kernel_size, init=init)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.gelu(self.conv(hide_padding(x.transpose(1, 2), mask))).transpose(1, 2)


class TextTransformer(nn.Module):
    """A text classifier: embeddings, a residual convolution over them, encoder, pooling, one linear map.

    Embeddings are normalised, as BERT's are: they start so small that the first branches would drown them.

    Shapes: ids (B, L) int64, mask (B, L) True = real token (all real unless given) -> logits (B, C).
    Args:
        max_length: tokens of the longest text; only learned positions are bounded by it.
        positions: "learned" or "sinusoidal" vectors (then embeddings are multiplied by √dim, as in the source), or
            "rotary" queries and keys.
        kernel_size: tokens that the convolution spans; 0 leaves it out. Attention that learns from a few thousand
            texts finds phrases badly.
        dropout: probability for embeddings, branches and the pooled vector alike.
        pack: leave padding out of the encoder where that is faster; see TransformerEncoder, also for masks on the CPU.
        activation_checkpointing: keep less for the backward pass, and compute it again; see Stack.

    >>> import torch
    >>> model = TextTransformer(100, num_classes=3, dim=8, depth=2, heads=2, max_length=16)
    >>> model(torch.randint(100, (4, 16))).shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        dim: int = 256,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 256,
        *,
        scheme: str | Scheme = "pre",
        hidden: int | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.3,
        token_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_drop: float = 0.0,
        positions: Literal["learned", "sinusoidal", "rotary"] = "learned",
        kernel_size: int = 3,
        pooling: Literal["mean", "cls", "max"] = "max",
        init: Init = "xavier",
        pack: bool = True,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.embedding = Embedding(vocab_size, dim, init=init)
        self.token_dropout = nn.Dropout1d(token_dropout)
        if positions == "learned":
            self.positions = LearnedPositions(max_length, dim, init=init)
        elif positions == "sinusoidal":
            self.positions = SinusoidalPositions(scale=dim**0.5)
        elif positions == "rotary":
            self.positions = nn.Identity()  # they turn the encoder's queries and keys
        else:
            raise ValueError(
                f"TextTransformer: positions are 'learned', 'sinusoidal' or 'rotary'; got positions={positions!r}. "
                f"Use positions='learned'."
            )
        self.norm = nn.LayerNorm(dim)
        self.phrases = Residual(Phrases(dim, kernel_size, init=init)) if kernel_size else None
        self.encoder = TransformerEncoder(
            dim,
            depth,
            heads,
            scheme=scheme,
            hidden=hidden,
            activation=activation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
            layer_drop=layer_drop,
            rotary=positions == "rotary",
            init=init,
            pack=pack,
            activation_checkpointing=activation_checkpointing,
        )
        self.pool = find_pooling(pooling)
        self.dropout = Dropout(dropout)
        self.head = Linear(dim, num_classes, init=init)

    reset_parameters = reset_children

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(self.positions(self.token_dropout(self.embedding(ids))))
        real = real_tokens(ids, mask)
        if self.phrases is not None:
            x = self.phrases(x, mask=None if mask is None else real)
        x = self.encoder(self.dropout(x), mask)  # a mask on the CPU stays there: see its pack
        return self.head(self.dropout(self.pool(x, real)))
