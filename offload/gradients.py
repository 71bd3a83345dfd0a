"""Gradients as optimizers take them: there are some of every leaf, and none that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_of(leaf: Tensor) -> Tensor:
    """Its gradient after the backward pass; zero where nothing was drawn."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class FiniteGradients:
    """Skips steps of which any gradient is NaN or infinite: they count as steps whose gradient is zero.

    Nobody waits for the device to know.
    """

    def __init__(self, device: torch.device) -> None:
        self._skipped = torch.zeros(2, dtype=torch.int32, device=device)  # so far; the last ones in a row

    def keep(self, gradients: Sequence[Tensor]) -> None:
        """Set all of a step's gradients to zero, in place, unless all their values are finite.

        A sum is finite only where all that it sums is; that of finite gradients does not overflow.

        Args:
            gradients: Of the leaves; those that have none, since nothing was drawn, are left out.
        """
        if not gradients:
            return
        finite = torch.stack([gradient.sum() for gradient in gradients]).isfinite().all()
        for gradient in gradients:
            gradient.masked_fill_(~finite, 0.0)
        self._skipped += ~finite
        self._skipped[1] *= ~finite

    def skipped_steps(self) -> tuple[int, int]:
        """How many steps have been skipped so far, and how many of those were the last in a row; waits."""
        total, in_a_row = self._skipped.tolist()
        return total, in_a_row
