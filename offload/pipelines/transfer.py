"""Rows between pinned staging buffers on the host and the device, on streams of their own.

On the CPU host and device are one: rows are written where they are used, and there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.adam.stored_harmonics import StoredRows
from offload.pipelines.times import OffloadTimes
from offload.store.layout import RowState

BLOCK_BYTES = 32 << 20  # of an upload that is filled while the previous one travels


@dataclass
class Uploaded:
    """Rows on their way to the device."""

    rows: Tensor  # [V, columns] on the device
    done: torch.cuda.Event | None

    def ready(self) -> Tensor:
        """Return the rows, for work on the current stream from now on."""
        if self.done is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            self.rows.record_stream(stream)
        return self.rows

    def stored(self, *, has_constant: bool) -> StoredRows:
        """Return the rows as colours are made of them, for work on the current stream; these are current.

        Args:
            has_constant: As of `StoredRows`.
        """
        return StoredRows(RowState(self.ready(), ()), None, None, None, has_constant)


@dataclass
class Downloaded:
    """Rows on their way to the host."""

    rows: Tensor  # [V, columns] on the host; overwritten by the download after the next of its kind
    done: torch.cuda.Event | None
    made: HarmonicsGradient | None = None  # where rows are not gradients but [V, 6] of what they are made of: the rest

    def ready(self) -> Tensor:
        """Return the rows, when they have arrived; waits on the calling thread only."""
        if self.done is not None:
            self.done.synchronize()
        return self.rows

    def gradients(self) -> Tensor | HarmonicsGradient:
        """Return the gradients that the rows are, or what they are made of; waits as `ready`."""
        return self.ready() if self.made is None else self.made.of(self.ready())


@dataclass
class _DownLane:
    """A stream of downloads, which take turns in two staging buffers."""

    stream: torch.cuda.Stream
    staging: list[Tensor]  # the one that was used last comes first
    spare: float  # staging is allocated for so many times the rows that need it


class RowTransfer:
    """Uploads and downloads of rows of one width; staging is allocated once and grows with the largest view."""

    def __init__(self, columns: int, device: torch.device, times: OffloadTimes) -> None:
        self._columns = columns
        self._times = times  # told how long the copies take
        self._device = device
        self._cuda = device.type == "cuda"
        self.staging_allocations = 0  # shows that the steady state allocates nothing
        if self._cuda:
            self._up = torch.cuda.Stream(device)
            self._block_rows = BLOCK_BYTES // (4 * columns)
            self._blocks: list[tuple[Tensor, torch.cuda.Event]] = []  # none, where nothing is uploaded
            self._next_block = 0
            # How many rows are urgent changes far more from view to view than how many there are.
            self._down, self._urgent_down = (
                _DownLane(torch.cuda.Stream(device), [self._pinned(0), self._pinned(0)], spare) for spare in (1.25, 2.0)
            )

    def upload(self, num_rows: int, fill: Callable[[Tensor, int, int], None]) -> Uploaded:
        """Send rows that the host writes block by block.

        Args:
            num_rows: V.
            fill: Called as fill(out, begin, end) for consecutive ranges of rows; writes them to out
                [end - begin, columns]. Rows that it leaves alone are undefined.
        """
        if not self._cuda:
            rows = torch.zeros(num_rows, self._columns)
            fill(rows, 0, num_rows)
            return Uploaded(rows, None)
        with torch.cuda.stream(self._up):
            rows = torch.empty(num_rows, self._columns, device=self._device)
            for begin, end, block in self._filled_blocks(num_rows, fill):
                with self._times.on_stream("host_to_device"):
                    rows[begin:end].copy_(block, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._up)
        return Uploaded(rows, done)

    def complete(self, uploaded: Uploaded, positions: Tensor, fill: Callable[[Tensor, int, int], None]) -> None:
        """Write some of the rows of an earlier upload, block by block, in the order of uploads.

        Args:
            uploaded: Rows on the device.
            positions: Which of them, [S] int64 on the host.
            fill: As for `upload`, of S rows.
        """
        if not self._cuda:
            rows = torch.empty(len(positions), self._columns)
            fill(rows, 0, len(positions))
            uploaded.rows.index_copy_(0, positions, rows)
            return
        with torch.cuda.stream(self._up):
            on_device = positions.to(self._device)
            arrived = torch.empty(min(self._block_rows, len(positions)), self._columns, device=self._device)
            for begin, end, block in self._filled_blocks(len(positions), fill):
                with self._times.on_stream("host_to_device"):
                    arrived[: end - begin].copy_(block, non_blocking=True)
                uploaded.rows.index_copy_(0, on_device[begin:end], arrived[: end - begin])
            if uploaded.done is not None:
                uploaded.done.record(self._up)

    def _filled_blocks(
        self, num_rows: int, fill: Callable[[Tensor, int, int], None]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield blocks of staging memory that `fill` has written; each is free when what follows has been copied."""
        if not self._blocks:
            self._blocks = [(self._pinned(self._block_rows), torch.cuda.Event()) for _ in range(3)]
        for begin in range(0, num_rows, self._block_rows):
            end = min(begin + self._block_rows, num_rows)
            block, sent = self._blocks[self._next_block]
            self._next_block = (self._next_block + 1) % len(self._blocks)
            sent.synchronize()
            fill(block[: end - begin], begin, end)
            yield begin, end, block[: end - begin]
            sent.record(self._up)

    def download(self, rows: Tensor, *, urgent: bool = False) -> Downloaded:
        """Fetch rows that the current stream computes.

        Args:
            rows: [V, columns].
            urgent: Beside the other downloads, not behind them.
        """
        if not self._cuda:
            return Downloaded(rows, None)
        lane = self._urgent_down if urgent else self._down
        lane.staging.reverse()
        if len(lane.staging[0]) < len(rows):
            lane.staging[0] = self._pinned(int(lane.spare * len(rows)))
        staging = lane.staging[0][: len(rows)]
        lane.stream.wait_stream(torch.cuda.current_stream())
        rows.record_stream(lane.stream)
        with torch.cuda.stream(lane.stream):
            with self._times.on_stream("device_to_host"):
                staging.copy_(rows, non_blocking=True)
            done = torch.cuda.Event()
            done.record(lane.stream)
        return Downloaded(staging, done)

    def _pinned(self, num_rows: int) -> Tensor:
        self.staging_allocations += 1
        return torch.empty(num_rows, self._columns, pin_memory=True)
