"""Gradients as optimizers take them: there are some of every leaf, and none that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from offload.backends import kernels_for


def gradient_of(leaf: Tensor) -> Tensor:
    """Return its gradient after the backward pass; zero where nothing was drawn."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class FiniteGradients:
    """Skips steps of which any gradient is NaN or infinite: they count as steps whose gradient is zero.

    Nobody waits for the device to know.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernels = kernels_for(device, __name__)
        self._calls = 0  # of `keep`
        # So far; the last ones in a row; the call that skipped the last one. The last spares clearing a mark.
        self._skipped = torch.zeros(3, dtype=torch.int32, device=device)

    def keep(self, leaves: Iterable[Tensor], ids: Tensor | None = None) -> None:
        """Set all of a step's gradients to zero, in place, unless all their values are finite.

        Args:
            leaves: Their gradients are contiguous; those that have none, since nothing was drawn, are left out.
            ids: int64 [V], the rows that may have values other than zero; None: all rows. They may repeat.
        """
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        if gradients:
            self._calls += 1
            self._kernels.clear_unless_finite(gradients, ids, self._skipped, self._calls)

    def skipped_steps(self) -> tuple[int, int]:
        """Count the steps skipped so far, and those of them that were the last in a row; waits."""
        total, in_a_row, _ = self._skipped.tolist()
        return total, in_a_row


def clear_unless_finite(gradients: Sequence[Tensor], ids: Tensor | None, skipped: Tensor, call: int) -> None:
    """Set gradients to zero, in place, unless all their values are finite.

    Args:
        gradients: [N, ...] each.
        ids: int64 [V], the rows to look at and to clear; None: all rows.
        skipped: int32 [3] of `FiniteGradients`, to be kept.
        call: Which call this is, from 1.
    """
    rows = gradients if ids is None else [gradient[ids] for gradient in gradients]
    # NaN goes through minimum and maximum, which unlike `isfinite` take no memory.
    if all(math.isfinite(end) for values in rows if values.numel() for end in map(float, values.aminmax())):
        skipped[1] = 0
        return
    for gradient in gradients:
        gradient.zero_() if ids is None else gradient.index_fill_(0, ids, 0.0)
    skipped += 1
    skipped[2] = call
