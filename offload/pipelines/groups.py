"""What the pipelines of the streamed trainer share: groups of rows in pinned memory, and how rows of views relate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.adam.deferral import CatchUpTables
from offload.adam.rows import RowState
from offload.store.host_store import HostStore

CHUNK_ROWS = 1 << 16  # visited at once when nothing is rendered: 38 MB of appearance


@dataclass
class StreamedGroup:
    """A store of rows that travel together, and what updates them."""

    store: HostStore  # holds this group only
    name: str  # of the group in the store
    tables: CatchUpTables
    learning_rates: Callable[[int], Sequence[float]]  # of each schedule, at a step from 1
    changed: Callable[[Tensor], None] = lambda host_ids: None  # told of rows whose values on the host are new

    def host(self) -> RowState:
        """All rows, in pinned memory."""
        parameters, *moments = (array.tensor for array in self.store.groups[self.name].arrays)
        return RowState(parameters, tuple(moments))

    def begin_step(self) -> None:
        """Begin the next step, on the current stream."""
        self.tables.begin_step(self.learning_rates(self.tables.step + 1))
        self.store.step = self.tables.step

    def undo_step(self, steps_done: int) -> None:
        """Take back a step that has begun after so many."""
        if self.tables.step > steps_done:
            self.tables.undo_step()
            self.store.step = self.tables.step


def positions_among(others: Tensor, ids: Tensor) -> Tensor:
    """Where ids stand among others, int64 [V]; -1 where they do not. Both are sorted and unique."""
    if len(others) == 0:
        return torch.full_like(ids, -1)
    positions = torch.searchsorted(others, ids).clamp_(max=len(others) - 1)
    return torch.where(others[positions] == ids, positions, -1)


def chunks_of(rows: int) -> list[tuple[int, int]]:
    """First and last row of the chunks that all of so many rows are visited in."""
    return [(first, min(first + CHUNK_ROWS, rows)) for first in range(0, rows, CHUNK_ROWS)]
