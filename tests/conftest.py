import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: their threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)
