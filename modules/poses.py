"""Corrections of the poses of training photos: how far each camera stands, and looks, from where it is said to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modules.contract import TrainedModule, Training


class Poses(TrainedModule):
    """Train for each photo a small turn and shift of its camera, about and along the camera's own axes; none at first.

    A row is the turn's axis times its angle, in radians where that is small (`rotations`), and the shift in world
    units. Rows are on the host, as the cameras are by which a view is culled before it is drawn.
    """

    def __init__(
        self,
        names: Sequence[str],
        viewmats: Tensor,
        extent: float,
        learning_rate: float,
        penalty_weight: float,
        training: Training,
    ) -> None:
        """
        Args:
            names: Of n photos.
            viewmats: [n, 4, 4] float64, world to camera, as they are given.
            extent: Of the scene, in world units.
            learning_rate: Of the first step, in radians, and of shifts in units of the extent.
            penalty_weight: In the loss, of a correction's square in the same units.
            training: How a run trains its modules.
        """
        units = torch.tensor([1.0, 1, 1, extent, extent, extent])
        super().__init__(names, torch.zeros(6), learning_rate, replace(training, device=torch.device("cpu")), units)
        self._viewmats = viewmats
        self._units = units
        self._penalty_weight = penalty_weight

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return the corrected poses [C, 4, 4] float64, world to camera, differentiable by the rows.

        Camera to world is the given pose after the correction, as in gsplat's example trainer.

        Args:
            rows: [C, 6] of the photos, as `leaf` or `values` give them.
            ids: [C] int64, which photos these are.
        """
        return torch.linalg.inv(corrections(rows)) @ self._viewmats[ids]

    def penalty(self, rows: Tensor) -> Tensor:
        """Return the weighted mean square of the step's rows [U, 6], in radians and units of the extent."""
        return self._penalty_weight * (rows / self._units).square().sum(dim=1).mean()


def corrections(rows: Tensor) -> Tensor:
    """Return what leads from the axes of corrected cameras to those of the given ones, [C, 4, 4] float64.

    Args:
        rows: [C, 6] of `Poses`.
    """
    turns, shifts = rotations(rows[:, :3].double()), rows[:, 3:, None].double()
    last = turns.new_tensor([0.0, 0, 0, 1]).expand(len(rows), 1, 4)
    return torch.cat([torch.cat([turns, shifts], dim=2), last], dim=1)


def rotations(vectors: Tensor) -> Tensor:
    """Return the rotations [C, 3, 3] of the quaternions w = 1 and x y z = vectors / 2, of vectors [C, 3].

    They turn about the vectors, by their length in radians but for its cube / 12. Differentiable at zero, too.
    """
    x, y, z = (vectors / 2).unbind(dim=1)
    one = torch.ones_like(x)
    rows = [
        [one + x * x - y * y - z * z, 2 * (x * y - z), 2 * (x * z + y)],
        [2 * (x * y + z), one - x * x + y * y - z * z, 2 * (y * z - x)],
        [2 * (x * z - y), 2 * (y * z + x), one - x * x - y * y + z * z],
    ]
    norm2 = one + x * x + y * y + z * z
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1) / norm2[:, None, None]
