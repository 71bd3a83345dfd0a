"""Tensors to and from the native module, which takes and returns NumPy arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def array(t: Tensor | None) -> np.ndarray | None:
    """Return a CPU tensor's memory as a C-contiguous array; a copy only where the tensor is not contiguous."""
    return None if t is None else t.detach().contiguous().numpy()


def tensor(a: np.ndarray) -> Tensor:
    """Return an array's memory as a tensor."""
    return torch.from_numpy(a)


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros of the type of `like`.

    The system provides them page by page as native threads first touch them, where torch.zeros writes them all
    beforehand.
    """
    return torch.from_numpy(np.zeros(tuple(shape), dtype=like.detach().numpy().dtype))
