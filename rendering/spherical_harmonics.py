"""View-dependent colour from spherical harmonics on the CPU, natively."""

from __future__ import annotations

import torch
from torch import Tensor

from native import rendering as native
from rendering.native import array, zeros
from rendering.projection import Projection


class _SphericalHarmonics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sh_degree, means, camera_positions, coeffs, row_offsets, gaussian_ids):
        colors = means.new_empty(len(gaussian_ids), 3)
        clamped = torch.empty(len(gaussian_ids), 3, dtype=torch.bool)
        inputs = (means, camera_positions, coeffs, row_offsets, gaussian_ids)
        native.spherical_harmonics(sh_degree, *(array(t) for t in (*inputs, colors, clamped)), torch.get_num_threads())
        ctx.save_for_backward(*inputs, clamped)
        ctx.sh_degree = sh_degree
        return colors

    @staticmethod
    def backward(ctx, v_colors):
        means, camera_positions, coeffs, *_ = ctx.saved_tensors
        v_means, v_coeffs = zeros(means.shape, means), zeros(coeffs.shape, means)
        v_positions = zeros(camera_positions.shape, means) if ctx.needs_input_grad[2] else None
        native.spherical_harmonics_backward(
            ctx.sh_degree,
            *(array(t) for t in (*ctx.saved_tensors, v_colors, v_means, v_coeffs, v_positions)),
            torch.get_num_threads(),
        )
        return None, v_means, v_positions, v_coeffs, None, None


def spherical_harmonics(
    sh_degree: int, means: Tensor, viewmats: Tensor, coeffs: Tensor, projection: Projection
) -> Tensor:
    """Return colours [nnz, 3] of projected Gaussians: 0.5 plus the harmonics, cut at zero as in 3DGS.

    Args:
        sh_degree: 0 to 3; coefficients of higher bands are not used.
        means: Gaussian centres [N, 3]. viewmats: world to camera [C, 4, 4].
        coeffs: [N, K, 3] with K >= (sh_degree + 1)^2.
    """
    camera_positions = torch.inverse(viewmats)[:, :3, 3]  # [C, 3]
    return _SphericalHarmonics.apply(
        sh_degree, means, camera_positions, coeffs, projection.row_offsets, projection.gaussian_ids
    )
