"""A training step of every scheme beside pre-norm's: eager, compiled, and the time that compiling takes.

    python tests/benchmarks/schemes.py [--rounds 15] [--compile] [--schemes NAME …] [--device cpu] [--json FILE]

A TransformerEncoder of 4 layers, 256 wide, 4 heads, batch 8 × 64: forward, backward and a fused AdamW step. All schemes
take their turn in every round, in an order that turns with it; the figure is the median over the rounds of the ratio to
the same round's "pre". With --compile every encoder is compiled whole (fullgraph, inductor) in its turn, with an empty
cache; "pre" is compiled once.

On a GPU: python tests/benchmarks/schemes.py --compile --device cuda --json FILE
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch._inductor.utils import fresh_cache

from resseq import SCHEMES, TransformerEncoder

DEPTH, DIM, HEADS, SHAPE = 4, 256, 4, (8, 64, 256)


def step_of(scheme: str, device: str, compiled: bool) -> tuple[Callable[[], float], float]:
    """A function that takes a step and gives its seconds, and what the first step took."""
    torch._dynamo.reset()
    model = TransformerEncoder(DIM, DEPTH, HEADS, scheme=scheme).to(device)
    run = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    x = torch.randn(SHAPE, device=device)

    def step() -> float:
        start = perf_counter()
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        return perf_counter() - start

    if not compiled or scheme == "pre":
        return step, step()
    with fresh_cache():  # every scheme compiles all of its code
        return step, step()


def compare(names: list[str], device: str, compiled: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Of each scheme: milliseconds of a step, its ratio to pre's in the same round, seconds of the first step."""
    steps, first = {}, {}
    for name in names:
        steps[name], first[name] = step_of(name, device, compiled)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 2):
        turned = names[i % len(names) :] + names[: i % len(names)]
        for name in turned:
            seconds = steps[name]()
            if i > 1:
                times[name].append(seconds)
    return {
        name: {
            "milliseconds": 1000 * statistics.median(times[name]),
            "ratio": statistics.median(ours / pre for ours, pre in zip(times[name], times["pre"], strict=True)),
            "first_step_seconds": first[name],
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = list(dict.fromkeys(["pre", *options.schemes]))
    found = {"eager": compare(names, options.device, False, options.rounds)}
    if options.compile:
        found["compiled"] = {}
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            for name in names[1:]:  # two at a time: thirty compiled nets at once fill the memory
                pair = compare(["pre", name], options.device, True, options.rounds)
                found["compiled"] |= {each: pair[each] for each in pair if each not in found["compiled"]}
    for kind, rows in found.items():
        print(f"{kind}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for name, row in rows.items():
            print(
                f"  {name:14} {row['milliseconds']:7.1f} ms  {row['ratio']:5.2f} × pre  "
                f"first step {row['first_step_seconds']:5.1f} s"
            )
    if options.json:
        options.json.write_text(
            json.dumps({"shape": SHAPE, "depth": DEPTH, "torch": torch.__version__, **found}, indent=1)
        )


if __name__ == "__main__":
    main()
