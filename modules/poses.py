"""Corrections of the poses of training photos: how far each camera stands, and looks, from where it is said to.

A camera that turns where it stands, and one that is shifted, see almost the same change: photos tell well what both
come to, and badly which of them it was. Adam, which steps along each number by itself, gets nowhere with such a pair.
So a camera turns about what it looks at: a turn is then what is told badly, and a shift what is told well.

That all cameras look too high or too low together, photos tell worst of all, since the Gaussians bend to it, and they
tell it wrong: of opaque Gaussians on level ground seen from aslant the nearer cover edges of those behind, so that all
is drawn too high in the picture, by up to a pixel (`tests/test_modules.py`). To make up for it cameras that were given
rightly all turned upwards, by 0.17 degrees or half a pixel in 2,000 steps on photos of 160x120, and held-out photos,
which had no such turn, lost 3 dB. Errors of their own n cameras have 1 / sqrt(n) of it. So corrections have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modules.contract import TrainedModule, Training
from modules.held_out_poses import Foretelling
from modules.motions import corrections

TINY = 1e-12  # of squares of sines: cameras that all look straight down have no turn upwards


class Poses(TrainedModule):
    """Train for each photo a small turn and shift of its camera, in the directions of its axes; none at first.

    A row is as in `modules/motions.py`, about the place in front of the camera that it looks at. Rows are on the host,
    as the cameras are by which a view is culled before it is drawn.
    """

    by_row = (*TrainedModule.by_row, "distances")
    distances: Tensor  # [n, 1] float64, how far in front of each camera that place is
    common_gradient: Tensor  # of a turn upwards of all cameras, the mean over about the last epoch

    def __init__(
        self,
        names: Sequence[str],
        viewmats: Tensor,
        distances: Tensor,
        extent: float,
        learning_rate: float,
        penalty_weight: float,
        training: Training,
    ) -> None:
        """
        Args:
            names: Of n photos.
            viewmats: [n, 4, 4] float64, world to camera, as they are given.
            distances: [n] float64, how far in front of each camera is what it looks at, in world units.
            extent: Of the scene, in world units.
            learning_rate: Of the first step, in radians, and of shifts in units of the extent.
            penalty_weight: In the loss, of a correction's square in the same units.
            training: How a run trains its modules.
        """
        units = torch.tensor([1.0, 1, 1, extent, extent, extent])
        super().__init__(names, torch.zeros(6), learning_rate, replace(training, device=torch.device("cpu")), units)
        self.register_buffer("distances", distances[:, None].clone())
        self.register_buffer("common_gradient", torch.zeros(()))
        self._viewmats = viewmats
        self._upwards = turns_upwards(viewmats).float()  # [n, 3]
        self._mean_square = self._upwards.square().sum(dim=1).mean().clamp(min=TINY)
        self._extent = extent
        self._units = units
        self._penalty_weight = penalty_weight

    def load_state_dict(self, state: Mapping[str, Tensor], *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Go on from a state, as `TrainedModule` does; where it has no distances its cameras turn about themselves."""
        if state and "distances" not in state:
            state = {**state, "distances": torch.zeros(len(state["last_step"]), 1, dtype=torch.float64)}
        super().load_state_dict(state)
        if "common_gradient" in state:
            self.common_gradient.copy_(state["common_gradient"])

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return the corrected poses [C, 4, 4] float64, world to camera, differentiable by the rows.

        Camera to world is the given pose after the correction, as in gsplat's example trainer.

        Args:
            rows: [C, 6] of the photos, as `leaf` or `values` give them.
            ids: [C] int64, which photos these are.
        """
        return torch.linalg.inv(self.corrections(rows, ids)) @ self._viewmats[ids]

    def corrections(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return what leads from the axes of corrected cameras to those of the given ones, [C, 4, 4] float64.

        Args:
            rows: As `forward` takes them.
            ids: The same.
        """
        return corrections(rows, self.distances[ids, 0])

    def foretelling(self) -> Foretelling:
        """Return what tells where other photos stand, which go with those found so far."""
        rows = self.values(torch.arange(len(self.names)))
        ids = rows.any(dim=1).nonzero().flatten()  # read with other options, those never seen have a last step, too
        given = torch.linalg.inv(self._viewmats[ids])
        found = given @ self.corrections(rows[ids], ids)
        return Foretelling(given.numpy(), found.numpy(), self.distances[ids, 0].numpy(), self._extent or 1.0)

    def penalty(self, rows: Tensor) -> Tensor:
        """Return the weighted mean square of the step's rows [U, 6], in radians and units of the extent."""
        return self._penalty_weight * (rows / self._units).square().sum(dim=1).mean()

    def _step(self, ids: Tensor, gradient: Tensor, rate: list[float]) -> None:
        """Step as `TrainedModule` does, but for what all cameras look too high by, and would.

        That has to leave the gradient, or Adam, which divides each photo's by how large it is, would turn each by
        another part of it; and the rows, since what Adam makes of the others does not add up to nothing.
        """
        common = self._common_turn()
        upwards = self._upwards[ids]  # [U, 3]
        share = (gradient[:, :3] * upwards).sum(dim=1).mean() / self._mean_square
        self.common_gradient += (share - self.common_gradient) * (len(ids) / len(self.names))
        super()._step(ids, gradient - functional.pad(self.common_gradient * upwards, (0, 3)), rate)
        self.rows -= common

    def values_ahead(self, rows: Tensor) -> Tensor:
        """Do what `TrainedModule.values_ahead` says; what is taken back is known before the step."""
        before = self.rows.clone()
        self.rows -= self._common_turn()
        values = super().values_ahead(rows)
        self.rows.copy_(before)
        return values

    def _common_turn(self) -> Tensor:
        """Return [n, 6], of photos that were trained on the turn upwards that is nearest to theirs, and no shift."""
        upwards = self._upwards * (self.last_step > 0)[:, None]
        share = (self.rows[:, :3] * upwards).sum() / upwards.square().sum().clamp(min=TINY)
        return functional.pad(share * upwards, (0, 3))


def turns_upwards(viewmats: Tensor) -> Tensor:
    """Return axes [n, 3], in those of the cameras, of turns away from the ground, the longer the more aslant they look.

    The length is the sine of the angle between where a camera looks and the normalized world's third axis, along which
    its points spread least: of a capture of ground its normal, of a facade that of the wall.

    Args:
        viewmats: [n, 4, 4], world to camera.
    """
    right, down, _ = viewmats[:, :3, 2].unbind(dim=1)  # of the third axis, in those of the cameras
    return torch.stack([-down, right, torch.zeros_like(right)], dim=1)
