"""Projection of 3D Gaussians to the image plane on the CPU: gsplat's packed projection, natively."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rendering import _native
from rendering.native import array, tensor


@dataclass(frozen=True)
class Projection:
    """The Gaussians that each camera sees, camera after camera, Gaussians ascending within a camera.

    `means2d`, `depths`, `conics` and `compensations` carry gradients to means, quats and scales.
    """

    row_offsets: Tensor  # [C + 1] int64: camera c has rows row_offsets[c] to row_offsets[c + 1]
    camera_ids: Tensor  # [nnz] int64
    gaussian_ids: Tensor  # [nnz] int64
    radii: Tensor  # [nnz, 2] int32, pixels
    means2d: Tensor  # [nnz, 2] pixels
    depths: Tensor  # [nnz]
    conics: Tensor  # [nnz, 3] xx, xy, yy of the inverse image covariance, 1/pixels^2
    compensations: Tensor | None  # [nnz] factor on opacities, when antialiased


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, viewmats, Ks, image_size, limits, antialiased):
        inputs = [array(t) for t in (means, quats, scales, opacities, viewmats, Ks)]
        results = _native.project(*inputs, *image_size, *limits, antialiased, torch.get_num_threads())
        rows, camera_ids, gaussian_ids, radii, means2d, depths, conics, compensations = map(tensor, results)
        ctx.save_for_backward(
            means, quats, scales, viewmats, Ks, rows, gaussian_ids, conics, compensations if antialiased else None
        )
        ctx.mark_non_differentiable(rows, camera_ids, gaussian_ids, radii)
        ctx.image_size, ctx.eps2d = image_size, limits[-1]
        return rows, camera_ids, gaussian_ids, radii, means2d, depths, conics, compensations

    @staticmethod
    def backward(ctx, _rows, _cameras, _gaussians, _radii, v_means2d, v_depths, v_conics, v_compensations):
        means, quats, scales, viewmats, Ks, rows, gaussian_ids, conics, compensations = ctx.saved_tensors
        v_means, v_quats, v_scales = (
            torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (means, quats, scales)
        )
        if compensations is None:
            v_compensations = None
        _native.project_backward(
            *(array(t) for t in (means, quats, scales, viewmats, Ks)),
            *ctx.image_size,
            ctx.eps2d,
            *(array(t) for t in (rows, gaussian_ids, conics, compensations)),
            *(array(t) for t in (v_means2d, v_depths, v_conics, v_compensations)),
            *(array(t) for t in (v_means, v_quats, v_scales)),
            torch.get_num_threads(),
        )
        return v_means, v_quats, v_scales, None, None, None, None, None, None


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    antialiased: bool,
) -> Projection:
    """Project Gaussians into every camera and keep those that reach its image.

    A quaternion of length zero counts as the identity rotation and gets no gradient. Gaussians whose projection
    does not fit the number format are left out.

    Args:
        means: centres [N, 3]. quats: w x y z of any length [N, 4]. scales: standard deviations [N, 3].
        opacities: [N] in 0..1, for culling only: no gradient.
        viewmats: world to camera [C, 4, 4]. Ks: intrinsics in pixels [C, 3, 3].
        width, height: pixels. near_plane, far_plane: depths outside which Gaussians are left out.
        radius_clip: pixels; Gaussians whose both radii are at most this are left out.
        eps2d: blur added to the image covariance, pixels^2.
        antialiased: also compute the opacity compensation of Mip-Splatting (Yu et al. 2024).
    """
    limits = (near_plane, far_plane, radius_clip, eps2d)
    *rows, compensations = _Project.apply(
        means, quats, scales, opacities, viewmats, Ks, (width, height), limits, antialiased
    )
    return Projection(*rows, compensations=compensations if antialiased else None)
