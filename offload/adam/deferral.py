"""Adam that leaves a row untouched while its gradient is zero: the mathematics, its tables, and the steps in torch.

A row last updated at step s with (w, m, v), and no gradient in steps s+1 ... t, has under dense Adam

    m_t = b1^(t-s) m        v_t = b2^(t-s) v        w_t = w - m / sqrt(v) * C_t(s)
    C_t(s) = sum_{i=s+1..t} lr_i * (b1/sqrt(b2))^(i-s) * sqrt(1-b2^i) / (1-b1^i)

where eps is small against sqrt(v), and w_t = w where v = 0. So a row needs one number, `last_step` = s, and all skipped
steps are applied at once when the row is next used (deferred updates as in GS-Scale, arXiv 2509.15645, without its
counters). Adam: Kingma & Ba, arXiv 1412.6980, as in `torch.optim.Adam`.

What depends on the step lies in small tables where rows are updated. They are brought to the next step by a few
operations there, so nothing is copied and nobody waits. `tests/oracles/adam.py` is the same without tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.backends import kernels_for

# What a step adds to C_t(s) is (b1/sqrt(b2))^(t-s) times its learning rate; below this it is lost in float32.
NEGLIGIBLE = 1e-12
FIRST_CAPACITY = 4096  # steps
ROUNDING = 1 + 1e-6  # by which sums of the same rates differ at most

LearningRates = Callable[[int], Sequence[float]]  # of each schedule, at a step from 1


def largest_step(betas: tuple[float, float]) -> float:
    """Bound the change of a parameter by one Adam step without bias correction, in units of the learning rate.

    By Cauchy-Schwarz on the sums of gradients in both moments:
    |m| / sqrt(v) <= (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2).
    """
    b1, b2 = betas
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))


@dataclass(frozen=True)
class StepSizes:
    """Hold what one Adam step needs: w -= sizes * m / (sqrt(v) + eps), bias corrections included."""

    sizes: Tensor  # [columns]
    eps: float
    betas: tuple[float, float]


@dataclass(frozen=True)
class SkippedSteps:
    """Hold what catching up rows takes, on a device, for `offload.adam.rows.fetch_dated_rows`."""

    sums: Tensor  # [schedules, steps] float32 or float64, C_t(s) indexed by s
    multipliers: Tensor  # [schedules, columns]
    eps: float  # with the bias correction of step t
    reach: float  # the bound of m / sqrt(v)

    @property
    def columns(self) -> int:
        return self.multipliers.shape[1]


class DeferralTables:
    """C_t(s) of each schedule and the decay of both moments over any number of steps.

    Attributes:
        step: t, the step that `begin_step` began last; 0 before the first.
        eps: Adam's, times the bias correction of step t.
        betas: Adam's decay rates.
        rates: [schedules], the learning rates of step t with its bias correction.
        multipliers: [schedules, columns] float32; at learning rates [schedules] those of the columns are
            `learning_rates @ multipliers`, so columns whose learning rates keep their ratio share a schedule.
        sums: [schedules, capacity] float64, C_t(s) indexed by s.
        decays: [2, capacity] float64, b1^k and b2^k.
    """

    def __init__(self, multipliers: Tensor, betas: tuple[float, float], eps: float, device: torch.device) -> None:
        """
        Args:
            multipliers: [schedules, columns].
            betas: Adam's decay rates per step, 0 <= betas[0] < sqrt(betas[1]) < 1.
            eps: Is added to the root of the second moment; above 0.
            device: Where rows are updated.
        """
        b1, b2 = betas
        if not (0 <= b1 < math.sqrt(b2) < 1):
            raise ValueError(f"betas {betas} must satisfy 0 <= betas[0] < sqrt(betas[1]) < 1")
        if not eps > 0:
            raise ValueError(f"eps {eps} must be above 0")
        if multipliers.ndim != 2:
            raise ValueError(f"multipliers {list(multipliers.shape)} must be [schedules, columns]")
        self.step = 0
        self.eps = self._plain_eps = eps
        self.betas = betas
        self.multipliers = multipliers.detach().to(device, torch.float32, copy=True).contiguous()
        self.rates = [0.0] * len(multipliers)
        self._ratio = b1 / math.sqrt(b2)
        window = math.ceil(math.log(NEGLIGIBLE) / math.log(self._ratio)) if self._ratio > 0 else 1
        self._ratio_powers = self._powers_of_ratio(window).to(device)  # [window], of the oldest step first
        self.sums = torch.zeros(len(multipliers), 0, dtype=torch.float64, device=device)
        self._grow(FIRST_CAPACITY)
        self._add = kernels_for(device, __name__).add_step
        self._changed = slice(0, 0)  # which steps `begin_step` has changed
        self._sums_before = self.sums  # the whole table before

    @property
    def columns(self) -> int:
        return self.multipliers.shape[1]

    @property
    def reach(self) -> float:
        """Return the bound of m / sqrt(v)."""
        return largest_step(self.betas)

    @property
    def schedules(self) -> int:
        return self.multipliers.shape[0]

    def begin_step(self, learning_rates: Sequence[float]) -> None:
        """Begin step t = step + 1, on the current stream, in time that does not depend on N.

        Args:
            learning_rates: [schedules], of step t.
        """
        rates = self._rates_to_begin(learning_rates)
        self._add_step(self._next_changed(), rates)
        self._note_begun(rates)

    def _rates_to_begin(self, learning_rates: Sequence[float]) -> list[float]:
        """Return the rates of the next step [schedules], with bias corrections; the tables have room for it."""
        if len(learning_rates) != self.schedules:
            raise ValueError(f"{len(learning_rates)} learning rates for {self.schedules} schedules")
        if self.step + 1 >= self.sums.shape[1]:
            self._grow(2 * self.sums.shape[1])
        return self._corrected_rates(self.step + 1, learning_rates)

    def _next_changed(self) -> slice:
        """Return the steps whose sums the next one changes."""
        return slice(max(0, self.step + 1 - self._ratio_powers.shape[0]), self.step + 1)

    def _note_begun(self, rates: list[float]) -> None:
        """Come to the next step, of these rates [schedules], which the sums have."""
        # Last: where memory lacks for the tables, the step has not begun, and there is nothing to undo.
        self.step += 1
        self.eps, self.rates = self._corrected_eps(self.step), rates

    def undo_step(self) -> None:
        """Take `begin_step` back; no row may have been updated since, and it cannot be done twice in a row."""
        self.sums[:, self._changed] = self._sums_unchanged()
        self.step -= 1
        self.eps = self._corrected_eps(self.step)

    def tables(self) -> dict[str, Tensor]:
        """Copy all that later steps and catching up rows depend on, by name, to the host; some bytes for each step."""
        sums = self.sums[:, : self.step + 1].T.cpu().contiguous()  # [steps, schedules]
        return {
            "step_count": torch.tensor(self.step),
            "betas": torch.tensor(self.betas, dtype=torch.float64),
            "eps": torch.tensor(self._plain_eps, dtype=torch.float64),
            "multipliers": self.multipliers.to("cpu", copy=True),  # [schedules, columns]
            "sums": sums,
            "before": sums.float(),
            "after": sums.float(),
        }

    def matches(self, tables: Mapping[str, Tensor]) -> bool:
        """Tell whether an optimizer with the same columns and betas left these tables.

        Rates of the columns may all have been others, if each schedule's kept their ratio: `rates_have_not_fallen`.
        """
        return (
            tuple(tables["betas"].tolist()) == self.betas
            and tables["eps"].item() == self._plain_eps
            and torch.equal(tables["multipliers"], self.multipliers.cpu())
        )

    def rates_have_not_fallen(self, tables: Mapping[str, Tensor], learning_rates: LearningRates) -> bool:
        """Tell whether rows that these tables are of lag behind no farther than they would have at other rates.

        Culling allows for what the present rates make of skipped steps.

        Args:
            tables: As `tables` gives them; they match.
            learning_rates: The present ones.

        Raises:
            ValueError: They do not belong together.
        """
        t = int(tables["step_count"])
        sums = checked_table(tables, "sums", (t + 1, self.schedules))
        return bool((sums <= ROUNDING * self._sums_of(t, learning_rates)).all())

    def load_state(self, tables: Mapping[str, Tensor]) -> None:
        """Go on after the steps that another optimizer has left.

        Args:
            tables: As `tables` gives them; with `step_count` alone no row may lag behind.

        Raises:
            ValueError: They do not belong together.
        """
        self.step = int(tables["step_count"])
        self.eps = self._corrected_eps(self.step)
        steps = self.step + 1
        if steps > self.sums.shape[1]:
            self._grow(max(steps, 2 * self.sums.shape[1]))
        if "sums" in tables:
            self._load_sums(tables, steps)

    def skipped(self, *, previous: bool = False) -> SkippedSteps:
        """Return what catches rows up where the tables are, until the next step begins.

        Args:
            previous: For values before step t began.
        """
        if previous:
            return SkippedSteps(self._sums_before, self.multipliers, self._corrected_eps(self.step - 1), self.reach)
        return SkippedSteps(self.sums, self.multipliers, self.eps, self.reach)

    def step_sizes(self) -> StepSizes:
        """Compute the sizes of step t on the current stream."""
        return self._sizes(self.eps, self.rates)

    def next_step_sizes(self, learning_rates: Sequence[float]) -> StepSizes:
        """Compute the sizes of step t + 1, which has not begun yet, as `begin_step` and `step_sizes` will."""
        return self._sizes(self._corrected_eps(self.step + 1), self._corrected_rates(self.step + 1, learning_rates))

    def _sizes(self, eps: float, rates: Sequence[float]) -> StepSizes:
        sizes = self.multipliers[0] * rates[0]
        for multipliers, rate in zip(self.multipliers[1:], rates[1:], strict=True):
            sizes.add_(multipliers, alpha=rate)
        return StepSizes(sizes, eps, self.betas)

    def _root_correction(self, t: int) -> float:
        """Return sqrt(1 - b2^t); 1 before the first step, when there are no moments to correct."""
        return math.sqrt(1 - self.betas[1] ** t) if t else 1.0

    def _corrected_eps(self, t: int) -> float:
        # m / (sqrt(v) / root_correction + eps) = root_correction * m / (sqrt(v) + eps * root_correction)
        return self._plain_eps * self._root_correction(t)

    def _sums_of(self, t: int, learning_rates: LearningRates) -> Tensor:
        """Compute C_t(s) [t + 1, schedules] of rates from the first step on, indexed by s; float64 on the host."""
        rates = np.zeros((t + len(self._ratio_powers), self.schedules))  # of steps 1 ... t; 0 of those that come
        for i in range(t):
            rates[i] = self._corrected_rates(i + 1, learning_rates(i + 1))
        powers = self._ratio_powers.cpu().numpy()[::-1]
        return torch.from_numpy(np.stack([np.correlate(each, powers, "valid") for each in rates.T], axis=1))

    # The rest is what `DeferredAdam` rounds differently, and keeps more or less of.

    def _sums_unchanged(self) -> Tensor:
        """Return the sums of the steps that `begin_step` has changed, as they were before it."""
        return self._sums_before[:, self._changed]

    def _corrected_rates(self, t: int, learning_rates: Sequence[float]) -> list[float]:
        """Return the schedules' learning rates with the bias corrections of step t."""
        return [rate * self._root_correction(t) / (1 - self.betas[0] ** t) for rate in learning_rates]

    def _powers_of_ratio(self, window: int) -> Tensor:
        """Return (b1/sqrt(b2))^k, float64, for k = window, window - 1 ... 1."""
        return self._ratio ** torch.arange(window, 0, -1, dtype=torch.float64)

    def _add_step(self, changed: slice, rates: Sequence[float]) -> None:
        """Add step t, of these rates [schedules], to C(s) of the steps s before it that it changes."""
        (self._sums_before,) = self._add([self.sums], changed, self._ratio_powers, [rates])
        self._changed = changed

    def _load_sums(self, tables: Mapping[str, Tensor], steps: int) -> None:
        self.sums[:, :steps] = checked_table(tables, "sums", (steps, self.schedules)).T.to(self.sums.device)

    def _grow(self, capacity: int) -> None:
        """Make room for steps below `capacity` in the tables."""
        device = self.sums.device
        sums = torch.zeros(self.schedules, capacity, dtype=torch.float64, device=device)
        sums[:, : self.sums.shape[1]] = self.sums
        decays = torch.tensor(self.betas, dtype=torch.float64)[:, None] ** torch.arange(capacity)
        decays[decays < torch.finfo(torch.float32).tiny] = 0  # no denormal numbers: they are slow
        self.decays, self.sums = decays.to(device), sums


def begin_steps(tables: Sequence[DeferralTables], learning_rates: Sequence[Sequence[float]]) -> None:
    """Do as `begin_step` of each, in one launch where they are two that have come equally far.

    Args:
        tables: Of groups that are updated together.
        learning_rates: [schedules] each, of the steps that begin.
    """
    if len(tables) == 2 and _are_alike(*tables):
        all_rates = [each._rates_to_begin(rates) for each, rates in zip(tables, learning_rates, strict=True)]
        first, changed = tables[0], tables[0]._next_changed()
        sums_before = first._add([each.sums for each in tables], changed, first._ratio_powers, all_rates)
        for each, before, corrected in zip(tables, sums_before, all_rates, strict=True):
            each._sums_before, each._changed = before, changed
            each._note_begun(corrected)
    else:
        for each, rates in zip(tables, learning_rates, strict=True):
            each.begin_step(rates)


def _are_alike(one: DeferralTables, other: DeferralTables) -> bool:
    """Tell whether two tables have the same steps, powers and capacity, in one place."""
    return (
        type(one) is type(other) is DeferralTables
        and (one.step, one.betas, one.sums.shape[1]) == (other.step, other.betas, other.sums.shape[1])
        and one.sums.device == other.sums.device
    )


def add_step(sums: Sequence[Tensor], changed: slice, powers: Tensor, rates: Sequence[Sequence[float]]) -> list[Tensor]:
    """Add a step to C(s) of the steps before it that it changes, in place, of one table or two.

    Args:
        sums: [schedules, capacity] float64 each.
        changed: Which steps these are, the last ones.
        powers: [window] float64 of the ratio, that of the last step last.
        rates: [schedules] of each table, of the step.

    Returns:
        The sums before, [schedules, capacity] each.
    """
    before = [table.clone() for table in sums]
    powers = powers[len(powers) - (changed.stop - changed.start) :]
    for table, of_table in zip(sums, rates, strict=True):
        for each, rate in zip(table, of_table, strict=True):
            each[changed].add_(powers, alpha=rate)
    return before


def caught_up(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    last_step: Tensor,
    tables: DeferralTables | SkippedSteps,
    columns: slice = slice(None),
) -> Tensor:
    """Compute parameters after step `tables.step`.

    Args:
        w, m, v: [M, columns] parameters and both moments after each row's last update.
        last_step: [M] integers, the step of that.
        tables: Of the skipped steps.
        columns: Which of the tables' columns these are.
    """
    skipped = torch.zeros_like(w)
    # Not a matrix product, for which cuBLAS would take 32 MB of a GPU and keep them.
    for sums, multipliers in zip(tables.sums, tables.multipliers[:, columns], strict=True):
        skipped += sums[last_step.long(), None].float() * multipliers
    return w - skipped * (m / (v.sqrt() + tables.eps))


def decayed(m: Tensor, v: Tensor, skipped: Tensor, tables: DeferralTables) -> tuple[Tensor, Tensor]:
    """Compute both moments [M, columns] after so many steps [M] without gradient."""
    decay1, decay2 = tables.decays[:, skipped.long(), None]  # [M, 1] float64 each
    # b2 in float32 is off by 1e-8, and 1000 steps remember it: the rest is added on top.
    near = decay2.float()
    return m * decay1.float(), v * near + v * (decay2 - near).float()


def adam_step(w: Tensor, m: Tensor, v: Tensor, gradients: Tensor, sizes: Tensor, step: StepSizes) -> None:
    """Apply one step of Adam in place.

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


def checked_table(tables: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    if tables[name].shape != shape:
        raise ValueError(f"{name} {list(tables[name].shape)} is not {list(shape)}")
    return tables[name]
