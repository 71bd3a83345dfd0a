"""Gaussians that live on the host, their appearance or all of them, and are trained through the row pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from offload.adam.finite import gradient_of
from offload.adam.host import DeferredAdam
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.adam.state import State
from offload.culling.cameras import Cameras
from offload.culling.cells import CoveredCells, covered_cells
from offload.device_memory import begin_stretch, stretch_peak
from offload.models.offloaded import OffloadedGaussians
from offload.pipelines.forwarded import ForwardedPipeline, Part, PartRows, ViewIds
from offload.pipelines.groups import RowGroup
from offload.pipelines.upcoming import upcoming_state, upcoming_view
from offload.store.host_store import HostStore
from offload.tiles.boxes import CELL, HALO, Tile
from offload.tiles.budget import MemoryBudget, RowLimit
from offload.tiles.planner import PartPlanner


@dataclass
class ViewPart:
    """What is rendered at once."""

    tile: Tile | None  # None: all pictures of the view
    rows: dict[str, Tensor]  # on the device, for `training.gaussians.activate`; leaves or their views
    positions: Tensor | None  # [T] int64 on the device: which of the view's rows they are; None: all, or nobody asks


@dataclass
class PartResult:
    """What rendering a part gave."""

    loss: Tensor  # scalar, its share of the view's loss
    num_intersections: int  # of Gaussians and the rasterizer's tiles
    num_pixels: int  # with halo


class ForwardedGaussians(OffloadedGaussians):
    """The optimized trainer's Gaussians; stands in for `training.gaussians.DeviceGaussians`.

    A training step is `fetch`, rendering and the backward pass, then `update`; `prefetch` after `fetch` lets the next
    view's rows travel behind the rendering. Where views may be split, `train_view` does all of that but for `update`.
    Densification and evaluation come after `update`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        geometry: Literal["device", "host"] = "device",
        max_gaussians: int = 0,
        limit: RowLimit | MemoryBudget | None = None,
        halo: int = HALO,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`; best in Morton order, in which a
                view's rows come in runs.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered.
            geometry: Where means, scales, quats and opacities are.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
            limit: Of the parts that `train_view` and `view_parts` split views into; None: they are never split.
            halo: Pixels around a tile that are rendered with it.
        """
        super().__init__(
            parameters,
            adam,
            device=device,
            geometry=geometry,
            max_gaussians=max_gaussians,
        )
        self._limit = limit
        self._halo = halo
        self._planner = PartPlanner(limit, self._covered_cells)
        self._measures = isinstance(limit, MemoryBudget) and device.type == "cuda"
        self._rows: PartRows | None = None
        self._cameras: Cameras | None = None
        self._view: ViewIds | None = None
        self._ids = torch.zeros(0, dtype=torch.int64)  # [V] of the present view, on the device
        self._geometry_rows: dict[str, Tensor] = {}
        self._geometry_sums: dict[str, Tensor] = {}
        groups = {}
        for name, store in self._stores.items():
            multipliers, rates = schedules_of(name, store.sh_degree, adam)
            deferred = self._deferrals[name] = DeferredAdam(multipliers, adam.betas, adam.eps)
            groups[name] = RowGroup(store, deferred, rates)
        if geometry == "host":
            self._stores["geometry"].on_change = self._host_geometry_changed
        self._pipeline = ForwardedPipeline(groups, self._find, device, find_in_worker=geometry == "host")

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras) -> dict[str, Tensor]:
        """The rows [V] that a view needs, on the device, for `training.gaussians.activate`; leaves or their views."""
        self._begin(cameras)
        return self._fetch_part()

    @property
    def ids(self) -> Tensor:
        """Which Gaussians the present view needs, [V] int64 on the device."""
        return self._ids

    def prefetch(self, cameras: Cameras) -> None:
        """Prepare the view after this one; not where densification will change rows before it."""
        self._pipeline.prefetch(cameras)

    def update(self) -> None:
        """Adam's step on the gradients of the rows that `fetch` gave."""
        self._keep_finite()
        gradients = self._geometry_gradients()
        self._rows = None  # frees their values
        if self._limit is None:
            self._pipeline.update()
        else:
            _once_more(self._pipeline.update)
        if self._device_geometry is not None:
            self._device_geometry.step(self._ids, gradients)
        self._geometry_rows, self._geometry_sums, self._view = {}, {}, None
        self.steps_done += 1

    # ----------------------------------------------------------------------------------- a training step in parts

    def train_view(
        self, cameras: Cameras, upcoming: Cameras | None, train_part: Callable[[ViewPart], PartResult]
    ) -> Tensor:
        """Render a view and propagate its loss back, in parts where it exceeds the limit; `update` comes after it.

        A part that runs out of device memory leaves nothing behind and is rendered again in finer parts.

        Args:
            cameras: The view.
            upcoming: The view after it; None at the last, and where densification will change rows before it.
            train_part: Renders one part and runs the backward pass of its share of the loss. It must leave no trace
                when it fails.

        Returns:
            The loss, a scalar.
        """
        _once_more(self._begin, cameras)
        losses = []
        while True:
            try:
                result = self._train_part(upcoming, train_part)
            except torch.cuda.OutOfMemoryError:
                result = None
            if result is None:  # here, where what the failed part held is free
                self._refine_part()
                continue
            losses.append(result.loss)
            if self._pipeline.is_last:
                return torch.stack(losses).sum()
            self._keep_finite()
            self._sum_geometry_gradients()
            self._rows = None
            _once_more(self._pipeline.next_part)

    def view_parts(self, cameras: Cameras) -> Iterator[ViewPart]:
        """Copies of the rows of a view, in parts where it exceeds the limit; training is not disturbed."""
        self._pipeline.finish()
        # What can be trained can be rendered, which takes less: no view is refused here.
        view = self._planner.plan(cameras, self._cull(cameras), self.num_gaussians, must_fit=False)
        for part in view.parts:
            ids, host_ids = view.of_part(part)
            rows = self._read(ids, host_ids)
            yield ViewPart(part.tile, {name: value.to(self._rendering_device) for name, value in rows.items()}, None)

    # ------------------------------------------------------------------------------------ reading, at any time

    def offload_milliseconds(self) -> dict[str, float]:
        """How long worker, copies and waiting for them have taken so far, by name; see `ForwardedPipeline`."""
        return self._pipeline.offload_milliseconds()

    def read_view(self, cameras: Cameras) -> dict[str, Tensor]:
        """Copies of the rows [V] that a view needs, as from `fetch`; training is not disturbed."""
        self._pipeline.finish()
        ids = self._cull(cameras)
        return {name: value.to(self._rendering_device) for name, value in self._read(ids, ids.cpu()).items()}

    # ------------------------------------------------------------------------------------------- to be continued

    def state(self) -> dict[str, Tensor]:
        """As of all offloaded Gaussians, with the next view as far as it has been found ahead."""
        return {**super().state(), **upcoming_state(self._pipeline.upcoming)}

    def copied_before_change(self) -> dict[str, HostStore]:
        """As of all offloaded Gaussians, with the last steps."""
        return {
            **super().copied_before_change(),
            **{f"last_step/{name}": store for name, store in self._stores.items()},
        }

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        super().load_state(state)
        upcoming = upcoming_view(state, self.device)
        if upcoming is not None and self._limit is None:
            upcoming.parts = [Part()]
        self._pipeline.load_state(upcoming)

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """
        self._pipeline.undo_step()
        if any(self._deferrals[name].step != self.steps_done for name in self._stores):
            raise RuntimeError("the step had been applied in part")
        self._rows, self._geometry_rows, self._geometry_sums = None, {}, {}

    # --------------------------------------------------------------------------------------------------- inside

    def _begin(self, cameras: Cameras) -> None:
        if self._measures:
            in_use = torch.cuda.memory_allocated(self._rendering_device)
            self._limit.fixed = in_use - self._pipeline.uploaded_bytes()
        self._cameras, self._view = cameras, self._pipeline.begin(cameras)
        self._ids = self._view.ids.to(self._rendering_device)

    def _fetch_part(self) -> dict[str, Tensor]:
        self._rows = self._pipeline.fetch()
        rows = self._to_render("appearance", self._rows.values["appearance"])
        if self._device_geometry is None:
            return {**self._to_render("geometry", self._rows.values["geometry"]), **rows}
        self._geometry_rows = {
            name: value.requires_grad_() for name, value in self._device_geometry.gather(self._rows.ids).items()
        }
        return {**self._geometry_rows, **rows}

    def _keep_finite(self) -> None:
        self._finite.keep([*self._rows.values.values(), *self._geometry_rows.values()])

    def _train_part(self, upcoming: Cameras | None, train_part: Callable[[ViewPart], PartResult]) -> PartResult:
        rows, part = self._fetch_part(), self._rows.part
        positions = None if part.rows is None else part.rows.to(self._rendering_device)
        if not self._measures:
            self._pipeline.prefetch(upcoming)
            return train_part(ViewPart(part.tile, rows, positions))
        before = torch.cuda.memory_allocated(self._rendering_device)
        self._pipeline.prefetch(upcoming)
        if not self._limit.is_calibrated:
            self._pipeline.uploaded_bytes()  # waits for them, so that the first parts tell how much they add
        begin_stretch(self._rendering_device)
        result = train_part(ViewPart(part.tile, rows, positions))
        peak, arrived = stretch_peak(self._rendering_device), self._pipeline.arrived_bytes()
        if arrived is not None:
            grown = peak - before - arrived
            self._limit.observe(len(self._rows.host_ids), result.num_intersections, result.num_pixels, grown, peak)
        return result

    def _refine_part(self) -> None:
        """Split the present part, which has run out of memory.

        Raises:
            OutOfMemoryError: It cannot be split.
        """
        self._geometry_rows, self._rows = {}, None
        self._pipeline.abandon_part()
        if self._rendering_device.type == "cuda":
            torch.cuda.empty_cache()
        if isinstance(self._limit, MemoryBudget):
            self._limit.exceeded()
        finer = self._planner.refine(self._cameras, self._view, self._pipeline.part)
        if len(finer) < 2:
            raise torch.cuda.OutOfMemoryError("The smallest tile does not fit into device memory.")
        self._pipeline.replace_part(finer)

    def _geometry_gradients(self) -> dict[str, Tensor]:
        """Of the whole view, once its last part has been propagated back."""
        if self._geometry_sums:
            self._sum_geometry_gradients()
            return self._geometry_sums
        return {name: gradient_of(row) for name, row in self._geometry_rows.items()}

    def _sum_geometry_gradients(self) -> None:
        """Add the present part's to those of the view."""
        if self._device_geometry is None:
            return
        if not self._geometry_sums:
            self._geometry_sums = {
                name: row.new_zeros(len(self._ids), *row.shape[1:]) for name, row in self._geometry_rows.items()
            }
        for name, row in self._geometry_rows.items():
            if row.grad is not None:
                self._geometry_sums[name].index_add_(0, self._rows.part.rows, row.grad)
        self._geometry_rows = {}

    # ----------------------------------------------------------------------------------------- what a view needs

    def _find(self, cameras: Cameras) -> ViewIds:
        return self._planner.plan(cameras, self._cull(cameras), self.num_gaussians)

    def _covered_cells(self, cameras: Cameras, ids: Tensor) -> list[CoveredCells]:
        margin = replace(self._margin(lagging=self._device_geometry is None), pixels=self._halo)
        if self._device_geometry is not None:
            return self._device_geometry.covered_cells(ids, cameras, margin, CELL)
        return covered_cells(self._host_geometry(), ids, cameras, margin, CELL)

    def _read(self, ids: Tensor, host_ids: Tensor) -> dict[str, Tensor]:
        """Copies of rows: geometry where it is, appearance on the host."""
        if self._device_geometry is not None:
            geometry = self._device_geometry.gather(ids)
        else:
            geometry = self._to_render("geometry", self._pipeline.read("geometry", host_ids))
        return {**geometry, **self._to_render("appearance", self._pipeline.read("appearance", host_ids))}

    def _hand_over(self, group: str, ids: Tensor | None) -> None:
        self._pipeline.catch_up(group, torch.arange(self.num_gaussians) if ids is None else ids.cpu())


Result = TypeVar("Result")


def _once_more(method: Callable[..., Result], *arguments: object) -> Result:
    """Call a method again where what was done ahead for it has run out of device memory, which drops that."""
    try:
        return method(*arguments)
    except torch.cuda.OutOfMemoryError:
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return method(*arguments)
