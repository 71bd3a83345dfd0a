"""gsplat's packed rasterization on the CPU: projection, spherical harmonics, tile intersection and blending."""

from __future__ import annotations

import torch
from torch import Tensor

from native import rendering as native
from rendering.native import array, zeros
from rendering.projection import Colors, Projection, project
from rendering.spherical_harmonics import spherical_harmonics

TILE_SIZE: int = native.TILE_SIZE  # pixels


class _Blend(torch.autograd.Function):
    """Alpha blending of up to MAX_CHANNELS colour channels."""

    @staticmethod
    def forward(ctx, intersections, image_shape, absgrad, means2d, conics, colors, opacities, backgrounds):
        render_colors = means2d.new_empty(*image_shape, colors.shape[1])
        render_alphas = means2d.new_empty(*image_shape, 1)
        inputs = (means2d, conics, colors, opacities)
        native.blend(
            intersections,
            *(array(t) for t in (*inputs, backgrounds, render_colors, render_alphas)),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(*inputs, render_colors, render_alphas)
        ctx.intersections, ctx.absgrad = intersections, absgrad
        ctx.set_materialize_grads(False)
        return render_colors, render_alphas

    @staticmethod
    def backward(ctx, v_render_colors, v_render_alphas):
        means2d, conics, colors, opacities, render_colors, render_alphas = ctx.saved_tensors
        v_render_colors = zeros(render_colors.shape, means2d) if v_render_colors is None else v_render_colors
        v_render_alphas = zeros(render_alphas.shape, means2d) if v_render_alphas is None else v_render_alphas
        gradients = [
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (means2d, conics, colors, opacities)
        ]
        v_means2d_abs = torch.empty_like(gradients[0]) if ctx.absgrad else None
        native.blend_backward(
            ctx.intersections,
            *(array(t) for t in ctx.saved_tensors),
            *(array(t) for t in (v_render_colors, v_render_alphas, *gradients, v_means2d_abs)),
            torch.get_num_threads(),
        )
        if ctx.absgrad:
            means2d.absgrad = v_means2d_abs
        v_backgrounds = None
        if ctx.needs_input_grad[7]:
            v_backgrounds = (v_render_colors * (1 - render_alphas)).sum(dim=(1, 2))  # [C, D]
        return None, None, None, *gradients, v_backgrounds


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
    """Do what `rendering.rasterize.project_pairs` says, for CPU tensors, float32 or float64.

    Differentiable in means, quats, scales, opacities, colors and the cameras' poses, not in Ks. The result does not
    depend on the number of threads, bit for bit.
    """
    if isinstance(colors, tuple):
        colors = torch.cat(colors, dim=1)
    coefficients = colors if isinstance(colors, Tensor) else None
    _check(means, quats, scales, opacities, coefficients, viewmats, Ks, width, height, sh_degree)
    projection = project(
        means, quats, scales, opacities, viewmats, Ks, width, height, near_plane=near_plane, far_plane=far_plane,
        radius_clip=radius_clip, eps2d=eps2d, antialiased=rasterize_mode == "antialiased",
    )  # fmt: skip
    if render_mode in ("D", "ED"):
        return projection, projection.depths[:, None]
    if not isinstance(colors, Tensor):  # it has coefficients of its own
        ids = projection.camera_ids, projection.gaussian_ids
        features = colors.colors(means, torch.inverse(viewmats)[:, :3, 3], *ids)
    elif sh_degree is None:
        features = colors[projection.gaussian_ids]
    else:
        features = spherical_harmonics(sh_degree, means, viewmats, colors, projection)
    if render_mode != "RGB":
        features = torch.cat([features, projection.depths[:, None]], dim=-1)
    return projection, features


def blend_pairs(
    projection: Projection,
    features: Tensor,
    backgrounds: Tensor | None,
    num_cameras: int,
    width: int,
    height: int,
    absgrad: bool,
) -> tuple[Tensor, Tensor, int]:
    """Do what `rendering.rasterize.blend_pairs` says, but for expected depths; differentiable in backgrounds too."""
    p = projection
    if absgrad and features.shape[1] > native.MAX_CHANNELS:
        # Channels are blended in groups, and absolute values of the groups' gradients do not add up.
        raise ValueError(f"absgrad works for at most {native.MAX_CHANNELS} channels, there are {features.shape[1]}")
    if p.row_offsets is None:
        raise ValueError("the projection has no row_offsets")
    if backgrounds is not None:
        _check_like("backgrounds", backgrounds, (num_cameras, features.shape[1]), features)
    intersections = native.intersect_tiles(
        *(array(t) for t in (p.row_offsets, p.means2d, p.radii, p.depths, p.conics, p.opacities)),
        width, height, torch.get_num_threads(),
    )  # fmt: skip
    image_shape = (num_cameras, height, width)
    blended, alphas = [], []
    for first in range(0, features.shape[1], native.MAX_CHANNELS):
        channels = slice(first, first + native.MAX_CHANNELS)
        part, part_alphas = _Blend.apply(
            intersections, image_shape, absgrad, p.means2d, p.conics, features[:, channels], p.opacities,
            None if backgrounds is None else backgrounds[:, channels],
        )  # fmt: skip
        blended.append(part)
        alphas.append(part_alphas)  # the same of every group
    render_colors = blended[0] if len(blended) == 1 else torch.cat(blended, dim=-1)
    return render_colors, alphas[0], intersections.count


def _check(means, quats, scales, opacities, colors, viewmats, Ks, width, height, sh_degree):
    N, C = len(means), len(viewmats)
    shapes = {
        "means": (means, (N, 3)),
        "quats": (quats, (N, 4)),
        "scales": (scales, (N, 3)),
        "opacities": (opacities, (N,)),
        "viewmats": (viewmats, (C, 4, 4)),
        "Ks": (Ks, (C, 3, 3)),
    }
    if colors is not None:
        shapes["colors"] = (colors, (N, colors.shape[1]) if sh_degree is None else (N, colors.shape[1], 3))
    for name, (t, shape) in shapes.items():
        _check_like(name, t, shape, means)
    if sh_degree is not None and not 0 <= sh_degree <= native.MAX_SH_DEGREE:
        raise ValueError(f"sh_degree is {sh_degree}, expected 0 to {native.MAX_SH_DEGREE}")
    if sh_degree is not None and colors is not None and colors.shape[1] < (sh_degree + 1) ** 2:
        raise ValueError(
            f"sh_degree {sh_degree} needs {(sh_degree + 1) ** 2} coefficients, colors has {colors.shape[1]}"
        )
    if width <= 0 or height <= 0:
        raise ValueError(f"image size must be positive, it is {width} x {height}")
    if Ks.requires_grad:
        raise ValueError("rasterizers have no gradient for Ks")


def _check_like(name, t, shape, means):
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {shape}")
    if t.dtype != means.dtype or t.dtype not in (torch.float32, torch.float64) or t.is_cuda:
        raise TypeError(f"{name} must be float32 or float64 on the CPU, like means; it is {t.dtype} on {t.device}")
