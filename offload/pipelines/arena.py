"""Space on the device for the rows of two views, as much as views need and memory has.

A pipeline asks it in one of two ways. `has_space_for` tells whether two views fit side by side, and lets it grow until
the largest pair does. `rows_in_common` lets two views meet in the middle, where one is overwritten by the other: then
it has space for the largest view and for a pair of the usual size, and the largest pairs wait a little. Where there is
no memory for a view at all (`holds`), its rows have to stay where they are, and the arena makes way (`release`).

How much memory there is beside a view's rendering is learned from the views before (`rendering_memory.py`): a pipeline
says when one begins to be rendered (`renders`), and before the next one the arena sees what that has taken (`see`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from offload.device_memory import most_bytes
from offload.pipelines.rendering_memory import RenderingMemory

SPARE = 32  # the arena is taken with 1/32 more than it needs, so that larger pairs of views seldom need more
ROOM = 1.25  # over the mean of the last pairs of views, where they may meet
LAST_PAIRS = 32  # that the mean is of
CAUTION = 1.1  # of what all else on the device takes while a view is rendered
COPIES = 2.0  # times what rendering takes, at most, while copies of rows, which have values of their own, are drawn
IDLE = 40 << 20  # bytes more that are not counted on: torch maps memory 20 MiB at a time, and some of each may lie idle
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
        self._wanted = 0  # rows that views so far have asked for
        self._num_pairs, self._mean_pair, self._largest_pair = 0, 0.0, 0  # rows of two views
        self._largest_view = 0  # rows of those that have been here
        self._largest_here = 0  # rows of the largest view that has been rendered from here
        self._largest_tried = 0  # the same, since rows were changed last
        self._rendering = RenderingMemory(device)
        self._beside = 0  # bytes of what has been put beside views, and gives way to them
        self._most = 0  # bytes that could be used for all, when space was last looked for

    def first_row(self, count: int, at_end: bool) -> int:
        """Return where the space of a view begins."""
        return self._capacity - count if at_end else 0

    def rows(self, count: int, at_end: bool) -> dict[str, Tensor]:
        """Return space for a view: group -> [count, columns]."""
        first = self.first_row(count, at_end)
        return {name: rows[first : first + count] for name, rows in self._rows.items()}

    def tensors(self) -> list[Tensor]:
        """Return all space."""
        return list(self._rows.values())

    def has_space_for(self, present: int, upcoming: int) -> bool:
        """Tell whether a view of so many rows can be fetched beside the one that is rendered."""
        self._wanted = max(self._wanted, present + upcoming)
        return present + upcoming <= self._capacity <= self._room(upcoming)

    def rows_in_common(self, present: int, upcoming: int) -> int | None:
        """Count the rows for which a view that is fetched while another is rendered has no space but that of the other.

        Args:
            present: Rows of the view that is rendered.
            upcoming: Rows of the other.

        Returns:
            The number; None: the view is to be fetched later, with `make_space_for`.
        """
        if not self._fits(upcoming, making_way=True):
            return None  # its rows will stay where they are
        pair = present + upcoming
        self._num_pairs += 1
        self._mean_pair += (pair - self._mean_pair) / min(self._num_pairs, LAST_PAIRS)
        self._largest_pair = max(self._largest_pair, pair)
        self._largest_view = max(self._largest_view, present, upcoming)
        self._wanted = max(self._largest_view, min(int(ROOM * self._mean_pair), self._largest_pair))
        most = self._room(upcoming)
        if self._capacity < upcoming or self._capacity > max(most, self._tried()):
            return None
        in_common = max(pair - self._capacity, 0)
        most += self._beside // self._row_bytes  # which gives way
        return None if in_common and self._is_small(self._wanted, most) else in_common

    def make_space_for(self, count: int) -> bool:
        """Have space for a view, and for what views so far have asked for if memory allows; all contents are lost.

        Returns:
            Whether memory has been allocated.
        """
        self._look()
        wanted, most = max(self._wanted, count), self._room(count)
        capacity = max(min(wanted + wanted // SPARE, most), count)
        too_small = self._capacity < count or self._is_small(wanted, capacity)
        if not too_small and self._capacity <= max(most, count, self._tried()):
            return False
        self.release()  # before more is taken
        try:
            for name, columns in self._columns.items():
                self._rows[name] = torch.empty(capacity, columns, dtype=self._dtype, device=self._device)
        except torch.OutOfMemoryError:
            self.release()
            raise
        self._capacity = capacity
        return True

    def holds(self, count: int) -> bool:
        """Tell whether there is memory for the rows of a view, and for rendering it."""
        self._look()
        return self._fits(count)

    def release(self) -> None:
        """Give all space back; contents are lost."""
        self._rows = {name: rows.new_empty(0, rows.shape[1]) for name, rows in self._rows.items()}
        self._capacity = 0
        self._rendering.forget_peak()  # of which that memory was part

    def leaves_copies(self, count: int) -> bool:
        """Tell whether there is memory beside all space to copy so many rows and draw them, between steps."""
        self._look()
        return self._capacity <= self._most_rows(count, COPIES)

    def renders(self, count: int, *, here: bool = True) -> None:
        """Note that a view is rendered from now on.

        Args:
            count: Its rows.
            here: Whether they are in the arena.
        """
        self._rendering.begins(count)
        if here:
            self._largest_here = max(self._largest_here, count)
            self._largest_tried = max(self._largest_tried, count)

    def rests(self, *, changing: bool = False) -> None:
        """Note that no view of a step is rendered from now on, whatever takes memory.

        Args:
            changing: Whether Gaussians may become others, for which more memory may be taken from then on.
        """
        self.see()
        self._rendering.begins(None)
        if changing:
            self._largest_tried = 0

    def see(self) -> None:
        """See what all else has taken while the view that `renders` has named was rendered."""
        self._rendering.see(self._capacity * self._row_bytes + self._beside)

    def _fits(self, count: int, *, making_way: bool = False) -> bool:
        """Tell whether there is memory for a view; `making_way` tells that what is beside views would give way.

        Of sizes that have been rendered it is known what that takes: without caution, since to leave rows elsewhere
        takes far longer.
        """
        most = self._most_rows(count, CAUTION if count > self._rendering.largest else 1.0)
        return count <= max(most + (self._beside // self._row_bytes if making_way else 0), self._tried())

    def _room(self, count: int) -> int:
        """Count the rows that there is memory for while a view of so many is rendered, or one of those so far here.

        Space that followed each view's size would be taken anew for nearly all of them.
        """
        return self._most_rows(max(count, self._largest_here))

    def _tried(self) -> int:
        """Return a number of rows that there was memory for while as many were rendered."""
        return 0 if self._beside else self._largest_tried

    def _is_small(self, wanted: int, most: int) -> bool:
        """Tell whether it is worth to take memory anew for so many rows, of which there is memory for `most`."""
        return self._capacity + self._capacity // SPARE < min(wanted, most)

    def spare_bytes(self) -> int:
        """Count the bytes that views so far would leave for what is put beside them."""
        if self._device.type != "cuda":
            return sys.maxsize
        self._look()
        rows = max(self._wanted + self._wanted // SPARE, self._capacity)
        return max(int(self._most - CAUTION * self._rendering.expected(self._largest_here)) - rows * self._row_bytes, 0)

    def set_beside(self, num_bytes: int) -> None:
        """Note how many bytes are put beside views from now on, before more are taken or after some were given back."""
        if num_bytes != self._beside:
            self.see()
        self._beside = num_bytes

    def lacks_memory_for(self, count: int) -> bool:
        """Tell whether there is no memory for a view, or for what views so far have asked for."""
        self._look()
        return max(self._wanted, count) > self._room(count)

    def _look(self) -> None:
        """Look how much memory there is."""
        if self._device.type == "cuda":
            self._most = int(USABLE * most_bytes(self._device)) - IDLE

    def _most_rows(self, count: int, caution: float = CAUTION) -> int:
        """Count the rows that there is memory for beside all that rendering a view of so many takes."""
        if self._device.type != "cuda":
            return sys.maxsize
        return int((self._most - self._beside - caution * self._rendering.expected(count)) / self._row_bytes)
