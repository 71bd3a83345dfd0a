"""Rows of compact stores that the device reads and decodes itself, where the host's threads update them.

To forward a row the host would read it, catch it up, and write its values, which then cross the link: 328 bytes read
and 256 written, which the link reads once more. A device reads the row as it is stored, 328 bytes over the link.
Geometry it decodes in passing. Harmonics stay packed, 196 bytes, until colours are made of them, which decodes them
(`offload/adam/stored_harmonics.py`), or until their values are asked for. That leaves the host's threads and memory to
commits, which both are short of.

Where geometry does not travel, packed rows of one view at a time are on the device: those of the next view come where
the present one's were, when colours have been made of these, early in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from offload.adam.deferral import SkippedSteps
from offload.adam.host import DeferredAdam
from offload.adam.stored_harmonics import StoredRows
from offload.backends import kernels_for
from offload.culling.visible import arriving
from offload.pipelines.groups import RowGroup
from offload.pipelines.lanes import Lane
from offload.pipelines.times import OffloadTimes
from offload.pipelines.transfer import Uploaded
from offload.store.layout import PackedRows, RowState, packed_rows

READ_ROWS = 1 << 17  # at once, where geometry travels, whose rows are packed in between, 17 MB
STAYS_PACKED = "appearance"  # the group
SPARE = 32  # space for a view has 1/32 more than the largest one so far, so that larger ones seldom need new memory


@dataclass
class UploadedPacked(Uploaded):
    """Packed rows on their way to the device, `rows` int32 [V, words]."""

    last_step: Tensor  # int32 [V], the step of each row's last update
    skipped: SkippedSteps  # what catches them up
    kernels: ModuleType  # that decode them

    def ready(self) -> Tensor:
        """Return the values [V, columns], computed on the current stream, for work there."""
        stored = self.stored(has_constant=False)
        values = torch.empty(len(self.rows), self.skipped.columns, device=self.rows.device)
        self.kernels.fetch_dated_rows(stored.rows, None, self.last_step, None, RowState(values, ()), self.skipped)
        return values

    def stored(self, *, has_constant: bool) -> StoredRows:
        """Return the rows as they are, for work on the current stream."""
        super().ready()
        Lane.current(self.rows.device).uses(self.last_step, self.skipped.sums, self.skipped.multipliers)
        rows = packed_rows(self.rows, STAYS_PACKED)
        return StoredRows(rows, None, self.last_step, self.skipped, has_constant)


@dataclass
class Compared:
    """The next view, compared with the two before it, and its rows when they are on their way."""

    ids: Tensor  # [V] int64 on the device
    host_ids: Callable[[], Tensor]  # waits for the same on the host
    present: Tensor  # [W] int64 on the device, those of the present view
    # What is known of both; the rest of `Overlap` would take as much memory again until the update.
    sources: Tensor  # [V] int64, where rows are in the present view; -1 where they are not
    moved: Tensor  # [V] bool, whether they are there
    leaving: Tensor  # [W] bool, which rows of the present view are not in the next one
    compared: torch.cuda.Event | None  # that these are there
    on_host: Tensor | None  # [V] bool, which rows neither of these views has, until they are being read
    nearby: Tensor  # [V] bool, which rows the view before the present one had, and the present one has not
    packed: PackedRows | None = None  # V of the group that stays packed, when they are being read


class Division(NamedTuple):
    """Divide rows of the present view into those that the next one has as well, S of W, and the others; int64."""

    shared_here: Tensor  # [S] on the device, where the next view has them
    shared_before: Tensor  # [S] on the device, where the present view has them
    shared_ids: Tensor  # [S] on the host, which Gaussians these are
    only_before: Tensor  # [W - S] on the host, the other rows of the present view
    only_before_ids: Tensor  # [W - S] on the host, which Gaussians these are


class DeviceReading:
    """Reads rows of all groups on a stream of its own, and catches them up with the steps that they have skipped.

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
        self._overlap = kernels_for(device, "offload.pipelines.overlap").overlap
        self._lane, self._side_lane = Lane.new(device), Lane.new(device)  # the latter for what no row waits for
        # For the packed rows of one view, where geometry does not travel: where it does, those of two are there.
        self._has_space = len(groups) == 1
        self._space: PackedRows | None = None

    def compare(self, ids: Tensor, present: Tensor, before: Tensor) -> Compared:
        """Compare the next view with those before it, when the current stream has done its work so far.

        Args:
            ids: int64 [V] on the device, sorted.
            present: The same of the present view.
            before: The same of the view before that.
        """
        culled = Lane.current(self._device).record()
        with self._lane as lane:
            lane.wait(culled)
            lane.uses(ids, present, before)
            overlap = self._overlap(ids, present, before, ids.new_zeros(()))
            compared = lane.record()
        with self._side_lane as lane:
            lane.wait(culled)
            lane.uses(ids)
            host_ids = arriving(ids)
        known = overlap.sources, overlap.moved, overlap.leaving
        return Compared(ids, host_ids, present, *known, compared, overlap.on_host, overlap.nearby)

    def begin(self, views: Compared) -> None:
        """Read rows of the next view that are in no view before it, in the place of the present one's.

        Nothing that is under way on the host writes them: not the commits of the view before the present one. What the
        current stream has been given so far is all that reads the present view's rows.
        """
        packed = self._take_space(len(views.ids))
        with self._lane:
            self._read(views.ids, views.on_host, {}, packed)
        views.on_host, views.packed = None, packed

    def divide(self, views: Compared) -> Division:
        """Compare the next view with the present one; waits for what the device needs for that alone.

        The host would need several milliseconds, of the threads that commit rows at that time.
        """
        with self._side_lane as lane:
            lane.wait(views.compared)
            lane.uses(views.present, views.sources, views.moved, views.leaving)
            shared_here = views.moved.nonzero().squeeze(1)
            only_before = views.leaving.nonzero().squeeze(1)
            on_device = views.ids[shared_here], only_before, views.present[only_before]
            shared_before = views.sources[shared_here]
            on_host = [arriving(numbers) for numbers in on_device]
        return Division(shared_here, shared_before, *(arrived() for arrived in on_host))

    def go_on(self, views: Compared) -> dict[str, Uploaded]:
        """Read the rows of the view before the present one, when they have been committed.

        Returns:
            group -> V rows, for values after the present step; those of the present view are left out, for `complete`.
        """
        packed = views.packed
        assert packed is not None  # `begin` has been called
        with self._lane as lane:
            self._read(views.ids, views.nearby, {}, packed)
            skipped = self._groups[STAYS_PACKED].adam.skipped_steps(self._device)
            done = lane.record()
        return {STAYS_PACKED: UploadedPacked(packed[0], done, packed[1], skipped, self._kernels)}

    def upload(
        self, host_ids: Tensor, left_out: Tensor | None, *, previous: bool = False
    ) -> tuple[Tensor, dict[str, Uploaded]]:
        """Read rows for their values after the present step; nobody waits.

        Args:
            host_ids: int64 [V] on the host, sorted.
            left_out: int64 [S] on the host, which of these are read later, by `complete`; None: none.
            previous: For values before the present step, of rows that have not been committed since.

        Returns:
            The ids on the device, for work that waits for the rows; and group -> its V rows.
        """
        stay_packed = self._take_space(len(host_ids)) if self._has_space else None
        with self._lane as lane:
            ids = self._to_device(host_ids)
            wanted = None
            if left_out is not None:
                wanted = torch.ones(len(ids), dtype=torch.bool, device=self._device)
                wanted.index_fill_(0, self._to_device(left_out), False)
            skipped = {
                name: group.adam.skipped_steps(self._device, previous=previous) for name, group in self._groups.items()
            }
            values, packed = self._read(ids, wanted, skipped, stay_packed)
            done = lane.record()
        uploads = {name: Uploaded(rows, done) for name, rows in values.items()}
        for name, (words, last_step) in packed.items():
            uploads[name] = UploadedPacked(words, done, last_step, skipped[name], self._kernels)
        return ids, uploads

    def complete(self, uploads: Mapping[str, Uploaded], ids: Tensor, positions: Tensor) -> None:
        """Read rows that were left out, as they have been committed in the present step.

        Args:
            uploads: As `upload` gave them, for values after that step.
            ids: int64 [V] on the device, their rows.
            positions: int64 [S] on any device, which of them were left out.
        """
        with self._lane as lane:
            places = self._to_device(positions)
            lane.uses(ids, places)
            if self._has_space:  # straight to where they are missing: memory is scarce, and rows have been changed
                wanted = torch.zeros(len(ids), dtype=torch.bool, device=self._device)
                wanted.index_fill_(0, places, True)
                for upload in uploads.values():
                    assert isinstance(upload, UploadedPacked)
                    self._read(ids, wanted, {}, (upload.rows, upload.last_step))
            else:
                self._read_among(uploads, ids[places], places)
            done = lane.record()
        for upload in uploads.values():
            upload.done = done

    def finish(self) -> None:
        """Wait until nothing is being read."""
        self._lane.finish()

    def give_up_space(self) -> None:
        """Leave the space to whoever changes rows, which may take much memory; after `finish`, between steps."""
        self._space = None

    def _read_among(self, uploads: Mapping[str, Uploaded], ids: Tensor, places: Tensor) -> None:
        """Read rows [S] on the current stream and copy them to their places among those of a view."""
        skipped = {
            name: group.adam.skipped_steps(self._device) for name, group in self._groups.items() if name != STAYS_PACKED
        }
        values, packed = self._read(ids, None, skipped)
        for name, upload in uploads.items():
            if isinstance(upload, UploadedPacked):
                rows, last_step = packed[name]
                upload.last_step.index_copy_(0, places, last_step)
            else:
                rows = values[name]
            upload.rows.index_copy_(0, places, rows)

    def _read(
        self,
        ids: Tensor,
        wanted: Tensor | None,
        skipped: Mapping[str, SkippedSteps],
        stay_packed: PackedRows | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, PackedRows]]:
        """Read rows [V] on the current stream, in their order.

        Args:
            ids: int64 [V] on the device.
            wanted: bool [V]; rows where it is False are undefined, or as they were. None: all are wanted.
            skipped: What catches up groups that do not stay packed.
            stay_packed: Where V rows of the other group go; None: to new memory.

        Returns:
            Values [V, columns] of these groups; and the packed rows of the other one.
        """
        count = len(ids)
        block = min(READ_ROWS, count) if len(self._groups) > 1 else count  # the launching thread has no time for more
        packed = {
            name: stay_packed or group.new_packed(count, self._device)
            if name == STAYS_PACKED
            else group.new_packed(block, self._device)
            for name, group in self._groups.items()
        }
        values = {
            name: torch.empty(count, group.adam.columns, device=self._device)
            for name, group in self._groups.items()
            if name != STAYS_PACKED
        }
        places = torch.arange(block if values else 0, device=self._device)  # of those that are decoded
        stored = [group.packed for group in self._groups.values()]
        with self._times.on_lane("host_to_device", self._lane):
            for first in range(0, count, max(block, 1)):
                rows = slice(first, min(first + block, count))
                here, those = slice(0, rows.stop - first), None if wanted is None else wanted[rows]
                view = {name: _cut_out(whole, rows if name == STAYS_PACKED else here) for name, whole in packed.items()}
                self._kernels.read_packed_rows(stored, ids[rows], those, list(view.values()))
                for name, decoded in values.items():
                    words, steps = view[name]
                    of_view, out = packed_rows(words, name), RowState(decoded[rows], ())
                    self._kernels.fetch_dated_rows(of_view, places[here], steps, those, out, skipped[name])
        return values, {name: rows for name, rows in packed.items() if name == STAYS_PACKED}

    def _take_space(self, count: int) -> PackedRows:
        """Return space for packed rows [V] that are read next, when the current stream has done its work so far.

        There the rows of the view before lie, which that work reads.
        """
        if self._space is None or len(self._space[0]) < count:
            if self._space is not None and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # or its memory would not be free yet, and both there at once
            self._space = None
            with self._lane:
                self._space = self._groups[STAYS_PACKED].new_packed(count + count // SPARE, self._device)
        self._lane.wait(Lane.current(self._device).record())
        return _cut_out(self._space, slice(count))

    def _to_device(self, numbers: Tensor) -> Tensor:
        """Copy int64 [V] on the current stream, without waiting for it; once more before, where it is not pinned."""
        if self._device.type != "cuda" or numbers.is_cuda:
            return numbers
        return numbers.pin_memory().to(self._device, non_blocking=True)


def _cut_out(packed: PackedRows, rows: slice) -> PackedRows:
    words, last_step = packed
    return words[rows], last_step[rows]
