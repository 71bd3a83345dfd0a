"""How much memory of a device all else takes while a view is rendered, learned from the views before.

What rendering takes depends on a view's rows and on its pictures, and the peaks of both lie at different moments: of a
view with few rows the loss takes most, of one with many the backward pass of the projection. So each size that has been
seen is kept by itself.
"""

from __future__ import annotations

import math

import torch

from offload.device_memory import begin_stretch

SIZES = 8  # of views that are told apart, from one number of rows to twice as many
# Bytes of each row where nothing has been rendered yet, pictures included. That is far more than most views take: one
# that is left elsewhere for it, once, tells what it takes.
RENDERING = 1024


class RenderingMemory:
    """Keeps the most bytes that were taken beside views' rows, by the number of these; nothing without a GPU."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: Where views are rendered.
        """
        self._device = device
        self._at_rest: int | None = None  # bytes before the first view; None: nobody has looked
        self._seen: dict[int, tuple[int, int]] = {}  # size -> the most rows of it that were rendered, and bytes
        self._rendered: int | None = None  # rows of the view that is rendered; None: of none
        self.largest = 0  # rows that have been rendered

    def begins(self, count: int | None) -> None:
        """Note that a view of so many rows is rendered from now on; None: none is, whatever takes memory."""
        self._rendered = count

    def see(self, rows_bytes: int) -> None:
        """See what has been taken since this was last called, beside so many bytes for rows."""
        if self._device.type != "cuda":
            return
        peak = begin_stretch(self._device)
        if self._at_rest is None:
            self._at_rest = torch.cuda.memory_allocated(self._device) - rows_bytes
        elif self._rendered is not None:
            size = _size(self._rendered)
            rows, others = self._seen.get(size, (0, 0))
            self._seen[size] = max(rows, self._rendered), max(others, peak - rows_bytes)
            self.largest = max(self.largest, self._rendered)

    def forget_peak(self) -> None:
        """Leave out of what is seen next what was taken until now."""
        if self._device.type == "cuda":
            begin_stretch(self._device)

    def expected(self, count: int) -> float:
        """Return the bytes that all else is to take while a view of so many rows is rendered.

        No view takes less than a smaller one has. One that is larger than all before takes as much more as it has more
        rows; one between others no more than the larger of these.
        """
        if not self._seen:
            return (self._at_rest or 0) + RENDERING * count
        size, largest = _size(count), max(self._seen)
        alike = min((seen for seen in self._seen if seen >= size), default=largest)
        rows, _ = self._seen[alike]
        return max(1.0, count / max(rows, 1)) * max(others for seen, (_, others) in self._seen.items() if seen <= alike)


def _size(count: int) -> int:
    return math.ceil(SIZES * math.log2(max(count, 1)))
