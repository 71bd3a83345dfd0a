"""Levelling: where densification has made one rank fuller than its share, rows move to the others.

Rows go with their moments, between steps, some at a time. Each rank asks for the memory that a part of them takes
before any rank sends it, and keeps what it sends until all have what they receive: where one of them finds no memory,
nobody has lost anything, all is as before, and one sentence says so. Only a rank that cannot even remove what it has
sent, which takes next to no memory, leaves Gaussians at two ranks: that ends training, and must not be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from distributed.dealing import BLOCK_ROWS
from distributed.mesh import Ranks
from errors import InputError, reason
from offload.models.contract import GaussianModel

MOST = 1.1  # of its share that the fullest rank may hold
MOVED_ROWS = 1 << 18  # at most, from a rank to another at once: 0.2 GB of rows
NO_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError, InputError)  # of the device, the host, pinned memory
BESIDE = "beside/"  # before the names of what is kept beside the model, while it travels
_SPREAD = 0.6180339887  # multiples of the golden ratio modulo 1 lie evenly, however many


class HeldTwice(MemoryError):
    """Say that rows have come to a rank and are still at the one that has sent them, which must not be saved."""


def level(model: GaussianModel, ranks: Ranks, beside: MutableMapping[str, Tensor] | None = None) -> bool:
    """Move rows between ranks, which call this at once, where the fullest holds 10 % more than its share.

    Rows that leave are blocks from everywhere in a rank's order, and those that come are appended.

    Args:
        model: What this rank holds.
        ranks: All of them.
        beside: Tensors [N, ...], of the same names everywhere, that are kept beside the model and of which each row
            goes where its Gaussian goes; they are replaced by those that fit the model. None: there are none.

    Returns:
        Whether rows have moved; also False where memory was lacking.

    Raises:
        HeldTwice: At all ranks, since one cannot remove what it has sent.
    """
    beside = {} if beside is None else beside
    counts = ranks.gather(model.num_gaussians)
    wanted = shared_out(sum(counts), ranks.shares)
    if all(count <= max(MOST * share, share + 1) for count, share in zip(counts, wanted, strict=True)):
        return False
    moves = moves_between(counts, wanted)
    num_before = model.num_gaussians
    leaving = _spread_rows(num_before, sum(moves[ranks.rank]))
    with _as_before(model, num_before):
        followed, failures = _moved(model, ranks, beside, leaving, moves)
    if failures:
        model.truncate(num_before)
        tqdm.write(
            f"Warning: Gaussians do not move to where there are fewer, for lack of memory at {failures[0]}: training "
            "goes on, and each rank keeps its own."
        )
        return False
    failure: str | None = None
    try:
        stays = torch.ones(model.num_gaussians, dtype=torch.bool)
        stays[leaving] = False
        kept = stays.nonzero().squeeze(1)
        model.keep(kept.to(model.device))
        beside.update({name: values[kept.to(values.device)] for name, values in followed.items()})
    except Exception as error:  # of whatever kind: other ranks have removed theirs
        failure = reason(error)
    failures = _told_by_all(failure, ranks)
    if failures:
        raise HeldTwice(
            f"Gaussians that have moved to where there are fewer could not be removed at {failures[0]}, so what there "
            "is now is not saved."
        )
    return True


@contextmanager
def _as_before(model: GaussianModel, num_before: int) -> Iterator[None]:
    """Remove what has been appended to the first rows where an error comes, as that another rank has ended."""
    try:
        yield
    except Exception:
        model.truncate(num_before)
        raise


def _moved(
    model: GaussianModel, ranks: Ranks, beside: Mapping[str, Tensor], leaving: Tensor, moves: Sequence[Sequence[int]]
) -> tuple[dict[str, Tensor], list[str]]:
    """Send rows and append those that come; nothing is removed.

    Args:
        model: What this rank holds.
        ranks: All of them.
        beside: As `level`.
        leaving: int64 [S] on the host, the rows that leave, in the order of the ranks that they go to.
        moves: [W][W] rows that each rank sends to each other.

    Returns:
        What is beside all rows now, and a sentence on each rank at which memory was lacking.
    """
    here, followed = ranks.rank, dict(beside)
    parts = leaving.split(moves[here])  # by the rank that they go to
    failure: str | None = None
    for first in range(0, max(map(max, moves)), MOVED_ROWS):
        sent = [part[first : first + MOVED_ROWS] for part in parts]
        received = [min(max(row[here] - first, 0), MOVED_ROWS) for row in moves]
        parcels: list[_Parcel] = []
        try:
            if failure is None:
                moving = torch.cat(sent)
                rows = model.moving_rows(moving.to(model.device))
                rows.update({BESIDE + name: values[moving.to(values.device)] for name, values in beside.items()})
                parcels = [_Parcel.of(key, values, ranks.device, sum(received)) for key, values in rows.items()]
        except NO_MEMORY as error:
            failure = reason(error)
        if ranks.any(failure is not None):
            break
        came = {parcel.key: parcel.sent_on(ranks, [len(ids) for ids in sent], received) for parcel in parcels}
        try:
            for name, values in followed.items():
                followed[name] = torch.cat([values, came.pop(BESIDE + name).to(values.device)])
            if sum(received) > 0:
                model.append_rows(came)
        except NO_MEMORY as error:
            failure = reason(error)
    return followed, _told_by_all(failure, ranks)


def _told_by_all(failure: str | None, ranks: Ranks) -> list[str]:
    """Return which ranks have failed, and why; all ranks call this at once, with what they have to tell themselves."""
    return [f"rank {rank} ({said})" for rank, said in enumerate(ranks.gather(failure)) if said is not None]


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


@dataclass(frozen=True)
class _Parcel:
    """Hold rows of any type as bytes on a rank's device, and memory for those that it receives of them."""

    key: str
    dtype: torch.dtype
    shape: torch.Size  # of a row
    sent: Tensor  # [S, bytes of a row] uint8
    received: Tensor  # [R, bytes of a row] uint8

    @staticmethod
    def of(key: str, values: Tensor, device: torch.device, num_received: int) -> _Parcel:
        """Pack rows [S, ...], and ask for memory for others."""
        rows, shape = values.to(device).contiguous(), values.shape[1:]
        sent = rows.view(len(rows), shape.numel()).view(torch.uint8)
        return _Parcel(key, rows.dtype, shape, sent, sent.new_empty(num_received, sent.shape[1]))

    def sent_on(self, ranks: Ranks, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Exchange the rows for [R, ...]; all ranks call this at once, with their counts of rows by rank."""
        came = ranks.all_to_all(self.sent, sent, received, self.received)
        return came.view(-1).view(self.dtype).view(len(came), *self.shape)  # the former also of rows without columns
