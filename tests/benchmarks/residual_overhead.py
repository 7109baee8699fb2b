"""What the wrapper costs: Residual(f, pre=norm) beside the same line written by hand, x + f(norm(x)).

    python tests/benchmarks/residual_overhead.py [--repeats 300] [--json FILE]

1. Microseconds more per call, with nn.Identity for f and norm, so that only the wrapper counts.
2. Forward and backward through 6 residuals of width 256, each a Linear behind a LayerNorm, batch 32 × 16: the ratio.
3. The same compiled with fullgraph=True: which operations the two captured graphs do not share, and the ratio. The
   backend is torch's own, inductor; where it does not work (it needs a C++ compiler) it is aot_eager, and that is said.

On a CPU, in float32. Both sides are timed in turn, and the one that goes first changes; the figure is the median of
the paired differences or ratios, with the quartiles in brackets. OMP_NUM_THREADS sets the number of threads.

Result
------
One thread, torch 2.13, 100 repeats: residual_overhead.json beside this file, and the README's "What it costs".
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from resseq import Residual

RESIDUALS, DIM, BATCH, LENGTH = 6, 256, 32, 16
CALLS = 200  # in one timing of the wrapper alone, which is too short for the clock


class ByHand(nn.Module):
    def __init__(self, f: nn.Module, norm: nn.Module):
        super().__init__()
        self.f, self.norm = f, norm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x))


def time_pairs(ours: Callable[[], None], by_hand: Callable[[], None], repeats: int) -> list[tuple[float, float]]:
    """Seconds of both, one pair for each repeat."""
    pairs = []
    for i in range(repeats + 5):
        seconds = {}
        for run in (ours, by_hand) if i % 2 else (by_hand, ours):
            start = perf_counter()
            run()
            seconds[run] = perf_counter() - start
        pairs.append((seconds[ours], seconds[by_hand]))
    return pairs[5:]  # the first ones warm up


def summarise(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def call_overhead(repeats: int) -> dict[str, float]:
    """Microseconds that one call of the wrapper takes more."""
    x = torch.ones(1)

    def calls(module: nn.Module) -> Callable[[], None]:
        def run():
            for _ in range(CALLS):
                module(x)

        return run

    pairs = time_pairs(
        calls(Residual(nn.Identity(), pre=nn.Identity())), calls(ByHand(nn.Identity(), nn.Identity())), repeats
    )
    return summarise([(ours - by_hand) / CALLS * 1e6 for ours, by_hand in pairs])


def build_models() -> tuple[nn.Module, nn.Module]:
    """Two models of the same weights, ours and the one by hand."""
    parts = [(nn.Linear(DIM, DIM), nn.LayerNorm(DIM)) for _ in range(RESIDUALS)]
    ours = nn.Sequential(*(Residual(linear, pre=norm) for linear, norm in parts))
    by_hand = nn.Sequential(*(ByHand(linear, norm) for linear, norm in parts))
    x = torch.randn(BATCH, LENGTH, DIM)
    assert torch.equal(ours(x), by_hand(x)), "both sides must compute the same"
    return ours, by_hand


def step_ratio(ours: nn.Module, by_hand: nn.Module, repeats: int) -> dict[str, float]:
    """Forward and backward: time of ours over the time of the one by hand."""
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)

    def step(model: nn.Module) -> Callable[[], None]:
        wanted = [x, *model.parameters()]

        def run():
            torch.autograd.grad(model(x).sum(), wanted)

        return run

    return summarise([a / b for a, b in time_pairs(step(ours), step(by_hand), repeats)])


def choose_backend() -> str:
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(2))
        return "inductor"
    except Exception as error:  # its class differs between versions of torch
        print(f"inductor does not work here ({type(error).__name__}): compiled with aot_eager instead")
        torch.compiler.reset()
        return "aot_eager"


def compile_both(*models: nn.Module) -> tuple[str, list[nn.Module], list[Counter]]:
    """The backend's name, the compiled models, and the operations of each captured graph with their counts."""
    name = choose_backend()
    backend = torch._dynamo.lookup_backend(name)
    compiled_models, operations = [], []
    for model in models:
        captured = []

        def record(graph: torch.fx.GraphModule, inputs: list, captured: list = captured):
            captured.append(Counter(_operation(graph, node) for node in graph.graph.nodes if node.op in CALL_OPS))
            return backend(graph, inputs)

        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=record)
        compiled(torch.randn(BATCH, LENGTH, DIM, requires_grad=True)).sum().backward()
        assert len(captured) == 1, f"one graph per model; got {len(captured)}"
        compiled_models.append(compiled)
        operations.append(captured[0])
    return name, compiled_models, operations


CALL_OPS = ("call_function", "call_module", "call_method")


def _operation(graph: torch.fx.GraphModule, node: torch.fx.Node) -> str:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))


def main() -> None:
    parser = argparse.ArgumentParser(description="What the wrapper costs beside the same line written by hand.")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "repeats": args.repeats}

    call = result["microseconds_per_call"] = call_overhead(args.repeats)
    print(f"wrapper alone: {call['median']:+.2f} µs per call [{call['low']:+.2f}, {call['high']:+.2f}]")

    ours, by_hand = build_models()
    step = result["eager_ratio"] = step_ratio(ours, by_hand, args.repeats)
    print(_percent("forward and backward, eager", step))

    result["backend"], compiled, (a, b) = compile_both(ours, by_hand)
    result["operations"] = {"ours": dict(a), "by_hand": dict(b)}
    result["different_operations"] = {name: a[name] - b[name] for name in a | b if a[name] != b[name]}
    print(
        f"operations of the captured graphs: {dict(b)} by hand; differences: {result['different_operations'] or 'none'}"
    )
    step = result["compiled_ratio"] = step_ratio(*compiled, args.repeats)
    print(_percent(f"forward and backward, compiled with {result['backend']}", step))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _percent(what: str, ratio: dict[str, float]) -> str:
    median, low, high = (100 * (ratio[key] - 1) for key in ("median", "low", "high"))
    return f"{what}: {median:+.1f} % [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
