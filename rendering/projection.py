"""Projection of 3D Gaussians to the image plane on the CPU: gsplat's packed projection, natively."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from native import rendering as native
from rendering.native import array, tensor, zeros


@dataclass(frozen=True)
class Projection:
    """Hold the Gaussians that each camera sees, camera after camera, Gaussians ascending within a camera.

    `means2d`, `depths`, `conics` and `opacities` carry gradients to the Gaussians and the cameras' poses.
    """

    camera_ids: Tensor  # [nnz] int64
    gaussian_ids: Tensor  # [nnz] int64
    radii: Tensor  # [nnz, 2] int32, pixels
    means2d: Tensor  # [nnz, 2] pixels
    depths: Tensor  # [nnz]
    conics: Tensor  # [nnz, 3] xx, xy, yy of the inverse image covariance, 1/pixels^2
    opacities: Tensor  # [nnz] with the compensation, when antialiased
    row_offsets: Tensor | None = None  # [C + 1] int64: camera c has rows row_offsets[c] to row_offsets[c + 1]; on CPUs


class Colors(Protocol):
    """Colours of N Gaussians, from whoever has their spherical harmonics in a form of its own."""

    def colors(self, means: Tensor, camera_positions: Tensor, camera_ids: Tensor, gaussian_ids: Tensor) -> Tensor:
        """Return colours [nnz, 3] of pairs of camera and Gaussian: 0.5 plus the harmonics, cut at zero as in 3DGS.

        Args:
            means: Gaussian centres [N, 3].
            camera_positions: [C, 3] in world units.
            camera_ids, gaussian_ids: [nnz] int64.
        """


class Exchange(Protocol):
    """Stands between projection and blending where those who hold Gaussians and those who draw cameras are many."""

    @property
    def num_cameras(self) -> int:
        """Count the cameras that are drawn here."""

    def __call__(self, projection: Projection, features: Tensor) -> tuple[Projection, Tensor]:
        """Return the pairs of the cameras drawn here, whoever has projected them.

        Args:
            projection: The Gaussians held here, in the cameras of all.
            features: [nnz, D] of these pairs, which are blended.
        """


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, viewmats, Ks, image_size, limits, antialiased):
        inputs = (means, quats, scales, opacities, viewmats, Ks)
        results = native.project(
            *(array(t) for t in inputs), *image_size, *limits, antialiased, torch.get_num_threads()
        )
        *rows, compensations = map(tensor, results)
        row_offsets, camera_ids, gaussian_ids, radii, _, _, conics, _ = rows
        saved = (row_offsets, gaussian_ids, conics, compensations if antialiased else None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *saved)
        ctx.mark_non_differentiable(row_offsets, camera_ids, gaussian_ids, radii)
        ctx.image_size, ctx.eps2d = image_size, limits[-1]
        return tuple(rows)

    @staticmethod
    def backward(ctx, _rows, _cameras, _gaussians, _radii, v_means2d, v_depths, v_conics, v_opacities):
        inputs, saved = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        count, like = len(saved[1]), inputs[0]
        v_rows = [
            zeros(shape, like) if v is None else v
            for v, shape in (
                (v_means2d, (count, 2)),
                (v_depths, (count,)),
                (v_conics, (count, 3)),
                (v_opacities, (count,)),
            )
        ]
        v_inputs = [zeros(t.shape, like) for t in inputs[:4]]  # means, quats, scales, opacities
        v_viewmats = zeros(inputs[4].shape, like) if ctx.needs_input_grad[4] else None
        native.project_backward(
            *(array(t) for t in inputs), *ctx.image_size, ctx.eps2d,
            *(array(t) for t in (*saved, *v_rows, *v_inputs, v_viewmats)), torch.get_num_threads(),
        )  # fmt: skip
        return *v_inputs, v_viewmats, None, None, None, None


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
        opacities: [N] in 0..1.
        viewmats: world to camera [C, 4, 4]. Ks: intrinsics in pixels [C, 3, 3].
        width, height: pixels. near_plane, far_plane: depths outside which Gaussians are left out.
        radius_clip: pixels; Gaussians whose both radii are at most this are left out.
        eps2d: blur added to the image covariance, pixels^2.
        antialiased: multiply opacities by the compensation of Mip-Splatting (Yu et al. 2024).
    """
    limits = (near_plane, far_plane, radius_clip, eps2d)
    row_offsets, camera_ids, gaussian_ids, radii, means2d, depths, conics, opacities = _Project.apply(
        means, quats, scales, opacities, viewmats, Ks, (width, height), limits, antialiased
    )
    return Projection(camera_ids, gaussian_ids, radii, means2d, depths, conics, opacities, row_offsets)
