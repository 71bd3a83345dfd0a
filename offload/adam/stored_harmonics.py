"""Colours of a view's Gaussians, made of harmonics as they are stored.

Their coefficients are 48 of a Gaussian's 59 values, or 45 without the constant one. Copied for a view they would be
its largest tensor, which is written once, read twice, and lies there until the update, and their gradient another one
as large. Here a row is decoded, where it has codes, and caught up with the steps that it has skipped where a colour is
made of it, together with the colour's slopes by the Gaussian's centre, 36 bytes, which are all that the backward pass
needs of it; and once more by Adam's step (`offload.adam.rows`, without values). The coefficients get no gradient before
that: it is made there too (`offload/adam/harmonics.py`). All this is for one camera.

So nothing reads rows between the colours and the update. Where the update does not need them either, as the CPU has
them, their memory goes to the next view then (`StoredRows.spend`).
"""

from __future__ import annotations

from collections.abc import Callable
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
    # Is told when colours have been made of the rows, if these are to make way then.
    on_spent: Callable[[], None] | None = None

    def forget(self) -> None:
        """Let go of the rows: a store that grows would stand twice while somebody still holds colours made of it."""
        self.__dict__.pop("rows", None)
        self.__dict__.pop("last_step", None)

    def spend(self) -> None:
        """Let rows make way, if they are to, now that the current stream has been given all that reads them."""
        if self.on_spent is not None:
            self.forget()
            self.on_spent()

    @property
    def are_gone(self) -> bool:
        """Tell whether no more colours can be made."""
        return "rows" not in self.__dict__

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
        """Return colours [nnz, 3] of the Gaussians that the camera sees: as `rendering.projection.Colors` says.

        Raises:
            ValueError: There are several cameras.
            RuntimeError: Rows have made way for those of the next view when colours were made of them.
        """
        if len(camera_positions) != 1:
            raise ValueError(f"harmonics as they are stored are for one camera, there are {len(camera_positions)}")
        if self.others.are_gone:
            raise RuntimeError("colours have been made of these rows, which have made way for the next view's")
        colors = _Colors.apply(self.sh0, means, camera_positions, self, gaussian_ids)
        self.others.spend()
        return colors


class _Colors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sh0: Tensor, means: Tensor, camera_positions: Tensor, harmonics: StoredHarmonics, ids: Tensor
    ) -> Tensor:
        means = means.contiguous()
        kernels = kernels_for(means.device, __name__)
        colors, slopes = kernels.colors_of(
            harmonics.others, sh0.detach(), means, camera_positions, ids, harmonics.sh_degree
        )
        ctx.save_for_backward(ids, colors, slopes)
        ctx.num_rows = len(means)
        return colors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_colors: Tensor) -> tuple[Tensor | None, ...]:
        ids, colors, slopes = ctx.saved_tensors
        kernels = kernels_for(colors.device, __name__)
        v_sh0, v_means = kernels.gradients_of(ctx.num_rows, ids, colors, slopes, v_colors)
        v_positions = -v_means.sum(dim=0, keepdim=True) if ctx.needs_input_grad[2] else None
        return v_sh0, v_means, v_positions, None, None


def colors_of(
    others: StoredRows, sh0: Tensor, means: Tensor, camera_positions: Tensor, ids: Tensor, sh_degree: int
) -> tuple[Tensor, Tensor | None]:
    """Compute colours, 0.5 plus the harmonics, cut at zero as in 3DGS; and how they change with means.

    Args:
        others: Of V rows, those of shN.
        sh0: [V, 1, 3], is added to the constant harmonic, where rows have it; the values of a row lie side by side.
        means: [V, 3], contiguous.
        camera_positions: [1, 3].
        ids: int64 [M], the rows whose colours are wanted.
        sh_degree: Of the harmonics to use.

    Returns:
        Colours [M, 3]; and their slopes before they are cut, [M, 3 colours, 3 coordinates], None where there are none.
    """
    with torch.enable_grad():
        seen = means.detach()[ids].requires_grad_()
        uncut = _uncut(others, sh0, seen, camera_positions.detach(), ids, sh_degree)
        slopes = None
        if num_harmonics(sh_degree):
            of_color = [torch.autograd.grad(color.sum(), seen, retain_graph=True)[0] for color in uncut.unbind(dim=1)]
            slopes = torch.stack(of_color, dim=1)
    return torch.where(uncut > CUT_BELOW, uncut.clamp(min=LEAST_COLOR), 0).detach(), slopes


def gradients_of(
    num_rows: int, ids: Tensor, colors: Tensor, slopes: Tensor | None, v_colors: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of sh0 [V, 1, 3], and of means [V, 3] by directions; zero of rows not among `ids`.

    Args:
        num_rows: V.
        ids: As for `colors_of`.
        colors, slopes: What it has returned; colours are zero where they were cut.
        v_colors: [M, 3] the gradient of colours.
    """
    v_colors = torch.where(colors > 0, v_colors, 0)
    v_sh0, v_means = colors.new_zeros(num_rows, 1, 3), colors.new_zeros(num_rows, 3)
    if slopes is not None:
        v_means[ids] = (v_colors[:, :, None] * slopes).sum(dim=1)
    v_sh0[:, 0].index_copy_(0, ids, v_colors * CONSTANT)
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
