"""The rows that culling has found for a view, and their way to the host."""

from __future__ import annotations

from collections.abc import Callable
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
        return VisibleRows.arriving(ids)()

    @staticmethod
    def arriving(ids: Tensor) -> Callable[[], VisibleRows]:
        """Send ids [V] to the host, on the current stream; return what waits there, on any thread, until they came."""
        arrived = arriving(ids)
        return lambda: VisibleRows(ids, arrived())


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the host, when it has arrived there."""
    return arriving(tensor)()


def arriving(tensor: Tensor) -> Callable[[], Tensor]:
    """Send a tensor to the host, on the current stream, through pinned memory, which torch keeps.

    Returns:
        What waits, on any thread, until it has arrived, and returns it.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    sent = torch.cuda.current_stream(tensor.device).record_event()

    def arrived() -> Tensor:
        sent.synchronize()
        return copy

    return arrived
