"""The rows that culling has found for a view, and their way to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class VisibleRows:
    """Name the rows that a view needs."""

    ids: Tensor  # [V] int64, sorted, where geometry is
    host_ids: Tensor  # [V] the same on the host

    @staticmethod
    def of(ids: Tensor) -> VisibleRows:
        """Bring ids [V] to the host as well; waits for them."""
        return VisibleRows(ids, to_host(ids))


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the host, when it has arrived there: through pinned memory, which torch keeps."""
    if not tensor.is_cuda:
        return tensor
    copy = tensor.to("cpu", non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copy
