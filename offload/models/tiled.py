"""Forwarded Gaussians whose views are rendered tile by tile, where they see too much for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.adam.host import DeferredAdam
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.device_memory import begin_stretch, stretch_peak
from offload.models.offloaded import OffloadedGaussians, Place, geometry_in, groups_beside
from offload.pipelines.contract import fetched
from offload.pipelines.tiled import TiledPipeline
from offload.store.layout import StateFormat
from offload.tiles.boxes import HALO, Tile
from offload.tiles.budget import Load, MemoryBudget, RowLimit
from offload.tiles.planner import TiledRows, TilePlanner
from offload.tiles.rounds import Others, RoundPlanner, lacking_together

StraysOf = Callable[[Tensor, Mapping[str, Tensor]], Tensor | None]  # of ids [T] and the values of their rows


@dataclass
class ViewTile:
    """Hold what is rendered at once."""

    tiles: tuple[Tile, ...]  # none: all pictures of the view; several are of as many processes
    rows: Mapping[str, Tensor]  # on the device, for `training.gaussians.activate`; leaves or slices of such
    positions: Tensor | None  # [T] int64 on the device: which of the view's rows they are; None: all, or not known
    load: Load | None = None  # what was planned for it here, where several processes draw; None: not known

    @property
    def tile(self) -> Tile | None:
        """Return the one that a process alone renders; None: all pictures of the view."""
        return self.tiles[0] if self.tiles else None


@dataclass
class TileResult:
    """Hold what rendering a tile gave."""

    loss: Tensor  # scalar, its share of the view's loss
    num_intersections: int  # of Gaussians and the rasterizer's tiles
    num_pixels: int  # with halo
    num_made: int = 0  # pairs of a camera and a row that were projected; counted where processes draw together
    num_exchanged: int = 0  # those that were sent to others, and those that were drawn


class TiledGaussians(OffloadedGaussians):
    """Gaussians that travel as those of `ForwardedGaussians`, tile by tile where a view exceeds a limit.

    `train_view` takes the place of `fetch` and `prefetch`: it renders a view, and propagates its loss back. `update`
    comes after it. `fetch` brings views in one tile only.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        limit: RowLimit | MemoryBudget | None,
        geometry: Place = "device",
        state: StateFormat = "float32",
        max_gaussians: int = 0,
        halo: int = HALO,
        others: Others | None = None,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`; best in Morton order, in which a
                view's rows come in runs.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered.
            limit: How large a tile may be; None: all views are rendered whole, and memory that runs out is an error.
            geometry: Where means, scales, quats and opacities are.
            state: The form of rows.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
            halo: Pixels around a tile that are rendered with it.
            others: Who holds other Gaussians of the same model and draws together with this process, by a limit of its
                own; all of them train and read a view at once. Nobody else speaks with them through this.
        """
        place = geometry_in(geometry, parameters, adam, device=device, max_gaussians=max_gaussians, state=state)
        groups = groups_beside(
            place,
            parameters,
            adam,
            lambda multipliers: DeferredAdam(multipliers, adam.betas, adam.eps),
            device=device,
            max_gaussians=max_gaussians,
            state=state,
        )
        if others is None or limit is None:
            self._planner = TilePlanner(limit, place, halo)
        else:
            self._planner = RoundPlanner(limit, place, halo, others)
        self._others = others
        self._tiles = TiledPipeline(groups, self._planner.find, device)
        super().__init__(place, groups, self._tiles, device)
        self._limit = limit
        # Memory is measured where there is a budget of it, and a GPU.
        self._budget = limit if isinstance(limit, MemoryBudget) and device.type == "cuda" else None
        self._present: tuple[Cameras, TiledRows] | None = None
        self._tile_rows: Tensor | None = None  # [T] which of the view's rows the present tile has; None: all
        self._sums: dict[str, Tensor] = {}  # [V, ...] gradients of geometry that does not travel, of tiles so far
        self._strays: list[Tensor] = []  # [F] each, of the tiles of the present view so far

    def train_view(
        self,
        cameras: Cameras,
        upcoming: Cameras | None,
        train_tile: Callable[[ViewTile], TileResult],
        strays_of: StraysOf | None = None,
    ) -> Tensor:
        """Render a view and propagate its loss back, in tiles where it exceeds the limit; `update` comes after it.

        A tile that runs out of device memory leaves nothing behind and is rendered again in finer tiles.

        Args:
            cameras: Of the view.
            upcoming: Of the view after it; None at the last, and where densification will change rows before it.
            train_tile: Renders one tile and runs the backward pass of its share of the loss. It must leave no trace
                when it fails.
            strays_of: Names the strays for `prefetch` among rows [T] with these values, as they are rendered.

        Returns:
            The loss, a scalar.
        """
        self._strays = []
        with self._order.taking("fetch", "train_view", cameras):
            self._forget_other_rows(cameras)
            self._begin(cameras)
            losses = self._train_tiles(upcoming, train_tile, strays_of)
        if upcoming is not None:
            with self._order.taking("prefetch", "train_view", upcoming):
                pass  # it has been done behind the last tile
        return torch.stack(losses).sum()

    def view_tiles(self, cameras: Cameras) -> Iterator[ViewTile]:
        """Give copies of the rows of a view, in tiles where it exceeds the limit; training is not disturbed."""
        with self._order.taking("read", "view_tiles"):
            self._pipeline.finish()
            # What can be trained can be rendered, which takes less: no view is refused here.
            view = self._planner.find(cameras)
            return self._copies_of_tiles(view, self._order.changes)

    def update(self) -> None:
        """Take Adam's step on the gradients of the view, of which every Gaussian has one, however many its tiles."""
        super().update()
        self._sums, self._present = {}, None

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """
        super().undo_step()
        self._sums, self._present = {}, None

    # --------------------------------------------------------------------------------------------------- inside

    def _copies_of_tiles(self, view: TiledRows, changes: int) -> Iterator[ViewTile]:
        """Give copies of the rows of each tile of a view, which was found after so many `changes`."""
        for tile in view.tiles:
            with self._order.reading_on("view_tiles", changes), lacking_together(self._others):
                rows = self._copies_to_render(view.of_tile(tile).ids)
            yield ViewTile(tile.tiles, rows, None, tile.load)

    def _begin(self, cameras: Cameras) -> None:
        if self._budget is not None:
            in_use = torch.cuda.memory_allocated(self._rendering_device)
            self._budget.fixed = in_use - self._tiles.uploaded_bytes()
        view = _once_more(self._tiles.begin, cameras)
        self._present = cameras, view
        self._ids = _once_more(view.ids.to, self._rendering_device)

    def _train_tiles(
        self,
        upcoming: Cameras | None,
        train_tile: Callable[[ViewTile], TileResult],
        strays_of: StraysOf | None,
    ) -> list[Tensor]:
        """Render all tiles of the present view; return the loss of each."""
        losses = []
        while True:
            try:
                result = self._train_tile(upcoming, train_tile, strays_of)
            except torch.cuda.OutOfMemoryError:
                result = None
            if result is None:  # here, where what the failed tile held is free
                self._refine_tile()
                continue
            losses.append(result.loss)
            if self._tiles.is_last:
                return losses
            self._keep_finite()
            self._sum_geometry_gradients()
            self._rows = None
            _once_more(self._tiles.next_tile)

    def _train_tile(
        self,
        upcoming: Cameras | None,
        train_tile: Callable[[ViewTile], TileResult],
        strays_of: StraysOf | None,
    ) -> TileResult:
        with lacking_together(self._others):
            fetched_rows = self._tiles.fetch_tile()
            rows, tile = self._to_render(fetched_rows), self._tiles.tile
            if upcoming is not None and strays_of is not None:
                self._expect_strays(strays_of(fetched_rows.ids, rows))
            positions = None if tile.rows is None else tile.rows.to(self._rendering_device)
        self._tile_rows = tile.rows
        view_tile = ViewTile(tile.tiles, rows, positions, tile.load)
        budget = self._budget
        if budget is None:
            self._prefetch(upcoming)
            return train_tile(view_tile)
        before = torch.cuda.memory_allocated(self._rendering_device)
        self._prefetch(upcoming)
        if not budget.is_calibrated:
            self._tiles.uploaded_bytes()  # waits for them, so that the first tiles tell how much they add
        begin_stretch(self._rendering_device)
        result = train_tile(view_tile)
        peak, arrived = stretch_peak(self._rendering_device), self._tiles.arrived_bytes()
        if arrived is not None:
            grown = peak - before - arrived
            num_rows = budget.as_rows(len(fetched_rows.host_ids), result.num_made, result.num_exchanged)
            budget.observe(num_rows, result.num_intersections, result.num_pixels, grown, peak)
        return result

    def _prefetch(self, upcoming: Cameras | None) -> None:
        """Bring ahead what comes next; where processes draw together, one that lacks memory for it brings it later."""
        try:
            self._tiles.prefetch(upcoming)
        except torch.cuda.OutOfMemoryError:
            if self._others is None:
                raise

    def _expect_strays(self, strays: Tensor | None) -> None:
        """Expect those of the present tile [F], and of the tiles before it."""
        if strays is not None and len(strays):
            self._strays.append(strays)
            self._geometry.expect_strays(torch.cat(self._strays).unique())

    def _refine_tile(self) -> None:
        """Split the present tile, which has run out of memory.

        Raises:
            OutOfMemoryError: It cannot be split.
        """
        self._leaves, self._rows = {}, None
        self._tiles.abandon_tile()
        if self._rendering_device.type == "cuda":
            torch.cuda.empty_cache()
        if self._limit is not None:
            self._limit.exceeded()
        finer = self._planner.refine(*fetched(self._present), self._tiles.tile)
        if len(finer) < 2:
            raise torch.cuda.OutOfMemoryError("The smallest tile does not fit into device memory.")
        self._tiles.replace_tile(finer)

    def _update_travelled(self, made: HarmonicsGradient | None) -> None:
        _once_more(self._tiles.update, made)

    def _geometry_gradients(self) -> dict[str, Tensor]:
        """Return the gradients [V, ...] of the view, once its last tile has been propagated back."""
        if not self._sums:
            return super()._geometry_gradients()
        self._sum_geometry_gradients()
        return self._sums

    def _sum_geometry_gradients(self) -> None:
        """Add those of the present tile to those of the view."""
        if not self._sums:
            self._sums = {name: leaf.new_zeros(len(self._ids), *leaf.shape[1:]) for name, leaf in self._leaves.items()}
        rows = fetched(self._tile_rows)
        for name, leaf in self._leaves.items():
            if leaf.grad is not None:
                self._sums[name].index_add_(0, rows, leaf.grad)
        self._leaves = {}


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
