"""Rows of a compact store, updated by the device: they cross the link as they are stored, and are decoded there.

Three lanes of work run at the same time. While view j is rendered,

- the fetch lane copies the rows of view j + 1 from the host;
- the write lane copies the rows of view j - 1 to the host.

Neither computes anything, so both leave the device's processors to the rendering. When a view begins its geometry is
decoded into values, caught up with the steps that it has skipped; harmonics are where one camera sees them, when their
colours are made (`offload/adam/stored_harmonics.py`). After the backward pass rows are stepped and coded again where
they lie. Rows that view j + 1 needs too are moved to it on the device and make neither trip.

Packed rows of two views are on the device at once, in one arena, at either end. View j + 1 takes the end of view j - 1,
part by part as that is written, with the rows that both have, which are set aside before. A small view comes from the
host when all of view j - 1 is there: to find what both have would take longer than to read it. The arena has space for
the largest view, and for two of the usual size. Where two views are larger, they meet in its middle: rows of view j + 1
that belong where view j still lies, the late ones, are read behind the writing of that. Where the arena is too small
for that, the next view is fetched when it is rendered, and the arena grows then, as far as there is memory.

Where a view is so large that the device has no memory for its rows beside its rendering, the arena makes way, and the
rows stay on the host. The device reads them there for values and colours (`offload/pipelines/rows_in_place.py`), and
after the backward pass they pass through it to be stepped (`offload/pipelines/passing_rows.py`). Nothing else travels
meanwhile, so that such a step takes some times as long.

The device culls (`offload/models/geometry_culled.py`), with a margin for what geometry may change until the view is
rendered, so the host's processors have nothing to do.

Some rows may be resident (`offload/pipelines/residents.py`): these come from the device's own memory and go there. To
whoever reads or changes a store that makes no difference, since `finish` brings them to it.

Bytes over the link for each row of a view that the one before it does not have, or of a large view neither of the two
before: 328 to fetch it and 328 to write it. On the device a row of the arena takes 328 bytes, and one of the present
view 56 of what rendering takes of geometry, which is not held beside it but read once more where it is asked for, and
64 of gradients; where more cameras than one see it 192 more of values and gradients each. Of a view that stays on the
host a row is fetched twice, and its 128 bytes of geometry for each time that these are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.adam.stored_harmonics import StoredRows
from offload.backends import kernels_for
from offload.culling.cameras import Cameras
from offload.pipelines.arena import Arena
from offload.pipelines.contract import MEANS, Counters, Displacement, fetched, upcoming_ids_of
from offload.pipelines.groups import (
    RowGroup,
    begin_step_of,
    chunks_of,
    gradient_or_made,
    leaf_without_values,
    step_packed,
)
from offload.pipelines.lanes import Lane
from offload.pipelines.overlap import Overlap
from offload.pipelines.passing_rows import PassingRows
from offload.pipelines.residents import Residents
from offload.pipelines.rows_in_place import RowsInPlace
from offload.store.layout import PackedRows, RowState, packed_rows

PARTS = 8  # that a view is written in, so that the view after the next can come behind
# Rows of a view; parts of smaller ones, and moving rows from the view before the last, would take more time to launch
# than they spare.
SMALLEST_CUT = 1 << 19
STEPS = "last step of "  # before the name of a group: what the arena has beside its rows

# Parts of a view: the first row of the arena, the one behind the last, and when the host has them.
Written = list[tuple[int, int, torch.cuda.Event | None]]


@dataclass
class PackedView:
    """The rows of one view on the device."""

    ids: Tensor  # [V] int64 on the device, sorted
    first_row: int  # in the arena
    at_end: bool  # of the arena
    # In the arena: group -> words int32 [V, words], the step of each last update [V]; empty, where they
    # stay on the host.
    rows: dict[str, PackedRows]
    values: dict[str, Tensor] = field(default_factory=dict)  # group -> [V, columns], leaves that receive gradients
    displaced: Tensor | None = None  # values [V, columns] of geometry to begin the update with
    fetched: torch.cuda.Event | None = None
    written: torch.cuda.Event | None = None
    overwritten: slice | None = None  # rows whose space the next view has taken, once these were on the host

    @property
    def stays(self) -> bool:
        """Tell whether its rows are on the host alone."""
        return not self.rows

    def words(self, group: str) -> Tensor:
        return self.rows[group][0]

    def last_step(self, group: str) -> Tensor:
        """Return the step of each row's last update, int32 [V]."""
        return self.rows[group][1]

    def part(self, rows: slice) -> list[PackedRows]:
        """Return some rows of each group."""
        return [(_cut_out(words, rows), _cut_out(last_step, rows)) for words, last_step in self.rows.values()]


@dataclass(frozen=True)
class _Late:
    """Rows of the next view whose space the present one has; no view before hands them on."""

    rows: slice
    shared: Tensor  # [V] bool, which of them the present view has


@dataclass
class _Upcoming:
    """The next view, found ahead."""

    ids: Tensor  # [V] int64 on the device
    view: PackedView | None = None  # whose rows are on their way but for those of the present view; None: no space
    overlap: Overlap | None = None  # with the views before; where there is a view
    late: _Late | None = None
    found: torch.cuda.Event | None = None  # that ids, or all of these, are there, and its space may be written to


class PackedPipeline:
    """Brings each view's packed rows to the device, updates them and brings them back; see the head of this file."""

    last_step_in_store: ClassVar[bool] = True

    def __init__(
        self,
        groups: Mapping[str, RowGroup],
        cull: Callable[[Cameras], Tensor],
        whole: Callable[[Tensor], Tensor],
        device: torch.device,
        resident_share: float = 0.0,
    ) -> None:
        """
        Args:
            groups: All parameters, in compact stores.
            cull: Gives the sorted ids [V], on the device, of what cameras may draw after one more step.
            whole: Adds to sorted ids [V] those that `cull` never gives without them.
            device: Where views are rendered and rows are updated.
            resident_share: The share of all rows that may be resident, where there is memory for them.
        """
        self._groups = groups
        self._cull = cull
        self._whole = whole
        self._device = device
        self._kernels = kernels_for(device, "offload.adam.rows")
        self._overlap = kernels_for(device, "offload.pipelines.overlap").overlap
        self._cull_lane, self._fetch_lane, self._write_lane = (Lane.new(device) for _ in range(3))
        columns = {name: group.store.packed.shape[1] for name, group in groups.items()}
        self._residents = Residents(groups, resident_share, device, self._kernels)
        self._on_host = {name: RowsInPlace(group, device) for name, group in groups.items()}
        self._passing = PassingRows(groups, device, self._kernels, (self._fetch_lane, self._write_lane))
        self._arena = Arena(columns | {STEPS + name: 1 for name in groups}, device, torch.int32)
        self._writing: dict[bool, Written] = {False: [], True: []}  # by whether the view is at the arena's end
        self._previous: PackedView | None = None  # updated last
        self._present: PackedView | None = None
        self._upcoming: _Upcoming | None = None
        self._found_ids: Tensor | None = None  # of the next view, found before training was interrupted
        # A view with rows that the host has not, and that are not written now, and which these are, [V] bool.
        self._lacking: tuple[PackedView, Tensor] | None = None
        self._ready: torch.cuda.Event | None = None  # when the next view may be culled
        self._applied = False  # whether gradients of the present view may have reached its rows
        self._rows_found, self._rows_given, self._rows_kept = 0, 0, 0  # given to be written
        self._rows_in_place = 0  # of views that stayed on the host
        self._rows_retained = torch.zeros((), dtype=torch.int64, device=device)
        self.staging_allocations = 0

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras) -> PackedView:
        """Return the rows of a view, with the values they have after the last step."""
        return self._fetch(cameras, self._groups)

    def fetch_stored(self, cameras: Cameras, name: str) -> tuple[PackedView, StoredRows]:
        """Do as `fetch`, but for one group, whose packed rows are returned as they are."""
        view, group = self._fetch(cameras, [other for other in self._groups if other != name]), self._groups[name]
        skipped = group.adam.skipped()
        if view.stays:
            return view, StoredRows(group.store.rows, view.ids, group.store.last_step, skipped, has_constant=False)
        rows = packed_rows(view.words(name), name)
        return view, StoredRows(rows, None, view.last_step(name), skipped, has_constant=False)

    def _fetch(self, cameras: Cameras, names: Iterable[str]) -> PackedView:
        if self._residents.is_due:
            self._choose_residents()
        self._arena.see()
        compute, upcoming = Lane.current(self._device), self._upcoming
        if upcoming is not None and upcoming.view is not None:
            view = upcoming.view
            compute.wait(view.fetched)
        else:
            view = self._fetch_late(cameras, upcoming)
        compute.uses(view.ids)
        self._arena.renders(view.ids.shape[0], here=not view.stays)
        view.values = {name: self._leaf(name, view) for name in names}
        self._upcoming = self._found_ids = None  # only now, since a fetch that fails may be repeated
        self._ready = compute.record()
        self._present, self._applied = view, False
        return view

    def prefetch(self, cameras: Cameras) -> None:
        """Let the next view's rows travel while the present one is rendered; waits for the culling alone."""
        self._upcoming = self._prepare(cameras, fetched(self._present), self._previous)

    def update(self, made: HarmonicsGradient | None = None) -> None:
        """Take Adam's step on the gradients of the view that `fetch` gave; its rows go where they are needed next."""
        view, upcoming, compute = fetched(self._present), self._upcoming, Lane.current(self._device)
        gradients = {name: gradient_or_made(view.values.get(name), made) for name in self._groups}
        if view.stays:
            self._passing.make_space(len(view.ids))
        begin_step_of(self._groups.values())
        self._applied = True
        # Those of geometry are read once more, as the gradient of harmonics is made, where the rows are.
        values = {name: leaf.detach() for name, leaf in view.values.items() if name != "geometry"}
        if view.displaced is not None:
            values["geometry"] = view.displaced
        if view.stays:
            self._passing.step(view.ids, values, gradients)
        else:
            for name, group in self._groups.items():
                step_packed(group, name, view.rows[name], view.ids, values.get(name), gradients[name], self._kernels)
        for leaf in view.values.values():
            leaf.grad = None  # whoever still holds the values has no use for it
        gradients, values, view.values, view.displaced = {}, {}, {}, None
        self._rows_given += len(view.ids)
        self._lacking = None
        if view.stays:
            self._rows_in_place += len(view.ids)
        elif upcoming is not None and upcoming.view is not None and upcoming.overlap is not None:
            self._hand_on(view, upcoming.view, upcoming.overlap, upcoming.found, compute)
            self._write(view, upcoming.overlap.leaving, compute)
            self._lacking = upcoming.view, upcoming.overlap.moved
            if upcoming.late is not None:
                self._read_late(upcoming.view, upcoming.late, view)
        else:
            self._write(view, None, compute)
        self._previous, self._present = view, None
        if self._residents.are_wanted:
            with self._write_lane as lane:  # behind the writing
                lane.wait(compute.record())  # of a view that has stayed on the host nothing may have been written here
                self._residents.count(view.ids)

    def displace(self, displacement: Displacement) -> None:
        """Move means of rows of the present view: the update begins with these values."""
        values = self.read_present("geometry")
        displacement.add_to(values[:, MEANS])
        fetched(self._present).displaced = values

    def read_present(self, name: str) -> Tensor:
        """Return the values [V, columns] of a group's rows in the present view.

        Raises:
            RuntimeError: There is none: no view has been fetched, or its rows have been updated.
        """
        return self._decoded(name, fetched(self._present))

    def geometry_moved(self) -> None:
        """Do nothing: geometry is among the rows."""

    def finish(self) -> None:
        """Wait until the host has everything, and the lanes rest. Rows that were fetched ahead stay good."""
        self._settle()
        self._write_residents_back()

    def _settle(self) -> None:
        """Wait until the host has everything but residents, and the lanes rest."""
        if self._lacking is not None:
            self._write(*self._lacking, Lane.current(self._device))
            self._rows_given += int(self._lacking[1].sum())
            self._lacking = None
        self._cull_lane.finish()  # what it found may be fetched late, elsewhere
        self._fetch_lane.finish()
        self._write_lane.finish()

    # ------------------------------------------------------------------------------------- reading, changing, state

    @property
    def upcoming_ids(self) -> Tensor | None:
        """Return the next view's rows [V] on the device, where they have been found ahead; between steps."""
        return self._found_ids if self._upcoming is None else self._upcoming.ids

    def forget_upcoming(self) -> None:
        """Drop what is known of the next view, since rows will be changed."""
        self.finish()  # rows may live in the upcoming view only
        self._arena.rests(changing=True)
        self._found_ids = self._previous = self._upcoming = None
        self._release_residents()
        self._residents.forget()

    def read(self, name: str, ids: Tensor) -> Tensor:
        """Return copies of the current values of rows [V, columns] on the device; the store is left as it is."""
        self.finish()
        self._arena.rests()
        if not self._arena.leaves_copies(len(ids)):
            self._give_space_up()
        group, ids = self._groups[name], ids.to(self._device)
        out = torch.empty(len(ids), group.adam.columns, device=self._device)
        for first, last in chunks_of(len(ids)):
            out[first:last] = self._values_of(name, *self._rows_of(name, ids[first:last]))
        return out

    def catch_up(self, name: str, ids: Tensor | None) -> None:
        """Let a group's store hold the current values of rows, so that others may read and change them.

        Args:
            name: Of the group.
            ids: int64 [M] on any device, sorted, the rows; None: all. Others keep the steps they have skipped.
        """
        self.forget_upcoming()
        group = self._groups[name]
        if ids is not None:
            ids = ids.cpu()
            ids = ids[group.store.last_step[ids] < group.adam.step]
        with group.store.changing(ids):
            for first, last in chunks_of(group.store.num_gaussians if ids is None else len(ids)):
                if ids is None:  # of which few are current: the device leaves those alone, and waits for no ids
                    chunk = torch.arange(first, last, device=self._device)
                else:
                    chunk = ids[first:last].to(self._device)
                words, last_step = self._rows_of(name, chunk)
                is_stale = last_step < group.adam.step
                values = self._values_of(name, words, last_step)
                self._kernels.step_view_rows(values, chunk, last_step, None, packed_rows(words, name), group.adam)
                self._kernels.write_packed_rows([(words, last_step)], chunk, is_stale, [group.packed])
            Lane.current(self._device).finish()

    def last_step(self, name: str) -> Tensor:
        """Return the step of each row's last update in a group, [N] int32; after `finish`."""
        return self._groups[name].store.last_step

    def state(self) -> dict[str, Tensor]:
        """Return what is known of the next view, as `offload.adam.state` names it; between steps."""
        return {} if self.upcoming_ids is None else {"upcoming/ids": self.upcoming_ids}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the next view from a state, or none, where it has none; the stores have been filled from it."""
        ids = upcoming_ids_of(state, self._device)
        self._found_ids = None if ids is None else self._whole(ids)
        self._previous = self._upcoming = None

    def undo_step(self, steps_done: int) -> None:
        """Forget the step after so many, which an error has ended; the next one begins with the same view.

        Raises:
            RuntimeError: Gradients have reached some rows already.
        """
        if self._present is None:
            return
        if self._applied:
            raise RuntimeError("the step had been applied in part")
        upcoming, self._upcoming = self._upcoming, None
        if upcoming is not None and upcoming.overlap is not None:
            self._fetch_lane.finish()
            given_up = int(upcoming.overlap.moved.sum())  # they would have been handed on
            self._rows_found, self._rows_retained = self._rows_found - given_up, self._rows_retained - given_up
        self.finish()
        self._found_ids, self._present, self._previous = self._present.ids, None, None
        for group in self._groups.values():
            group.undo_step(steps_done)

    @property
    def rows_moved(self) -> dict[str, int]:
        """Count the rows of views that have been fetched, retained and written so far; waits for the fetching.

        A retained row stays on the device from one view to the next: it is neither written nor fetched in between. A
        row of the view before the last one is written, but need not be fetched, where a view has more than
        `SMALLEST_CUT`. Resident rows are fetched once, and written whenever the host needs them. Those of a view that
        stays on the host are fetched twice; that regularizers and noise read their geometry once more is not counted.
        """
        self._fetch_lane.finish()
        self._write_lane.finish()
        retained = int(self._rows_retained)
        spared_fetching, spared_writing = self._residents.rows_spared()
        return {
            "rows_fetched": self._rows_found + self._rows_in_place - retained - self._rows_kept - spared_fetching,
            "rows_retained": retained,
            "rows_written": self._rows_given - retained - spared_writing,
        }

    def counters(self) -> Counters:
        """Count allocations of space for views, rows and bytes that have travelled, and rows of views that stayed on
        the host; waits for the fetching."""
        rows = self.rows_moved
        row_bytes = sum(group.store.rows.row_bytes + 4 for group in self._groups.values())
        link_bytes = row_bytes * (rows["rows_fetched"] + rows["rows_written"])
        traffic = {**rows, "rows_in_place": self._rows_in_place, "link_bytes": link_bytes}
        return Counters(self.staging_allocations, {}, traffic)

    # --------------------------------------------------------------------------------------------------- inside

    def _prepare(self, cameras: Cameras, present: PackedView, previous: PackedView | None) -> _Upcoming:
        """Find the next view and let its rows travel, but for those of the present one."""
        with self._cull_lane as lane:
            lane.wait(self._ready)
            ids = self._cull(cameras)
            count = ids.shape[0]
            num_late = None if present.stays else self._arena.rows_in_common(present.ids.shape[0], count)
            if num_late is None:
                return _Upcoming(ids, found=lane.record())
            late_rows, early = _cut(count, num_late, late_first=not present.at_end)
            before = None if previous is None or count <= SMALLEST_CUT else previous  # that may hand rows on
            before_ids = ids[:0] if before is None else before.ids
            common, late = self._overlap(ids, present.ids, before_ids, self._rows_retained), None
            if num_late:
                late = _left_to_host(common, late_rows)
                self._rows_retained -= late.shared.sum()
            if before is not None and before.overwritten is not None:
                _find_on_host(common, before.overwritten)
            # Rows of the view before the present one, which often are none, and where they are there.
            kept = ids[:0] if before is None else common.nearby.nonzero().squeeze(1)
            places = common.places[kept] if kept.shape[0] else kept
            found = lane.record()
        view = self._new_view(ids, at_end=not present.at_end)
        with self._fetch_lane as lane:
            lane.wait(found)
            if before is None:
                lane.wait(None if previous is None else previous.written)
                self._read(view, common.on_host, early)
            else:
                self._rows_kept += kept.shape[0]
                aside = self._copied(before, places) if kept.shape[0] else None
                found = lane.record()
                self._read_behind_writing(view, common.on_host, early, self._writing[view.at_end])
                if aside is not None:
                    self._kernels.write_packed_rows(aside, kept, None, list(view.rows.values()))
            view.fetched = lane.record()
            lane.uses(ids, common.on_host, kept, places)
        return _Upcoming(ids, view, common, late, found)

    def _fetch_late(self, cameras: Cameras, upcoming: _Upcoming | None) -> PackedView:
        """Fetch a view that has not been fetched ahead; there is no other on the device."""
        if upcoming is not None and self._previous is not None and self._previous.stays:
            Lane.current(self._device).wait(upcoming.found)  # which comes after all else, so that no thread need wait
        else:
            self._settle()
        if upcoming is None:
            ids = self._cull(cameras) if self._found_ids is None else self._found_ids
        else:
            ids = upcoming.ids
            if len(self._residents) and self._arena.lacks_memory_for(len(ids)):
                self._release_residents()  # views come first
        self._previous = None
        if not self._arena.holds(len(ids)):
            self._release_residents()  # or the host would lack their values
            if not self._arena.holds(len(ids)):
                return self._stay(ids)
        if self._arena.make_space_for(len(ids)):
            self.staging_allocations += 1
            for lane in (self._fetch_lane, self._write_lane):
                lane.uses(*self._arena.tensors())
            self._writing = {False: [], True: []}
        view = self._new_view(ids, at_end=False)
        self._read(view, None)
        return view

    def _stay(self, ids: Tensor) -> PackedView:
        """Leave the rows of a view on the host, and their memory on the device to its rendering."""
        self._arena.release()
        self._rows_found += len(ids)
        return PackedView(ids, 0, at_end=False, rows={})

    def _give_space_up(self) -> None:
        """Leave the arena's memory to others, between steps; what was fetched ahead is fetched once more, late."""
        if self._upcoming is not None and self._upcoming.view is not None:
            self._upcoming = _Upcoming(self._upcoming.ids, found=self._upcoming.found)
        self._previous = None
        self._arena.release()

    def _choose_residents(self) -> None:
        """Put the rows that are shown most often in the place of the present residents."""
        self._settle()
        self._release_residents()
        ids = self._residents.chosen(self._arena.spare_bytes())
        self._arena.set_beside(len(ids) * self._residents.row_bytes)
        self._residents.bring(ids)
        self._arena.set_beside(len(self._residents) * self._residents.row_bytes)  # fewer, where memory lacked

    def _write_residents_back(self) -> None:
        """Wait until the host has residents too; the lanes rest."""
        if self._residents.write_back():
            Lane.current(self._device).finish()

    def _release_residents(self) -> None:
        """Give the memory of residents back; the lanes rest."""
        self._write_residents_back()
        self._residents.release()
        self._arena.set_beside(0)

    def _new_view(self, ids: Tensor, at_end: bool) -> PackedView:
        count = ids.shape[0]
        self._rows_found += count
        space = self._arena.rows(count, at_end)
        rows = {name: (space[name], space[STEPS + name][:, 0]) for name in self._groups}
        return PackedView(ids, self._arena.first_row(count, at_end), at_end, rows)

    def _read(self, view: PackedView, wanted: Tensor | None, rows: slice = slice(None)) -> None:
        """Read some rows of a view, those of them that are wanted [V]; None: all."""
        wanted, ids = None if wanted is None else _cut_out(wanted, rows), _cut_out(view.ids, rows)
        self._kernels.read_packed_rows(self._stored(), ids, wanted, view.part(rows), self._residents.rows)

    def _stored(self) -> list[PackedRows]:
        """Return all rows of each group, as the stores have them."""
        return [group.packed for group in self._groups.values()]

    def _copied(self, view: PackedView, places: Tensor) -> list[PackedRows]:
        """Copy the rows at places [M] of a view, of each group."""
        copies = [group.new_packed(places.shape[0], self._device) for group in self._groups.values()]
        self._kernels.read_packed_rows(list(view.rows.values()), places, None, copies)
        return copies

    def _read_behind_writing(self, view: PackedView, wanted: Tensor, rows: slice, writing: Written) -> None:
        """Read some rows part by part, each when what lay there is on the host."""
        for part in _parts_of(rows):
            lower, upper = view.first_row + part.start, view.first_row + part.stop
            self._fetch_lane.wait(*(event for begin, end, event in writing if begin < upper and lower < end))
            self._read(view, wanted, part)

    def _read_late(self, view: PackedView, late: _Late, present: PackedView) -> None:
        """Read the late rows of the next view where the present one lies, which is being written.

        First come those that the present view has not, behind its writing, and then those that it has, after that.
        """
        with self._fetch_lane as lane:
            self._read_behind_writing(view, ~late.shared, late.rows, self._writing[present.at_end])
            lane.wait(present.written)
            self._read(view, late.shared, late.rows)
            view.fetched = lane.record()
            lane.uses(view.ids, late.shared)
        num_late = late.rows.stop - late.rows.start
        present.overwritten, _ = _cut(present.ids.shape[0], num_late, late_first=present.at_end)

    def _write(self, view: PackedView, wanted: Tensor | None, compute: Lane) -> None:
        """Write rows part by part, as they will be when what the current lane has been given is done."""
        parts: Written = []
        self._residents.changed()
        with ExitStack() as changes:
            for group in self._groups.values():
                changes.enter_context(group.store.changing(view.ids))
            stored = self._stored()
            updated = compute.record()
            with self._write_lane as lane:
                lane.wait(updated)
                for rows in _parts_of(slice(0, view.ids.shape[0])):
                    those, ids = None if wanted is None else _cut_out(wanted, rows), _cut_out(view.ids, rows)
                    packed = view.part(rows)
                    self._kernels.write_packed_rows(packed, ids, those, stored, self._residents.rows)
                    parts.append((view.first_row + rows.start, view.first_row + rows.stop, lane.record()))
                lane.uses(view.ids, *(() if wanted is None else (wanted,)))
                view.written = parts[-1][2] if parts else lane.record()
        self._writing[view.at_end] = parts

    def _hand_on(
        self,
        view: PackedView,
        upcoming: PackedView,
        common: Overlap,
        found: torch.cuda.Event | None,
        compute: Lane,
    ) -> None:
        """Move rows that both views have from the present one to the next, whose others may still come meanwhile."""
        compute.wait(found, None if self._previous is None else self._previous.written)  # which was there before
        source, target = list(view.rows.values()), list(upcoming.rows.values())
        self._kernels.read_packed_rows(source, common.sources, common.moved, target)
        compute.uses(common.sources, common.moved)

    def _leaf(self, name: str, view: PackedView) -> Tensor:
        """Return what receives the gradient of a group's rows; geometry is not held beside them (`read_present`)."""
        if name == "geometry":
            return leaf_without_values(len(view.ids), self._groups[name].adam.columns, self._device)
        return self._decoded(name, view).requires_grad_()

    def _decoded(self, name: str, view: PackedView) -> Tensor:
        if view.stays:
            return self._on_host[name].read(view.ids)
        return self._values_of(name, view.words(name), view.last_step(name))

    def _values_of(self, name: str, words: Tensor, last_step: Tensor) -> Tensor:
        """Compute the current values [V, columns] of packed rows on the device."""
        adam, count = self._groups[name].adam, len(words)
        out = torch.empty(count, adam.columns, device=self._device)
        self._kernels.fetch_dated_rows(packed_rows(words, name), None, last_step, None, RowState(out, ()), adam)
        return out

    def _rows_of(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Copy packed rows from the store to the device, and the steps of their last updates."""
        rows = self._groups[name].new_packed(len(ids), self._device)
        self._kernels.read_packed_rows([self._groups[name].packed], ids, None, [rows])
        return rows


def _cut_out(tensor: Tensor, rows: slice) -> Tensor:
    """Return some rows; without a view of them where they are all, as in most views of a small model."""
    return tensor if rows == slice(0, tensor.shape[0]) else tensor[rows]


def _parts_of(rows: slice) -> list[slice]:
    """Cut rows into parts, where there are many."""
    count = rows.stop - rows.start
    size = max(count if count <= SMALLEST_CUT else -(-count // PARTS), 1)
    return [slice(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size)]


def _cut(count: int, num_late: int, *, late_first: bool) -> tuple[slice, slice]:
    """Cut a view of so many rows into those whose space another one has too, and the rest."""
    first = num_late if late_first else count - num_late
    before, after = slice(0, first), slice(first, count)
    return (before, after) if late_first else (after, before)


def _left_to_host(common: Overlap, late: slice) -> _Late:
    """Let these rows of the next view come from the host."""
    shared = torch.zeros_like(common.moved)
    shared[late] = common.moved[late]
    common.leaving[common.sources[shared]] = True
    common.moved[late] = common.nearby[late] = False
    return _Late(late, shared)


def _find_on_host(common: Overlap, overwritten: slice) -> None:
    """Let rows of the next view come from the host that the view before the present one has no more."""
    lost = common.nearby & (common.places >= overwritten.start) & (common.places < overwritten.stop)
    common.on_host.logical_or_(lost)
    common.nearby.logical_xor_(lost)
