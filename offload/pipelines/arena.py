"""Space on the device for the rows of two views, as much as views need and memory has."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from offload.device_memory import most_bytes, peak_memory

SPARE = 32  # the arena is taken with 1/32 more than it needs, so that larger pairs of views seldom need more
CAUTION = 1.1  # of what all else on the device takes while a larger view than before is rendered
USABLE = 0.93  # of device memory: torch's allocator has reserved up to 6 % more than was in use (H200, 18 and 40 M)


class Arena:
    """Holds space on the device for rows of two views, one from its beginning and one from its end."""

    def __init__(self, columns: Mapping[str, int], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """
        Args:
            columns: Of each group, 32 bits each.
            device: Where it is.
            dtype: Of them.
        """
        self._columns = columns
        self._dtype = dtype
        self._device = device
        self._row_bytes = 4 * sum(columns.values())
        self._rows = {name: torch.empty(0, count, dtype=dtype, device=device) for name, count in columns.items()}
        self._capacity = 0  # rows of each
        self._wanted = 0  # rows of the largest pair of views so far
        self._largest = 0  # rows of the largest view that has been rendered
        self._others = 0  # bytes that all else on the device has taken at most
        self._most = 0  # bytes that could be used for all, when space was last looked for

    def first_row(self, count: int, at_end: bool) -> int:
        """Return where the space of a view begins."""
        return self._capacity - count if at_end else 0

    def rows(self, count: int, at_end: bool) -> dict[str, Tensor]:
        """Return space for a view: group -> [count, columns]."""
        first = self.first_row(count, at_end)
        return {name: rows[first : first + count] for name, rows in self._rows.items()}

    def has_space_for(self, present: int, upcoming: int) -> bool:
        """Tell whether a view of so many rows can be fetched beside the one that is rendered."""
        fits = present + upcoming <= self._capacity <= self._most_rows(upcoming)
        self._wanted = max(self._wanted, present + upcoming)
        self._largest = max(self._largest, present)  # by the next time it has been rendered
        return fits

    def make_space_for(self, count: int) -> bool:
        """Have space for a view, and for pairs as large as wanted so far if memory allows; all contents are lost.

        Returns:
            Whether memory has been allocated.
        """
        if self._device.type == "cuda":
            self._most = int(USABLE * most_bytes(self._device))
        wanted, most = max(self._wanted, count), self._most_rows(count)
        capacity = max(min(wanted + wanted // SPARE, most), count)
        too_small = self._capacity < count or self._capacity + self._capacity // SPARE < min(wanted, capacity)
        if not too_small and self._capacity <= max(most, count):
            return False
        self._rows.clear()  # frees memory before more is taken
        self._capacity = 0  # until it has been
        for name, columns in self._columns.items():
            self._rows[name] = torch.empty(capacity, columns, dtype=self._dtype, device=self._device)
        self._capacity = capacity
        return True

    def _most_rows(self, count: int) -> int:
        """Count the rows that there is memory for beside all that rendering a view of so many takes."""
        if self._device.type != "cuda":
            return sys.maxsize
        taken = self._capacity * self._row_bytes
        self._others = max(self._others, peak_memory(self._device)["allocated"] - taken)
        growth = CAUTION * max(1.0, count / max(self._largest, 1))
        return int((self._most - growth * self._others) / self._row_bytes)
