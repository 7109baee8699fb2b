"""What launching costs a small model on a GPU: a step as it is, as one CUDA graph, and the sum of its kernels.

    python tests/benchmarks/cuda_graph.py [--rounds 50] [--json FILE]

The model is training_step.py's at its first shape: 12 layers, 64 wide, 64 texts of 24 tokens, dropout 0.1; float32. The
graph holds forward, backward and optimizer, and is fed by copying a batch into its inputs. A graph makes the step as
fast as its kernels where the second ratio is near 1; the goal is 2.

Result: none yet; it waits for a GPU.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_step import SHAPES, WARM_UP, build_peers, draw_batch, interleave

Step = Callable[..., None]


def build_step(model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=True)

    def step(ids: Tensor, mask: Tensor, labels: Tensor) -> None:
        F.cross_entropy(model(ids, mask), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def capture(step: Step, batch: tuple[Tensor, ...]) -> Step:
    """The step as one graph, for batches of this shape."""
    inputs = [each.clone() for each in batch]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*inputs)

    def replay(*batch: Tensor) -> None:
        for place, given in zip(inputs, batch, strict=True):
            place.copy_(given)
        graph.replay()

    return replay


def kernel_milliseconds(step: Step, batch: tuple[Tensor, ...], steps: int = 10) -> float:
    """The sum of the times that a step's kernels run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorder:
        for _ in range(steps):
            step(*batch)
        torch.cuda.synchronize()
    return sum(each.self_device_time_total for each in recorder.key_averages()) / steps / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="A small model's step on a GPU, with and without a CUDA graph.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    device, (*sizes, length, size) = torch.device("cuda"), SHAPES[0]

    def draw() -> tuple[Tensor, ...]:
        return draw_batch(length, size, device)

    eager, captured = (build_step(build_peers(*sizes, length, 0.1)["resseq"].to(device).train()) for _ in range(2))
    steps = {"as it is": eager, "one graph": capture(captured, draw())}
    times = interleave(list(steps), draw, lambda who, *batch: steps[who](*batch), args.rounds, device)
    medians = {who: statistics.median(each) for who, each in times.items()}
    kernels = kernel_milliseconds(eager, draw())
    print(f"kernels alone {kernels:.2f} ms")
    for who, value in medians.items():
        print(f"{who:10}{value:8.2f} ms, {value / kernels:.2f} of its kernels")
    if args.json:
        about = {"torch": torch.__version__, "device": torch.cuda.get_device_name(device), "rounds": args.rounds}
        args.json.write_text(json.dumps({**about, "kernels": kernels, "milliseconds": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
