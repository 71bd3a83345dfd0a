"""Rows that stay in pinned host memory, moments and all, where the device updates them behind and after the rendering.

The device holds parameters alone, of two views: the one that is rendered and the next. While view j is rendered,

- a worker thread on the host waits until the step of view j - 1 is done, culls view j + 1 and sends its ids;
- the fetch lane reads its rows from the host, with their moments, applies the steps that they have skipped and leaves
  the parameters on the device.

After the backward pass of view j a kernel on the lane of rendering reads the moments of its rows from the host, applies
Adam, and writes parameters and moments there. Rows that view j + 1 needs too are not fetched but moved to it then, on
the device. So the host is current when a step is done, and no row has to be written later.

Bytes over the link for each row of a view, with 48 columns of appearance and geometry in a line of 64 bytes, so 256
bytes of parameters and as many of each moment: 768 to fetch it, where the view before has not had it; 512 read and 768
written to update it. With the appearance's moments in bfloat16: 576; 320 and 576. At the 50 GB/s of one way, what is
read takes 26 ns a row, and what is written goes beside it.

On the device a row takes 240 bytes in each of the two views, as many for its gradient, and about 40 for numbers of
rows and last steps. Both views lie in one arena, at either end. Where they do not fit together, the next view's rows
are fetched when it is rendered, and the arena grows then, as far as there is memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from offload.adam.finite import gradient_of
from offload.backends import kernels_for
from offload.culling.cameras import Cameras
from offload.pipelines.arena import Arena
from offload.pipelines.contract import MEANS, Counters, Displacement, fetched, upcoming_ids_of
from offload.pipelines.groups import RowGroup, chunks_of, positions_among
from offload.pipelines.lanes import Lane
from offload.pipelines.times import OffloadTimes
from offload.pipelines.worker import WorkAhead
from offload.store.layout import RowState


@dataclass
class InPlaceView:
    """The rows of one view: their parameters on the device, and when they were updated last."""

    ids: Tensor  # [V] int64 on the device, sorted
    host_ids: Tensor  # [V] the same on the host
    last_step: dict[str, Tensor]  # group -> [V] int32 on the device, step of each row's update before that of this view
    rows: dict[str, Tensor]  # group -> [V, columns] in the arena
    at_end: bool  # of the arena
    values: dict[str, Tensor] = field(default_factory=dict)  # the same, as leaves that receive gradients
    fetched: torch.cuda.Event | None = None
    step: int = 0  # of its update
    updated: torch.cuda.Event | None = None  # and on the host


@dataclass
class _Upcoming:
    """The next view, found ahead."""

    host_ids: Tensor  # [V] int64
    view: InPlaceView | None = None  # whose rows are on their way but for those of the present view; None: no space
    sources: Tensor | None = None  # [V] int64 on the device, where its rows are in the present view; -1: not there
    found: torch.cuda.Event | None = None  # that `sources` are there


class StreamedHostPipeline:
    """Brings each view's parameters to the device and updates its rows where they live; see the head of this file."""

    last_step_in_store: ClassVar[bool] = True

    def __init__(self, groups: Mapping[str, RowGroup], cull: Callable[[Cameras], Tensor], device: torch.device) -> None:
        """
        Args:
            groups: What travels.
            cull: Gives the sorted ids [V], on the host, of what cameras may draw after one more step. It is called
                when the rows on the host are those of after the last step, and may read them.
            device: Where views are rendered and rows are updated.
        """
        self._groups = groups
        self._cull = cull
        self._device = device
        self._kernels = kernels_for(device, "offload.adam.rows")
        self._fetch_lane = Lane.new(device)
        self._arena = Arena({name: group.adam.columns for name, group in groups.items()}, device)
        self._present: InPlaceView | None = None
        self._unnoted: InPlaceView | None = None  # updated last, of which the stores do not know yet
        self._changes = ExitStack()  # of the stores, which its update has begun
        self._found_ids: Tensor | None = None  # of the next view, found before training was interrupted
        self._ready: torch.cuda.Event | None = None  # when rows of the next view may be fetched
        self._applied = False  # whether gradients of the present view may have reached its rows
        self._times = OffloadTimes()
        self._ahead: WorkAhead[_Upcoming] = WorkAhead(self._times, device)
        self._rows_found, self._rows_updated = 0, 0
        self._rows_retained = torch.zeros((), dtype=torch.int64, device=device)
        self.staging_allocations = 0

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras) -> InPlaceView:
        """Return the rows of a view, with the values they have after the last step."""
        compute, upcoming = Lane.current(self._device), self._ahead.result()
        self._ahead.forget()
        self._arena.see()
        if upcoming is not None and upcoming.view is not None:
            view = upcoming.view
            compute.wait(view.fetched)
            compute.uses(view.ids, *view.last_step.values())
        else:
            view = self._fetch_late(cameras, None if upcoming is None else upcoming.host_ids)
        self._arena.renders(len(view.ids))
        # Not `detach`, which would have autograd take changes elsewhere in the arena for changes of these rows.
        view.values = {name: rows.data.requires_grad_() for name, rows in view.rows.items()}
        self._present, self._applied = view, False
        return view

    def prefetch(self, cameras: Cameras) -> None:
        """Let the next view's rows travel while the present one is rendered; waits for nothing."""
        with self._fetch_lane as lane:
            lane.wait(self._ready)
            self._begin_step()  # here, where rows catch up
        self._ahead.begin(self._prepare, cameras, fetched(self._present))

    def update(self) -> None:
        """Take Adam's step on the gradients of the view that `fetch` gave, on the host; waits for the worker."""
        upcoming, view, compute = self._ahead.result(), fetched(self._present), Lane.current(self._device)
        self._note_update()
        if upcoming is None:
            with self._fetch_lane as lane:
                lane.wait(self._ready)  # rows have caught up elsewhere
                self._begin_step()
        else:
            compute.wait(upcoming.found)
        self._applied = True
        for name, group in self._groups.items():
            gradients = gradient_of(view.values[name])
            rows, last_step = view.rows[name], view.last_step[name]
            host = self._changes.enter_context(group.store.changing(view.host_ids))
            self._kernels.step_host_rows(rows, view.ids, last_step, gradients, host, group.adam)
            compute.uses(group.adam.decays)
            if upcoming is not None and upcoming.view is not None:
                destination = RowState(upcoming.view.rows[name], ())
                self._kernels.move_rows(RowState(rows, ()), upcoming.sources, destination)
        if upcoming is not None and upcoming.sources is not None:
            compute.uses(upcoming.sources)
        for values in view.values.values():
            values.grad = None  # whoever still holds the values has no use for it
        view.values, view.rows = {}, {}
        self._rows_updated += len(view.ids)
        view.step, view.updated = self.step_count, compute.record()
        self._ready = view.updated
        self._unnoted, self._present = view, None

    def displace(self, displacement: Displacement) -> None:
        """Move means of rows of the present view, whose values on the device the update begins with."""
        displacement.add_to(fetched(self._present).values["geometry"].detach()[:, MEANS])

    def geometry_moved(self) -> None:
        """Do nothing: geometry is among the rows."""

    def finish(self) -> None:
        """Wait until the host has everything, and the lanes rest. Rows that were fetched ahead stay good."""
        self._ahead.result()
        self._note_update()
        self._fetch_lane.finish()

    @property
    def upcoming_ids(self) -> Tensor | None:
        """Return the next view's rows [V] on the host, where they have been found ahead; between steps."""
        upcoming = self._ahead.result()
        return self._found_ids if upcoming is None else upcoming.host_ids

    def forget_upcoming(self) -> None:
        """Drop what is known of the next view, since rows will be changed."""
        self.finish()
        self._arena.rests(changing=True)
        self._ahead.forget()
        self._found_ids = None

    def state(self) -> dict[str, Tensor]:
        """Return what is known of the next view, as `offload.adam.state` names it; between steps."""
        return {} if self.upcoming_ids is None else {"upcoming/ids": self.upcoming_ids}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the next view from a state, or none, where it has none; the stores have been filled from it."""
        self._ahead.forget()
        self._found_ids = upcoming_ids_of(state, torch.device("cpu"))

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
        self._fetch_lane.finish()
        self._ahead.forget()
        self._found_ids, self._present = self._present.host_ids, None
        for group in self._groups.values():
            group.undo_step(steps_done)

    def counters(self) -> Counters:
        """Count allocations of space for views, rows and bytes that have travelled, and milliseconds that the worker
        has waited for updates, noted them, culled and sent ids and kernels (the main thread where nothing was
        prefetched), and that the main thread has waited for the worker; waits for the fetching."""
        traffic = {**self.rows_moved, "link_bytes": self.link_bytes}
        return Counters(self.staging_allocations, self._times.milliseconds(), traffic)

    @property
    def step_count(self) -> int:
        """Return the step that has begun last."""
        return next(iter(self._groups.values())).adam.step

    @property
    def rows_moved(self) -> dict[str, int]:
        """Count the rows of views that have been fetched, retained and written so far; waits for the fetching.

        A retained row stays on the device from one view to the next and is not fetched in between. All are written.
        """
        self._ahead.result()
        self._fetch_lane.finish()
        retained = int(self._rows_retained)
        return {
            "rows_fetched": self._rows_found - retained,
            "rows_retained": retained,
            "rows_written": self._rows_updated,
        }

    @property
    def link_bytes(self) -> int:
        """Count the bytes of rows moved between host and device so far, both ways; waits for the fetching."""
        rows = self.rows_moved
        hosts = [group.store.rows for group in self._groups.values()]
        moments, whole = sum(host.moments_bytes for host in hosts), sum(host.row_bytes for host in hosts)
        return whole * rows["rows_fetched"] + (moments + whole) * rows["rows_written"]

    # ------------------------------------------------------------------------------------ reading and changing rows

    def read(self, name: str, ids: Tensor) -> Tensor:
        """Return copies of the current values of rows [V, columns] on the device; the store is left as it is."""
        self.finish()
        group, host_ids = self._groups[name], ids.cpu()
        out = self._caught_up(group, self._to_device(host_ids), self._last_step_of(group, host_ids))
        self._fetch_lane.wait(Lane.current(self._device).record())  # which will change the tables
        return out

    def last_step(self, name: str) -> Tensor:
        """Return the step of each row's last update, [N] int32."""
        self.finish()
        return self._groups[name].store.last_step

    def catch_up(self, name: str, ids: Tensor | None) -> None:
        """Let a group's store hold the current values of rows, so that others may read and change them.

        Args:
            name: Of the group.
            ids: int64 [M] on any device, sorted, the rows; None: all. Others keep the steps they have skipped.
        """
        self.forget_upcoming()  # it may not hold any more
        group = self._groups[name]
        last_step = group.store.last_step
        if ids is None:
            stale = (last_step < group.adam.step).nonzero().squeeze(1)
        else:
            stale = ids.cpu()
            stale = stale[last_step[stale] < group.adam.step]
        with group.store.changing(stale) as host:
            for first, last in chunks_of(len(stale)):
                host_ids = stale[first:last]
                ids, chunk_last_step = self._to_device(host_ids), self._last_step_of(group, host_ids)
                rows = self._caught_up(group, ids, chunk_last_step)
                self._kernels.step_host_rows(rows, ids, chunk_last_step, None, host, group.adam)
            Lane.current(self._device).finish()
            last_step.index_fill_(0, stale, group.adam.step)

    # --------------------------------------------------------------------------------------------------- inside

    def _prepare(self, cameras: Cameras, present: InPlaceView) -> _Upcoming:
        """Find the next view and fetch its rows; the worker does it behind the rendering of the present one."""
        self._note_update()
        with self._times.on_host("worker_cull"):
            host_ids = self._cull(cameras)
        if not self._arena.has_space_for(len(present.host_ids), len(host_ids)):
            return _Upcoming(host_ids)
        with self._fetch_lane as lane, self._times.on_host("worker_send"):
            view = self._new_view(host_ids, at_end=not present.at_end)
            sources = positions_among(present.ids, view.ids)
            found = lane.record()
            on_host = sources < 0
            for last_step in view.last_step.values():
                last_step.masked_fill_(~on_host, self.step_count)  # the step of the present view, which is to come
            self._rows_retained += (~on_host).sum()
            self._read_from_host(view, on_host)
            lane.uses(present.ids)
            view.fetched = lane.record()
        return _Upcoming(host_ids, view, sources, found)

    def _fetch_late(self, cameras: Cameras, host_ids: Tensor | None) -> InPlaceView:
        """Fetch a view that has not been fetched ahead; there is no other on the device."""
        self.finish()
        if host_ids is None:
            host_ids = self._cull(cameras) if self._found_ids is None else self._found_ids
        self._found_ids = None
        self.staging_allocations += self._arena.make_space_for(len(host_ids))
        view = self._new_view(host_ids, at_end=False)
        self._read_from_host(view, None)
        self._ready = Lane.current(self._device).record()
        return view

    def _note_update(self) -> None:
        """Wait for the update that was given last, and let the stores know of it."""
        view = self._unnoted
        if view is None:
            return
        if view.updated is not None:
            with self._times.on_host("wait_for_update"):
                view.updated.synchronize()
        with self._times.on_host("worker_settle"):
            for group in self._groups.values():
                group.store.last_step.index_fill_(0, view.host_ids, view.step)
            self._changes.close()
        self._unnoted = None

    def _begin_step(self) -> None:
        for group in self._groups.values():
            group.begin_step()

    def _new_view(self, host_ids: Tensor, at_end: bool) -> InPlaceView:
        """Make a view whose ids and last steps are on their way, on the current lane."""
        self._rows_found += len(host_ids)
        last_step = {name: self._last_step_of(group, host_ids) for name, group in self._groups.items()}
        rows = self._arena.rows(len(host_ids), at_end)
        return InPlaceView(self._to_device(host_ids), host_ids, last_step, rows, at_end)

    def _read_from_host(self, view: InPlaceView, wanted: Tensor | None) -> None:
        for name, group in self._groups.items():
            out = RowState(view.rows[name], ())
            self._kernels.fetch_dated_rows(group.store.rows, view.ids, view.last_step[name], wanted, out, group.adam)

    def _caught_up(self, group: RowGroup, ids: Tensor, last_step: Tensor) -> Tensor:
        """Compute the current values of rows [M, columns] on the device."""
        out = torch.empty(len(ids), group.adam.columns, device=self._device)
        self._kernels.fetch_dated_rows(group.store.rows, ids, last_step, None, RowState(out, ()), group.adam)
        return out

    def _last_step_of(self, group: RowGroup, host_ids: Tensor) -> Tensor:
        return self._to_device(group.store.last_step[host_ids])

    def _to_device(self, values: Tensor) -> Tensor:
        """Bring values from the host, on the current lane, through pinned memory that torch keeps."""
        if self._device.type != "cuda":
            return values
        return values.pin_memory().to(self._device, non_blocking=True)
