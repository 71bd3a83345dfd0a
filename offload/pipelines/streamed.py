"""Rows that live in pinned host memory and are updated by the device, behind the rendering.

Three lanes of work run at the same time. While view j is rendered,

- the fetch lane reads the rows of view j + 1 from the host and applies the steps that they have skipped;
- the write lane writes the rows of view j - 1 to the host.

After the backward pass of view j the device updates its rows where they lie. Those that view j + 1 needs too are moved
to it on the device, moments and all, and make neither trip; the others are left to the write lane.

So three views are on the device at once, in three slots. Of the rows of view j + 1 those of view j are given to it by
the update, those of view j - 1 are copied from there, and the others come from the host, which has them: view j + 1
takes the slot of view j - 2, and waits until that has been written.

Views are culled ahead, with a margin for what geometry may change until they are rendered
(`offload/pipelines/forwarded.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from offload.adam.finite import gradient_of
from offload.backends import kernels_for
from offload.culling.cameras import Cameras
from offload.pipelines.contract import Counters, Displacement, fetched, upcoming_ids_of
from offload.pipelines.groups import RowGroup, chunks_of
from offload.pipelines.lanes import Lane
from offload.pipelines.overlap import Overlap
from offload.store.layout import RowState

SPARE = 16  # space for a view is taken with 1/16 more than it needs, so that larger views seldom need more


@dataclass
class _Slot:
    """Space on the device for the rows of one view."""

    states: dict[str, RowState] = field(default_factory=dict)  # group -> [capacity, columns]
    capacity: int = -1  # rows; none have been allocated
    written: torch.cuda.Event | None = None  # the view that was here is on the host


@dataclass
class StreamedView:
    """The rows of one view on the device."""

    ids: Tensor  # [V] int64 on the device, sorted
    slot: _Slot
    values: dict[str, Tensor] = field(default_factory=dict)  # group -> [V, columns], leaves that receive gradients
    fetched: torch.cuda.Event | None = None

    def state(self, group: str) -> RowState:
        return self.slot.states[group][: len(self.ids)]


@dataclass
class _Upcoming:
    """The next view, whose rows are on their way but for those of the present view."""

    view: StreamedView
    overlap: Overlap  # with the views before
    found: torch.cuda.Event | None  # that it is there


class StreamedPipeline:
    """Brings each view's rows to the device, updates them and brings them back; see the head of this file."""

    last_step_in_store: ClassVar[bool] = False  # those of rows that have been updated are on the device

    def __init__(self, groups: Mapping[str, RowGroup], cull: Callable[[Cameras], Tensor], device: torch.device) -> None:
        """
        Args:
            groups: What travels.
            cull: Gives the sorted ids [V], on the device, of what cameras may draw after one more step.
            device: Where views are rendered and rows are updated.
        """
        self._groups = groups
        self._cull = cull
        self._device = device
        self._kernels = kernels_for(device, "offload.adam.rows")
        self._overlap = kernels_for(device, "offload.pipelines.overlap").overlap
        self._cull_lane, self._fetch_lane, self._write_lane = (Lane.new(device) for _ in range(3))
        self._slots = [_Slot() for _ in range(3)]  # the one to be used next comes first
        self._capacity = 0  # of every slot that is used from now on
        self._newer_last_step: dict[str, Tensor] = {}  # group -> [N] int32 on the device; without: the store's count
        self._previous: StreamedView | None = None  # updated last
        self._present: StreamedView | None = None
        self._upcoming: _Upcoming | None = None
        self._found_ids: Tensor | None = None  # of the next view, found before training was interrupted
        self._host_lacks_previous = False  # whether rows of the previous view live in the upcoming one only
        self._ready: torch.cuda.Event | None = None  # when the next view may be culled
        self._applied = False  # whether gradients of the present view may have reached its rows
        self._rows_found, self._rows_updated = 0, 0
        self._rows_retained, self._rows_copied = torch.zeros(2, dtype=torch.int64, device=device)
        self.staging_allocations = 0

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras) -> StreamedView:
        """Return the rows of a view, with the values they have after the last step."""
        compute = Lane.current(self._device)
        if self._upcoming is None:
            self.finish()
            ids, self._found_ids = self._cull(cameras) if self._found_ids is None else self._found_ids, None
            view = self._new_view(ids)
            self._read_from_host(view, None)
            self._previous = None
            self._ready = compute.record()
        else:
            view, self._upcoming = self._upcoming.view, None
            compute.wait(view.fetched)
            compute.uses(view.ids)
        view.values = {name: view.state(name).parameters.detach().requires_grad_() for name in self._groups}
        self._present, self._applied = view, False
        return view

    def prefetch(self, cameras: Cameras) -> None:
        """Let the next view's rows travel while the present one is rendered; waits for the culling alone."""
        present, previous = fetched(self._present).ids, self._previous
        with self._cull_lane as lane:
            lane.wait(self._ready)
            ids = self._cull(cameras)
            common = self._overlap(ids, present, ids[:0] if previous is None else previous.ids, self._rows_retained)
            self._rows_copied += common.nearby.sum()
            culled = lane.record()
        view = self._new_view(ids)
        with self._fetch_lane as lane:
            lane.wait(culled, view.slot.written)
            self._begin_step()  # here, where rows catch up
            self._read_from_host(view, common.on_host)
            if previous is not None:
                for name, group in self._groups.items():
                    rows, last_step = view.state(name), self.last_step(name)
                    self._kernels.fetch_rows(
                        previous.state(name), common.places, ids, last_step, common.nearby, rows, group.adam
                    )
                lane.uses(previous.ids)
            view.fetched = lane.record()
            lane.uses(ids, *common)
        self._upcoming = _Upcoming(view, common, culled)

    def update(self) -> None:
        """Take Adam's step on the gradients of the view that `fetch` gave; its rows go where they are needed next."""
        view, upcoming, compute = fetched(self._present), self._upcoming, Lane.current(self._device)
        if upcoming is None:
            with self._fetch_lane as lane:
                lane.wait(self._ready)  # rows have caught up elsewhere
                self._begin_step()
        self._applied = True
        for name, group in self._groups.items():
            gradients = gradient_of(view.values[name])
            self._kernels.step_rows(view.state(name), view.ids, self.last_step(name), gradients, group.adam)
            compute.uses(group.adam.decays)
        view.values = {}
        self._rows_updated += len(view.ids)
        if upcoming is not None:
            compute.wait(upcoming.found, upcoming.view.slot.written)  # the latter: of the view that was there before
            for name in self._groups:
                self._kernels.move_rows(view.state(name), upcoming.overlap.sources, upcoming.view.state(name))
            compute.uses(upcoming.overlap.sources)
        self._ready = compute.record()
        self._write_to_host(view, None if upcoming is None else upcoming.overlap.leaving)
        self._host_lacks_previous = upcoming is not None
        self._previous, self._present = view, None

    def displace(self, displacement: Displacement) -> None:
        """Do nothing: geometry is not among the rows."""

    def geometry_moved(self) -> None:
        """Note that geometry which stays on the device has taken its step as well, so that it may be culled."""
        self._ready = Lane.current(self._device).record()

    def finish(self) -> None:
        """Wait until the host has everything, and the lanes rest. Rows that were fetched ahead stay good."""
        if self._host_lacks_previous:
            self._write_to_host(fetched(self._previous), None)
            self._host_lacks_previous = False
        self._fetch_lane.finish()
        self._write_lane.finish()

    @property
    def upcoming_ids(self) -> Tensor | None:
        """Return the next view's rows [V] on the device, where they have been found ahead; between steps."""
        return self._found_ids if self._upcoming is None else self._upcoming.view.ids

    def forget_upcoming(self) -> None:
        """Drop what is known of the next view, since rows will be changed."""
        self.finish()  # rows may live in the upcoming view only
        self._found_ids = self._upcoming = None

    def state(self) -> dict[str, Tensor]:
        """Return what is known of the next view, as `offload.adam.state` names it; between steps."""
        return {} if self.upcoming_ids is None else {"upcoming/ids": self.upcoming_ids}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the next view from a state, or none, where it has none; the stores have been filled from it."""
        self._found_ids, self._upcoming = upcoming_ids_of(state, self._device), None
        self._newer_last_step.clear()

    def undo_step(self, steps_done: int) -> None:
        """Forget the step after so many, which an error has ended; the next one begins with the same view.

        Raises:
            RuntimeError: Gradients have reached some rows already.
        """
        if self._present is None:
            return
        if self._applied:
            raise RuntimeError("the step had been applied in part")
        self._fetch_lane.finish()
        self._found_ids, self._present, self._upcoming = self._present.ids, None, None
        for group in self._groups.values():
            group.undo_step(steps_done)

    @property
    def step_count(self) -> int:
        """Return the step that has begun last."""
        return next(iter(self._groups.values())).adam.step

    @property
    def rows_moved(self) -> dict[str, int]:
        """Count the rows of views that have been fetched, retained and written so far; waits for the culling.

        A retained row stays on the device from one view to the next: it is neither written nor fetched in between. A
        row of the view before the last one is written, but need not be fetched.
        """
        self._cull_lane.finish()
        retained = int(self._rows_retained)
        return {
            "rows_fetched": self._rows_found - retained - int(self._rows_copied),
            "rows_retained": retained,
            "rows_written": self._rows_updated - retained,
        }

    @property
    def link_bytes(self) -> int:
        """Count the bytes that views have moved between host and device so far, both ways; waits for the culling."""
        rows = self.rows_moved
        row_bytes = sum(group.store.rows.row_bytes for group in self._groups.values())
        return row_bytes * (rows["rows_fetched"] + rows["rows_written"])

    def counters(self) -> Counters:
        """Count allocations of space for views, and rows and bytes that have travelled; waits for the culling."""
        return Counters(self.staging_allocations, {}, {**self.rows_moved, "link_bytes": self.link_bytes})

    # ------------------------------------------------------------------------------------ reading and changing rows

    def read(self, name: str, ids: Tensor) -> Tensor:
        """Return copies of the current values of rows [V, columns] on the device; the store is left as it is."""
        self.finish()
        group, ids = self._groups[name], ids.to(self._device)
        out = torch.empty(len(ids), group.adam.columns, device=self._device)
        self._kernels.fetch_rows(group.store.rows, ids, ids, self.last_step(name), None, RowState(out, ()), group.adam)
        self._fetch_lane.wait(Lane.current(self._device).record())  # which will change the tables
        return out

    def last_step(self, name: str) -> Tensor:
        """Return the step of each row's last update, [N] int32 on the device."""
        if name not in self._newer_last_step:
            # Through a copy, since pinned memory is not copied across parts.
            self._newer_last_step[name] = self._groups[name].store.last_step.clone().to(self._device)
        return self._newer_last_step[name][: self._groups[name].store.num_gaussians]  # the last may have been removed

    def catch_up(self, name: str, ids: Tensor | None) -> None:
        """Let a group's store hold the current values of rows, so that others may read and change them.

        Args:
            name: Of the group.
            ids: int64 [M] on any device, the rows; None: all. Others keep the steps they have skipped.
        """
        self.forget_upcoming()  # it may not hold any more
        group = self._groups[name]
        last_step = self.last_step(name)
        with group.store.changing(ids) as host:
            for first, last in chunks_of(group.store.num_gaussians if ids is None else len(ids)):
                chunk = (torch.arange(first, last) if ids is None else ids[first:last]).to(self._device)
                rows = host.new_empty(len(chunk), self._device)
                self._kernels.fetch_rows(host, chunk, chunk, last_step, None, rows, group.adam)
                self._kernels.catch_up_rows(rows, chunk, last_step, group.adam)
                self._kernels.write_rows(rows, chunk, None, host)
            Lane.current(self._device).finish()
            group.store.last_step.copy_(last_step.cpu())
        del self._newer_last_step[name]

    # --------------------------------------------------------------------------------------------------- inside

    def _new_view(self, ids: Tensor) -> StreamedView:
        self._rows_found += len(ids)
        return StreamedView(ids, self._next_slot(len(ids)))

    def _next_slot(self, count: int) -> _Slot:
        """Take the slot whose view came first, with space for this many rows."""
        slot = self._slots.pop(0)
        self._slots.append(slot)
        if count > self._capacity:
            self._capacity = count + count // SPARE
        if slot.capacity < self._capacity:  # even if there is space for this view: a larger one will come here too
            if slot.written is not None:
                slot.written.synchronize()
            slot.states.clear()  # frees memory before more is taken
            slot.capacity = self._capacity
            for name, group in self._groups.items():
                slot.states[name] = group.store.rows.new_empty(slot.capacity, self._device)
            # What this memory was used for before may not be done.
            self._fetch_lane.wait(Lane.current(self._device).record())
            self.staging_allocations += 1
        return slot

    def _begin_step(self) -> None:
        for group in self._groups.values():
            group.begin_step()

    def _read_from_host(self, view: StreamedView, wanted: Tensor | None) -> None:
        for name, group in self._groups.items():
            host, last_step = group.store.rows, self.last_step(name)
            self._kernels.fetch_rows(host, view.ids, view.ids, last_step, wanted, view.state(name), group.adam)

    def _write_to_host(self, view: StreamedView, wanted: Tensor | None) -> None:
        """Write rows as they will be when what the current lane has been given is done."""
        with ExitStack() as changes:
            hosts = {
                name: changes.enter_context(group.store.changing(view.ids)) for name, group in self._groups.items()
            }
            updated = Lane.current(self._device).record()
            with self._write_lane as lane:
                lane.wait(updated)
                for name, host in hosts.items():
                    self._kernels.write_rows(view.state(name), view.ids, wanted, host)
                lane.uses(view.ids, *(() if wanted is None else (wanted,)))
                view.slot.written = lane.record()
