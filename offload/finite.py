"""Keeps gradients that are not finite away from parameters and moments, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FiniteGradients:
    """Skips steps of which any gradient is NaN or infinite: they count as steps whose gradient is zero."""

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
