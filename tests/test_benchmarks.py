"""Every benchmark runs, at the smallest size that it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
SMALLEST = {
    "activation_memory": "--depths 1",
    "bert_base": "--device cpu --layers 1 --dim 64 --rounds 1",
    "padding": "--rounds 1",
    "predict": "--texts 4 --rounds 1 --data trec",
    "residual_overhead": "--repeats 2",
    "resnet_step": "--size 32 --batch 2 --rounds 1",
    "reversible_error": "",
    "schemes": "--schemes pre post --rounds 1",
    "seeds_together": "--seeds 2 --rounds 1",
    "training_step": "--rounds 1",
}


def test_each_has_a_smallest_size():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALLEST, "cuda_graph"}  # which takes a GPU


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs(name):
    if name in ("bert_base", "padding", "predict") and "RESSEQ_DATA" not in os.environ:
        pytest.skip("needs RESSEQ_DATA")
    subprocess.run([sys.executable, FOLDER / f"{name}.py", *SMALLEST[name].split()], check=True)
