"""What the pipelines share: groups of rows in their stores, and how rows of views relate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables, LearningRates, begin_steps
from offload.adam.finite import gradient_of
from offload.adam.harmonics import HarmonicsGradient
from offload.store.contract import RowStore
from offload.store.layout import PackedRows, packed_rows

CHUNK_ROWS = 1 << 16  # visited at once when nothing is rendered: 38 MB of appearance


Adam = TypeVar("Adam", bound=DeferralTables)


# Is told of rows after a step that a device has taken on them, whether the store has them already or not: ids [V],
# their values [V, columns], and what gives their moments [V, words] while it is called. A view that is stepped chunk by
# chunk comes in whole chunks (`chunks_of`).
OnStep = Callable[[Tensor, Tensor, Callable[[], Tensor]], None]


@dataclass
class RowGroup(Generic[Adam]):
    """A store of rows that travel together, and their optimizer.

    Whoever updates rows of it writes them inside of `store.changing`, which tells others before and after.
    """

    store: RowStore
    adam: Adam  # `DeferredAdam` where the host updates rows
    learning_rates: LearningRates
    on_step: OnStep | None = None

    @property
    def packed(self) -> PackedRows:
        """Return all rows of a compact store, and the steps of their last updates."""
        return self.store.packed, self.store.last_step

    def new_packed(self, count: int, device: torch.device) -> PackedRows:
        """Take memory on a device for so many rows of a compact store, and for the steps of their last updates."""
        words = torch.empty(count, self.store.packed.shape[1], dtype=torch.int32, device=device)
        return words, torch.empty(count, dtype=torch.int32, device=device)

    def begin_step(self) -> None:
        """Begin the next step, on the current stream."""
        self.adam.begin_step(self.learning_rates(self.adam.step + 1))
        self.store.step = self.adam.step

    def undo_step(self, steps_done: int) -> None:
        """Take back a step that has begun after so many."""
        if self.adam.step > steps_done:
            self.adam.undo_step()
            self.store.step = self.adam.step


def begin_step_of(groups: Iterable[RowGroup]) -> None:
    """Begin the next step of groups that are updated together, on the current stream."""
    groups = list(groups)
    tables = [group.adam for group in groups]
    begin_steps(tables, [group.learning_rates(group.adam.step + 1) for group in groups])
    for group in groups:
        group.store.step = group.adam.step


def step_packed(
    group: RowGroup,
    name: str,
    packed: PackedRows,
    ids: Tensor,
    values: Tensor | None,
    gradient: Tensor | HarmonicsGradient,
    kernels: ModuleType,
) -> None:
    """Take Adam's step, which has begun, on rows of a view that lie packed; whoever listens is told of new values.

    Args:
        group: What steps them.
        name: Of the group.
        packed: V of its rows, on the device.
        ids: int64 [V] on the device, which Gaussians they are.
        values: [V, columns], as they were before it; receive the new ones. None: they are read once more.
        gradient: [V, columns], or what it is made of.
        kernels: As of `offload.adam.rows`.
    """
    words, last_step = packed
    rows = packed_rows(words, name)
    kernels.step_view_rows(values, ids, last_step, gradient, rows, group.adam)
    if group.on_step is not None:
        group.on_step(ids, rows.parameters, lambda: rows.moments[0])


def leaf_without_values(count: int, columns: int, device: torch.device) -> Tensor:
    """Return a leaf [V, columns] that takes no memory until it receives a gradient; its values are NaN."""
    return _no_number(device).expand(count, columns).requires_grad_()


@cache
def _no_number(device: torch.device) -> Tensor:
    """Return NaN [1, 1], once for each device: to fill it is a launch, and views are many."""
    return torch.full((1, 1), torch.nan, device=device)


def gradient_or_made(leaf: Tensor | None, made: HarmonicsGradient | None) -> Tensor | HarmonicsGradient:
    """Return the gradient of rows [V, columns] of a view, or what it is made of, where they have no leaf."""
    if leaf is not None:
        return gradient_of(leaf)
    if made is None:
        raise RuntimeError("rows without values were updated before their gradient was given")
    return made


def positions_among(others: Tensor, ids: Tensor) -> Tensor:
    """Find where ids stand among others, int64 [V]; -1 where they do not. Both are sorted and unique."""
    if len(others) == 0:
        return torch.full_like(ids, -1)
    positions = torch.searchsorted(others, ids).clamp_(max=len(others) - 1)
    return torch.where(others[positions] == ids, positions, -1)


def chunks_of(rows: int) -> list[tuple[int, int]]:
    """Cut so many rows into chunks to be visited one after the other: the first row of each, and the one behind it."""
    return [(first, min(first + CHUNK_ROWS, rows)) for first in range(0, rows, CHUNK_ROWS)]
