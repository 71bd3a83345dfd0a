"""Geometry in packed rows on the device, which steps them there, beside an appearance that lies in host memory.

A compact row of geometry has 112 bytes, the constant colour and all moments included, where float32 takes 132 without
the colour. So the host's threads, and the link, are left with 192 bytes of harmonics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.adam.state import State, load_deferred, named_tables
from offload.backends import kernels_for
from offload.culling.balls import BallsOfStore
from offload.culling.cameras import Cameras
from offload.culling.cells import CoveredCells
from offload.models.geometry_culled import CulledGeometry
from offload.pipelines.contract import MEANS, Displacement
from offload.pipelines.groups import RowGroup
from offload.pipelines.rows_in_place import RowsInPlace
from offload.store.contract import RowStore
from offload.store.device_store import DeviceStore

BLOCK_ROWS = 1 << 20  # whose values or gradients take 67 MB side by side: views may be far larger than their tiles


class PackedGeometry(CulledGeometry):
    """Holds the geometry of N Gaussians in compact rows: 116 bytes per Gaussian and no gradients.

    Rows lag behind by the steps since their last update. What is read of them is current; before they are changed they
    have to be brought to the present step by `catch_up`. They are culled as they are stored, on the current stream.
    """

    def __init__(self, parameters: Mapping[str, Tensor], adam: AdamOptions, *, device: torch.device) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`.
            adam: Learning rates, decay rates and epsilon.
            device: Where all of it lives.
        """
        store = DeviceStore(parameters, "geometry", state="compact", device=device)
        super().__init__(store, adam, BallsOfStore(store), device=device)
        multipliers, learning_rates = schedules_of("geometry", store.sh_degree, adam, "compact")
        tables = DeferralTables(multipliers, adam.betas, adam.eps, device)
        self._group = RowGroup(store, tables, learning_rates)
        self._rows = RowsInPlace(self._group, device)
        self._cells = kernels_for(device, "offload.culling.kernels").covered_cells
        self._join = kernels_for(device, "offload.models.named_rows").join

    @property
    def stores(self) -> dict[str, RowStore]:
        """Return no stores: these rows stay."""
        return {}

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        """Find in which cells of each camera's picture rows [V] may draw after one more step.

        Args:
            ids: int64 [V] on the device.
            cameras: C of them.
            halo: Pixels that are added to what a row draws.
            cell: Pixels of a cell's side.
        """
        margin = replace(self._margin(lagging=False), pixels=halo)
        parts = [self._cells(self.gather(some), cameras, margin, cell) for some in ids.split(BLOCK_ROWS)]
        return self._strays.everywhere([CoveredCells.joined(of_camera) for of_camera in zip(*parts, strict=True)], ids)

    def gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Copy the current values of rows [V]: views of one tensor."""
        return self._store.layout.named(self._rows.read(ids))

    def update(self, ids: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Take the next step of Adam.

        Args:
            ids: int64 [V] on the device, the rows that have a gradient, each once; that of all others is zero.
            gradients: Those of the rows, as from `gather`.
        """
        self._group.begin_step()
        self.steps_done = self._group.adam.step
        for first in range(0, len(ids), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            block = {name: gradient[rows] for name, gradient in gradients.items()}
            # Without values, which are read anew: rows may have been displaced, and tiles have gathered some each. Nor
            # are joined gradients given a name, so that those of one block make way for those of the next.
            self._rows.step(ids[rows], None, self._joined(block))

    def displace(self, ids: Tensor, offsets: Tensor) -> None:
        """Add offsets [D, 3] to the means of rows [D]; they may lag behind."""
        with self._store.changing(ids) as rows:
            Displacement(ids, offsets).add_to(rows.parameters[:, MEANS])

    def catch_up(self, ids: Tensor | None) -> None:
        """Apply the skipped steps of rows.

        Args:
            ids: int64 [M] on any device, each of them once; None: all rows.
        """
        self._rows.catch_up(ids)
        super().catch_up(ids)

    def state(self) -> dict[str, Tensor]:
        """Return rows and all that catching them up needs, as `offload.adam.state` names it."""
        tables = named_tables("geometry", self._group.adam)
        return {**self._store.arrays_by_name(), "last_step/geometry": self._store.last_step, **tables}

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here."""
        load_deferred(self._store, "geometry", self._group.adam, self._group.learning_rates, state)
        super().load_state(state)
        self._store.step = self.steps_done

    def _joined(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Lay gradients [V, ...] side by side, as the columns of rows lie."""
        layout = self._store.layout
        widths = {name: columns.stop - columns.start for name, columns in layout.columns.items()}
        parts = [gradients[name].reshape(len(gradients[name]), width) for name, width in widths.items()]
        return self._join(parts, layout.num_columns)
