"""Levelling: where densification has made one rank fuller than its share, rows move to the others.

Rows go with their moments, between steps, some at a time. Each rank keeps what it sends until all have what they
receive: where one of them finds no memory for it, nobody has lost anything and all is as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed.dealing import BLOCK_ROWS
from distributed.mesh import Ranks
from errors import InputError
from offload.models.contract import GaussianModel

MOST = 1.1  # of its share that the fullest rank may hold
MOVED_ROWS = 1 << 18  # at most, from a rank to another at once: 0.2 GB of rows
_SPREAD = 0.6180339887  # multiples of the golden ratio modulo 1 lie evenly, however many


def level(model: GaussianModel, ranks: Ranks) -> bool:
    """Move rows between ranks, which call this at once, where the fullest holds 10 % more than its share.

    Rows that leave are blocks from everywhere in a rank's order, and those that come are appended.

    Args:
        model: What this rank holds.
        ranks: All of them.

    Returns:
        Whether rows have moved; also False where memory was lacking.
    """
    counts = ranks.gather(model.num_gaussians)
    wanted = shared_out(sum(counts), ranks.shares)
    if all(count <= max(MOST * share, share + 1) for count, share in zip(counts, wanted, strict=True)):
        return False
    moves = moves_between(counts, wanted)
    here, num_before = ranks.rank, model.num_gaussians
    leaving = _spread_rows(num_before, sum(moves[here]))
    parts = leaving.split(moves[here])  # by the rank that they go to
    failure = False
    for first in range(0, max(map(max, moves)), MOVED_ROWS):
        sent = [part[first : first + MOVED_ROWS] for part in parts]
        received = [min(max(row[here] - first, 0), MOVED_ROWS) for row in moves]
        rows = model.moving_rows(torch.cat(sent).to(model.device))
        came = {key: _sent_on(values, ranks, [len(ids) for ids in sent], received) for key, values in rows.items()}
        if not failure and sum(received) > 0:
            try:
                model.append_rows(came)
            except (torch.cuda.OutOfMemoryError, MemoryError, InputError):  # of the device, the host, pinned memory
                failure = True
    if ranks.any(failure):
        model.truncate(num_before)
        return False
    stays = torch.ones(model.num_gaussians, dtype=torch.bool)
    stays[leaving] = False
    model.keep(stays.nonzero().squeeze(1).to(model.device))
    return True


def shared_out(count: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers in the proportion of the shares, which add up to 1; the numbers add up to the count."""
    ends = [round(count * sum(shares[: rank + 1])) for rank in range(len(shares))]
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def moves_between(counts: Sequence[int], wanted: Sequence[int]) -> list[list[int]]:
    """Return how many rows each rank sends to each other, [W][W], that all may have what is wanted.

    Args:
        counts: W numbers of rows.
        wanted: W numbers with the same sum.
    """
    moves = [[0] * len(counts) for _ in counts]
    over = [count - share for count, share in zip(counts, wanted, strict=True)]
    source = target = 0
    while True:
        while source < len(over) and over[source] <= 0:
            source += 1
        while target < len(over) and over[target] >= 0:
            target += 1
        if source == len(over) or target == len(over):
            return moves
        moved = min(over[source], -over[target])
        moves[source][target] += moved
        over[source] -= moved
        over[target] += moved


def _spread_rows(num_rows: int, count: int) -> Tensor:
    """Return so many of the rows, ascending: blocks that lie evenly among them, the last of them in part."""
    rows = torch.arange(num_rows)
    order = (rows // BLOCK_ROWS * _SPREAD % 1).argsort(stable=True)
    return order[:count].sort().values


def _sent_on(values: Tensor, ranks: Ranks, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Exchange rows [S, ...] of any type for rows [R, ...]; they travel as bytes."""
    rows = values.to(ranks.device).contiguous()
    shape = rows.shape[1:]
    flat = rows.view(len(rows), shape.numel()).view(torch.uint8)
    came = ranks.all_to_all(flat, sent, received)
    return came.view(rows.dtype).view(len(came), *shape)
