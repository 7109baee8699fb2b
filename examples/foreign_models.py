"""Diagnostics of networks that know nothing of resseq: torch's own encoder, and a BERT of Hugging Face's.

    python examples/foreign_models.py

prints a table each: what every layer does to the stream and the gradient, and how far the output moves when the layer
is deleted. Random weights, a few seconds (transformers has to be installed).

A layer's deletion turns the encoder's output by 0.13 to 0.34 (1 - cosine), BERT's by 0.0004 to 0.0006.
"""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from resseq.diagnostics import inspect, lesion_curve

DIM, DEPTH, HEADS = 64, 6, 4


def stream(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


def look(model: nn.Module, x: Tensor, blocks: str):
    """Statistics and lesions, the measure being the output's cosine with that of the whole model."""
    with torch.no_grad():
        whole = stream(model(x))

        def likeness(model: nn.Module) -> float:
            return torch.cosine_similarity(stream(model(x)), whole, dim=-1).mean().item()

        report = lesion_curve(model, likeness, blocks=blocks)
    return inspect(model, x, blocks=blocks) + report


def main(depth: int = DEPTH) -> dict:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, batch_first=True), depth)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:  # torch starts all layers as copies of one
            nn.init.xavier_uniform_(parameter)
    config = BertConfig(
        vocab_size=100,
        hidden_size=DIM,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
    )
    models = {
        "nn.TransformerEncoder": (encoder, torch.randn(8, 16, DIM), "layers.*"),
        "Hugging Face's BERT": (BertModel(config), torch.randint(100, (8, 16)), "encoder.layer.*"),
    }
    return {name: look(model.eval(), x, blocks) for name, (model, x, blocks) in models.items()}


if __name__ == "__main__":
    for name, report in main().items():
        print(name, report.text, *report.verdict, "", sep="\n")
