"""Gaussians that live on the host, their appearance or all of them, and are trained through the row pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from offload.adam import DeferredAdam
from offload.culling import BlockBounds, Cameras, CoveredCells, covered_cells, visible_ids
from offload.device_geometry import DeviceGeometry
from offload.device_memory import begin_stretch, stretch_peak
from offload.finite import FiniteGradients
from offload.margins import largest_drift, largest_step, margin_of
from offload.part_limits import MemoryBudget, RowLimit
from offload.part_planner import PartPlanner
from offload.pipeline import Part, PartRows, RowGroup, RowPipeline, ViewIds
from offload.schedules import schedules_of
from offload.split import CELL, HALO, Tile
from offload.state import State, copy_current, load_deferred
from offload.store import HostStore, total_growth
from offload.upcoming import upcoming_state, upcoming_view


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


class HybridGaussians:
    """The optimized trainer's Gaussians; stands in for `training.gaussians.DeviceGaussians`.

    A training step is `fetch`, rendering and the backward pass, then `update`; `prefetch` after `fetch` lets the next
    view's rows travel behind the rendering. Where views may be split, `train_view` does all of that but for `update`.
    Densification and evaluation come after `update`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        learning_rates: Mapping[str, float],
        means_lr: Callable[[int], float],
        *,
        betas: tuple[float, float],
        eps: float,
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
            learning_rates: Of each of them at step 0; that of the means never grows.
            means_lr: The means' learning rate at a step from 0.
            betas: Adam's decay rates.
            eps: Adam's epsilon.
            device: Where views are rendered.
            geometry: Where means, scales, quats and opacities are.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
            limit: Of the parts that `train_view` and `view_parts` split views into; None: they are never split.
            halo: Pixels around a tile that are rendered with it.
        """
        self.steps_done = 0
        self._learning_rates = dict(learning_rates)
        self._means_lr = means_lr
        self._rendering_device = device
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
        self._device_geometry: DeviceGeometry | None = None
        self._bounds: BlockBounds | None = None  # of geometry on the host; None until they are next needed
        self._stores: dict[str, HostStore] = {}
        self._adams: dict[str, DeferredAdam] = {}
        self._finite = FiniteGradients(device)
        names = ("appearance",) if geometry == "device" else ("geometry", "appearance")
        groups = {}
        for name in names:
            store = HostStore(parameters, groups=(name,), max_gaussians=max_gaussians, pin=device.type == "cuda")
            multipliers, rates = schedules_of(store.groups[name], learning_rates, means_lr)
            self._adams[name] = DeferredAdam(multipliers, betas, eps)
            groups[name] = RowGroup(store, name, self._adams[name], rates)
            self._stores[name] = store
        if geometry == "device":
            self._device_geometry = DeviceGeometry(parameters, betas=betas, eps=eps, device=device)
            self._margin = margin_of(largest_step(betas), learning_rates)
        else:
            # Rows on the host may lag behind by all the steps they have skipped.
            self._margin = margin_of(largest_step(betas) + largest_drift(betas), learning_rates)
            groups["geometry"].committed = self._geometry_committed
        self._pipeline = RowPipeline(groups, self._find, device, find_in_worker=geometry == "host")

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

    def update(self, step: int) -> None:
        """Adam's step on the gradients of the rows that `fetch` gave.

        Args:
            step: From 0.
        """
        self._keep_finite()
        gradients = self._geometry_gradients()
        self._rows = None  # frees their values
        if self._limit is None:
            self._pipeline.update()
        else:
            _once_more(self._pipeline.update)
        if self._device_geometry is not None:
            rates = {**self._learning_rates, "means": self._means_lr(step)}
            self._device_geometry.step(self._ids, gradients, rates)
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

    @property
    def num_gaussians(self) -> int:
        return self._stores["appearance"].num_gaussians

    @property
    def device(self) -> torch.device:
        """Where geometry is."""
        return torch.device("cpu") if self._device_geometry is None else self._rendering_device

    @property
    def staging_allocations(self) -> int:
        """How often staging memory has been allocated so far."""
        return self._pipeline.staging_allocations

    def offload_milliseconds(self) -> dict[str, float]:
        """How long worker, copies and waiting for them have taken so far, by name; see `RowPipeline`."""
        return self._pipeline.offload_milliseconds()

    def read_view(self, cameras: Cameras) -> dict[str, Tensor]:
        """Copies of the rows [V] that a view needs, as from `fetch`; training is not disturbed."""
        self._pipeline.finish()
        ids = self._cull(cameras)
        return {name: value.to(self._rendering_device) for name, value in self._read(ids, ids.cpu()).items()}

    def snapshot(self) -> dict[str, Tensor]:
        """The current values of the six parameter tensors; a copy of what is on the host."""
        if self._device_geometry is not None:
            geometry = self._device_geometry.parameters
        else:
            geometry = self._named("geometry", self._pipeline.read("geometry", None))
        return {**geometry, **self._named("appearance", self._pipeline.read("appearance", None))}

    # ------------------------------------------------------------------------------------------- to be continued

    def state(self) -> dict[str, Tensor]:
        """Everything that training goes on from, as `offload.state` describes it: views of the stores.

        With the next view, as far as it has been found ahead.
        """
        self._pipeline.finish()
        state = {"step_count": torch.tensor(self.steps_done), **upcoming_state(self._pipeline.upcoming)}
        for place in self._places():
            state.update(place.arrays_by_name())
        for name, store in self._stores.items():
            state[f"last_step/{name}"] = store.last_step
            state.update({f"deferral/{name}/{key}": table for key, table in self._adams[name].tables().items()})
        return state

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        self.steps_done = int(state["step_count"])
        for name, store in self._stores.items():
            load_deferred(store, name, self._adams[name], state)
        if self._device_geometry is not None:
            copy_current(self._device_geometry.arrays_by_name(), state)
            self._device_geometry.step_count = self.steps_done
        self._bounds = None
        upcoming = upcoming_view(state, self.device)
        if upcoming is not None and self._limit is None:
            upcoming.parts = [Part()]
        self._pipeline.continue_with(upcoming)

    def skipped_steps(self) -> tuple[int, int]:
        """How many steps had a gradient that was not finite, and how many of those were the last in a row."""
        return self._finite.skipped_steps()

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """
        self._pipeline.undo_step()
        if any(adam.step_count != self.steps_done for adam in self._adams.values()):
            raise RuntimeError("the step had been applied in part")
        self._rows, self._geometry_rows, self._geometry_sums = None, {}, {}

    # ---------------------------------------------- what densification asks (training.densification.GaussianStore)

    def read(self, name: str) -> Tensor:
        """The current values of one geometry parameter; not copied."""
        if self._device_geometry is not None:
            return self._device_geometry.parameters[name]
        self._catch_up(None)
        return self._stores["geometry"].read(name)

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], without moments."""
        self._catch_up(ids)
        for place in self._places():
            place.append_copies(ids)
        self._bounds = None

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where some places have them only, since appending has failed."""
        for place in self._places():
            place.truncate(num_gaussians)
        self._bounds = None

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """Give these rows [M] new values; all moments of the rows become zero."""
        self._catch_up(ids)
        for place in self._places():
            place.overwrite(ids, values)
        self._bounds = None

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        self._pipeline.finish()
        for place in self._places():
            place.keep(ids)
        self._bounds = None

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        if self._device_geometry is not None:
            self._device_geometry.clamp_opacities(max_logit)
        else:
            self._catch_up(None)
            self._stores["geometry"].clamp_opacities(max_logit)

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Memory in bytes, of host and device, that appending this many Gaussians takes at its peak."""
        return total_growth(self._places(), num_new)

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
        leaves = [*self._rows.values.values(), *self._geometry_rows.values()]
        self._finite.keep([leaf.grad for leaf in leaves if leaf.grad is not None])

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
        return {
            name: torch.zeros_like(row) if row.grad is None else row.grad for name, row in self._geometry_rows.items()
        }

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
        margin = replace(self._margin, pixels=self._halo)
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

    def _places(self) -> list[DeviceGeometry | HostStore]:
        device = [] if self._device_geometry is None else [self._device_geometry]
        return [*device, *self._stores.values()]

    def _catch_up(self, ids: Tensor | None) -> None:
        host_ids = torch.arange(self.num_gaussians) if ids is None else ids.cpu()
        self._pipeline.catch_up(host_ids.unique())

    def _geometry_committed(self, host_ids: Tensor) -> None:
        if self._bounds is not None:
            self._bounds.update(self._host_geometry(), host_ids)

    def _host_geometry(self) -> Tensor:
        return self._stores["geometry"].groups["geometry"].parameters.tensor

    def _cull(self, cameras: Cameras) -> Tensor:
        if self._device_geometry is not None:
            return self._device_geometry.visible_ids(cameras, self._margin)
        if self._bounds is None:  # once after a refinement, whose operations are several
            self._bounds = BlockBounds(self._host_geometry())
        return visible_ids(self._host_geometry(), self._bounds, cameras, self._margin)

    def _to_render(self, group: str, rows: Tensor) -> dict[str, Tensor]:
        return self._stores[group].groups[group].to_render(rows)

    def _named(self, group: str, rows: Tensor) -> dict[str, Tensor]:
        return self._stores[group].groups[group].named(rows)


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
