"""What autograd keeps of a forward pass until the backward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[int, int]]:
    """Address and bytes of each storage that autograd keeps, without the parameters.

    The graph holds them, so that no address is used again as long as the output lives.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
