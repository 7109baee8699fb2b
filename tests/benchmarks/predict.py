"""Sentences labelled in a second: resseq's Run.logits beside Hugging Face's pipeline on a BERT of the same size.

    RESSEQ_DATA=… python tests/benchmarks/predict.py [--texts 512] [--rounds 5] [--device cpu|cuda] [--json FILE]

Texts are those of TREC and IMDB as they come, each side with the same trained tokenizer, a batch of 32, cut at 256
tokens; dim 128, 6 layers, 4 heads, untrained weights, which cost what trained ones do. From text to probabilities:
tokenising is part of it. The pipeline pads a batch of texts in the order in which they come; resseq sorts them by
length and hands the answers back in order. Printed are medians over the rounds, in which the two take turns, and the
median of the ratios within a round.

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

from resseq.data.corpus import data_options, prepare
from resseq.data.text import load_text
from resseq.models import build_model
from resseq.options import TrainOptions
from resseq.run import Run

DIM, DEPTH, HEADS, LENGTH, BATCH = 128, 6, 4, 256, 32


def build_ours(options: TrainOptions, corpus, device: torch.device) -> Callable[[list[str]], object]:
    model = build_model(options, len(corpus.classes), **corpus.reader.shape).to(device).eval()
    run = Run(Path(), model, corpus.reader, options, corpus.classes, corpus.fingerprint, device)
    return lambda texts: run.logits(texts, BATCH).softmax(1).tolist()


def build_pipeline(corpus, device: torch.device) -> Callable[[list[str]], object]:
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, pipeline

    vocabulary = corpus.reader.tokenizer.get_vocab_size()
    config = BertConfig(
        vocab_size=vocabulary + 1,
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        max_position_embeddings=LENGTH,
        num_labels=len(corpus.classes),
        attn_implementation="sdpa",
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.reader.tokenizer, pad_token="[PAD]", model_max_length=LENGTH
    )
    labels = pipeline(
        "text-classification", model=BertForSequenceClassification(config), tokenizer=tokenizer, device=device
    )
    return lambda texts: labels(texts, batch_size=BATCH, truncation=True, top_k=None)


def measure(name: str, count: int, rounds: int, device: torch.device) -> dict:
    data = os.path.join(os.environ["RESSEQ_DATA"], name)
    options = TrainOptions(data=data, max_length=LENGTH, dim=DIM, depth=DEPTH, heads=HEADS)
    corpus = prepare(data_options(options))
    texts = load_text(data_options(options)).splits["test"].inputs
    texts = [texts[int(i)] for i in torch.randperm(len(texts))[:count]]
    sides = {"resseq": build_ours(options, corpus, device), "pipeline": build_pipeline(corpus, device)}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(rounds + 1):
        for side in sorted(sides, reverse=bool(i % 2)):
            start = perf_counter()
            sides[side](texts)
            if i:
                rates[side].append(len(texts) / (perf_counter() - start))
    ratio = statistics.median(a / b for a, b in zip(rates["resseq"], rates["pipeline"], strict=True))
    medians = {side: statistics.median(values) for side, values in rates.items()}
    return {"data": name, "texts": len(texts), "texts_per_second": medians, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description="Sentences labelled in a second.")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", nargs="+", default=["trec", "imdb"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for name in args.data:
        row = measure(name, args.texts, args.rounds, torch.device(args.device))
        results.append(row)
        ours, theirs = row["texts_per_second"].values()
        print(f"{name}: {ours:.0f} texts/s, pipeline {theirs:.0f}: {row['ratio']:.2f} times as many", flush=True)
    if args.json:
        about = {"torch": torch.__version__, "device": args.device, "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({**about, "rounds": args.rounds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
