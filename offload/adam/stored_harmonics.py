"""Colours of a view's Gaussians, made of harmonics as they are stored.

Their coefficients are 48 of a Gaussian's 59 values, or 45 without the constant one. Copied for a view they would be
its largest tensor, which is written once, read twice, and lies there until the update, and their gradient another one
as large. Here a row is decoded, where it has codes, and caught up with the steps that it has skipped where a colour is
made of it; once more in the backward pass, where the colour's direction gets a gradient; and once more by Adam's step
(`offload.adam.rows`, without values). The coefficients get no gradient before that: it is made there too
(`offload/adam/harmonics.py`). All this is for one camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offload.adam.deferral import SkippedSteps
from offload.adam.harmonics import (
    CONSTANT,
    CUT_BELOW,
    LEAST_COLOR,
    directions_to,
    num_harmonics,
    relative_harmonics,
)
from offload.adam.rows import fetch_dated_rows
from offload.backends import kernels_for
from offload.store.layout import RowState


@dataclass
class StoredRows:
    """Rows of harmonics, of which some are those of a view, until they are updated."""

    rows: RowState  # packed ones; or float32; or values that are current, float32 without moments
    places: Tensor | None  # [V] int64, which of them the view has; None: they are the view's, in its order
    last_step: Tensor | None  # int32, the step of each row's last update; None of current ones
    skipped: SkippedSteps | None  # what catches them up; None of current ones
    has_constant: bool  # whether the first three columns are the constant harmonic's

    def forget(self) -> None:
        """Let go of the rows: a store that grows would stand twice while somebody still holds colours made of it."""
        del self.rows, self.last_step

    def of(self, numbers: Tensor) -> Tensor:
        """Return the values [M, columns] of rows [M] of the view, as `fetch_dated_rows` gives them."""
        places = numbers if self.places is None else self.places[numbers]
        if self.skipped is None or self.last_step is None:
            return self.rows.parameters[places]
        values = torch.empty(len(places), self.skipped.columns, device=places.device)
        fetch_dated_rows(self.rows, places, self.last_step[places], None, RowState(values, ()), self.skipped)
        return values


@dataclass(frozen=True)
class StoredHarmonics:
    """Harmonics of a view, in the place of coefficients that `rendering.rasterize` takes for colours."""

    sh0: Tensor  # [V, 1, 3], which receives a gradient; zeros, where the rows have the constant harmonic too
    others: StoredRows
    sh_degree: int

    def colors(self, means: Tensor, camera_positions: Tensor, camera_ids: Tensor, gaussian_ids: Tensor) -> Tensor:
        """Return colours [nnz, 3] of the Gaussians that the camera sees: as `rendering.projection.Colors` says."""
        if len(camera_positions) != 1:
            raise ValueError(f"harmonics as they are stored are for one camera, there are {len(camera_positions)}")
        return _Colors.apply(self.sh0, means, camera_positions, self, gaussian_ids)


class _Colors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sh0: Tensor, means: Tensor, camera_positions: Tensor, harmonics: StoredHarmonics, ids: Tensor
    ) -> Tensor:
        means = means.contiguous()
        kernels = kernels_for(means.device, __name__)
        colors = kernels.colors_of(harmonics.others, sh0.detach(), means, camera_positions, ids, harmonics.sh_degree)
        ctx.save_for_backward(means, camera_positions, ids, colors)
        ctx.others, ctx.sh_degree = harmonics.others, harmonics.sh_degree
        return colors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_colors: Tensor) -> tuple[Tensor | None, ...]:
        means, camera_positions, ids, colors = ctx.saved_tensors
        kernels = kernels_for(means.device, __name__)
        v_sh0, v_means = kernels.gradients_of(ctx.others, means, camera_positions, ids, colors, v_colors, ctx.sh_degree)
        v_positions = -v_means.sum(dim=0, keepdim=True) if ctx.needs_input_grad[2] else None
        return v_sh0, v_means, v_positions, None, None


def colors_of(
    others: StoredRows, sh0: Tensor, means: Tensor, camera_positions: Tensor, ids: Tensor, sh_degree: int
) -> Tensor:
    """Compute colours: 0.5 plus the harmonics, cut at zero as in 3DGS.

    Args:
        others: Of V rows, those of shN.
        sh0: [V, 1, 3], is added to the constant harmonic, where rows have it; the values of a row lie side by side.
        means: [V, 3], contiguous.
        camera_positions: [1, 3].
        ids: int64 [M], the rows whose colours are wanted.
        sh_degree: Of the harmonics to use.

    Returns:
        [M, 3].
    """
    uncut = _uncut(others, sh0, means[ids], camera_positions, ids, sh_degree)
    return torch.where(uncut > CUT_BELOW, uncut.clamp(min=LEAST_COLOR), 0)


def gradients_of(
    others: StoredRows,
    means: Tensor,
    camera_positions: Tensor,
    ids: Tensor,
    colors: Tensor,
    v_colors: Tensor,
    sh_degree: int,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of sh0 [V, 1, 3], and of means [V, 3] by directions; zero of rows not among `ids`.

    Args:
        others, means, camera_positions, ids, sh_degree: As for `colors_of`.
        colors: [M, 3] that it has returned, zero where they were cut.
        v_colors: [M, 3] their gradient.
    """
    v_colors = torch.where(colors > 0, v_colors, 0)
    v_sh0, v_means = means.new_zeros(len(means), 1, 3), torch.zeros_like(means)
    if num_harmonics(sh_degree) and len(ids):
        with torch.enable_grad():
            seen = means[ids].requires_grad_()
            uncut = _uncut(others, torch.zeros_like(v_sh0), seen, camera_positions, ids, sh_degree)
            (v_means[ids],) = torch.autograd.grad(uncut, seen, v_colors)
    v_sh0[:, 0].index_copy_(0, ids, v_colors.mul_(CONSTANT))
    return v_sh0, v_means


def _uncut(
    others: StoredRows, sh0: Tensor, means: Tensor, camera_positions: Tensor, ids: Tensor, sh_degree: int
) -> Tensor:
    """Compute colours [M, 3] before they are cut, of rows `ids` with these means [M, 3]."""
    used = num_harmonics(sh_degree)
    relative = relative_harmonics(directions_to(means, camera_positions))[:, :used]  # [M, K - 1]
    columns, constant = others.of(ids), sh0[ids, 0]
    if others.has_constant:
        constant, columns = constant + columns[:, :3], columns[:, 3:]
    coefficients = columns[:, : 3 * used].reshape(len(ids), used, 3)
    return 0.5 + CONSTANT * (constant + (relative[:, :, None] * coefficients).sum(dim=1))
