"""An exposure for each training photo: how its light and its camera changed the colours of the scene."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from modules.contract import TrainedModule, Training

AFFINE_LEARNING_RATE = 0.01
GRID_LEARNING_RATE = 2e-3
GRID = (8, 16, 16)  # cells by brightness, y and x
TOTAL_VARIATION_WEIGHT = 10.0
BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


class Place(NamedTuple):
    """Say which pixels of a photo were drawn."""

    x: int  # column of the first one
    y: int  # its row
    width: int  # of the whole photo
    height: int


class Exposure(TrainedModule):
    """Train a transform of colours for each photo, which says how it differs from the other photos.

    What all have in common no photo tells from the scene: it is left to the model, which else may become as dark or
    bright as it likes. So the mean of the trained photos' matrices is the identity after each step.
    """

    levels = 1  # of brightness, each with matrices of its own

    @abstractmethod
    def forward(self, colors: Tensor, rows: Tensor, place: Place) -> Tensor:
        """Return the colours [C, h, w, 3] of rendered pixels as the photos show them; each pixel by itself.

        Args:
            colors: [C, h, w, 3].
            rows: [C, ...] of the photos, as `leaf` gives them.
            place: Where the pixels lie.
        """

    def update(self) -> None:
        """Do as `TrainedModule.update`, and take from all trained photos what their matrices have in common."""
        super().update()
        rows, trained = self.rows, self.last_step > 0  # the others are the identity
        means = rows.mean(dim=0).view(12, self.levels, -1)  # [12, levels, cells]
        off = means.mean(dim=2, keepdim=True) - torch.eye(3, 4).to(rows).view(12, 1, 1)
        common = off.expand_as(means).reshape(1, -1) * (len(rows) / trained.sum().clamp(min=1))
        rows.addcmul_(trained[:, None].to(rows), common, value=-1)  # in place


class AffineExposure(Exposure):
    """Train a 3x4 matrix for each photo, of colours and 1; the identity at first (as in Hierarchical 3DGS)."""

    def __init__(self, names: Sequence[str], training: Training) -> None:
        """
        Args:
            names: Of the photos.
            training: How a run trains its modules.
        """
        super().__init__(names, torch.eye(3, 4), AFFINE_LEARNING_RATE, training)

    def forward(self, colors: Tensor, rows: Tensor, place: Place) -> Tensor:
        """Do what `Exposure.forward` says, with rows [C, 3, 4]."""
        return transformed(colors, rows[:, None, None])


class BilateralGrid(Exposure):
    """Train a grid of 3x4 matrices for each photo, by place in it and brightness (arXiv 2406.00448)."""

    levels = GRID[0]

    def __init__(self, names: Sequence[str], training: Training) -> None:
        """
        Args:
            names: Of the photos.
            training: How a run trains its modules.
        """
        identity = torch.eye(3, 4).reshape(12, 1, 1, 1).repeat(1, *GRID)  # [12, 8, 16, 16]
        super().__init__(names, identity, GRID_LEARNING_RATE, training)

    def forward(self, colors: Tensor, rows: Tensor, place: Place) -> Tensor:
        """Do what `Exposure.forward` says, with rows [C, 12, 8, 16, 16]."""
        num_cameras, height, width, _ = colors.shape
        across = (torch.arange(place.x, place.x + width, device=colors.device) + 0.5) / place.width
        down = (torch.arange(place.y, place.y + height, device=colors.device) + 0.5) / place.height
        brightness = sum(weight * colors[..., channel] for channel, weight in enumerate(BRIGHTNESS))  # [C, h, w]
        at = torch.stack([*torch.broadcast_tensors(across, down[:, None], brightness)], dim=-1)  # [C, h, w, 3] in 0..1
        matrices = functional.grid_sample(
            rows, (2 * at - 1)[:, None], mode="bilinear", padding_mode="border", align_corners=True
        )  # [C, 12, 1, h, w]
        matrices = matrices[:, :, 0].permute(0, 2, 3, 1).reshape(num_cameras, height, width, 3, 4)
        return transformed(colors, matrices)

    def penalty(self, rows: Tensor) -> Tensor:
        """Return the total variation loss of the step's grids [U, 12, 8, 16, 16]."""
        differences = (rows.diff(dim=axis).square().mean() for axis in (2, 3, 4))
        return TOTAL_VARIATION_WEIGHT * sum(differences, start=rows.new_zeros(()))


def transformed(colors: Tensor, matrices: Tensor) -> Tensor:
    """Return colours [C, h, w, 3] times matrices [C, h or 1, w or 1, 3, 4] of colour and 1."""
    # Not a matrix product, for which cuBLAS would take 32 MB of a GPU and keep them.
    result = matrices[..., 3]
    for channel in range(3):
        result = result + colors[..., channel : channel + 1] * matrices[..., channel]
    return result
