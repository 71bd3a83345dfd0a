"""Choices among the rows of all ranks that come out as one process would make them."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed.mesh import Ranks


def largest_within(values: Tensor, weights: Tensor, room: int, ranks: Ranks | None = None) -> Tensor:
    """Choose rows by their values, largest first, as long as their weights add up to no more than there is room for.

    Of equal values the first row comes first, and rank by rank. Ranks call this at once; all that travels are sums.

    Args:
        values: [N] float32, not negative; of this rank's rows.
        weights: [N] int64, not negative.
        room: Bound of the sum, over all ranks.
        ranks: None: there is this process only.

    Returns:
        [N] bool.
    """

    def total(chosen: Tensor) -> int:
        return sum(_gathered(int(weights[chosen].sum()), ranks))

    bits = values.contiguous().view(torch.int32)  # which are in the order of the values
    # The least threshold above which the rows have room: bisected, so that nothing is sorted or sent.
    below, threshold = -2, torch.iinfo(torch.int32).max
    if total(bits >= 0) <= room:
        return torch.ones_like(bits, dtype=torch.bool)
    while threshold - below > 1:
        middle = (below + threshold) // 2
        if total(bits > middle) <= room:
            threshold = middle
        else:
            below = middle
    above, equal = bits > threshold, (bits == threshold).nonzero().squeeze(1)
    taken, of_equal = total(above), _gathered(int(weights[equal].sum()), ranks)
    taken += sum(of_equal[: 0 if ranks is None else ranks.rank])
    above[equal] = taken + weights[equal].cumsum(dim=0) <= room
    return above


def _gathered(value: int, ranks: Ranks | None) -> list[int]:
    return [value] if ranks is None else ranks.gather(value)
