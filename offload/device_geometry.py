"""Geometry on the device with dense Adam, although each step has gradients of a few rows only.

Means, log scales, quaternions and logit opacities take 44 of a Gaussian's 236 parameter bytes. On the device they are
culled without touching the host (selective offloading, GS-Scale, arXiv 2509.15645).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from offload.culling import Cameras, CoveredCells, Margin, covered_cells_on_device, visible_ids_on_device
from offload.rows import kept_rows

GEOMETRY = ("means", "scales", "quats", "opacities")


class DeviceGeometry:
    """The geometry of N Gaussians and its Adam moments: 11 x 3 floats, 132 bytes per Gaussian and no gradients."""

    def __init__(
        self, parameters: Mapping[str, Tensor], *, betas: tuple[float, float], eps: float, device: torch.device
    ) -> None:
        """
        Args:
            parameters: means [N, 3], scales [N, 3] (log), quats [N, 4], opacities [N] (logit).
            betas: Adam's decay rates.
            eps: Adam's epsilon.
            device: Where all of it lives.
        """
        self.parameters = {name: parameters[name].detach().to(device, torch.float32, copy=True) for name in GEOMETRY}
        self.exp_avg = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.betas = betas
        self.eps = eps
        self.step_count = 0

    @property
    def num_gaussians(self) -> int:
        return len(self.parameters["means"])

    def visible_ids(self, cameras: Cameras, margin: Margin) -> Tensor:
        """Sorted int64 [V] on the device: rows that the cameras may draw when geometry moves by at most the margin."""
        return visible_ids_on_device(**self.parameters, cameras=cameras, margin=margin)

    def covered_cells(self, ids: Tensor, cameras: Cameras, margin: Margin, cell: int) -> list[CoveredCells]:
        """In which cells of each camera's picture these rows [V] may draw, moved by at most the margin."""
        return covered_cells_on_device(**self.parameters, ids=ids, cameras=cameras, margin=margin, cell=cell)

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Views of rows that follow each other."""
        return {name: value[first:last] for name, value in self.parameters.items()}

    def gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Copies of the rows [V]."""
        return {name: value[ids] for name, value in self.parameters.items()}

    def step(self, ids: Tensor, gradients: Mapping[str, Tensor], learning_rates: Mapping[str, float]) -> None:
        """One step of dense Adam over all N rows.

        Args:
            ids: [V] the rows that have a gradient; that of all others is zero.
            gradients: Of the rows, as from `gather`.
            learning_rates: Of each parameter.
        """
        self.step_count += 1
        b1, b2 = self.betas
        root_correction = math.sqrt(1 - b2**self.step_count)
        if self.device.type == "cuda":
            self._step_on_cuda(ids, gradients, learning_rates, root_correction)
            return
        for name, parameter in self.parameters.items():
            exp_avg, exp_avg_sq, gradient = self.exp_avg[name], self.exp_avg_sq[name], gradients[name]
            exp_avg.mul_(b1).index_add_(0, ids, gradient, alpha=1 - b1)
            exp_avg_sq.mul_(b2).index_add_(0, ids, gradient.square(), alpha=1 - b2)
            step_size = learning_rates[name] / (1 - b1**self.step_count)
            denominator = exp_avg_sq.sqrt().div_(root_correction).add_(self.eps)
            parameter.addcdiv_(exp_avg, denominator, value=-step_size)

    def _step_on_cuda(
        self, ids: Tensor, gradients: Mapping[str, Tensor], learning_rates: Mapping[str, float], root_correction: float
    ) -> None:
        from offload.device_adam_triton import adam_step  # Triton comes with CUDA builds of torch only

        has_gradient = torch.zeros(self.num_gaussians, dtype=torch.uint8, device=self.device)
        has_gradient.index_fill_(0, ids, 1)
        for name, parameter in self.parameters.items():
            adam_step(
                parameter,
                self.exp_avg[name],
                self.exp_avg_sq[name],
                ids,
                gradients[name],
                has_gradient,
                betas=self.betas,
                step_size=learning_rates[name] / (1 - self.betas[0] ** self.step_count),
                root_correction=root_correction,
                eps=self.eps,
            )

    def arrays_by_name(self) -> dict[str, Tensor]:
        """Parameters and moments under the names of `offload.state`; not copied."""
        arrays = {"parameters": self.parameters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{array}/{name}": value for array, values in arrays.items() for name, value in values.items()}

    @property
    def device(self) -> torch.device:
        return self.parameters["means"].device

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Memory in bytes that appending this many Gaussians takes at its peak: one tensor stands twice."""
        return {self.device: num_new * 3 * 11 * 4 + self.num_gaussians * 4 * 4}

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], without moments."""
        for name, value in self.parameters.items():
            self.parameters[name] = torch.cat([value, value[ids]])
            for moments in (self.exp_avg, self.exp_avg_sq):
                moment = moments[name]
                moments[name] = torch.cat([moment, moment.new_zeros(len(ids), *moment.shape[1:])])

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """Give these rows [M] new values; all their moments become zero."""
        for name, parameter in self.parameters.items():
            if name in values:
                parameter[ids] = values[name]
            self.exp_avg[name][ids] = 0
            self.exp_avg_sq[name][ids] = 0

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        for tensors in (self.parameters, self.exp_avg, self.exp_avg_sq):
            for name in GEOMETRY:
                tensors[name] = kept_rows(tensors[name], ids)

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where some tensors have them only, since appending has failed."""
        for tensors in (self.parameters, self.exp_avg, self.exp_avg_sq):
            for name in GEOMETRY:
                tensors[name] = tensors[name][:num_gaussians]

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        self.parameters["opacities"].clamp_(max=max_logit)
        self.exp_avg["opacities"].zero_()
        self.exp_avg_sq["opacities"].zero_()
