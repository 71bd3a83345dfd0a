"""Geometry in host memory, whose rows travel to the device and back as those of the appearance do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from offload.adam.options import AdamOptions
from offload.adam.state import State
from offload.culling.cameras import Cameras, Margin
from offload.culling.cells import CoveredCells, covered_cells
from offload.culling.margins import margin_ahead
from offload.culling.native import BlockBounds, visible_ids
from offload.culling.strays import Strays
from offload.store.contract import RowStore
from offload.store.host_store import HostStore
from offload.store.layout import StateFormat

CULLED_COLUMNS = 12  # of a row: its geometry, and one that fills 48 bytes


class HostGeometry(HostStore):
    """Holds the geometry of N Gaussians in a host store, and culls it there.

    Rows lag behind by the steps since their last update. Culling allows for that, and its bounds of blocks of rows
    follow each change that the store is told of.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        max_gaussians: int,
        pin: bool,
        state: StateFormat = "float32",
        pad_to_cache_line: bool = False,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`.
            adam: How the rows are updated, which says how far they can move.
            max_gaussians, pin, state, pad_to_cache_line: As for `HostStore`.
        """
        super().__init__(
            parameters,
            "geometry",
            state=state,
            max_gaussians=max_gaussians,
            pin=pin,
            pad_to_cache_line=pad_to_cache_line,
        )
        self.on_change = self._follow_change
        self.steps_done = 0  # `step` is ahead of it while a step is under way
        self._strays = Strays()
        self._adam = adam
        self._bounds: BlockBounds | None = None  # None until they are next needed
        self._pin = pin

    @property
    def stores(self) -> dict[str, RowStore]:
        """Return the store by its group."""
        return {"geometry": self}

    def visible_ids(self, cameras: Cameras) -> Tensor:
        """Find the sorted ids, int64 [V] on the host, of what cameras may draw after one more step."""
        if self._bounds is None:  # once after a refinement, whose operations are several
            self._bounds = BlockBounds(self._culled_rows())
        ids = visible_ids(self._culled_rows(), self._bounds, cameras, self._margin(lagging=True), pin=self._pin)
        return self._strays.beside(ids)

    def expect_strays(self, ids: Tensor | None) -> None:
        """Find these rows, sorted int64 [F], for every camera from now on; None: none any more."""
        self._strays.expect(ids)

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        """Find in which cells of each camera's picture rows [V] may draw after one more step.

        Args:
            ids: int64 [V] on the host.
            cameras: C of them.
            halo: Pixels that are added to what a row draws.
            cell: Pixels of a cell's side.
        """
        margin = replace(self._margin(lagging=True), pixels=halo)
        return self._strays.everywhere(covered_cells(self._culled_rows(), ids, cameras, margin, cell), ids)

    def gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Copy nothing: rows travel."""
        return {}

    def update(self, ids: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Count the step that the pipeline has taken."""
        self.steps_done += 1

    def displace(self, ids: Tensor, offsets: Tensor) -> None:
        """Do nothing: rows travel, and their pipeline moves them."""

    def catch_up(self, ids: Tensor | None) -> None:
        """Do nothing: their pipeline has applied the skipped steps."""

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M] new values; all their moments become zero, unless they are left."""
        self._bounds = None  # which follow sorted ids alone
        super().overwrite(ids, values, leaves_moments=leaves_moments)

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero."""
        self._bounds = None
        super().relocate(source_ids, target_ids)

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the store has all."""
        return {}

    def load_state(self, state: State) -> None:
        """Go on from a state; the store has been filled from it."""
        self.steps_done = int(state["step_count"])
        self._bounds = None

    def _culled_rows(self) -> Tensor:
        """Return rows [N, 12] as culling takes them."""
        return self.rows.parameters[:, :CULLED_COLUMNS]

    def _follow_change(self, ids: Tensor | None) -> None:
        """Bring the bounds up to date with rows (sorted, on the host; None: all) that have changed."""
        if ids is None:
            self._bounds = None
        elif self._bounds is not None:
            self._bounds.update(self._culled_rows(), ids)

    def _margin(self, lagging: bool) -> Margin:
        """Return how far rows, current or lagging behind, may move until the next step is done."""
        rounded = self.layout.state == "compact"
        return margin_ahead(self._adam, self.steps_done, lagging=lagging, rounded=rounded)
