"""Rows that stay on the device: each view's are gathered there and updated where they lie.

A step reads and writes the rows of its view alone, so its time and its memory do not grow with N, but for culling. The
values of a view are gathered as they are after the steps that its rows have skipped, and receive gradients; the update
reads the moments from the store and writes all three back.

The next view is culled on a lane of its own, with a margin for what geometry may change until it is rendered
(`offload/pipelines/forwarded.py`). That begins with the update, when the device has been given all that it renders of
the present view: the host has to wait for the number of visible rows, and nothing else waits with it. Before the
rendering the device would rest meanwhile, 1.3 of 5 ms at 4 million Gaussians (H200).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.adam.stored_harmonics import StoredRows
from offload.culling.cameras import Cameras
from offload.pipelines.contract import MEANS, Counters, Displacement, fetched, upcoming_ids_of
from offload.pipelines.groups import RowGroup, begin_step_of, gradient_or_made
from offload.pipelines.lanes import Lane
from offload.pipelines.rows_in_place import RowsInPlace


@dataclass
class ResidentRows:
    """Hold the rows of a view: which they are and, once they have been fetched, their values."""

    ids: Tensor  # [V] int64 on the device, sorted
    found: torch.cuda.Event | None = None  # that the ids are there
    values: dict[str, Tensor] = field(default_factory=dict)  # group -> [V, columns], leaves that receive gradients


class ResidentPipeline:
    """Gathers each view's rows from stores on the device and updates them there; see the head of this file."""

    last_step_in_store: ClassVar[bool] = True

    def __init__(
        self,
        groups: Mapping[str, RowGroup],
        cull: Callable[[Cameras], Tensor],
        device: torch.device,
        whole: Callable[[Tensor], Tensor] = lambda ids: ids,
    ) -> None:
        """
        Args:
            groups: Rows on the device.
            cull: Gives the sorted ids [V], on the device, of what cameras may draw after one more step.
            device: Where everything is.
            whole: Adds to sorted ids [V] those that `cull` never gives without them.
        """
        self._groups = groups
        self._rows = {name: RowsInPlace(group, device) for name, group in groups.items()}
        self._cull = cull
        self._whole = whole
        self._device = device
        self._cull_lane = Lane.new(device)
        self._present: ResidentRows | None = None
        self._upcoming: ResidentRows | None = None  # known of the next view, or of the present one before it is fetched
        self._next: Cameras | None = None  # that will be culled with the update
        self._ready: torch.cuda.Event | None = None  # when the next view may be culled
        self._applied = False  # whether gradients of the present view may have reached its rows

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras) -> ResidentRows:
        """Return the rows of a view, with the values they have after the last step."""
        return self._fetch(cameras, self._groups)

    def fetch_stored(self, cameras: Cameras, name: str) -> tuple[ResidentRows, StoredRows]:
        """Do as `fetch`, but for one group, whose rows are returned as its store has them."""
        view, group = self._fetch(cameras, [other for other in self._groups if other != name]), self._groups[name]
        store, skipped = group.store, group.adam.skipped()
        return view, StoredRows(store.rows, view.ids, store.last_step, skipped, store.layout.has_constant)

    def _fetch(self, cameras: Cameras, names: Iterable[str]) -> ResidentRows:
        compute = Lane.current(self._device)
        if self._upcoming is None:
            self._upcoming = self._new_view(cameras)
        view = self._upcoming
        compute.wait(view.found)
        compute.uses(view.ids)
        view.values = {name: self.read(name, view.ids).requires_grad_() for name in names}
        self._present, self._upcoming, self._applied = view, None, False
        self._ready = compute.record()  # what has moved geometry was given before
        return view

    def prefetch(self, cameras: Cameras) -> None:
        """Let the update cull the next view, as soon as the device has been given all that it renders."""
        self._next = cameras

    def update(self, made: HarmonicsGradient | None = None) -> None:
        """Take Adam's step on the gradients of the view that `fetch` gave, in the stores; waits for the culling."""
        view = fetched(self._present)
        if self._next is not None:
            self._cull_next(self._next)
        gradients = {name: gradient_or_made(view.values.get(name), made) for name in self._groups}
        begin_step_of(self._groups.values())
        self._applied = True
        for name, rows in self._rows.items():
            values = view.values.get(name)
            rows.step(view.ids, None if values is None else values.detach(), gradients[name])
        for values in view.values.values():
            values.grad = None  # whoever still holds the values has no use for it
        view.values, self._present = {}, None

    def displace(self, displacement: Displacement) -> None:
        """Move means of rows of the present view, whose values on the device the update begins with."""
        displacement.add_to(fetched(self._present).values["geometry"].detach()[:, MEANS])

    def geometry_moved(self) -> None:
        """Do nothing: culling waits for the next `fetch`, which comes later on the same stream."""

    # ------------------------------------------------------------------------------------- reading, changing, state

    def finish(self) -> None:
        """Wait until what has been found ahead is there; the stores hold everything at any time."""
        self._cull_lane.finish()

    def forget_upcoming(self) -> None:
        """Drop what is known of the next view, since rows will be changed."""
        self.finish()
        self._upcoming = None

    def read(self, name: str, ids: Tensor) -> Tensor:
        """Return copies of the current values of rows [V, columns] of a group; the store is left as it is.

        Args:
            name: Of the group.
            ids: int64 [V] on any device.
        """
        return self._rows[name].read(ids)

    def catch_up(self, name: str, ids: Tensor | None) -> None:
        """Let a group's store hold the current values of rows, so that others may read and change them.

        Args:
            name: Of the group.
            ids: int64 [M] on any device, sorted, the rows; None: all. Others keep the steps they have skipped.
        """
        self.forget_upcoming()
        self._rows[name].catch_up(ids)

    def last_step(self, name: str) -> Tensor:
        """Return the step of each row's last update in a group, [N] int32 on the device."""
        return self._groups[name].store.last_step

    def state(self) -> dict[str, Tensor]:
        """Return what is known of the next view, as `offload.adam.state` names it; between steps, after `finish`."""
        return {} if self._upcoming is None else {"upcoming/ids": self._upcoming.ids}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the next view from a state, or none, where it has none; the stores have been filled from it."""
        ids = upcoming_ids_of(state, self._device)
        self._upcoming = None if ids is None else ResidentRows(self._whole(ids))

    def undo_step(self, steps_done: int) -> None:
        """Forget the step after so many, which an error has ended; the next one begins with the same view.

        Raises:
            RuntimeError: Gradients have reached some rows already.
        """
        if self._present is None:
            return
        if self._applied:
            raise RuntimeError("the step had been applied in part")
        self._upcoming, self._present, self._next = ResidentRows(self._present.ids), None, None
        for group in self._groups.values():
            group.undo_step(steps_done)

    def _cull_next(self, cameras: Cameras) -> None:
        """Find the next view, beside what the device has been given to do."""
        with self._cull_lane as lane:
            lane.wait(self._ready)
            self._upcoming = self._new_view(cameras)
            self._upcoming.found = lane.record()
        self._next = None

    def _new_view(self, cameras: Cameras) -> ResidentRows:
        return ResidentRows(self._cull(cameras))

    def counters(self) -> Counters:
        """Return nothing: nothing travels."""
        return Counters()
