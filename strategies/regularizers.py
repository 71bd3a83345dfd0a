"""The regularizers of opacities and scales, over the rows in view, alike in all trainers.

3DGS-MCMC (arXiv 2404.09591) and gsplat add the mean of all opacities and of all scales to the loss. Rows that no view
sees would have a gradient by that, and could not sleep. Here the sum goes over the rows that the cameras of a step draw
and is divided by the mean number of rows that steps draw:

    opacity_reg * sum_{drawn} o / D + scale_reg * sum_{drawn} (s_x + s_y + s_z) / (3 D)

A row that a share p of all steps draws has N p = D in the mean over rows, so that over many steps the gradients of the
average row add up to what the mean over all N rows gives it, while its gradients of the photos add up in those same p
steps: the balance of both, which decides what Adam does, is that of the mean over N. Rows that are seen more often are
held back as much more often. Where each step draws all rows both definitions are the same.

D is an exponential mean over the steps before, and not the number of the step at hand, which is not known before the
last tile of a view that is rendered in tiles. So the first step of a run has no regularizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distributed.mesh import Ranks
from strategies.ops import drawn_rows

MEMORY = 100  # steps that the mean number of drawn rows looks back


class Regularizers:
    """Add both regularizers to the loss of a step, and count the rows that steps draw."""

    def __init__(self, opacity_reg: float, scale_reg: float, ranks: Ranks | None = None) -> None:
        """
        Args:
            opacity_reg: Weight of the mean opacity.
            scale_reg: Weight of the mean standard deviation, in world units.
            ranks: That train together, each with its own rows: the sums go over all of them.
        """
        self._ranks = ranks
        self._opacity_reg = opacity_reg
        self._scale_reg = scale_reg
        self._num_steps = 0  # that were counted
        self._mean_drawn = 0.0  # D

    @property
    def is_on(self) -> bool:
        """Return whether there is anything to add."""
        return self._opacity_reg > 0 or self._scale_reg > 0

    def added_to(self, loss: Tensor, rows: Mapping[str, Tensor], info: Mapping[str, Any]) -> Tensor:
        """Return the loss of a step, or of a tile, with the regularizers of the rows that it has drawn.

        Args:
            loss: Scalar.
            rows: As for `of`.
            info: Of `rendering.rasterize`; of a tile, with the rows that no tile before has drawn.
        """
        if not self.is_on:
            return loss
        own = self.of(rows, drawn_rows(info))
        if self._ranks is not None:  # whose losses are averaged, while no other rank adds to these rows' gradients
            own = own + (self._ranks.size - 1) * own.detach()
        return loss + own

    def of(self, rows: Mapping[str, Tensor], drawn: Tensor) -> Tensor:
        """Return what rows add to the loss, a scalar.

        Args:
            rows: The parameters [V, ...], of which `scales` are logarithms and `opacities` logits.
            drawn: int64 [D] which of them are drawn, each once; of tiles, those that no tile before has drawn.
        """
        total = torch.zeros((), device=drawn.device)
        if self._mean_drawn == 0.0:
            return total
        # `index_select`, whose gradient is added; that of indexing sorts the rows first, since they might repeat.
        if self._opacity_reg > 0:
            opacities = torch.sigmoid(rows["opacities"].index_select(0, drawn))
            total = total + opacities.sum() * (self._opacity_reg / self._mean_drawn)
        if self._scale_reg > 0:
            scales = torch.exp(rows["scales"].index_select(0, drawn))
            total = total + scales.sum() * (self._scale_reg / (3 * self._mean_drawn))
        return total

    def count(self, num_drawn: int) -> None:
        """Take in how many rows a step has drawn, at each rank of its own; all of them call this at once."""
        if not self.is_on:
            return
        if self._ranks is not None:
            (num_drawn,) = self._ranks.sums([num_drawn])
        self._num_steps += 1
        self._mean_drawn += (num_drawn - self._mean_drawn) / min(self._num_steps, MEMORY)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has been counted, by name; nothing where no regularizer is on."""
        if not self.is_on:
            return {}
        counted = torch.tensor([self._num_steps, self._mean_drawn], dtype=torch.float64)
        return {"steps_and_mean_drawn": counted}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; one without counts begins anew."""
        if "steps_and_mean_drawn" in state:
            num_steps, self._mean_drawn = state["steps_and_mean_drawn"].tolist()
            self._num_steps = int(num_steps)
