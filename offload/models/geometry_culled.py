"""Geometry of a compact state: rows that travel as those of the appearance do, and what a device culls them by.

What stays on the device is a ball around each Gaussian, or a box around each block of them (selective offloading,
GS-Scale, arXiv 2509.15645, without moments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from offload.adam.options import AdamOptions
from offload.adam.state import State
from offload.backends import kernels_for
from offload.culling.balls import Balls, BallsOfStore
from offload.culling.bounds import Drift
from offload.culling.boxes import Boxes
from offload.culling.cameras import Cameras, Margin
from offload.culling.cells import CoveredCells, covered_cells
from offload.culling.margins import drift_after, drift_per_ratio, margin_ahead
from offload.culling.strays import Strays
from offload.models.geometry_host import CULLED_COLUMNS
from offload.pipelines.lanes import Lane
from offload.store.contract import RowStore
from offload.store.device_store import DeviceStore
from offload.store.growth import Growth, total_growth
from offload.store.layout import RowState, packed_rows

COPIED_ROWS = 1 << 20  # at once, from the store; whole blocks
COPIED_STATES = 1 << 18  # the same, with moments, of which bounds are made beside views' rows


class CulledGeometry:
    """Holds geometry of N Gaussians in a store, and bounds of it on the device, where it is culled.

    Bounds are those of the stored values, which lag behind by the steps since each row's last update; culling allows
    for that. Whoever steps rows tells of their new values (`follow`), since the store may have them later.
    """

    def __init__(
        self, store: RowStore, adam: AdamOptions, bounds: Balls | BallsOfStore | Boxes, *, device: torch.device
    ) -> None:
        """
        Args:
            store: Of the group "geometry", compact.
            adam: How the rows are updated, which says how far they can move.
            bounds: On the device.
            device: Where views are rendered.
        """
        self.steps_done = 0  # the store's `step` is ahead of it while a step is under way
        self._strays = Strays()
        self._store = store
        self._adam = adam
        self._device = device
        self._kernels = kernels_for(device, "offload.adam.rows")
        self._bounds = bounds
        self._bounds_are_good = False  # whether they are those of the store; they are made when they are next needed
        self._drifts: list[float] = []  # `per_ratio` of rows that had their last step after so many

    @property
    def num_gaussians(self) -> int:
        return self._store.num_gaussians

    @property
    def device(self) -> torch.device:
        """Return where bounds are."""
        return self._device

    @property
    def stores(self) -> dict[str, RowStore]:
        """Return the store by its group."""
        return {"geometry": self._store}

    def visible_ids(self, cameras: Cameras) -> Tensor:
        """Find the sorted ids, int64 [V] on the device, of what cameras may draw after one more step."""
        self._make_bounds()
        margin = self._margin(know_drifts=self._bounds.know_drifts)
        return self._strays.beside(self._bounds.visible_ids(cameras, margin))

    def whole(self, ids: Tensor) -> Tensor:
        """Return these sorted ids [V] with those that are fetched whenever they are, sorted."""
        self._make_bounds()
        return self._bounds.whole(ids)

    def follow(self, ids: Tensor, values: Tensor, moments: Callable[[], Tensor]) -> None:
        """Take what Gaussians [V] are after the next step, as `RowGroup.on_step` is told of it."""
        if self._bounds_are_good:
            self._bounds.follow(ids, values, moments, drift_after(self._adam, self.steps_done))

    def expect_strays(self, ids: Tensor | None) -> None:
        """Find these rows, sorted int64 [F], for every camera from now on; None: none any more."""
        self._strays.expect(None if ids is None else self.whole(ids))

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        """Find in which cells of each camera's picture rows [V] may draw after one more step.

        Args:
            ids: int64 [V] on the device.
            cameras: C of them.
            halo: Pixels that are added to what a row draws.
            cell: Pixels of a cell's side.
        """
        margin = replace(self._margin(), pixels=halo)
        rows = self._store.rows.parameters[:, :CULLED_COLUMNS].cpu()
        return self._strays.everywhere(covered_cells(rows, ids.cpu(), cameras, margin, cell), ids)

    def gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Copy nothing: rows travel."""
        return {}

    def update(self, ids: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Count the step that the pipeline has taken."""
        self.steps_done += 1

    def displace(self, ids: Tensor, offsets: Tensor) -> None:
        """Do nothing: rows travel, and their pipeline moves them."""

    def catch_up(self, ids: Tensor | None) -> None:
        """Note that stored values are others: their pipeline has applied the skipped steps."""
        self._bounds_are_good = False

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the values of a parameter, or those of rows [M], on the device; all have been caught up."""
        if self._store.device.type == self._device.type:
            return self._store.read(name, ids)
        layout, count = self._store.layout, self.num_gaussians if ids is None else len(ids)
        values, first = torch.empty(count, *layout.shapes[name], device=self._device), 0
        for rows in self._stored_rows(ids):
            values[first : first + len(rows)] = layout.named(rows)[name]
            first += len(rows)
        Lane.current(self._device).finish()  # or the host might change rows that the device has still to read
        return values

    def append_blank(self, count: int) -> None:
        """Append so many rows whose values and moments are written next."""
        self._store.append_blank(count)

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], without moments."""
        self._store.append_copies(ids)

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows."""
        self._bounds_are_good = False
        self._store.truncate(num_gaussians)

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M] new values; all their moments become zero, unless they are left."""
        self._store.overwrite(ids, values, leaves_moments=leaves_moments)

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero."""
        self._store.relocate(source_ids, target_ids)

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        self._store.keep(ids)

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        self._bounds_are_good = False
        self._store.clamp_opacities(max_logit)

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Count the bytes of memory that appending this many Gaussians takes."""
        return total_growth([self._store, self._bounds], num_new)

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the store has all."""
        return {}

    def load_state(self, state: State) -> None:
        """Go on from a state; the store has been filled from it."""
        self.steps_done = int(state["step_count"])
        self._bounds_are_good = False

    def _margin(self, lagging: bool = True, know_drifts: bool = False) -> Margin:
        """Return how far a row may be from its bounds, or its current values, when the next step renders it."""
        return margin_ahead(self._adam, self.steps_done, lagging=lagging, rounded=True, know_drifts=know_drifts)

    def _make_bounds(self) -> None:
        """Make bounds of the stored values, where they are not; once after a refinement, whose operations are many."""
        if not self._bounds_are_good:
            self._bounds.rebuild(self._store.num_gaussians, self._stored_states())
            self._bounds_are_good = True

    def _stored_states(self) -> Iterator[tuple[RowState, Drift]]:
        """Give all stored rows, some at a time, and how far their means drift; with moments where bounds know that."""
        drift = drift_after(self._adam, 0)
        if not self._bounds.know_drifts:
            yield from ((RowState(rows, ()), drift) for rows in self._stored_rows())
            return
        while len(self._drifts) <= self.steps_done:
            self._drifts.append(drift_per_ratio(self._adam, len(self._drifts)))
        # By the step of the last update, from 1; rows that have had none have no moments either.
        per_ratio = torch.tensor([self._drifts[0], *self._drifts], device=self._device)
        for first in range(0, self.num_gaussians, COPIED_STATES):
            last = min(first + COPIED_STATES, self.num_gaussians)
            if isinstance(self._store, DeviceStore):
                rows = self._store.rows[first:last]
            else:
                rows = packed_rows(self._copied_words(first, last), "geometry")
            last_step = self._store.last_step[first:last].to(self._device)
            yield rows, replace(drift, per_ratio=per_ratio[last_step])

    def _copied_words(self, first: int, last: int) -> Tensor:
        """Copy stored rows `first` to `last - 1` to the device as words, int32 [M, words]: it reads them itself."""
        numbers = self._store.packed.view(torch.float32)
        ids = torch.arange(first, last, device=self._device)
        rows = torch.empty(last - first, numbers.shape[1], device=self._device)
        self._kernels.move_rows(RowState(numbers, ()), ids, RowState(rows, ()))
        return rows.view(torch.int32)

    def _stored_rows(self, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Give stored values [M, columns] of rows, or of all, some at a time: the device reads them itself."""
        if isinstance(self._store, DeviceStore):  # whose rows are here, and tight
            assert ids is None  # `read` has them of the store
            yield from self._store.rows.parameters.split(COPIED_ROWS)
            return
        packed, count = self._store.packed, self.num_gaussians if ids is None else len(ids)
        columns = packed.shape[1] // 2
        halves = packed.view(torch.float32).view(-1, columns)  # by turns the values and the moments of a row
        for first in range(0, count, COPIED_ROWS):
            last = min(first + COPIED_ROWS, count)
            some = torch.arange(first, last, device=self._device) if ids is None else ids[first:last].to(self._device)
            rows = torch.empty(last - first, columns, device=self._device)
            self._kernels.move_rows(RowState(halves, ()), 2 * some, RowState(rows, ()))
            yield rows
