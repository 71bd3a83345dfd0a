"""What rows need to know to apply all steps that they have skipped, and Adam on them in plain torch.

The mathematics is that of `offload/adam/host.py`. What depends on the step lies in small tables on the device. A
table is brought to the next step by a few operations there, so nothing is copied and nobody waits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.adam.host import NEGLIGIBLE

FIRST_CAPACITY = 4096  # steps


@dataclass(frozen=True)
class StepSizes:
    """What one Adam step needs: w -= sizes * m / (sqrt(v) + eps), bias corrections included."""

    sizes: Tensor  # [columns]
    eps: float
    betas: tuple[float, float]


class CatchUpTables:
    """C_t(s) of each schedule and the decay of both moments over any number of steps.

    Attributes:
        step: t, the step that `begin_step` began last; 0 before the first.
        eps: Adam's, times the bias correction of step t.
        sums: [schedules, capacity] float64, C_t(s) indexed by s.
        decays: [2, capacity] float64, b1^k and b2^k.
        multipliers: [schedules, columns] float32; at learning rates [schedules] those of the columns are
            `learning_rates @ multipliers`.
    """

    def __init__(self, multipliers: Tensor, betas: tuple[float, float], eps: float, device: torch.device) -> None:
        """
        Args:
            multipliers: [schedules, columns].
            betas: Adam's decay rates, 0 <= betas[0] < sqrt(betas[1]) < 1.
            eps: Adam's epsilon.
            device: Where rows are updated.
        """
        b1, b2 = betas
        if not (0 <= b1 < math.sqrt(b2) < 1):
            raise ValueError(f"betas {betas} must satisfy 0 <= betas[0] < sqrt(betas[1]) < 1")
        self.step = 0
        self.eps = eps
        self.betas = betas
        self.multipliers = multipliers.to(device, torch.float32)
        self._eps = eps
        self._rates: list[float] = [0.0] * len(multipliers)  # [schedules], with bias correction
        ratio = b1 / math.sqrt(b2)
        window = math.ceil(math.log(NEGLIGIBLE) / math.log(ratio)) if ratio > 0 else 1
        powers = ratio ** torch.arange(window, 0, -1, dtype=torch.float64)  # oldest entry first
        self._ratio_powers = powers.to(device)
        self.sums = torch.zeros(len(multipliers), 0, dtype=torch.float64, device=device)
        self._grow(FIRST_CAPACITY)
        self._unchanged = 0, self.sums[:, :0]  # what `begin_step` has changed, from where on, and what was there

    @property
    def columns(self) -> int:
        return self.multipliers.shape[1]

    def begin_step(self, learning_rates: Sequence[float]) -> None:
        """Begin step t = step + 1, on the current stream, in time that does not depend on N.

        Args:
            learning_rates: [schedules], of step t.
        """
        self.step += 1
        if self.step >= self.sums.shape[1]:
            self._grow(2 * self.sums.shape[1])
        self.eps, self._rates = self._corrected(self.step, learning_rates)
        self._add_step(self.step, self._rates)

    def undo_step(self) -> None:
        """Take `begin_step` back; it cannot be done twice in a row."""
        first, unchanged = self._unchanged
        self.sums[:, first : self.step] = unchanged
        self.step -= 1
        self.eps = self._eps * (math.sqrt(1 - self.betas[1] ** self.step) if self.step else 1.0)

    def tables(self) -> dict[str, Tensor]:
        """Copies on the host of what catching up rows depends on, named as by `DeferredAdam.tables`."""
        sums = self.sums[:, : self.step + 1].T.cpu().contiguous()  # [steps, schedules]
        return {
            "step_count": torch.tensor(self.step),
            "betas": torch.tensor(self.betas, dtype=torch.float64),
            "eps": torch.tensor(self._eps, dtype=torch.float64),
            "multipliers": self.multipliers.cpu(),
            "sums": sums,
            "before": sums.float(),
            "after": sums.float(),
        }

    def matches(self, tables: Mapping[str, Tensor]) -> bool:
        """Whether an optimizer with the same columns, betas and learning rates left these tables."""
        return (
            tuple(tables["betas"].tolist()) == self.betas
            and tables["eps"].item() == self._eps
            and torch.equal(tables["multipliers"], self.multipliers.cpu())
        )

    def continue_from(self, tables: Mapping[str, Tensor]) -> None:
        """Go on after the steps that another optimizer has left.

        Args:
            tables: As `tables` gives them; with `step_count` alone no row may lag behind.

        Raises:
            ValueError: They do not belong together.
        """
        self.step = int(tables["step_count"])
        self.eps = self._eps * (math.sqrt(1 - self.betas[1] ** self.step) if self.step else 1.0)
        steps = self.step + 1
        if steps > self.sums.shape[1]:
            self._grow(max(steps, 2 * self.sums.shape[1]))
        if "sums" not in tables:
            return
        if tables["sums"].shape != (steps, len(self.multipliers)):
            raise ValueError(f"sums {list(tables['sums'].shape)} is not [{steps}, {len(self.multipliers)}]")
        self.sums[:, :steps] = tables["sums"].T.to(self.sums.device)

    def step_sizes(self) -> StepSizes:
        """Of step t, computed on the current stream."""
        return self._sizes(self.eps, self._rates)

    def next_step_sizes(self, learning_rates: Sequence[float]) -> StepSizes:
        """Of step t + 1, which has not begun yet; as `begin_step` and `step_sizes`."""
        return self._sizes(*self._corrected(self.step + 1, learning_rates))

    def _corrected(self, t: int, learning_rates: Sequence[float]) -> tuple[float, list[float]]:
        """Epsilon and the schedules' learning rates, with the bias corrections of a step."""
        b1, b2 = self.betas
        root_correction = math.sqrt(1 - b2**t)
        return self._eps * root_correction, [rate * root_correction / (1 - b1**t) for rate in learning_rates]

    def _sizes(self, eps: float, rates: Sequence[float]) -> StepSizes:
        sizes = self.multipliers[0] * rates[0]
        for multipliers, rate in zip(self.multipliers[1:], rates[1:], strict=True):
            sizes.add_(multipliers, alpha=rate)
        return StepSizes(sizes, eps, self.betas)

    def _add_step(self, t: int, rates: Sequence[float]) -> None:
        first = max(0, t - len(self._ratio_powers))
        self._unchanged = first, self.sums[:, first:t].clone()
        for sums, rate in zip(self.sums, rates, strict=True):
            sums[first:t].add_(self._ratio_powers[len(self._ratio_powers) - (t - first) :], alpha=rate)

    def _grow(self, capacity: int) -> None:
        device = self.sums.device
        sums = torch.zeros(len(self.multipliers), capacity, dtype=torch.float64, device=device)
        sums[:, : self.sums.shape[1]] = self.sums
        self.sums = sums
        decays = torch.tensor(self.betas, dtype=torch.float64)[:, None] ** torch.arange(capacity)
        decays[decays < torch.finfo(torch.float32).tiny] = 0  # no denormal numbers
        self.decays = decays.to(device)


def caught_up(
    w: Tensor, m: Tensor, v: Tensor, stamps: Tensor, tables: CatchUpTables, columns: slice = slice(None)
) -> Tensor:
    """Parameters after step `tables.step`.

    Args:
        w, m, v: [M, columns] parameters and both moments after each row's last update.
        stamps: [M] integers, the step of that.
        tables: Of the skipped steps.
        columns: Which of the tables' columns these are.
    """
    skipped = torch.zeros_like(w)
    # Not a matrix product, for which cuBLAS would take 32 MB of a GPU and keep them.
    for sums, multipliers in zip(tables.sums, tables.multipliers[:, columns], strict=True):
        skipped += sums[stamps.long(), None].float() * multipliers
    return w - skipped * (m / (v.sqrt() + tables.eps))


def decayed(m: Tensor, v: Tensor, skipped: Tensor, tables: CatchUpTables) -> tuple[Tensor, Tensor]:
    """Copies of both moments [M, columns] after so many steps [M] without gradient."""
    decay1, decay2 = tables.decays[:, skipped.long(), None]  # [M, 1] float64 each
    # b2 in float32 is off by 1e-8, and 1000 steps remember it: the rest is added on top.
    near = decay2.float()
    return m * decay1.float(), v * near + v * (decay2 - near).float()


def adam_step(w: Tensor, m: Tensor, v: Tensor, gradients: Tensor, sizes: Tensor, step: StepSizes) -> None:
    """One step of Adam in place.

    Args:
        w, m, v: [M, columns] parameters and both moments after the step before.
        gradients: [M, columns].
        sizes: [columns] of `step.sizes`.
        step: What else the step needs.
    """
    # Written as a change, so that 1 - b, not b, is rounded to float32: v would remember that for 1000 steps.
    m += (1 - step.betas[0]) * (gradients - m)
    v += (1 - step.betas[1]) * (gradients * gradients - v)
    w -= sizes * (m / (v.sqrt() + step.eps))
