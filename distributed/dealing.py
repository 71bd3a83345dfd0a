"""Which Gaussians a rank holds at first: blocks of rows in Morton order, dealt in turn.

Neighbours in memory are neighbours in space, so that rows of a view lie in runs; blocks that are dealt in turn lie
everywhere, so that every rank holds about its share of what any camera sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_ROWS = 256


def dealt_rows(num_rows: int, rank: int, proportions: Sequence[int]) -> Tensor:
    """Return the rows [M] int64, ascending, of N in Morton order that a rank holds.

    Args:
        num_rows: N.
        rank: Which rank.
        proportions: How many blocks each rank gets in a round.
    """
    # In a round the blocks of a rank lie as far from one another as they can.
    turns = [((turn + 0.5) / share, rank) for rank, share in enumerate(proportions) for turn in range(share)]
    ranks = torch.tensor([rank for _, rank in sorted(turns)])  # of the blocks of a round
    blocks = torch.arange(num_rows) // BLOCK_ROWS
    return (ranks[blocks % len(ranks)] == rank).nonzero().squeeze(1)
