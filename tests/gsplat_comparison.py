"""Compares the CPU rasterizer with gsplat: live on a machine with a CUDA GPU, or with what gsplat wrote there once.

report = compare_renders(run(scene, "cpu", **options), run(scene, "cuda", **options))
report.check()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.adam.finite import gradient_of
from rendering.rasterize import rasterize
from tests.gaussian_scenes import PARAMETERS, GaussianScene, relative_error, render, weights_like

PIXEL_TOLERANCE = 1e-3
MAX_OUTLIER_PIXELS = 1e-3  # fraction: where rounding decides whether a faint Gaussian is drawn
GRADIENT_TOLERANCE = 1e-3  # relative norm
MAX_ROUNDING_CASES = 1e-3  # fraction of visible Gaussians seen by one only, or with radii that differ


@dataclass
class Run:
    """One rendering and its gradients, on the CPU."""

    colors: Tensor  # [C, H, W, D]
    alphas: Tensor  # [C, H, W, 1]
    pair_ids: Tensor  # [nnz] camera * N + Gaussian, ascending
    radii: Tensor  # [nnz, 2]
    means2d_grad: Tensor  # [nnz, 2]
    means2d_absgrad: Tensor | None  # [nnz, 2]
    gradients: dict[str, Tensor]  # of the six parameters


def random_loss(colors: Tensor, alphas: Tensor) -> Tensor:
    """Randomly weighted sum of pixels and alphas, the same on every device."""
    return (colors * weights_like(colors)).sum() + (alphas * weights_like(alphas, 6)).sum()


def run(
    scene: GaussianScene,
    device: str,
    dtype: torch.dtype = torch.float32,
    loss: Callable[[Tensor, Tensor], Tensor] = random_loss,
    **options,
) -> Run:
    """Render a scene with `rasterize` on a device, and differentiate a loss.

    Args:
        scene: Gaussians after activation; a trained model will do.
        device: "cuda" is gsplat, "cpu" ours.
        dtype: float64 on the CPU is the measure of both.
        loss: Of colors [C, H, W, D] and alphas [C, H, W, 1].
        options: of `rasterize`; `backgrounds=True` stands for a colour per camera.
    """
    scene = scene.to(device, dtype)
    colors, alphas, info = render(rasterize, scene, **options)
    info["means2d"].retain_grad()
    loss(colors, alphas).backward()

    def cpu(value: Tensor) -> Tensor:
        return value.detach().cpu()

    gradients = {name: cpu(gradient_of(getattr(scene, name))) for name in PARAMETERS}
    return Run(
        colors=cpu(colors),
        alphas=cpu(alphas),
        pair_ids=cpu(info["camera_ids"].long() * len(scene.means) + info["gaussian_ids"].long()),
        radii=cpu(info["radii"]),
        means2d_grad=cpu(info["means2d"].grad),
        means2d_absgrad=cpu(info["means2d"].absgrad) if options.get("absgrad") else None,
        gradients=gradients,
    )


@dataclass
class Comparison:
    outlier_pixels: float  # fraction of pixels off by more than PIXEL_TOLERANCE (relative above 1) in any channel
    largest_difference: float
    gradient_errors: dict[str, float]  # relative norms; also means2d and, if asked for, absgrad
    visible: int
    seen_by_one_only: int
    differing_radii: int

    def check(self) -> None:
        """Fail where the two renderings differ by more than rounding explains."""
        assert self.visible > 0, self
        assert self.outlier_pixels <= MAX_OUTLIER_PIXELS, self
        assert max(self.gradient_errors.values()) <= GRADIENT_TOLERANCE, self
        # At least one, so that a small scene may have a rounding case too.
        allowed = max(1, int(MAX_ROUNDING_CASES * self.visible))
        assert self.seen_by_one_only <= allowed, self
        assert self.differing_radii <= allowed, self


def compare_renders(ours: Run, theirs: Run) -> Comparison:
    """How far our rendering of a scene is from gsplat's."""
    difference = torch.cat(
        [(ours.colors - theirs.colors).abs() / theirs.colors.abs().clamp(min=1), (ours.alphas - theirs.alphas).abs()],
        dim=-1,
    ).amax(-1)  # [C, H, W]
    in_ours, in_theirs = torch.isin(ours.pair_ids, theirs.pair_ids), torch.isin(theirs.pair_ids, ours.pair_ids)
    errors = {name: relative_error(ours.gradients[name], theirs.gradients[name]) for name in PARAMETERS}
    errors["means2d"] = relative_error(ours.means2d_grad[in_ours], theirs.means2d_grad[in_theirs])
    if ours.means2d_absgrad is not None and theirs.means2d_absgrad is not None:
        errors["absgrad"] = relative_error(ours.means2d_absgrad[in_ours], theirs.means2d_absgrad[in_theirs])
    return Comparison(
        outlier_pixels=(difference > PIXEL_TOLERANCE).double().mean().item(),
        largest_difference=difference.max().item(),
        gradient_errors=errors,
        visible=len(theirs.pair_ids),
        seen_by_one_only=int((~in_ours).sum() + (~in_theirs).sum()),
        differing_radii=int((ours.radii[in_ours] != theirs.radii[in_theirs]).any(-1).sum()),
    )
