"""A training step at BERT-base's size on a GPU: resseq padded, packed and compiled, beside Hugging Face's BERT (sdpa).

    python tests/benchmarks/bert_base.py [--rounds 10] [--device cuda|cpu] [--layers 12] [--dim 768] [--json FILE]

768 wide, 12 layers, 12 heads, bfloat16 autocast, dropout 0.1; model, step, optimizer and places of dropout are those of
training_step.py. Texts are as long as MR's sentences (in batches of 64) and
as IMDB's reviews cut at 512 tokens (in batches of 16), in random order, each batch padded to its longest.

- resseq padded, resseq packed: the same model; the second gets its masks on the CPU.
- resseq compiled: padded, each residual compiled by itself with dynamic shapes; the first step's seconds stand apart.

Printed are the medians of a step's milliseconds, of the ratios within a round to Hugging Face, and the share of the
measured rate of bfloat16 matrix products that the arithmetic of the real tokens alone makes use of. Then, on a GPU, the
lines of code at which a step waits for the device (torch.cuda.set_sync_debug_mode).

Result: none yet; it waits for a GPU. With --device cpu --dim 48 --layers 2 it runs anywhere, for a look.
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from training_step import CLASSES, VOCABULARY, build_peers, interleave, ratio, take_step

# tokens of a text at each twentieth of the texts, from the shortest to the longest; 8,000 BPE tokens
MR = [1, 9, 12, 14, 16, 18, 19, 21, 23, 24, 26, 27, 29, 30, 32, 34, 37, 39, 43, 47, 80]
IMDB = [12, 85, 121, 144, 155, 165, 175, 186, 199, 214, 229, 247, 269, 298, 333, 374, 427, 494, 512, 512, 512]
SETS = {"mr, up to 128": (MR, 128, 64), "imdb, up to 512": (IMDB, 512, 16)}  # lengths, places, batch


def draw_batch(quantiles: list[int], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of texts that are as long as those of the quantiles."""
    place = torch.rand(batch) * (len(quantiles) - 1)
    below = torch.tensor(quantiles[:-1])[place.long()]
    above = torch.tensor(quantiles[1:])[place.long()]
    lengths = torch.lerp(below.float(), above.float(), place.frac()).round().long()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.randint(1, VOCABULARY, mask.shape) * mask, mask, torch.randint(CLASSES, (batch,))


def operations(dim: int, layers: int, lengths: Tensor) -> float:
    """Floating-point operations of a step on texts of these lengths: forward, and twice that backward."""
    per_token = 2 * 12 * dim**2 * lengths.sum() + 4 * dim * lengths.square().sum()
    return 3 * layers * float(per_token)


def matrix_rate(device: torch.device, size: int) -> float:
    """Operations a second of a product of two square matrices in bfloat16, the median of 20."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    times = interleave(["product"], lambda: (), lambda _: a @ a, 20, device)["product"]
    return 2 * size**3 / statistics.median(times) * 1e3


def waits(step, batch: tuple[Tensor, ...]) -> list[str]:
    """Where a step waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(*batch)
    torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]


def measure(name: str, dim: int, layers: int, rounds: int, device: torch.device) -> dict:
    quantiles, places, size = SETS[name]
    heads = dim // 64 or 1

    def build(peer: str) -> nn.Module:
        return build_peers(dim, layers, heads, places, 0.1)[peer].to(device).train()

    models = {f"resseq {how}": build("resseq") for how in ("padded", "packed", "compiled")}
    models["hugging face"] = build("hugging face")
    models["resseq packed"].encoder.pack = True
    for residual in models["resseq compiled"].encoder.residuals:
        residual.compile(dynamic=True)
    optimizers = {who: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for who, model in models.items()}
    lengths: list[Tensor] = []

    def draw() -> tuple[Tensor, ...]:
        ids, mask, labels = draw_batch(quantiles, size)
        lengths.append(mask.sum(1))
        return ids.to(device), mask.to(device), labels.to(device), mask

    def step(who: str, ids: Tensor, mask: Tensor, labels: Tensor, mask_on_cpu: Tensor) -> None:
        seen = mask_on_cpu if who == "resseq packed" else mask
        take_step(models[who], optimizers[who], (ids, seen, labels), bf16=True)

    begun = perf_counter()
    step("resseq compiled", *draw())
    seconds = perf_counter() - begun
    lengths.clear()
    times = interleave(list(models), draw, step, rounds, device)
    work = statistics.mean(operations(dim, layers, each) for each in lengths)
    rate = matrix_rate(device, 8192 if device.type == "cuda" else 512)
    row = {
        "texts": name,
        "padding": 1 - statistics.mean(float(each.sum() / (each.max() * len(each))) for each in lengths),
        "milliseconds": {who: statistics.median(each) for who, each in times.items()},
        "ratio_to_hugging_face": {who: ratio(times, who, "hugging face") for who in times},
        "matrix_rate": rate,
        "share_of_matrix_rate": {who: work / (statistics.median(each) / 1e3) / rate for who, each in times.items()},
        "compile_seconds": seconds,
    }
    if device.type == "cuda":
        batch = draw()
        row["waits"] = {who: waits(lambda *given, who=who: step(who, *given), batch) for who in models}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step at BERT-base's size beside Hugging Face's BERT.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    device, results = torch.device(args.device), []
    for name in SETS:
        row = measure(name, args.dim, args.layers, args.rounds, device)
        results.append(row)
        print(f"{name}, {row['padding']:.0%} padding; compiled in {row['compile_seconds']:.0f} s")
        for who, value in row["milliseconds"].items():
            waits_at = f"; waits at {', '.join(row['waits'][who]) or 'no line'}" if "waits" in row else ""
            print(
                f"  {who:18}{value:9.2f} ms {row['ratio_to_hugging_face'][who]:6.2f} of Hugging Face's, "
                f"{row['share_of_matrix_rate'][who]:.0%} of the matrix rate{waits_at}",
                flush=True,
            )
    if args.json:
        where = torch.cuda.get_device_name(device) if args.device == "cuda" else "cpu"
        about = {"torch": torch.__version__, "device": where, "rounds": args.rounds}
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
