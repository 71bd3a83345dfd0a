"""Rows of a compact store that stay on the device from view to view: those that views have shown most often.

A resident row makes neither trip over the link. Its place in the store lags behind until all residents are written
back, which whoever reads or changes the store asks for first. Which rows are resident changes no bit of a model: it
says where a row lies, and nothing else.

Bytes on the device: 328 of a resident row, and of each Gaussian 4 for its place and 1 for how often it was shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import ModuleType

import torch
from torch import Tensor

from offload.pipelines.groups import RowGroup
from offload.store.layout import LAST_STEP_BYTES, PackedRows, ResidentRows

BYTES = 4 + 1  # of each Gaussian, resident or not, where some are: its place, and `_shown`
FIRST_CHOICE = 16  # views that are counted before residents are chosen; from then on as many again, and at most
CHOICES = 512  # views from one choice to the next
MOST_SHOWN = 255  # that a count can hold


class Residents:
    """Holds the resident rows of all groups. It works on the current stream, and waits for none."""

    def __init__(self, groups: Mapping[str, RowGroup], share: float, device: torch.device, kernels: ModuleType) -> None:
        """
        Args:
            groups: What travels, in compact stores.
            share: Of all Gaussians that may be resident; 0: none are, and nothing is counted.
            device: Where they are.
            kernels: As of `offload.adam.rows`.
        """
        self._groups = groups
        self._share = share
        self._device = device
        self._kernels = kernels
        self.row_bytes = sum(4 * group.store.packed.shape[1] + LAST_STEP_BYTES for group in groups.values())
        self.rows: ResidentRows | None = None
        self._shown: Tensor | None = None  # uint8 [N], how often views have shown each Gaussian, of late
        self._counted = 0  # views since the last choice
        self._until_choice = FIRST_CHOICE
        self._stored = True  # whether the stores have what is resident
        self._moved = torch.zeros(2, dtype=torch.int64, device=device)  # of `ResidentRows`
        self._brought, self._written_back = 0, 0  # rows over the link

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows.rows[0][1])

    @property
    def is_due(self) -> bool:
        """Tell whether residents are to be chosen anew."""
        return self._counted >= self._until_choice

    @property
    def are_wanted(self) -> bool:
        """Tell whether there may be residents, for which `count` is to be told what views show."""
        return self._share > 0

    def count(self, ids: Tensor) -> None:
        """Count that a view has shown Gaussians [V]."""
        if self._shown is None:
            self._shown = torch.zeros(self._num_gaussians, dtype=torch.uint8, device=self._device)
        self._shown[ids] = self._shown[ids].clamp_(max=MOST_SHOWN - 1) + 1
        self._counted += 1

    def changed(self) -> None:
        """Note that residents may have been written, so that the stores lag behind."""
        self._stored = self.rows is None

    def rows_spared(self) -> tuple[int, int]:
        """Return how many rows fewer have been fetched and written than without residents; waits."""
        read, written = self._moved.tolist()
        return read - self._brought, written - self._written_back

    def write_back(self) -> bool:
        """Begin to bring residents to the stores, which then have all; they stay. Tell whether there were any to bring.

        No other stream may be at work on them.
        """
        if self._stored or self.rows is None:
            return False
        ids = (self.rows.places >= 0).nonzero().squeeze(1)  # in the order of their places
        with ExitStack() as changes:
            for group in self._groups.values():
                changes.enter_context(group.store.changing(ids))
            self._kernels.write_packed_rows(self.rows.rows, ids, None, self._all_rows())
        self._stored = True
        self._written_back += len(ids)
        return True

    def chosen(self, most_bytes: int) -> Tensor:
        """Return the sorted ids, int64 [R], of the rows that are to be resident from now on.

        Args:
            most_bytes: That they may take.
        """
        if self._shown is None:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        self._counted, self._until_choice = 0, min(2 * self._until_choice, CHOICES)
        spare = max(most_bytes - BYTES * len(self._shown), 0)
        ids = most_shown(self._shown, min(int(self._share * len(self._shown)), spare // self.row_bytes))
        self._shown.bitwise_right_shift_(1)  # what is long ago counts less
        return ids

    def bring(self, ids: Tensor) -> None:
        """Begin to bring rows that have been chosen, where there are no residents; fewer where memory lacks."""
        while len(ids):
            try:
                rows = self._with_space(len(ids))
                break
            except torch.OutOfMemoryError:
                ids = ids[: len(ids) // 2]
        else:
            return
        rows.places[ids] = torch.arange(len(ids), dtype=torch.int32, device=self._device)
        self._kernels.read_packed_rows(self._all_rows(), ids, None, rows.rows)
        self.rows = rows  # only now: an error leaves none
        self._brought += len(ids)

    def release(self) -> None:
        """Give the memory of residents back; the stores have them."""
        self.rows, self._stored = None, True

    def forget(self) -> None:
        """Release all, and what has been counted, since Gaussians will be others; the stores have them."""
        self.release()
        self._shown, self._counted, self._until_choice = None, 0, FIRST_CHOICE

    @property
    def _num_gaussians(self) -> int:
        return next(iter(self._groups.values())).store.num_gaussians

    def _all_rows(self) -> list[PackedRows]:
        return [group.packed for group in self._groups.values()]

    def _with_space(self, count: int) -> ResidentRows:
        """Take memory for so many rows; no Gaussian is among them yet."""
        rows = [group.new_packed(count, self._device) for group in self._groups.values()]
        places = torch.full((self._num_gaussians,), -1, dtype=torch.int32, device=self._device)
        return ResidentRows(places, rows, self._moved)


def most_shown(shown: Tensor, most: int) -> Tensor:
    """Return which rows have been shown most often, of equals the first; none that never was.

    Args:
        shown: uint8 [N], how often each has been.
        most: How many rows at most.

    Returns:
        Sorted ids, int64 [M].
    """
    numbers = shown.bincount(minlength=MOST_SHOWN + 1).cpu()  # of rows that were shown so often
    at_least = numbers.flip(0).cumsum(0).flip(0)  # falls
    threshold = max(int((at_least > most).sum()), 1)  # the lowest count whose rows all fit
    ids = (shown > threshold - 1).nonzero().squeeze(1)  # 256 would not be a uint8
    if threshold == 1 or len(ids) == most:
        return ids
    equals = (shown == threshold - 1).nonzero().squeeze(1)[: most - len(ids)]
    return torch.cat([ids, equals]).sort().values
