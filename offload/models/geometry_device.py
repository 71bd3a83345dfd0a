"""Geometry on the device, of which each step has gradients of a few rows only.

Means, log scales, quaternions and logit opacities take 44 of a Gaussian's 236 parameter bytes. On the device they are
culled without touching the host (selective offloading, GS-Scale, arXiv 2509.15645). Adam's updates are deferred there
too, so that a step writes the rows of its view alone. What grows with N is the first test of culling, which reads at
most 44 bytes of each row: 0.2 ms for 18 million at 4 TB/s, where dense Adam would take 1.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from offload.adam import geometry as geometry_kernels
from offload.adam.deferral import DeferralTables
from offload.adam.geometry import COLUMNS, GeometryState
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.adam.state import State, load_deferred, named_tables
from offload.backends import kernels_for
from offload.culling.cameras import Cameras, Margin
from offload.culling.cells import CoveredCells
from offload.culling.margins import margin_ahead
from offload.culling.strays import Strays
from offload.pipelines.contract import Displacement
from offload.store.contract import RowStore
from offload.store.growth import Growth
from offload.store.host_store import check_relocation
from offload.store.kept_rows import kept_rows
from offload.store.layout import LAST_STEP_BYTES

GEOMETRY = tuple(COLUMNS)
CAUGHT_UP_ROWS = 1 << 20  # at once, for which torch takes some 200 bytes a row
BYTES = 3 * 11 * 4 + LAST_STEP_BYTES  # of a Gaussian: parameters, moments and the step of its last update


class DeviceGeometry:
    """Holds the geometry of N Gaussians and its Adam moments: 136 bytes per Gaussian and no gradients.

    Rows lag behind by the steps since their last update. What is read of them is current; before they are changed
    they have to be brought to the present step by `catch_up`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], adam: AdamOptions, *, device: torch.device) -> None:
        """
        Args:
            parameters: means [N, 3], scales [N, 3] (log), quats [N, 4], opacities [N] (logit).
            adam: Learning rates, decay rates and epsilon.
            device: Where all of it lives.
        """
        values = {name: parameters[name].detach().to(device, torch.float32, copy=True) for name in GEOMETRY}
        self._state = GeometryState(
            values,
            {name: torch.zeros_like(value) for name, value in values.items()},
            {name: torch.zeros_like(value) for name, value in values.items()},
            torch.zeros(len(values["means"]), dtype=torch.int32, device=device),
        )
        multipliers, self._rates = schedules_of("geometry", 0, adam)
        self.tables = DeferralTables(multipliers, adam.betas, adam.eps, device)
        self._strays = Strays()
        self._adam = adam
        self._kernels = kernels_for(device, "offload.adam.geometry")
        self._culling = kernels_for(device, "offload.culling.kernels")

    @property
    def num_gaussians(self) -> int:
        return len(self._state.parameters["means"])

    @property
    def device(self) -> torch.device:
        return self._state.parameters["means"].device

    @property
    def last_step(self) -> Tensor:
        """Return the step of each row's last update, [N] int32."""
        return self._state.last_step

    @property
    def stores(self) -> dict[str, RowStore]:
        """Return no stores: these rows stay."""
        return {}

    @property
    def steps_done(self) -> int:
        return self.tables.step

    def visible_ids(self, cameras: Cameras) -> Tensor:
        """Find the sorted ids, int64 [V] on the device, of what cameras may draw after one more step."""
        margin, lag_margin = self._margin(lagging=False), self._margin(lagging=True)
        return self._strays.beside(self._culling.visible_ids(self._state, self.tables, cameras, margin, lag_margin))

    def expect_strays(self, ids: Tensor | None) -> None:
        """Find these rows, sorted int64 [F], for every camera from now on; None: none any more."""
        self._strays.expect(ids)

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        """Find in which cells of each camera's picture rows [V] may draw after one more step.

        Args:
            ids: int64 [V] on the device.
            cameras: C of them.
            halo: Pixels that are added to what a row draws.
            cell: Pixels of a cell's side.
        """
        margin = replace(self._margin(lagging=False), pixels=halo)
        covered = self._culling.covered_cells(self.gather(ids), cameras, margin, cell)
        return self._strays.everywhere(covered, ids)

    def gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Copy the current values of rows [V]."""
        return self._kernels.gather_rows(self._state, ids, self.tables)

    def update(self, ids: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Take the next step of Adam.

        Args:
            ids: [V] the rows that have a gradient, each once; that of all others is zero.
            gradients: Those of the rows, as from `gather`.
        """
        rates = self._rates(self.tables.step + 1)
        self._kernels.step_rows(self._state, ids, gradients, self.tables, self.tables.next_step_sizes(rates))
        self.tables.begin_step(rates)

    def displace(self, ids: Tensor, offsets: Tensor) -> None:
        """Add offsets [D, 3] to the means of rows [D]; they may lag behind."""
        Displacement(ids, offsets).add_to(self._state.parameters["means"])

    def catch_up(self, ids: Tensor | None) -> None:
        """Apply the skipped steps of rows.

        Args:
            ids: [M] on any device, each of them once; None: all rows.
        """
        chunks = self._lagging_rows() if ids is None else ids.to(self.device).split(CAUGHT_UP_ROWS)
        for chunk in chunks:
            if len(chunk):
                geometry_kernels.catch_up_rows(self._state, chunk, self.tables)

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the values of a parameter, not copied, or those of rows [M]; all have been caught up."""
        values = self._state.parameters[name]
        return values if ids is None else values[ids]

    def _lagging_rows(self) -> Iterator[Tensor]:
        """Give the ids of all lagging rows, int64 [M] at a time, of which catching up takes little memory."""
        for first in range(0, self.num_gaussians, CAUGHT_UP_ROWS):
            lags = self.last_step[first : first + CAUGHT_UP_ROWS] < self.tables.step
            yield lags.nonzero().squeeze(1) + first

    def arrays_by_name(self) -> dict[str, Tensor]:
        """Return parameters and moments under the names of `offload.adam.state`; not copied."""
        state = self._state
        arrays = {"parameters": state.parameters, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        return {f"{array}/{name}": value for array, values in arrays.items() for name, value in values.items()}

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Count the bytes that appending this many Gaussians takes: one tensor stands twice meanwhile."""
        return {self.device: Growth(num_new * BYTES, self.num_gaussians * 4 * 4)}

    def append_blank(self, count: int) -> None:
        """Append so many rows whose values and moments are written next."""
        for values in (self._state.parameters, self._state.exp_avg, self._state.exp_avg_sq):
            for name, value in values.items():
                values[name] = torch.cat([value, value.new_zeros(count, *value.shape[1:])])
        self._state.last_step = torch.cat([self.last_step, self.last_step.new_full((count,), self.steps_done)])

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], which have been caught up, without moments."""
        for name, value in self._state.parameters.items():
            self._state.parameters[name] = torch.cat([value, value[ids]])
            for moments in (self._state.exp_avg, self._state.exp_avg_sq):
                moment = moments[name]
                moments[name] = torch.cat([moment, moment.new_zeros(len(ids), *moment.shape[1:])])
        self._state.last_step = torch.cat([self.last_step, self.last_step[ids]])

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M], which have been caught up, new values; moments become zero, unless they are left."""
        for name, parameter in self._state.parameters.items():
            if name in values:
                parameter[ids] = values[name]
            if not leaves_moments:
                self._state.exp_avg[name][ids] = 0
                self._state.exp_avg_sq[name][ids] = 0

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero; all of them have been caught up."""
        check_relocation(source_ids, target_ids)
        self.overwrite(target_ids, {name: value[source_ids] for name, value in self._state.parameters.items()})

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        for tensors in (self._state.parameters, self._state.exp_avg, self._state.exp_avg_sq):
            for name in GEOMETRY:
                tensors[name] = kept_rows(tensors[name], ids)
        self._state.last_step = kept_rows(self.last_step, ids)

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where some tensors have them only, since appending has failed."""
        for tensors in (self._state.parameters, self._state.exp_avg, self._state.exp_avg_sq):
            for name in GEOMETRY:
                tensors[name] = tensors[name][:num_gaussians]
        self._state.last_step = self.last_step[:num_gaussians]

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities; none lags behind."""
        self._state.parameters["opacities"].clamp_(max=max_logit)
        self._state.exp_avg["opacities"].zero_()
        self._state.exp_avg_sq["opacities"].zero_()

    def state(self) -> dict[str, Tensor]:
        """Return parameters, moments and all that catching them up needs, as `offload.adam.state` names it."""
        tables = named_tables("geometry", self.tables)
        return {**self.arrays_by_name(), "last_step/geometry": self.last_step, **tables}

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here."""
        load_deferred(self, "geometry", self.tables, self._rates, state)

    def _margin(self, lagging: bool) -> Margin:
        """Return how far rows, current or lagging behind, may move until the next step is done."""
        return margin_ahead(self._adam, self.steps_done, lagging=lagging)
