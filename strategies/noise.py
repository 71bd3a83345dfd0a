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

All else is exact, and trainers draw the same rows. Those of the view after the present one are found before the noise
of the present step, with a margin for it (`AdamOptions.displacement`, 1 % of the scene scale). A row that noise would
carry farther in any coordinate, if the step draws it, is a stray, which the next view gets wherever it lies
(`offload/culling/strays.py`). All that decides it is known before the step is rendered: its random numbers, and what
rows are and are owed. Nearly all rows are opaque or small, and ruled out by a bound that needs neither.

Whoever reads all means (saving, evaluation, export, a refinement) reads them without what is owed. It does not matter:
the noise has no mean, it is owed to rows that are nearly transparent, and decisions about rows look at opacities
alone. What is copied is paid what it is owed first (`strategies.mcmc`).

Random numbers are a hash of seed, step and row, so that all trainers draw the same, and a resumed run too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from offload.adam.bfloat16 import random_bits
from strategies.ops import rotation_matrices, word_at

MOVED_BY = ("scales", "quats", "opacities")  # the parameters that say how far
STEEPNESS, HALF_OPACITY = 100.0, 0.005  # of g, which is 1/2 at this opacity
LARGEST = math.sqrt(2 * 2 * math.log(2.0**33))  # norm of three of `normal_numbers`, whose uniform ones are above 2^-33
ROUNDING = 0.99  # of a margin, which float32 arithmetic does not use up


class Noise:
    """Keep which noise each row is owed, and draw it."""

    def __init__(self, rates: np.ndarray, seeds: Sequence[int], margin: float) -> None:
        """
        Args:
            rates: [steps] float64, lr_i * noise_lr of each step.
            seeds: Of the random numbers.
            margin: How far culling ahead lets any coordinate of a mean be moved, in world units.
        """
        self._variances = torch.from_numpy(np.concatenate([[0.0], np.cumsum(rates**2)]))  # [steps + 1] of steps before
        self._largest_sizes = self._variances.sqrt().tolist()  # [steps + 1] of rows that are owed all of these
        self._seeds = seeds
        self._margin = ROUNDING * margin
        self._owed_from: Tensor | None = None  # [N] int32 where geometry is, the first step whose noise a row is owed

    def begin(self, step: int, num_gaussians: int, device: torch.device) -> None:
        """Keep what N rows are owed on a device; a run that begins, or goes on without a state, owes from `step` on."""
        if self._owed_from is None:
            self._owed_from = torch.full((num_gaussians,), step, dtype=torch.int32)
        self._owed_from = self._owed_from.to(device)

    def offsets(self, step: int, ids: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return all noise that rows are owed up to a step, this one included; it is owed until `owe_from` says else.

        Args:
            step: Number of the step, from 0.
            ids: int64 [M] on any device, the rows, each once.
            rows: Their `scales` [M, 3] (log), `quats` [M, 4] and `opacities` [M] (logits), on any device.

        Returns:
            float32 [M, 3], to be added to the means, where the rows are. Rows that are not finite get nothing.
        """
        device, owed_from = rows["scales"].device, self._owed()
        self._variances = self._variances.to(owed_from.device)  # once: a copy at each step would wait for the device
        variances = self._variances[step + 1] - self._variances[owed_from[ids.to(owed_from.device)].long()]  # [M]
        sizes = variances.sqrt().float().to(device) * _shares(rows["opacities"])
        turns = rotation_matrices(rows["quats"])  # [M, 3, 3]
        normal = normal_numbers(ids.to(device), word_at(self._seeds, step))
        # Written out: products of many small matrices take a GPU longer than their bytes do.
        local = (turns * normal[:, :, None]).sum(dim=1) * (2 * rows["scales"]).exp()  # along the axes
        offsets = (turns * local[:, None, :]).sum(dim=2) * sizes[:, None]
        return torch.where(offsets.isfinite(), offsets, 0.0)

    def strays(self, step: int, ids: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return which rows the noise of a step would carry farther than culling allows for, int64 [F] of the ids.

        Args:
            step: Number of the step, from 0.
            ids: Sorted int64 [V] on any device.
            rows: As for `offsets`.
        """
        largest = self._largest_sizes[step + 1] * LARGEST
        bounds = largest * _shares(rows["opacities"]) * (2 * rows["scales"].amax(dim=1)).exp()  # [V]
        some = (bounds > self._margin).nonzero().squeeze(1)
        some_ids = ids[some.to(ids.device)]
        offsets = self.offsets(step, some_ids, {name: rows[name][some] for name in MOVED_BY})
        return some_ids[(offsets.abs().amax(dim=1) > self._margin).to(ids.device)]

    def owe_from(self, step: int, ids: Tensor) -> None:
        """Owe rows [M] the noise from a step on, and none of the steps before."""
        owed_from = self._owed()
        owed_from[ids.to(owed_from.device)] = step

    def append(self, step: int, num_new: int) -> None:
        """Owe rows that were appended the noise from a step on."""
        owed_from = self._owed()
        self._owed_from = torch.cat([owed_from, owed_from.new_full((num_new,), step)])

    def keep(self, ids: Tensor) -> None:
        """Follow rows [M] that were kept, in this order."""
        owed_from = self._owed()
        self._owed_from = owed_from[ids.to(owed_from.device)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is owed, by name; not copied."""
        return {} if self._owed_from is None else {"owed_from": self._owed_from}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; one that is empty owes nothing."""
        self._owed_from = state["owed_from"].clone() if "owed_from" in state else None

    def _owed(self) -> Tensor:
        if self._owed_from is None:
            raise RuntimeError("nobody has said yet how many rows there are")
        return self._owed_from


def _shares(opacities: Tensor) -> Tensor:
    """Return g [M] of the opacities of rows [M], which are logits."""
    return torch.sigmoid(-STEEPNESS * (torch.sigmoid(opacities) - HALF_OPACITY))


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
