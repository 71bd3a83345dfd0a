"""Geometry of a compact state whose rows are in host memory, and of which the device has what culling needs.

Rows travel to the device and back as those of the appearance do. What stays there is a ball around each Gaussian: the
mean, the largest scale and the opacity, 20 bytes (selective offloading, GS-Scale, arXiv 2509.15645, without moments).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from offload.adam.options import AdamOptions
from offload.adam.state import State
from offload.backends import kernels_for
from offload.culling.cameras import Cameras
from offload.culling.cells import CoveredCells, covered_cells
from offload.culling.margins import margin_ahead
from offload.models.geometry_host import CULLED_COLUMNS
from offload.store.host_store import HostStore

BALL_BYTES = 5 * 4
COPIED_ROWS = 1 << 20  # at once, from the host


class CulledGeometry(HostStore):
    """Holds the geometry of N Gaussians in a host store, and a ball around each on the device, where it is culled.

    Balls are those of the stored values, which lag behind by the steps since each row's last update; culling allows for
    that. Whoever steps rows tells of their new values (`follow`), since the store may have them later.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], adam: AdamOptions, *, device: torch.device, max_gaussians: int
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`.
            adam: How the rows are updated, which says how far they can move.
            device: Where balls are.
            max_gaussians: As for `HostStore`.
        """
        super().__init__(
            parameters, "geometry", state="compact", max_gaussians=max_gaussians, pin=device.type == "cuda"
        )
        self.steps_done = 0  # `step` is ahead of it while a step is under way
        self._adam = adam
        self._device = device
        self._culling = kernels_for(device, "offload.culling.kernels")
        self._balls: Tensor | None = None  # [5, N] on the device; None until they are next needed

    @property
    def device(self) -> torch.device:
        """Return where balls are."""
        return self._device

    @property
    def stores(self) -> dict[str, HostStore]:
        """Return the store by its group."""
        return {"geometry": self}

    def visible_ids(self, cameras: Cameras) -> Tensor:
        """Find the sorted ids, int64 [V] on the device, of what cameras may draw after one more step."""
        if self._balls is None:  # once after a refinement, whose operations are several
            self._balls = torch.empty(5, self.num_gaussians, device=self._device)
            for first in range(0, self.num_gaussians, COPIED_ROWS):
                rows = slice(first, first + COPIED_ROWS)
                self._balls[:, rows] = self._balls_of(self.rows.parameters[rows, :CULLED_COLUMNS]).to(self._device)
        return self._culling.visible_balls(
            self._balls, cameras, margin_ahead(self._adam, self.steps_done, lagging=True)
        )

    def follow(self, ids: Tensor, values: Tensor) -> None:
        """Take the values [V, columns] that rows [V] have after a step, both on the device."""
        if self._balls is not None:
            self._balls[:, ids] = self._balls_of(values)

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        """Find in which cells of each camera's picture rows [V] may draw after one more step.

        Args:
            ids: int64 [V] on the device.
            cameras: C of them.
            halo: Pixels that are added to what a row draws.
            cell: Pixels of a cell's side.
        """
        margin = replace(margin_ahead(self._adam, self.steps_done, lagging=True), pixels=halo)
        return covered_cells(self.rows.parameters[:, :CULLED_COLUMNS], ids.cpu(), cameras, margin, cell)

    def gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Copy nothing: rows travel."""
        return {}

    def update(self, ids: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Count the step that the pipeline has taken."""
        self.steps_done += 1

    def catch_up(self, ids: Tensor | None) -> dict[str, Tensor]:
        """Return the parameters [N, ...] by name, not copied; their pipeline has applied the skipped steps."""
        self._balls = None
        return self.snapshot()

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Count the bytes of host and device memory that appending this many Gaussians takes at its peak."""
        growth = super().growth_bytes(num_new)
        growth[self._device] = growth.get(self._device, 0) + BALL_BYTES * num_new
        return growth

    def load_state(self, state: State) -> None:
        """Go on from a state; the store has been filled from it."""
        self.steps_done = int(state["step_count"])
        self._balls = None

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the store has all."""
        return {}

    def _balls_of(self, rows: Tensor) -> Tensor:
        """Return [5, M] of rows [M, at least 11] of geometry."""
        return torch.stack([*rows[:, :3].unbind(1), rows[:, 3:6].amax(1), rows[:, 10]])
