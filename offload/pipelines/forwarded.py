"""Forwards the rows of each view to the device and commits their gradients, behind the rendering.

While the device renders view j, a worker thread on the host

1. commits the gradients of view j - 1 (rows that view j needs as well are committed already, see 3), which it begins
   as soon as step j - 1 is over,
2. culls view j + 1 ahead, with a margin for what view j will change (the device does, before it renders view j, where
   geometry is there), and forwards its rows: rows that are not in view j have no gradient at this step, so their next
   value is a pure catch-up.

Where rows are compact the device reads them itself, instead, as soon as no commit of view j - 1 will write them
(`device_reading.py`). The worker is spared half of its work, and the link carries rows in place of values. Where
geometry is on the device as well, it also compares the two views, of which nobody but the update needs to know on the
host: that asks for it while the worker still commits. Rows of view j + 1 then come where those of view j were, when
colours have been made of these, so that device memory holds those of one view.

When view j has been rendered, its gradients travel to the host, beside what the worker is still doing; of harmonics
that one camera sees, what these are made of (`offload/adam/harmonics.py`), 24 bytes a row. When that is done,

3. rows in both views are updated, committed and forwarded in one pass. Only these wait for each other.

The margin covers the largest step that Adam can take, so the ids found ahead contain all that will be drawn, and
nothing has to be fetched late. Rows that turn out not to be drawn have a zero gradient, which Adam may apply or defer
alike (parameter forwarding and deferred updates of GS-Scale, arXiv 2509.15645).

`offload/pipelines/tiled.py` does the same for views that are rendered tile by tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from offload.adam.harmonics import MADE_COLUMNS, HarmonicsGradient
from offload.adam.host import DeferredAdam
from offload.adam.stored_harmonics import StoredRows
from offload.backends import native, num_threads
from offload.culling.cameras import Cameras
from offload.culling.visible import VisibleRows
from offload.pipelines.contract import MEANS, Counters, Displacement, fetched, upcoming_ids_of
from offload.pipelines.device_reading import Compared, DeviceReading
from offload.pipelines.groups import RowGroup, gradient_or_made
from offload.pipelines.lanes import Lane
from offload.pipelines.times import OffloadTimes
from offload.pipelines.transfer import Downloaded, RowTransfer, Uploaded
from offload.pipelines.worker import WorkAhead


@dataclass
class ForwardedRows:
    """Hold rows that are rendered together, on the device."""

    ids: Tensor  # [V] int64 on the device, sorted
    host_ids: Tensor  # [V] the same on the host
    values: dict[str, Tensor]  # group -> [V, columns], leaves; empty once their gradients have been taken in
    # What travels to the host: group -> [V, columns], gradients; or [V, 6], what they are made of together with `made`.
    gradients: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, HarmonicsGradient] = field(default_factory=dict)  # group -> that of no rows
    downloads: dict[str, Downloaded] = field(default_factory=dict)  # group -> its gradients, on their way


@dataclass
class Upcoming:
    """Hold the view after the present one, and what the rows it begins with share with the present view; on the host.

    It begins with all of its rows, or with those of its first tile.
    """

    rows: VisibleRows
    shared_here: Tensor  # [S] which of the rows it begins with wait for gradients of the present view; on any device
    shared_before: Tensor  # [S] which rows of the present view they are; there as well
    shared_ids: Tensor  # [S] which Gaussians these are
    only_before: Tensor  # [W - S] the other rows of the present view
    only_before_ids: Tensor  # [W - S] which Gaussians these are
    # The other rows that it begins with, [V - S], and which Gaussians these are; None where the device has compared.
    only_here: Tensor | None = None
    only_here_ids: Tensor | None = None

    @staticmethod
    def between(rows: VisibleRows, first_ids: Tensor, present_ids: Tensor) -> Upcoming:
        """Divide rows into those that are in two views and the others.

        Args:
            rows: Of the view.
            first_ids: int64 [V] on the host, sorted and unique, the rows that it begins with.
            present_ids: The same [W] of the present view, which waits for gradients of all of them.
        """
        # In memory that torch keeps, where a GPU has the rows: the system would hand out new pages each time.
        here, only_here, only_here_ids, before, only_before, only_before_ids = (
            torch.empty_like(ids, pin_memory=ids.is_pinned()) for ids in [first_ids] * 3 + [present_ids] * 3
        )
        found = here, before, only_here, only_here_ids, only_before, only_before_ids
        shared = native.compare_ids(first_ids, present_ids, *found, num_threads())
        alone, alone_before = len(first_ids) - shared, len(present_ids) - shared
        here, before = here[:shared], before[:shared]
        only_before, only_before_ids = only_before[:alone_before], only_before_ids[:alone_before]
        shared_ids = present_ids[before]
        return Upcoming(
            rows, here, before, shared_ids, only_before, only_before_ids, only_here[:alone], only_here_ids[:alone]
        )

    @staticmethod
    def of(rows: VisibleRows, first_ids: Tensor, shared: tuple[Tensor, Tensor], present_ids: Tensor) -> Upcoming:
        """Divide rows into those that two views share and the others.

        Args:
            rows: Of the view.
            first_ids: int64 [V] on the host, the rows that it begins with.
            shared: Two int64 [S] on the host: the shared rows among `first_ids`, and in the present view.
            present_ids: int64 [W] on the host, the rows of the present view.
        """
        only_here, only_before = (
            positions_without(positions, len(ids))
            for positions, ids in zip(shared, (first_ids, present_ids), strict=True)
        )
        here, before = shared
        return Upcoming(
            rows, here, before, present_ids[before], only_before, present_ids[only_before], only_here,
            first_ids[only_here],
        )  # fmt: skip


@dataclass
class Ahead:
    """Hold rows on their way to the device, behind the rendering."""

    uploads: dict[str, Uploaded]  # group -> [V, columns]
    # Returns the view that begins with them, the same each time; None: the present view has them, in its next tile.
    find: Callable[[], Upcoming] | None

    @property
    def upcoming(self) -> Upcoming | None:
        """Return the view that begins with these rows, or None, if it is the present one."""
        return None if self.find is None else self.find()


class ForwardedPipeline:
    """Brings the rows of each view to the device and their gradients back; see the head of this file.

    What the worker does ahead may fail where device memory runs out. That is raised once, by whichever call needs its
    result, and nothing has changed then: the same call can be repeated, and works without what was done ahead.
    """

    last_step_in_store: ClassVar[bool] = True

    def __init__(
        self,
        groups: Mapping[str, RowGroup[DeferredAdam]],
        cull: Callable[[Cameras], Tensor],
        device: torch.device,
        *,
        device_reads: bool = False,
    ) -> None:
        """
        Args:
            groups: What travels. With geometry among them, the worker culls, since it changes what culling reads.
            cull: Gives the sorted ids [V], where geometry is, of what cameras may draw after one more step.
            device: Where views are rendered.
            device_reads: Whether the device reads rows from their stores, which are compact, and catches them up.
        """
        self._groups = groups
        self._cull = cull
        self._device = device
        self._culls_in_worker = "geometry" in groups
        self._times = OffloadTimes()
        self._transfers = {name: RowTransfer(group.adam.columns, device, self._times) for name, group in groups.items()}
        self._made_transfer = RowTransfer(MADE_COLUMNS, device, self._times)
        self._reading = DeviceReading(groups, device, self._times) if device_reads else None
        self._early_reading = None if self._culls_in_worker else self._reading
        self._present: VisibleRows | None = None
        self._rows: ForwardedRows | None = None
        self._step_begun = False
        self._ahead: WorkAhead[Ahead] = WorkAhead(self._times, device)
        self._owed: list[Callable[[], None]] = []  # commits of gradients on their way to the host
        self._applied = False  # whether gradients of the present view may have reached the rows
        self._is_ending = False  # whether its update has begun to change them, which is not done twice
        self._displaced: Displacement | None = None  # rows of the present view, with its update
        self._found: VisibleRows | None = None  # of the next view, found before training was interrupted
        # Where rows are read early: whether nothing will read those of the present view any more; the next view, until
        # its rows are being read; and what has them divided while the worker still commits, which nobody needs before.
        self._are_spent = False
        self._compared: Compared | None = None
        self._find_in_update: Callable[[], Upcoming] | None = None
        self._before: Tensor | None = None  # [V] on the device, rows of the view before the present one; to read early

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras) -> ForwardedRows:
        """Return the rows of a view, with the values they have after the last step."""
        rows = self._bring(*self._begin_whole(cameras))
        self._are_spent = True
        return rows

    def fetch_stored(self, cameras: Cameras, name: str) -> tuple[ForwardedRows, StoredRows]:
        """Do as `fetch`, but for one group, whose rows are returned as they have come."""
        ids, host_ids = self._begin_whole(cameras)
        uploads = self._uploads(host_ids)
        stored = uploads.pop(name).stored(has_constant=self._groups[name].store.layout.has_constant)
        self._are_spent = False
        if self._early_reading is not None:
            stored.on_spent = self._spend
        return self._take(ids, host_ids, uploads), stored

    def prefetch(self, cameras: Cameras) -> None:
        """Let the worker commit what is owed and forward the next view's rows, while the present one is rendered."""
        present = fetched(self._present)
        if self._early_reading is None:
            self._ahead.begin(self._prepare, self._finding(cameras, present), None)
            return
        ids = self._cull(cameras)
        before = ids[:0] if self._before is None else self._before
        self._compared = self._early_reading.compare(ids, present.ids, before)
        self._find_in_update = cache(partial(_divided, self._early_reading, self._compared))
        if self._are_spent:
            self._read_ahead()

    def update(self, made: HarmonicsGradient | None = None) -> None:
        """Take in the gradients of the view and end the step; the worker commits them at once.

        Args:
            made: What the gradient of the rows without values is made of, where there are some.
        """
        present, gradients, downloads, ahead = self._gradients_and_ahead(made)
        # What takes most device memory comes before anything is changed, so that it can be done again.
        if ahead is None or ahead.upcoming is None:
            self._applied = self._is_ending = True
            self._displace(present)
            remaining, remaining_ids = torch.arange(len(present.host_ids)), present.host_ids
        else:
            urgent = self._download_urgently(ahead.upcoming.shared_before, gradients)
            self._applied = self._is_ending = True
            self._displace(present)
            self._update_shared(ahead, ahead.upcoming, lambda name: self._gradients_of(urgent[name]))
            remaining, remaining_ids = ahead.upcoming.only_before, ahead.upcoming.only_before_ids
        self._owed.append(partial(self._commit, remaining_ids, remaining, downloads))
        self._end_step()

    def displace(self, displacement: Displacement) -> None:
        """Move means of rows of the present view, on the host, with the update that comes next."""
        self._displaced = displacement

    def geometry_moved(self) -> None:
        """Do nothing: the next view is culled later, on the same stream."""

    # ------------------------------------------------------------------------------------- reading, changing, state

    def finish(self) -> None:
        """Commit all gradients; afterwards the stores hold everything. Values forwarded ahead stay good."""
        self._ahead.result()
        self._commit_all_owed()

    def forget_upcoming(self) -> None:
        """Drop what is known of the next view, since rows will be changed."""
        self.finish()
        self._finish_reading()
        self._ahead.forget()
        if self._reading is not None:
            self._reading.give_up_space()
        self._found = None

    def read(self, name: str, ids: Tensor) -> Tensor:
        """Return copies of the current values of rows [V, columns] of a group on the host; the store is left as it is.

        Args:
            name: Of the group.
            ids: int64 [V] on any device.
        """
        self.finish()
        group, host_ids = self._groups[name], ids.cpu()
        out = torch.empty(len(host_ids), group.adam.columns)
        group.adam.forward(group.store.rows, group.store.last_step, host_ids, out)
        return out

    def catch_up(self, name: str, ids: Tensor | None) -> None:
        """Commit the skipped steps of rows of a group, so that its store holds their current values.

        Args:
            name: Of the group.
            ids: int64 [M] on any device, the rows; None: all.
        """
        self.forget_upcoming()
        group = self._groups[name]
        host_ids = torch.arange(group.store.num_gaussians) if ids is None else ids.cpu()
        stale = host_ids[group.store.last_step[host_ids] < group.adam.step]
        with group.store.changing(stale) as rows:
            group.adam.commit(rows, group.store.last_step, stale, None)

    def last_step(self, name: str) -> Tensor:
        """Return the step of each row's last update in a group, [N] int32; after `finish`."""
        return self._groups[name].store.last_step

    @property
    def upcoming(self) -> VisibleRows | None:
        """Return the next view, where it has been found ahead; between steps."""
        ahead = self._ahead.result()
        return self._found if ahead is None or ahead.upcoming is None else ahead.upcoming.rows

    def state(self) -> dict[str, Tensor]:
        """Return what is known of the next view, as `offload.adam.state` names it; between steps."""
        return {} if self.upcoming is None else {"upcoming/ids": self.upcoming.host_ids}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the next view from a state, or none, where it has none; the stores have been filled from it."""
        ids = upcoming_ids_of(state, torch.device("cpu"))
        self._found = None if ids is None else VisibleRows(self._where_geometry_is(ids), ids)

    def undo_step(self, steps_done: int) -> None:
        """Forget the step after so many, which an error has ended; the next one begins with the same view.

        Raises:
            RuntimeError: Gradients have reached some rows already.
        """
        with contextlib.suppress(Exception):
            self._ahead.result()
        if self._present is None:
            return
        if self._applied:
            raise RuntimeError("the step had been applied in part")
        self._finish_reading()
        self._commit_all_owed()
        for group in self._groups.values():
            group.undo_step(steps_done)
        self._found = self._present
        self._step_begun = False
        self._ahead.forget()
        self._rows = self._present = self._displaced = self._compared = self._find_in_update = None

    def counters(self) -> Counters:
        """Count allocations of staging memory; and milliseconds that the worker has culled, forwarded and committed
        (the main thread where nothing was prefetched), the main thread has updated rows that two views share and has
        waited for the worker, both have waited for gradients to arrive, and copies have taken."""
        transfers = *self._transfers.values(), self._made_transfer
        staging_allocations = sum(transfer.staging_allocations for transfer in transfers)
        return Counters(staging_allocations, self._times.milliseconds())

    # ------------------------------------------------------------------------------------------ steps of the way

    def _begin(self, cameras: Cameras) -> VisibleRows:
        """Begin a step on the view of these cameras."""
        ahead = self._ahead.result()
        if ahead is None or ahead.upcoming is None:
            self.finish()
            rows, self._found = self._find(cameras) if self._found is None else self._found, None
        else:
            rows, self._found = ahead.upcoming.rows, None
        self._present, self._applied, self._is_ending = rows, False, False
        return rows

    def _begin_whole(self, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """Begin a step on a view that is rendered at once; return its ids [V], on the device and on the host."""
        rows = self._begin(cameras)
        return rows.ids.to(self._device), rows.host_ids

    def _bring(self, ids: Tensor, host_ids: Tensor) -> ForwardedRows:
        """Bring the values of rows to the device that are rendered now, or take those that have been prefetched."""
        return self._take(ids, host_ids, self._uploads(host_ids))

    def _uploads(self, host_ids: Tensor) -> dict[str, Uploaded]:
        """Return the rows that are rendered now, on their way since they were prefetched, or from now on."""
        ahead = self._ahead.result()
        if ahead is not None:
            return dict(ahead.uploads)
        self._commit_all_owed()
        return self._upload_unchanged(host_ids)

    def _take(self, ids: Tensor, host_ids: Tensor, uploads: Mapping[str, Uploaded]) -> ForwardedRows:
        """Begin to render the values of rows."""
        values = {name: upload.ready().requires_grad_() for name, upload in uploads.items()}
        Lane.current(self._device).uses(ids)  # which may have come with them
        self._ahead.forget()
        self._rows = ForwardedRows(ids, host_ids, values)
        return self._rows

    def _find(self, cameras: Cameras) -> VisibleRows:
        return VisibleRows.of(self._cull(cameras))

    def _finding(self, cameras: Cameras, present: VisibleRows) -> Callable[[], Upcoming]:
        """Begin to find the next view, where no device compares it; return what finds it, the same each time.

        The worker gives no work to the device's current stream, where it would wait for the rendering: geometry that is
        on the device is culled here.
        """
        find: Callable[[], VisibleRows] = partial(self._find, cameras)
        if not self._culls_in_worker:
            find = VisibleRows.arriving(self._cull(cameras))

        @cache
        def find_upcoming() -> Upcoming:
            rows = find()
            return Upcoming.between(rows, rows.host_ids, present.host_ids)

        return find_upcoming

    def _spend(self) -> None:
        """Note that all has been given to the device that reads the rows of the present view as they have come."""
        self._are_spent = True
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Let rows of the next view come where those of the present one are, if it has been found."""
        if self._early_reading is None or self._compared is None:
            return
        views, self._compared = self._compared, None  # once: where that fails, rows are read when they are rendered
        self._early_reading.begin(views)
        self._ahead.begin(self._prepare, self._find_in_update, partial(self._early_reading.go_on, views))

    def _prepare(self, find: Callable[[], Upcoming], read: Callable[[], dict[str, Uploaded]] | None) -> Ahead:
        """Upload what can be known of the next view before the present view's gradients."""
        self._commit_all_owed()
        self._begin_step()
        if read is not None:
            return Ahead(read(), find)
        with self._times.on_host("worker_cull") if self._culls_in_worker else contextlib.nullcontext():
            upcoming = find()
        if self._reading is None:
            uploads = {name: self._upload_known(name, upcoming) for name in self._groups}
        else:
            upcoming.rows.ids, uploads = self._reading.upload(upcoming.rows.host_ids, upcoming.shared_here)
        return Ahead(uploads, find)

    def _upload_known(self, name: str, upcoming: Upcoming) -> Uploaded:
        group, known, ids = self._groups[name], upcoming.only_here, upcoming.only_here_ids
        assert known is not None  # the host has compared
        assert ids is not None

        def fill(out: Tensor, begin: int, end: int) -> None:
            first, last = torch.searchsorted(known, torch.tensor([begin, end])).tolist()
            with self._times.on_host("worker_forward"):
                out_rows = known[first:last] - begin
                group.adam.forward(group.store.rows, group.store.last_step, ids[first:last], out, out_rows=out_rows)

        return self._transfers[name].upload(len(known) + len(upcoming.shared_here), fill)

    def _upload_unchanged(self, host_ids: Tensor) -> dict[str, Uploaded]:
        """Upload rows as they were before the step, whether or not it has begun."""
        if self._reading is not None:
            return self._reading.upload(host_ids, None, previous=self._step_begun)[1]
        uploads = {}
        for name, group in self._groups.items():
            forward = group.adam.forward_previous if self._step_begun else group.adam.forward

            def fill(
                out: Tensor, begin: int, end: int, group: RowGroup[DeferredAdam] = group, forward: Callable = forward
            ) -> None:
                with self._times.on_host("worker_forward"):
                    forward(group.store.rows, group.store.last_step, host_ids[begin:end], out)

            uploads[name] = self._transfers[name].upload(len(host_ids), fill)
        return uploads

    def _gradients_and_ahead(
        self, made: HarmonicsGradient | None = None
    ) -> tuple[VisibleRows, dict[str, Tensor], dict[str, Downloaded], Ahead | None]:
        """Send the gradients of the rows on the device to the host, and wait for the worker.

        Returns:
            The present view; the gradients by group, as `_take_gradients` returns them and on their way; and what the
            worker has done.

        Raises:
            OutOfMemoryError: The update is done again, and memory had run out when it had begun to change rows.
        """
        if self._is_ending:
            raise torch.cuda.OutOfMemoryError("Device memory ran out when the step had been applied in part.")
        present, gradients = fetched(self._present), self._take_gradients(made)
        downloads = fetched(self._rows).downloads
        for name, gradient in gradients.items():
            # Once, also if the update is done again: the next download takes memory that the worker may commit from.
            if name not in downloads:
                downloads[name] = self._download(name, gradient)
        self._read_ahead()  # unless that has been done when colours were made
        if self._find_in_update is not None:
            self._find_in_update()
        ahead = self._ahead.result()
        self._commit_all_owed()
        self._begin_step()
        return present, gradients, downloads, ahead

    def _take_gradients(self, made: HarmonicsGradient | None = None) -> dict[str, Tensor]:
        """Free the values of the rows on the device, and return what travels: `ForwardedRows.gradients`."""
        rows = fetched(self._rows)
        for name in self._groups:
            if name in rows.gradients:
                continue  # the update is done again
            gradient = gradient_or_made(rows.values.get(name), made)
            if isinstance(gradient, HarmonicsGradient):
                rows.made[name] = gradient.of(torch.empty(0, MADE_COLUMNS))
                gradient = gradient.side_by_side()
            rows.gradients[name] = gradient
        rows.values = {}
        return rows.gradients

    def _download(self, name: str, gradient: Tensor, *, urgent: bool = False) -> Downloaded:
        """Send to the host what `_take_gradients` has returned of a group, or some rows of that."""
        made = fetched(self._rows).made.get(name)
        transfer = self._transfers[name] if made is None else self._made_transfer
        downloaded = transfer.download(gradient, urgent=urgent)
        downloaded.made = made
        return downloaded

    def _download_urgently(self, rows: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Downloaded]:
        """Send gradients of some rows, whose numbers are on any device, ahead of the others."""
        rows = rows.to(self._device)
        Lane.current(self._device).uses(rows)
        return {name: self._download(name, gradient[rows], urgent=True) for name, gradient in gradients.items()}

    def _update_shared(
        self,
        ahead: Ahead,
        upcoming: Upcoming,
        gradients_of: Callable[[str], Tensor | HarmonicsGradient],
        gradient_rows: Tensor | None = None,
    ) -> None:
        """Update the rows that both views have, and complete what was forwarded of the next one.

        Args:
            ahead: What was forwarded.
            upcoming: The next view, whose rows these are.
            gradients_of: Gives the gradients of G rows of a group on the host, when they have arrived.
            gradient_rows: int64 [S], which of these each shared row has; None: they are in its order.
        """
        host_ids = upcoming.shared_ids
        for name, group in self._groups.items():
            gradients = gradients_of(name)
            if self._reading is not None:
                with group.store.changing(host_ids) as rows, self._times.on_host("update_shared_rows"):
                    group.adam.commit(rows, group.store.last_step, host_ids, gradients, gradient_rows=gradient_rows)
                continue
            numbers = torch.arange(len(host_ids)) if gradient_rows is None else gradient_rows

            def fill(
                out: Tensor,
                begin: int,
                end: int,
                group: RowGroup[DeferredAdam] = group,
                gradients: Tensor | HarmonicsGradient = gradients,
                numbers: Tensor = numbers,
            ) -> None:
                block = group.store.rows, group.store.last_step, host_ids[begin:end]
                with self._times.on_host("update_shared_rows"):
                    group.adam.commit_and_forward(*block, gradients, out, gradient_rows=numbers[begin:end])

            with group.store.changing(host_ids):
                self._transfers[name].complete(ahead.uploads[name], upcoming.shared_here, fill)
        if self._reading is not None:
            self._reading.complete(ahead.uploads, upcoming.rows.ids, upcoming.shared_here)

    def _displace(self, present: VisibleRows) -> Tensor:
        """Move means of rows of the present view, while the worker rests; return which, int64 [D] on the host."""
        displaced, self._displaced = self._displaced, None
        if displaced is None:
            return torch.zeros(0, dtype=torch.int64)
        store, host_ids = self._groups["geometry"].store, present.host_ids[displaced.rows.cpu()]
        with store.changing(host_ids) as rows:
            Displacement(host_ids, displaced.offsets).add_to(rows.parameters[:, MEANS])
        return host_ids

    def _finish_reading(self) -> None:
        """Wait until the device reads no rows, which may change or go."""
        if self._reading is not None:
            self._reading.finish()

    def _begin_step(self) -> None:
        """Begin the step of the present view, if that has not been done."""
        if self._step_begun:
            return
        for group in self._groups.values():
            group.begin_step()
        self._step_begun = True

    def _end_step(self) -> None:
        """Let the worker commit what is owed, before it is given the next view."""
        if self._early_reading is not None:
            self._before = fetched(self._present).ids
        self._present = self._rows = self._compared = self._find_in_update = None
        self._step_begun = False
        self._ahead.begin_before(self._commit_owed)

    def _commit_all_owed(self) -> None:
        """Commit all gradients that are owed to the stores, when the worker has done its part."""
        self._ahead.finish_before()
        self._commit_owed()

    def _commit_owed(self) -> None:
        owed, self._owed = self._owed, []
        for work in owed:
            work()

    def _commit(self, host_ids: Tensor, gradient_rows: Tensor, gradients: Mapping[str, Downloaded]) -> None:
        for name, group in self._groups.items():
            arrived = self._gradients_of(gradients[name])
            with group.store.changing(host_ids) as rows, self._times.on_host("worker_commit"):
                group.adam.commit(rows, group.store.last_step, host_ids, arrived, gradient_rows=gradient_rows)

    def _arrived(self, gradients: Downloaded) -> Tensor:
        with self._times.on_host("wait_for_gradients"):
            return gradients.ready()

    def _gradients_of(self, downloaded: Downloaded) -> Tensor | HarmonicsGradient:
        with self._times.on_host("wait_for_gradients"):
            return downloaded.gradients()

    def _where_geometry_is(self, host_ids: Tensor) -> Tensor:
        return host_ids if self._culls_in_worker else host_ids.to(self._device)


def _divided(reading: DeviceReading, views: Compared) -> Upcoming:
    """Return the next view, as the device has compared it with the present one."""
    division = reading.divide(views)
    return Upcoming(VisibleRows(views.ids, views.host_ids()), *division)


def positions_without(positions: Tensor, count: int) -> Tensor:
    """Return all int64 below `count` that are not among the positions, ascending."""
    others = np.ones(count, dtype=bool)
    others[positions.numpy()] = False
    return torch.from_numpy(np.flatnonzero(others))  # torch's nonzero takes three times as long


def shared_positions(ids: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the ids that both hold stand in each.

    Args:
        ids: [V] sorted, unique int64.
        other: [W] the same.

    Returns:
        Two int64 [S], ascending: positions in `ids` and in `other`.
    """
    if len(ids) == 0 or len(other) == 0:
        empty = ids.new_zeros(0)
        return empty, empty
    positions = torch.searchsorted(other, ids).clamp_(max=len(other) - 1)  # [V]
    here = (other[positions] == ids).nonzero().squeeze(1)
    return here, positions[here]
