"""Rasterization on CUDA, put together from gsplat's own kernels.

`gsplat.rasterization` gathers the harmonics of all visible Gaussians before it evaluates them and scatters their
gradients back, which makes those copies the largest tensors of a view; here they are read and their gradients written
where they lie. It also cannot render a part of a picture, and refuses backgrounds when packed.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rendering.projection import Colors, Projection
from rendering.spherical_harmonics_triton import Harmonics

TILE_SIZE = 16  # pixels


def project_pairs(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor | tuple[Tensor, Tensor] | Colors,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    sh_degree: int | None,
    render_mode: str,
    rasterize_mode: str,
) -> tuple[Projection, Tensor]:
    """Do what `rendering.rasterize.project_pairs` says, for CUDA tensors; float32, packed."""
    # Columns of wider rows are copied once, here, for projection and harmonics alike.
    means, quats, scales, opacities = (t.contiguous() for t in (means, quats, scales, opacities))
    depth_only = render_mode in ("D", "ED")
    harmonics: Colors | None = None
    if not isinstance(colors, Tensor | tuple):
        harmonics = colors
    elif not depth_only and sh_degree is not None:
        harmonics = Harmonics(sh_degree, colors)  # here, since its gradient is to come last
    viewmats, Ks, camera_positions = _on_device(viewmats, Ks, means.device)  # before the host waits for counts of pairs
    rows = (means, quats, scales, opacities)
    if not means.shape[0]:
        rows = _stand_in(*rows)
    sparse_gradients, antialiased = False, rasterize_mode == "antialiased"
    pairs = _projection().apply(
        rows[0], None, rows[1], rows[2], viewmats, Ks, width, height, eps2d, near_plane, far_plane, radius_clip,
        sparse_gradients, antialiased, "pinhole", rows[3],
    )  # fmt: skip
    if not means.shape[0]:
        pairs = tuple(None if values is None else values[:0] for values in pairs)
    camera_ids, gaussian_ids, radii, means2d, depths, conics, compensations, opacities = pairs
    if compensations is not None:
        opacities = opacities * compensations
    projection = Projection(camera_ids, gaussian_ids, radii, means2d, depths, conics, opacities)
    if depth_only:
        return projection, depths[:, None]
    if harmonics is None:
        if not isinstance(colors, Tensor):
            raise ValueError("colors are two tensors, but sh_degree is None")
        features = colors.index_select(0, gaussian_ids)
    else:
        features = harmonics.colors(means, camera_positions, camera_ids, gaussian_ids)
    if render_mode != "RGB":
        features = torch.cat([features, depths[:, None]], dim=-1)
    return projection, features


def _on_device(viewmats: Tensor, Ks: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return cameras [C, 4, 4] and [C, 3, 3] on the device, and their positions [C, 3].

    Numbers on the host travel at once, from pinned memory, for which nobody waits; but poses that want a gradient.
    """
    if viewmats.requires_grad or viewmats.device == device:
        viewmats, Ks = (t.to(device, non_blocking=True).contiguous() for t in (viewmats, Ks))
        return viewmats, Ks, _positions(viewmats)
    parts = (viewmats, _positions(viewmats), Ks.to(viewmats))  # Ks last, so that the others begin at 16 bytes
    sent = torch.cat([part.flatten() for part in parts]).pin_memory().to(device, non_blocking=True)
    viewmats, positions, Ks = (
        numbers.view(part.shape)
        for numbers, part in zip(sent.split([part.numel() for part in parts]), parts, strict=True)
    )
    return viewmats, Ks, positions


def _positions(viewmats: Tensor) -> Tensor:
    """Return where cameras [C, 4, 4] stand, [C, 3]: -R^T t, since a general inverse makes cuBLAS keep 32 MiB."""
    return -(viewmats[:, :3, :3] * viewmats[:, :3, 3:]).sum(dim=1)


@cache
def _projection() -> Any:
    """Return gsplat's packed projection, and the opacities [nnz] of what it finds, as a function of autograd.

    Unlike gsplat's own it is not given zeros for every result without a gradient: ids, radii and depths of pairs, 36
    bytes each, where memory is scarce. Nor has it ids of batches, 8 bytes, beside those of a single camera, which are
    zeros as well.
    """
    # Imported here only: the import compiles CUDA code where it finds nvcc, which no CPU run should wait for.
    from gsplat.cuda._wrapper import _FullyFusedProjectionPacked as Packed

    class Projecting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
            ctx.set_materialize_grads(False)
            (_, *pairs), opacities, viewmats = Packed.forward(ctx, *arguments), arguments[-1], arguments[4]
            if len(viewmats) == 1:
                _, camera_ids, *others = ctx.to_save
                ctx.save_for_backward(camera_ids, camera_ids, *others)
            ctx.num_rows = len(opacities)
            return *pairs, opacities.index_select(0, pairs[1])

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            *ids, radii, means2d, depths, conics, compensations, opacities = None, *gradients
            gaussian_ids, like = ctx.saved_tensors[2], ctx.saved_tensors[-2]  # [nnz], conics [nnz, 3]
            # What begins with zeros is cleared at once.
            zeros = like.new_zeros(ctx.num_rows + (len(like) if depths is None else 0))
            v_opacities = zeros[: ctx.num_rows]
            if opacities is not None:  # added, since other cameras may see the same row
                v_opacities.index_add_(0, gaussian_ids, opacities)
            if depths is None:
                depths = zeros[ctx.num_rows :]
            if means2d is None:
                means2d = torch.zeros_like(like[:, :2])
            if conics is None:
                conics = torch.zeros_like(like)
            *of_others, _ = Packed.backward(ctx, *ids, radii, means2d, depths, conics, compensations)
            return *of_others, v_opacities

    return Projecting


def _stand_in(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return one Gaussian where there is none: gsplat divides by their number, which ends the process."""
    return (
        torch.cat([means, means.new_zeros(1, 3)]),
        torch.cat([quats, quats.new_ones(1, 4)]),
        torch.cat([scales, scales.new_ones(1, 3)]),
        torch.cat([opacities, opacities.new_zeros(1)]),
    )


def blend_pairs(
    projection: Projection,
    features: Tensor,
    backgrounds: Tensor | None,
    num_cameras: int,
    width: int,
    height: int,
    absgrad: bool,
) -> tuple[Tensor, Tensor, int]:
    """Do what `rendering.rasterize.blend_pairs` says, but for expected depths."""
    from gsplat.cuda._wrapper import isect_offset_encode, isect_tiles, rasterize_to_pixels

    p = projection
    tiles = (math.ceil(width / TILE_SIZE), math.ceil(height / TILE_SIZE))
    _, isect_ids, flatten_ids = isect_tiles(
        p.means2d, p.radii, p.depths, TILE_SIZE, *tiles, packed=True, n_images=num_cameras, image_ids=p.camera_ids,
        gaussian_ids=p.gaussian_ids,
    )  # fmt: skip
    offsets = isect_offset_encode(isect_ids, num_cameras, *tiles).view(num_cameras, tiles[1], tiles[0])
    render_colors, render_alphas = rasterize_to_pixels(
        p.means2d, p.conics, features, p.opacities, width, height, TILE_SIZE, offsets, flatten_ids, packed=True,
        absgrad=absgrad,
    )  # fmt: skip
    if backgrounds is not None:
        # gsplat's own check refuses backgrounds when packed.
        render_colors = render_colors + (1.0 - render_alphas) * backgrounds[:, None, None, :]
    return render_colors, render_alphas, isect_ids.shape[0]
