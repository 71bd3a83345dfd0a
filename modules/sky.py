"""A sky: colours that depend on the direction alone, behind all Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contract import TrainedModule, Training
from rendering.harmonics import real_harmonics

DEGREE = 3
LEARNING_RATE = 0.01


class Sky(TrainedModule):
    """Train the spherical harmonics of a sky, in 3DGS's order and signs: one row, [16, 3], of a grey sky at first."""

    def __init__(self, training: Training) -> None:
        """
        Args:
            training: How a run trains its modules.
        """
        super().__init__(["sky"], torch.zeros((DEGREE + 1) ** 2, 3), LEARNING_RATE, training)

    @property
    def row(self) -> Tensor:
        """Return the number [1] of the only row."""
        return torch.zeros(1, dtype=torch.int64)

    def forward(
        self, coefficients: Tensor, viewmats: Tensor, Ks: Tensor, x: int, y: int, width: int, height: int
    ) -> Tensor:
        """Return the sky's colours [C, height, width, 3] behind pixels, differentiable by coefficients and viewmats.

        Args:
            coefficients: [16, 3], as `leaf` or `values` give them.
            viewmats: [C, 4, 4] world to camera.
            Ks: [C, 3, 3] in pixels.
            x: Column of the first pixel in the whole picture.
            y: Its row.
            width: In pixels.
            height: In pixels.
        """
        return _Colors.apply(coefficients, directions(viewmats, Ks, x, y, width, height))


def directions(viewmats: Tensor, Ks: Tensor, x: int, y: int, width: int, height: int) -> Tensor:
    """Return the unit vectors [C, height, width, 3], in the world, from cameras through the centres of pixels.

    Args:
        viewmats: [C, 4, 4] world to camera.
        Ks: [C, 3, 3] in pixels.
        x: Column of the first pixel in the whole picture.
        y: Its row.
        width: In pixels.
        height: In pixels.
    """
    device = viewmats.device
    columns = torch.arange(x, x + width, device=device) + 0.5
    rows = (torch.arange(y, y + height, device=device) + 0.5)[:, None]
    K, rotations = Ks[:, None, None], viewmats[:, None, None, :3, :3]
    down = (rows - K[..., 1, 2]) / K[..., 1, 1]  # [C, height, 1]
    right = (columns - K[..., 0, 2] - K[..., 0, 1] * down) / K[..., 0, 0]  # [C, height, width]
    turned = rotations[..., 0, :] * right[..., None] + rotations[..., 1, :] * down[..., None] + rotations[..., 2, :]
    return torch.nn.functional.normalize(turned, dim=-1)


class _Colors(torch.autograd.Function):
    """Sum up the harmonics one by one: memory holds one of the 16 at a time, in the backward pass too."""

    @staticmethod
    def forward(ctx, coefficients: Tensor, towards: Tensor) -> Tensor:
        ctx.save_for_backward(towards, coefficients)
        colors = torch.full_like(towards, 0.5)
        for harmonic, coefficient in zip(real_harmonics(towards), coefficients, strict=True):
            colors += harmonic[..., None] * coefficient
        return colors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v_colors: Tensor):
        towards, coefficients = ctx.saved_tensors
        gradients = [(harmonic[..., None] * v_colors).sum(dim=(0, 1, 2)) for harmonic in real_harmonics(towards)]
        v_towards = None
        if ctx.needs_input_grad[1]:
            v_towards = torch.zeros_like(towards)
            with torch.enable_grad():
                towards = towards.requires_grad_()
                for harmonic, coefficient in zip(real_harmonics(towards), coefficients, strict=True):
                    if harmonic.requires_grad:  # all but the constant one
                        v_towards += torch.autograd.grad(harmonic, towards, (v_colors * coefficient).sum(dim=-1))[0]
        return torch.stack(gradients), v_towards
