"""Geometry on the device, of which each step has gradients of a few rows only.

Means, log scales, quaternions and logit opacities take 44 of a Gaussian's 236 parameter bytes. On the device they are
culled without touching the host (selective offloading, GS-Scale, arXiv 2509.15645). Adam's updates are deferred there
too, so that a step writes the rows of its view alone. What grows with N is the first test of culling, which reads at
most 44 bytes of each row: 0.2 ms for 18 million at 4 TB/s, where dense Adam would take 1.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from offload.adam import geometry as geometry_kernels
from offload.adam.deferral import DeferralTables
from offload.adam.geometry import COLUMNS, GeometryState
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.backends import kernels_for
from offload.culling.cameras import Cameras, Margin
from offload.culling.cells import CoveredCells
from offload.models.kept_rows import kept_rows
from offload.store.layout import LAST_STEP_BYTES

GEOMETRY = tuple(COLUMNS)
SETTLED_ROWS = 1 << 20  # at once, for which torch takes some 200 bytes a row
BYTES = 3 * 11 * 4 + LAST_STEP_BYTES  # of a Gaussian: parameters, moments and the step of its last update


class DeviceGeometry:
    """The geometry of N Gaussians and its Adam moments: 136 bytes per Gaussian and no gradients.

    Rows lag behind by the steps since their last update. What is read of them is current; before they are changed
    they have to be brought to the present step by `settle`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
    ) -> None:
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
        """Step of each row's last update, [N] int32."""
        return self._state.last_step

    def visible_ids(self, cameras: Cameras, margin: Margin, lag_margin: Margin) -> Tensor:
        """Sorted int64 [V] on the device: rows that the cameras may draw when geometry moves by at most the margin.

        Args:
            cameras: The pictures to be drawn.
            margin: How much current rows may still move.
            lag_margin: How much rows may move that lag behind.
        """
        return self._culling.visible_ids(self._state, self.tables, cameras, margin, lag_margin)

    def covered_cells(self, ids: Tensor, cameras: Cameras, margin: Margin, cell: int) -> list[CoveredCells]:
        """In which cells of each camera's picture these rows [V] may draw, moved by at most the margin."""
        return self._culling.covered_cells(self.gather(ids), cameras, margin, cell)

    def gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Copies of the current rows [V]."""
        return self._kernels.gather_rows(self._state, ids, self.tables)

    def step(self, ids: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """The next step of Adam.

        Args:
            ids: [V] the rows that have a gradient, each once; that of all others is zero.
            gradients: Of the rows, as from `gather`.
        """
        rates = self._rates(self.tables.step + 1)
        self._kernels.step_rows(self._state, ids, gradients, self.tables, self.tables.next_step_sizes(rates))
        self.tables.begin_step(rates)

    def settle(self, ids: Tensor | None) -> dict[str, Tensor]:
        """Bring rows to the present step.

        Args:
            ids: [M] on any device, each of them once; None: all rows.

        Returns:
            The parameters [N, ...], not copied.
        """
        chunks = self._lagging_rows() if ids is None else ids.to(self.device).split(SETTLED_ROWS)
        for chunk in chunks:
            if len(chunk):
                geometry_kernels.catch_up_rows(self._state, chunk, self.tables)
        return self._state.parameters

    def _lagging_rows(self) -> Iterator[Tensor]:
        """int64 [M] at a time, of which settling takes little memory."""
        for first in range(0, self.num_gaussians, SETTLED_ROWS):
            lags = self.last_step[first : first + SETTLED_ROWS] < self.tables.step
            yield lags.nonzero().squeeze(1) + first

    def arrays_by_name(self) -> dict[str, Tensor]:
        """Parameters and moments under the names of `offload.adam.state`; not copied."""
        state = self._state
        arrays = {"parameters": state.parameters, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        return {f"{array}/{name}": value for array, values in arrays.items() for name, value in values.items()}

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Memory in bytes that appending this many Gaussians takes at its peak: one tensor stands twice."""
        return {self.device: num_new * BYTES + self.num_gaussians * 4 * 4}

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these settled rows [M], without moments."""
        for name, value in self._state.parameters.items():
            self._state.parameters[name] = torch.cat([value, value[ids]])
            for moments in (self._state.exp_avg, self._state.exp_avg_sq):
                moment = moments[name]
                moments[name] = torch.cat([moment, moment.new_zeros(len(ids), *moment.shape[1:])])
        self._state.last_step = torch.cat([self.last_step, self.last_step[ids]])

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """Give these settled rows [M] new values; all their moments become zero."""
        for name, parameter in self._state.parameters.items():
            if name in values:
                parameter[ids] = values[name]
            self._state.exp_avg[name][ids] = 0
            self._state.exp_avg_sq[name][ids] = 0

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
        """Lower every logit opacity to at most this, and forget the moments of all opacities; all rows are settled."""
        self._state.parameters["opacities"].clamp_(max=max_logit)
        self._state.exp_avg["opacities"].zero_()
        self._state.exp_avg_sq["opacities"].zero_()
