"""Time of one training step: resseq's text Transformer beside torch.nn's encoder and Hugging Face's BERT.

    python tests/benchmarks/training_step.py [--rounds 30] [--device cpu|cuda] [--bf16] [--json FILE] [--profile]

A step is forward, cross-entropy on a linear map of the mean over the real tokens, backward, AdamW (fused) and
zero_grad. Every peer gets the same padded batches, and resseq computes the padding as the others do: real lengths
random between L/2 and L, one mask, vocabulary 8000, learned positions. Feed-forward width 4 · dim, GELU, eager,
float32 or with --bf16 under bfloat16 autocast.

- resseq: TextTransformer, scheme "pre", pooling "mean", without its convolution, which the others lack.
- torch.nn: TransformerEncoder, norm_first.
- hugging face: BertModel with sdpa, no pooler; post-norm, and a norm and a token type more in its embeddings. It is
  left out where transformers is not installed.

With dropout 0.1 it stands in resseq and BERT at the same places: embeddings, attention weights, after attention's
output, after the feed-forward; and in all three on the pooled vector. torch.nn keeps its own places: these, and one
more after the activation inside the feed-forward.

Each round times one step of every peer, and the one that goes first changes. Printed are the medians in ms and the
medians of the ratios within a round, to the fastest peer that is not resseq. OMP_NUM_THREADS sets the number of
threads. With --profile, instead: the ten operations in which resseq's step with dropout spends most, by torch.profiler.

Result
------
Two threads, torch 2.13, 30 rounds: training_step.json beside this file, and the README's "What it costs".
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resseq import TextTransformer
from resseq.layers.pooling import pool_mean

VOCABULARY, CLASSES, WARM_UP = 8000, 6, 3
SHAPES = [  # dim, depth, heads, L, B
    (64, 12, 4, 24, 64),
    (128, 6, 4, 64, 16),
    (256, 6, 4, 128, 8),
]


class TorchBody(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, length: int, dropout: float):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, dim), nn.Embedding(length, dim)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.dropout(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        return self.encoder(x, src_key_padding_mask=~mask)


class BertBody(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, length: int, dropout: float):
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * dim,
            max_position_embeddings=length,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            attn_implementation="sdpa",
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state


class Classifier(nn.Module):
    """What TextTransformer has behind its encoder, for the peers."""

    def __init__(self, body: nn.Module, dim: int, dropout: float):
        super().__init__()
        self.body, self.dropout, self.head = body, nn.Dropout(dropout), nn.Linear(dim, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.dropout(pool_mean(self.body(ids, mask), mask)))


def build_peers(dim: int, depth: int, heads: int, length: int, dropout: float) -> dict[str, nn.Module]:
    peers = {
        "resseq": TextTransformer(
            VOCABULARY,
            CLASSES,
            dim,
            depth,
            heads,
            length,
            dropout=dropout,
            attention_dropout=dropout,
            kernel_size=0,
            pooling="mean",
            pack=False,
        ),
        "torch.nn": Classifier(TorchBody(dim, depth, heads, length, dropout), dim, dropout),
    }
    try:
        peers["hugging face"] = Classifier(BertBody(dim, depth, heads, length, dropout), dim, dropout)
    except ImportError:
        print("hugging face is left out: transformers is not installed")
    return peers


def draw_batch(length: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, 0 behind each text's end; the mask, True = real token; the labels."""
    lengths = torch.randint(length // 2, length + 1, (batch, 1))
    mask = torch.arange(length) < lengths
    ids = torch.randint(1, VOCABULARY, (batch, length)) * mask
    return ids.to(device), mask.to(device), torch.randint(CLASSES, (batch,)).to(device)


def measure(
    shape: tuple[int, int, int, int, int], dropout: float, rounds: int, device: torch.device, bf16: bool
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of every round and number of parameters, by peer."""
    *sizes, length, batch = shape
    peers = {name: peer.to(device).train() for name, peer in build_peers(*sizes, length, dropout).items()}
    optimizers = {name: torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True) for name, peer in peers.items()}

    def step(name: str, *batch: Tensor) -> None:
        take_step(peers[name], optimizers[name], batch, bf16)

    times = interleave(list(peers), lambda: draw_batch(length, batch, device), step, rounds, device)
    return times, {name: sum(p.numel() for p in peer.parameters()) for name, peer in peers.items()}


def profile(shape: tuple[int, int, int, int, int], device: torch.device, bf16: bool, steps: int = 10) -> str:
    """The ten operations that take most of resseq's step with dropout, in per cent of all operations' own time."""
    *sizes, length, batch = shape
    model = build_peers(*sizes, length, 0.1)["resseq"].to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]
    recorder = torch.profiler.profile(activities=kinds)
    for i in range(WARM_UP + steps):
        if i == WARM_UP:
            recorder.start()
        take_step(model, optimizer, draw_batch(length, batch, device), bf16)
    recorder.stop()
    own = {
        each.key: each.self_device_time_total if device.type == "cuda" else each.self_cpu_time_total
        for each in recorder.key_averages()
    }
    largest = sorted(own, key=own.__getitem__, reverse=True)[:10]
    return "\n".join(f"  {name:48}{100 * own[name] / sum(own.values()):5.1f} %" for name in largest)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], bf16: bool) -> None:
    ids, mask, labels = batch
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = F.cross_entropy(model(ids, mask), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def interleave(
    names: list[str],
    draw: Callable[[], tuple[Tensor, ...]],
    step: Callable[..., None],
    rounds: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Milliseconds of ``step(name, *draw())`` in every round; the peer that goes first changes from round to round."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(WARM_UP + rounds):
        batch = draw()
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronise()
            start = perf_counter()
            step(name, *batch)
            synchronise()
            times[name].append((perf_counter() - start) * 1e3)
    return {name: values[WARM_UP:] for name, values in times.items()}


def ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of one training step, resseq beside its peers.")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="where resseq's step spends its time")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    if args.profile:
        for shape in SHAPES:
            print(f"dim, depth, heads, L, B = {shape}", profile(shape, device, args.bf16), sep="\n", flush=True)
        return
    results = []
    for shape in SHAPES:
        for dropout in (0.0, 0.1):
            times, parameters = measure(shape, dropout, args.rounds, device, args.bf16)
            medians = {name: statistics.median(values) for name, values in times.items()}
            fastest = min((name for name in medians if name != "resseq"), key=medians.__getitem__)
            row = {
                "shape": dict(zip(("dim", "depth", "heads", "length", "batch"), shape, strict=True)),
                "dropout": dropout,
                "parameters": parameters,
                "milliseconds": medians,
                "fastest_peer": fastest,
                "ratio_to_fastest_peer": {name: ratio(times, name, fastest) for name in times},
                "ratio_to_hugging_face": ratio(times, "resseq", "hugging face") if "hugging face" in times else None,
            }
            results.append(row)
            print(f"dim, depth, heads, L, B = {shape}, dropout {dropout}", flush=True)
            for name, value in medians.items():
                relative = row["ratio_to_fastest_peer"][name]
                print(f"  {name:14}{value:9.2f} ms  {relative:5.2f}  {parameters[name]:10,} parameters")
            if row["ratio_to_hugging_face"] is not None:
                print(f"  resseq / hugging face: {row['ratio_to_hugging_face']:.2f}", flush=True)
    if args.json:
        about = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if args.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "rounds": args.rounds,
            "precision": "bfloat16 autocast" if args.bf16 else "float32",
        }
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
