"""Random Gaussians and cameras for tests of the rasterizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PARAMETERS = ("means", "quats", "scales", "opacities", "sh0", "shN")


@dataclass
class GaussianScene:
    """Gaussians after activation, and cameras that look at them along +z."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    scales: Tensor  # [N, 3]
    opacities: Tensor  # [N]
    sh0: Tensor  # [N, 1, 3]
    shN: Tensor  # [N, 15, 3]
    viewmats: Tensor  # [C, 4, 4]
    Ks: Tensor  # [C, 3, 3]
    width: int
    height: int

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> GaussianScene:
        """A copy whose six parameters are leaves that require gradients."""
        moved = {
            name: value.detach().clone().to(device, dtype) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        for name in PARAMETERS:
            moved[name].requires_grad_()
        return GaussianScene(**moved)


def random_scene(
    n: int, seed: int, *, n_cameras: int = 1, width: int = 70, height: int = 52, median_scale: float = 0.05
) -> GaussianScene:
    """N Gaussians in a box 2 to 6 in front of the cameras, which reaches beyond every image border and behind them.

    Opacities reach from below 1/255 to 1; scales spread over a factor of 30; quaternions are not normalized.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    means = torch.cat(
        [uniform(n, 1, low=-3, high=3), uniform(n, 1, low=-2.5, high=2.5), uniform(n, 1, low=-0.5, high=6)], dim=1
    )
    viewmats = torch.eye(4).repeat(n_cameras, 1, 1)
    for camera in range(n_cameras):
        angle = torch.tensor(0.15 * camera + 0.05)
        viewmats[camera, 0, 0] = viewmats[camera, 2, 2] = angle.cos()
        viewmats[camera, 0, 2], viewmats[camera, 2, 0] = angle.sin(), -angle.sin()
        viewmats[camera, :3, 3] = torch.tensor([0.1 * camera, -0.05, 0.2])
    focal = 0.9 * width
    K = torch.tensor([[focal, 0, 0.52 * width], [0, 1.05 * focal, 0.47 * height], [0, 0, 1]])
    return GaussianScene(
        means=means,
        quats=normal(n, 4) * uniform(n, 1, low=0.3, high=2),
        scales=median_scale * torch.exp(0.6 * normal(n, 3)),
        opacities=uniform(n, low=0, high=1),
        sh0=normal(n, 1, 3),
        shN=0.3 * normal(n, 15, 3),
        viewmats=viewmats,
        Ks=K.repeat(n_cameras, 1, 1),
        width=width,
        height=height,
    )


def render(function: Callable, scene: GaussianScene, **options) -> tuple:
    """What `function` (a rasterizer) returns for a scene. `backgrounds=True` stands for a colour per camera."""
    if options.get("backgrounds"):
        cameras = len(scene.viewmats)
        options["backgrounds"] = torch.linspace(0.2, 0.9, 3 * cameras).reshape(cameras, 3).to(scene.means)
    colors = torch.cat([scene.sh0, scene.shN], 1)
    return function(
        scene.means, scene.quats, scene.scales, scene.opacities, colors, scene.viewmats, scene.Ks, scene.width,
        scene.height, **options,
    )  # fmt: skip


def weights_like(image: Tensor, seed: int = 5) -> Tensor:
    """Fixed random weights that make a scalar loss of an image."""
    return torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).to(image)


def gradients(
    scene: GaussianScene, colors: Tensor, alphas: Tensor, names: tuple[str, ...] = PARAMETERS
) -> dict[str, Tensor]:
    """Gradients of the six parameters, or what is named, from a randomly weighted sum of all pixels and alphas."""
    loss = (colors * weights_like(colors)).sum() + (alphas * weights_like(alphas, 6)).sum()
    found = torch.autograd.grad(loss, [getattr(scene, name) for name in names], allow_unused=True)
    return {
        name: torch.zeros_like(getattr(scene, name)) if g is None else g for name, g in zip(names, found, strict=True)
    }


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()
