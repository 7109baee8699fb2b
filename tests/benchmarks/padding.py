"""What padding costs: one training step on real lengths, resseq with and without it beside Hugging Face's BERT.

    RESSEQ_DATA=… python tests/benchmarks/padding.py [--rounds 5] [--dropout 0.1] [--device cpu|cuda] [--bf16]
        [--json FILE]

Texts are TREC's questions and IMDB's reviews, 8,000 BPE tokens, cut at 64 and at 256. Models, optimizer and places of
dropout are those of training_step.py. Batches come in two orders:

- random: the texts as a permutation gives them;
- sorted: 50 batches of a permutation sorted by length together and cut again, as `resseq train` does.

On a GPU, the masks of the packed batches stay on the CPU, as they must to be packed without waiting for it.

A round is the same 8 batches of each order for everyone: of the sorted pool every sixth or so, so that short and long
ones stand for all. Who goes first changes. Printed are the medians over the rounds of the milliseconds for one batch,
and of the ratios within a round to Hugging Face on the random and on the sorted batches.

Result: README.md beside this file.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor
from training_step import build_peers

from resseq.data.batching import POOL, collate
from resseq.data.corpus import prepare
from resseq.data.text import TextOptions

DATA = {"trec": (64, 12, 4, 64, 64), "imdb": (128, 6, 4, 256, 16)}  # dim, depth, heads, max_length, batch
BATCHES = 8
Batch = dict[str, Tensor]


def draw_batches(tokens, size: int) -> dict[str, list[Batch]]:
    """Batches of one permutation's first texts, in both orders."""
    order = torch.randperm(len(tokens))[: POOL * size]
    by_length = order[tokens.lengths[order].argsort(stable=True)]
    chosen = {"random": order.split(size), "sorted": by_length.split(size)}
    places = [int((i + 0.5) * len(chosen["random"]) / BATCHES) for i in range(BATCHES)]
    return {
        name: [collate([tokens[int(i)] for i in batches[place]]) for place in places]
        for name, batches in chosen.items()
    }


def padding(batches: list[Batch]) -> float:
    """Share of the places that are padding."""
    masks = [batch["mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def build_step(model, device: torch.device, bf16: bool) -> Callable[[Batch], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(batch["ids"], batch["mask"])
        F.cross_entropy(logits.float(), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[Batch], None], batches: list[Batch], device: torch.device, stays: tuple[str, ...]) -> float:
    """The time for all batches, of which all but what stays is on the device beforehand."""
    batches = [
        {name: value if name in stays else value.to(device) for name, value in batch.items()} for batch in batches
    ]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    for batch in batches:
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def measure(name: str, dropout: float, rounds: int, device: torch.device, bf16: bool) -> dict:
    """A row of the result: padding, milliseconds and ratios by runner, "who, which batches"."""
    *sizes, length, batch = DATA[name]
    options = TextOptions(data=os.path.join(os.environ["RESSEQ_DATA"], name), max_length=length)
    tokens = prepare(options).splits["train"]
    models = {f"resseq {how}": build_peers(*sizes, length, dropout)["resseq"] for how in ("padded", "packed")}
    models["resseq packed"].encoder.pack = True
    models["hugging face"] = build_peers(*sizes, length, dropout)["hugging face"]
    steps = {who: build_step(model.to(device).train(), device, bf16) for who, model in models.items()}
    runners = [(who, order) for who in steps for order in ("random", "sorted")]
    times: dict[str, list[float]] = {f"{who}, {order}": [] for who, order in runners}
    shares: dict[str, list[float]] = {"random": [], "sorted": []}
    for i in range(rounds + 1):
        batches = draw_batches(tokens, batch)
        for who, order in runners[i % len(runners) :] + runners[: i % len(runners)]:
            spent = seconds(steps[who], batches[order], device, ("mask",) if who == "resseq packed" else ())
            if i:  # the first round warms up
                times[f"{who}, {order}"].append(spent)
        for order in shares:
            shares[order].append(padding(batches[order]))

    def ratios(to: str) -> dict[str, float]:
        return {
            who: statistics.median(a / b for a, b in zip(values, times[to], strict=True))
            for who, values in times.items()
        }

    return {
        "data": name,
        "shape": dict(zip(("dim", "depth", "heads", "max_length", "batch"), DATA[name], strict=True)),
        "dropout": dropout,
        "padding": {order: statistics.mean(values) for order, values in shares.items()},
        "milliseconds": {who: statistics.median(values) / BATCHES * 1e3 for who, values in times.items()},
        "ratio_to_hugging_face_random": ratios("hugging face, random"),
        "ratio_to_hugging_face_sorted": ratios("hugging face, sorted"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="One training step with and without padding, on real lengths.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    about = {"torch": torch.__version__, "device": args.device, "threads": torch.get_num_threads()}
    results = []
    for name in DATA:
        row = measure(name, args.dropout, args.rounds, torch.device(args.device), args.bf16)
        results.append(row)
        print(name, row["shape"], {order: f"{share:.0%} padding" for order, share in row["padding"].items()})
        for who, value in row["milliseconds"].items():
            random, by_length = row["ratio_to_hugging_face_random"][who], row["ratio_to_hugging_face_sorted"][who]
            print(f"  {who:22}{value:9.1f} ms   {random:5.2f} of random, {by_length:5.2f} of sorted", flush=True)
    if args.json:
        args.json.write_text(json.dumps({**about, "rounds": args.rounds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
