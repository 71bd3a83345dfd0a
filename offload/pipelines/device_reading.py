"""Rows of compact stores that the device reads and decodes itself, where the host's threads update them.

To forward a row the host would read it, catch it up, and write its values, which then cross the link: 328 bytes read
and 256 written, which the link reads once more. A device reads the row as it is stored, 328 bytes over the link, and
decodes it in passing. That leaves the host's threads and memory to commits, which both are short of.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload.adam.host import DeferredAdam
from offload.backends import kernels_for
from offload.pipelines.groups import RowGroup
from offload.pipelines.lanes import Lane
from offload.pipelines.times import OffloadTimes
from offload.pipelines.transfer import Uploaded
from offload.store.layout import RowState, packed_rows

READ_ROWS = 1 << 17  # at once; they are packed in between, 43 MB


class DeviceReading:
    """Reads rows of all groups, caught up with the steps that they have skipped, on a stream of its own.

    Rows must not be written before what has been read of them is there (`finish`), in which case their values would be
    of no use, or memory be gone.
    """

    def __init__(self, groups: Mapping[str, RowGroup[DeferredAdam]], device: torch.device, times: OffloadTimes) -> None:
        """
        Args:
            groups: In compact stores, pinned where the device is a GPU.
            device: Where views are rendered.
            times: Told how long the reading takes.
        """
        self._groups = groups
        self._device = device
        self._times = times
        self._kernels = kernels_for(device, "offload.adam.rows")
        self._lane = Lane.new(device)

    def upload(
        self, host_ids: Tensor, left_out: Tensor | None, *, previous: bool = False
    ) -> tuple[Tensor, dict[str, Uploaded]]:
        """Read the values that rows have after the present step; nobody waits.

        Args:
            host_ids: int64 [V] on the host, sorted.
            left_out: int64 [S] on the host, which of these are read later, by `complete`; None: none.
            previous: Values before the present step, of rows that have not been committed since.

        Returns:
            The ids on the device, for work that waits for the rows; and group -> [V, columns].
        """
        with self._lane as lane:
            ids = self._to_device(host_ids)
            wanted = None
            if left_out is not None:
                wanted = torch.ones(len(ids), dtype=torch.bool, device=self._device)
                wanted.index_fill_(0, self._to_device(left_out), False)
            columns = {name: group.adam.columns for name, group in self._groups.items()}
            values = {name: torch.empty(len(ids), width, device=self._device) for name, width in columns.items()}
            self._read(ids, wanted, values, previous)
            done = lane.record()
        return ids, {name: Uploaded(rows, done) for name, rows in values.items()}

    def complete(self, uploads: Mapping[str, Uploaded], host_ids: Tensor, positions: Tensor) -> None:
        """Read rows that were left out, with the values that they have been committed with.

        Args:
            uploads: group -> [V, columns], as `upload` gave them.
            host_ids: int64 [S] on the host, the rows.
            positions: int64 [S] on the host, where they are among those.
        """
        with self._lane as lane:
            ids, places = self._to_device(host_ids), self._to_device(positions)
            values = {name: upload.rows.new_empty(len(ids), upload.rows.shape[1]) for name, upload in uploads.items()}
            self._read(ids, None, values, previous=False)
            for name, upload in uploads.items():
                upload.rows.index_copy_(0, places, values[name])
            done = lane.record()
        for upload in uploads.values():
            upload.done = done

    def finish(self) -> None:
        """Wait until nothing is being read."""
        self._lane.finish()

    def _read(self, ids: Tensor, wanted: Tensor | None, values: Mapping[str, Tensor], previous: bool) -> None:
        """Read rows [V] into values [V, columns], in the order of both, on the current stream."""
        skipped = {
            name: group.adam.skipped_steps(self._device, previous=previous) for name, group in self._groups.items()
        }
        most = min(READ_ROWS, len(ids))
        stored = [(group.store.packed, group.store.last_step) for group in self._groups.values()]
        packed = [(torch.empty(most, words.shape[1], dtype=torch.int32, device=self._device)) for words, _ in stored]
        last_steps = [torch.empty(most, dtype=torch.int32, device=self._device) for _ in stored]
        places = torch.arange(most, device=self._device)
        with self._times.on_lane("host_to_device", self._lane):
            for first in range(0, len(ids), READ_ROWS):
                rows = slice(first, min(first + READ_ROWS, len(ids)))
                count, those = rows.stop - first, None if wanted is None else wanted[rows]
                view = [(words[:count], steps[:count]) for words, steps in zip(packed, last_steps, strict=True)]
                self._kernels.read_packed_rows(stored, ids[rows], those, view)
                for name, (words, steps) in zip(self._groups, view, strict=True):
                    of_view, out = packed_rows(words, name), RowState(values[name][rows], ())
                    self._kernels.fetch_dated_rows(of_view, places[:count], steps, those, out, skipped[name])

    def _to_device(self, numbers: Tensor) -> Tensor:
        """Copy int64 [V] on the current stream, without waiting for it; once more before, where it is not pinned."""
        if self._device.type != "cuda":
            return numbers
        return numbers.pin_memory().to(self._device, non_blocking=True)
