"""rasterize(): gsplat's kernels where tensors are on a CUDA GPU, the native CPU rasterizer elsewhere."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from errors import InputError
from rendering.backends import kernels_for
from rendering.projection import Colors, Exchange, Projection
from rendering.region import Region

_RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
_RASTERIZE_MODES = ("classic", "antialiased")


def rasterize(
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
    region: Region | None = None,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    absgrad: bool = False,
    rasterize_mode: str = "classic",
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, dict]:
    """Render Gaussians into C images, with the meaning of `gsplat.rasterization` (1.5.3).

    Args:
        means: centres [N, 3]. quats: rotations w x y z, of any length [N, 4].
        scales: standard deviations [N, 3], after exp. opacities: [N], after sigmoid.
        colors: [N, D]; or spherical harmonics when sh_degree is given: [N, K, 3], or sh0 [N, 1, 3] and
            shN [N, K - 1, 3] where they are two tensors, or what makes colours of them itself.
        viewmats: world to camera [C, 4, 4], rigid. Ks: intrinsics in pixels [C, 3, 3]. Both where the Gaussians are, or
            on the host, from where they travel at once. width, height: pixels.
        region: render these pixels of the picture only, as they are in the whole picture; None: all.
        near_plane, far_plane: Gaussians with a depth outside are left out.
        radius_clip: pixels; Gaussians whose radii are at most this are left out.
        eps2d: blur added to the image covariance, pixels^2.
        sh_degree: bands in use, at most 3 on the CPU. backgrounds: [C, D].
        render_mode: RGB, D (accumulated depth), ED (expected depth), RGB+D or RGB+ED (depth as last channel).
        absgrad: the backward pass sets `info["means2d"].absgrad`.
        rasterize_mode: classic or antialiased.
        exchange: between projection and blending takes the pairs of all C cameras to whoever draws them. Pictures and
            backgrounds then are those of the cameras drawn here; the info is that of the Gaussians given, in all C
            cameras, but for n_intersections.

    Returns:
        render_colors [C, H, W, D], render_alphas [C, H, W, 1], of the region's size, and info, which holds for the nnz
        pairs of camera and visible Gaussian: `camera_ids`, `gaussian_ids` [nnz] int64; `radii` [nnz, 2] int32 pixels;
        `means2d` [nnz, 2] pixels from the region's corner (call `retain_grad()` on it to get its gradient); `depths`,
        `opacities` [nnz]; `conics` [nnz, 3]; and `width`, `height` of the picture, `n_cameras`, `n_intersections` of
        Gaussians and 16x16 tiles of pixels.

    Raises:
        ValueError, TypeError: tensors that do not fit each other.
    """
    projection, features = project_pairs(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=near_plane,
        far_plane=far_plane, radius_clip=radius_clip, eps2d=eps2d, sh_degree=sh_degree, render_mode=render_mode,
        rasterize_mode=rasterize_mode,
    )  # fmt: skip
    region = region or Region(0, 0, width, height)
    drawn = projection = replace(projection, means2d=region.relative(projection.means2d))
    if exchange is not None:
        drawn, features = exchange(projection, features)
    num_drawn = viewmats.shape[0] if exchange is None else exchange.num_cameras
    render_colors, render_alphas, num_intersections = blend_pairs(
        drawn, features, num_drawn, region.width, region.height, backgrounds=backgrounds, render_mode=render_mode,
        absgrad=absgrad,
    )  # fmt: skip
    info = pair_info(projection, width, height, viewmats.shape[0])
    info["n_intersections"] = num_intersections
    return render_colors, render_alphas, info


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
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    render_mode: str = "RGB",
    rasterize_mode: str = "classic",
) -> tuple[Projection, Tensor]:
    """Project Gaussians into C cameras: the first half of `rasterize`, which says what the arguments are.

    Returns:
        The nnz pairs of a camera and a Gaussian that it sees, and their features [nnz, D], which are blended.

    Raises:
        ValueError, TypeError: tensors that do not fit each other.
    """
    if render_mode not in _RENDER_MODES:
        raise ValueError(f"render_mode is {render_mode!r}, expected one of {', '.join(_RENDER_MODES)}")
    if rasterize_mode not in _RASTERIZE_MODES:
        raise ValueError(f"rasterize_mode is {rasterize_mode!r}, expected one of {', '.join(_RASTERIZE_MODES)}")
    return _kernels(means).project_pairs(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=near_plane,
        far_plane=far_plane, radius_clip=radius_clip, eps2d=eps2d, sh_degree=sh_degree, render_mode=render_mode,
        rasterize_mode=rasterize_mode,
    )  # fmt: skip


def blend_pairs(
    projection: Projection,
    features: Tensor,
    num_cameras: int,
    width: int,
    height: int,
    *,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    absgrad: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """Blend pairs into pictures: the second half of `rasterize`.

    Args:
        projection: pairs of C cameras, whose means2d count from the corner of what is drawn.
        features: [nnz, D] of these.
        num_cameras: C.
        width, height: of what is drawn, pixels.
        backgrounds: [C, 3]. render_mode, absgrad: as `rasterize` has them.

    Returns:
        render_colors [C, H, W, D], render_alphas [C, H, W, 1], and how often Gaussians meet 16x16 tiles of pixels.

    Raises:
        ValueError, TypeError: tensors that do not fit each other.
    """
    if backgrounds is not None and render_mode != "RGB":
        # Depth has background 0.
        rgb = backgrounds[:, : features.shape[1] - 1]
        backgrounds = torch.cat([rgb, rgb.new_zeros(len(rgb), 1)], dim=-1)
    colors, alphas, num_intersections = _kernels(features).blend_pairs(
        projection, features, backgrounds, num_cameras, width, height, absgrad
    )
    if render_mode in ("ED", "RGB+ED"):
        depth = colors[..., -1:] / alphas.clamp(min=1e-10)
        colors = torch.cat([colors[..., :-1], depth], dim=-1)
    return colors, alphas, num_intersections


def pair_info(projection: Projection, width: int, height: int, num_cameras: int) -> dict[str, Any]:
    """Return what `rasterize` says in its info of the pairs of C cameras, whose pictures have this size in pixels."""
    return {
        "camera_ids": projection.camera_ids,
        "gaussian_ids": projection.gaussian_ids,
        "radii": projection.radii,
        "means2d": projection.means2d,
        "depths": projection.depths,
        "conics": projection.conics,
        "opacities": projection.opacities,
        "width": width,
        "height": height,
        "n_cameras": num_cameras,
        "tile_size": _kernels(projection.means2d).TILE_SIZE,
    }


def _kernels(tensor: Tensor) -> ModuleType:
    return kernels_for(tensor.device, "rendering.cpu_rasterizer")


def check_gsplat() -> None:
    """Raise InputError where gsplat cannot render on this machine's GPU; call it before training on CUDA."""
    if importlib.util.find_spec("gsplat") is None:
        raise InputError("gsplat is not installed, which a run on CUDA needs; run 'source install.sh' on this machine.")
    try:
        from gsplat.cuda._backend import _C
    except Exception as error:  # a compiler, linker or loader can fail in many ways
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"gsplat's CUDA code cannot be loaded ({first_line}); run 'source install.sh' on this machine."
        ) from error
    if _C is None:
        raise InputError(
            "gsplat's CUDA code is not compiled and there is no nvcc to compile it; install the CUDA toolkit and run "
            "'source install.sh' on this machine."
        )
