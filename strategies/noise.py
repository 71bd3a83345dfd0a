"""The noise on means of 3DGS-MCMC, owed to rows that sleep and drawn at once when a view next shows them.

Dense training adds to each mean at each step i (arXiv 2404.09591, equation 8, as gsplat has it)

    n_i = lr_i * noise_lr * g(o) * S z_i,   g(o) = sigmoid(-100 (o - 0.005)),   z_i ~ N(0, 1)^3

with S the covariance, o the opacity and lr_i the learning rate of means. While a view shows a row no more, its S and o
are at rest but for the steps that momentum still takes, so the noises of the steps s ... t that it has slept through
and of the step t that shows it again add up to one normal draw:

    sum_i n_i = noise_lr * sqrt(sum_{i=s..t} lr_i^2) * g(o) * S z

The sum of squares comes from one table, so a row needs one number, the first step whose noise it is owed, and the work
of a step is O(V).

What is not the same as noise at every step:

- S and o are those of the step that shows the row again, before its update. After the last step with a gradient,
  momentum moves a log scale by at most r f lr_scales and a logit by at most r f lr_opacities, with r the bound of m /
  sqrt(v) (7.3, `largest_step`) and f = q / (1 - q), q = b1 / sqrt(b2) (9.1), at the usual betas: by 0.33 and 3.3, if
  gradients of one sign had just begun; by 0.05 and 0.45 where they have lasted, as then r = 1. S goes as the square of
  scales, and g changes by at most exp(100 |do|), with do = o times the change of the logit. So the standard deviation
  of what was slept through is off by 10 % and, at o = 0.005, where noise is largest, by 25 % where gradients have
  lasted; it is exact where a row was at rest.
- A row is found by where it was last seen, not by where noise would have carried it meanwhile.
- Rows of the view after the present one are found before the noise of the present step, with a margin of 1 % of the
  scene scale for it (`AdamOptions.displacement`). A row that noise carries farther, into that view, may be drawn from
  the view after it on: such rows are large and nearly transparent, and by them alone trainers may differ.

Whoever reads all means (saving, evaluation, export, a refinement) reads them without what is owed. It does not matter:
the noise has no mean, it is owed to rows that are nearly transparent, and decisions about rows look at opacities
alone. What is copied is paid what it is owed first (`strategies.mcmc`).

Random numbers are a hash of seed, step and row, so that all trainers draw the same, and a resumed run too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from offload.adam.bfloat16 import random_bits
from strategies.ops import rotation_matrices, word_at

STEEPNESS, HALF_OPACITY = 100.0, 0.005  # of g, which is 1/2 at this opacity


class Noise:
    """Keep which noise each row is owed, and draw it."""

    def __init__(self, rates: np.ndarray, seed: int) -> None:
        """
        Args:
            rates: [steps] float64, lr_i * noise_lr of each step.
            seed: Of the random numbers.
        """
        self._variances = torch.from_numpy(np.concatenate([[0.0], np.cumsum(rates**2)]))  # [steps + 1] of steps before
        self._seed = seed
        self._owed_from: Tensor | None = None  # [N] int32 where geometry is, the first step whose noise a row is owed

    def owed_from(self, step: int, num_gaussians: int, device: torch.device) -> Tensor:
        """Return the first step whose noise each row is owed, int32 [N] where geometry is; written by `draw`.

        A run that begins, or goes on without a state, owes from `step` on.
        """
        if self._owed_from is None:
            self._owed_from = torch.full((num_gaussians,), step, dtype=torch.int32)
        self._owed_from = self._owed_from.to(device)
        return self._owed_from

    def draw(self, step: int, ids: Tensor, owed_from: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Draw all that rows are owed up to a step, this one included, and note that it is paid.

        Args:
            step: Number of the step, from 0.
            ids: int64 [M] where geometry is, the rows, each once.
            owed_from: As `owed_from` gives it.
            rows: Their `scales` [M, 3] (log), `quats` [M, 4] and `opacities` [M] (logits), on any device.

        Returns:
            float32 [M, 3], to be added to the means, where the rows are. Rows that are not finite get nothing.
        """
        device = rows["scales"].device
        self._variances = self._variances.to(ids.device)  # once: a copy at each step would wait for the device
        variances = self._variances[step + 1] - self._variances[owed_from[ids].long()]  # [M]
        owed_from[ids] = step + 1
        sizes = variances.sqrt().float().to(device)
        sizes = sizes * torch.sigmoid(-STEEPNESS * (torch.sigmoid(rows["opacities"]) - HALF_OPACITY))
        turns = rotation_matrices(rows["quats"])  # [M, 3, 3]
        normal = normal_numbers(ids.to(device), word_at([self._seed], step))
        local = torch.einsum("nji,nj->ni", turns, normal) * (2 * rows["scales"]).exp()  # along the axes
        offsets = torch.einsum("nij,nj->ni", turns, local) * sizes[:, None]
        return torch.where(offsets.isfinite(), offsets, 0.0)

    def forget(self, step: int, ids: Tensor) -> None:
        """Owe rows [M] that were overwritten the noise from the step after this on."""
        if self._owed_from is not None:
            self._owed_from[ids] = step + 1

    def append(self, step: int, num_new: int) -> None:
        """Owe rows that were appended the noise from the step after this on."""
        if self._owed_from is not None:
            self._owed_from = torch.cat([self._owed_from, self._owed_from.new_full((num_new,), step + 1)])

    def keep(self, ids: Tensor) -> None:
        """Follow rows [M] that were kept, in this order."""
        if self._owed_from is not None:
            self._owed_from = self._owed_from[ids.to(self._owed_from.device)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is owed, by name; not copied."""
        return {} if self._owed_from is None else {"owed_from": self._owed_from}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; one that is empty owes nothing."""
        self._owed_from = state["owed_from"].clone() if "owed_from" in state else None


def normal_numbers(ids: Tensor, word: int) -> Tensor:
    """Draw three normal numbers for each row, float32 [M, 3] (Box and Muller).

    Args:
        ids: int64 [M] the rows.
        word: 32 random bits of the step.
    """
    uniform = (random_bits(ids, 4, word).float() + 0.5) * 2.0**-32  # [M, 4] in (0, 1]
    radius = (-2 * uniform[:, :2].log()).clamp_(min=0).sqrt()
    angle = 2 * math.pi * uniform[:, 2:]
    return torch.cat([radius * angle.cos(), radius[:, :1] * angle[:, :1].sin()], dim=1)
