"""Adam over rows of host memory that leaves a row untouched while its gradient is zero.

A row last updated at step s with (w, m, v), and no gradient in steps s+1 ... t, has under dense Adam

    m_t = b1^(t-s) m        v_t = b2^(t-s) v        w_t = w - m / sqrt(v) * C_t(s)
    C_t(s) = sum_{i=s+1..t} lr_i * (b1/sqrt(b2))^(i-s) * sqrt(1-b2^i) / (1-b1^i)

where eps is small against sqrt(v), and w_t = w where v = 0. So a row needs one stamp, `last_step` = s, and all skipped
steps are applied at once when the row is next used (deferred updates as in GS-Scale, arXiv 2509.15645, without its
counters). Adam: Kingma & Ba, arXiv 1412.6980, as in `torch.optim.Adam`.

`tests/oracles/adam.py` is the same in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from offload.backends import native, num_threads

# What a step adds to C_t(s) is (b1/sqrt(b2))^(t-s) times its learning rate; below this it is lost in float32.
NEGLIGIBLE = 1e-12
FIRST_CAPACITY = 1024  # steps


class DeferredAdam:
    """The optimizer of one store of rows: its step, its tables and the native kernels that visit rows.

    It holds no rows. Those are passed to each call as CPU tensors: `parameters`, `exp_avg`, `exp_avg_sq` float32
    [N, columns] and `last_step` int32 [N]; a row that has never been updated, or whose optimizer state is reset,
    has exp_avg = exp_avg_sq = 0 and last_step = step_count. `ids` int64 [V] are the rows to visit, strictly
    increasing, or None for all of them. Row i of the visit reads its gradient from row i of `gradients`, or from row
    gradient_rows[i], and writes its value to row i of `out`, or to row out_rows[i].

    Each method passes over the memory of the visited rows once. Methods that write different rows may run at the same
    time in several threads; `begin_step` may not run beside any other.

    Args:
        multipliers: [schedules, columns]. At a step with learning rates [schedules] those of the columns are
            `learning_rates @ multipliers`, so columns whose learning rates keep their ratio share a schedule.
        betas: decay of the first and second moments per step, with 0 <= betas[0] < sqrt(betas[1]) < 1.
        eps: added to the root of the second moment; above 0.
        threads: threads of each call, the cores of this process if None.

    Attributes:
        step_count: t, the step that `begin_step` began last; 0 before the first.
    """

    def __init__(
        self,
        multipliers: Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        threads: int | None = None,
    ) -> None:
        b1, b2 = betas
        if not (0 <= b1 < math.sqrt(b2) < 1):
            raise ValueError(f"betas {betas} must satisfy 0 <= betas[0] < sqrt(betas[1]) < 1")
        if not eps > 0:
            raise ValueError(f"eps {eps} must be above 0")
        if multipliers.ndim != 2:
            raise ValueError(f"multipliers {list(multipliers.shape)} must be [schedules, columns]")
        self.multipliers = multipliers.detach().to("cpu", torch.float32).numpy().copy(order="C")
        self.schedules, self.columns = self.multipliers.shape
        self.betas = betas
        self.eps = eps
        self.threads = num_threads() if threads is None else threads
        self.step_count = 0
        self._rates = np.zeros(self.columns, np.float32)
        self._eps = self._previous_eps = eps

        # What `begin_step` has changed in the tables: where, and what was there.
        self._unchanged = slice(0, 0), np.zeros((0, self.schedules), np.float32), np.zeros((0, self.schedules))

        ratio = b1 / math.sqrt(b2)
        window = math.ceil(math.log(NEGLIGIBLE) / math.log(ratio)) if ratio > 0 else 1
        self._ratio_powers = ratio ** np.arange(window, 0, -1, dtype=np.float64)  # oldest entry first
        self._capacity = 0
        self._grow(FIRST_CAPACITY)

    def _grow(self, capacity: int) -> None:
        """Makes room for steps below `capacity` in the tables."""
        sums = np.zeros((capacity, self.schedules))  # C_t(s), indexed by s
        before = np.zeros((capacity, self.schedules), np.float32)  # C_{t-1}(s), for rows with a gradient at t
        after = np.zeros((capacity, self.schedules), np.float32)  # C_t(s), for rows without
        if self._capacity:
            sums[: self._capacity] = self._sums
            before[: self._capacity] = self._before
            after[: self._capacity] = self._after
        self._sums, self._before, self._after = sums, before, after
        powers = np.power(self.betas, np.arange(capacity, dtype=np.float64)[:, None])  # [capacity, 2]
        powers[powers < np.finfo(np.float32).tiny] = 0  # no denormal numbers: they are slow
        decays = powers.astype(np.float32)
        # 0.999 in float32 is off by 1e-8, and 1000 steps remember it: a third column keeps the rest of b2^k.
        self._decays = np.column_stack([decays, (powers[:, 1] - decays[:, 1]).astype(np.float32)])
        self._capacity = capacity

    def tables(self) -> dict[str, Tensor]:
        """Copies of all that later steps and catching up rows depend on, by name; a few bytes for each step so far."""
        steps = self.step_count + 1
        return {
            "step_count": torch.tensor(self.step_count),
            "betas": torch.tensor(self.betas, dtype=torch.float64),
            "eps": torch.tensor(self.eps, dtype=torch.float64),
            "multipliers": torch.from_numpy(self.multipliers.copy()),  # [schedules, columns]
            "sums": torch.from_numpy(self._sums[:steps].copy()),  # [steps, schedules]
            "before": torch.from_numpy(self._before[:steps].copy()),
            "after": torch.from_numpy(self._after[:steps].copy()),
        }

    @classmethod
    def from_tables(cls, tables: Mapping[str, Tensor], columns: slice = slice(None)) -> DeferredAdam:
        """The optimizer that left these tables, or one of some of its columns.

        Raises:
            ValueError: They do not belong together.
        """
        betas = tuple(tables["betas"].tolist())
        adam = cls(tables["multipliers"][:, columns], betas, tables["eps"].item())
        adam.continue_from(tables)
        return adam

    def matches(self, tables: Mapping[str, Tensor]) -> bool:
        """Whether an optimizer with the same columns, betas and learning rates left these tables."""
        return (
            tuple(tables["betas"].tolist()) == self.betas
            and tables["eps"].item() == self.eps
            and tables["multipliers"].shape == self.multipliers.shape
            and bool((tables["multipliers"].numpy() == self.multipliers).all())
        )

    def continue_from(self, tables: Mapping[str, Tensor]) -> None:
        """Go on after the steps that another optimizer has left.

        Args:
            tables: As `tables` gives them; with `step_count` alone no row may lag behind.

        Raises:
            ValueError: They do not belong together.
        """
        self.step_count = int(tables["step_count"])
        self._eps = self.eps * self._root_correction()
        steps = self.step_count + 1
        if steps > self._capacity:
            self._grow(max(steps, 2 * self._capacity))
        if "sums" not in tables:
            return
        for name, table in (("sums", self._sums), ("before", self._before), ("after", self._after)):
            if tables[name].shape != (steps, self.schedules):
                raise ValueError(f"{name} {list(tables[name].shape)} is not [{steps}, {self.schedules}]")
            table[:steps] = tables[name].numpy()

    def begin_step(self, learning_rates: Sequence[float]) -> None:
        """Begins step t = step_count + 1, in time that does not depend on N.

        Args:
            learning_rates: [schedules], of step t.
        """
        if len(learning_rates) != self.schedules:
            raise ValueError(f"{len(learning_rates)} learning rates for {self.schedules} schedules")
        self.step_count += 1
        t = self.step_count
        if t >= self._capacity:
            self._grow(2 * self._capacity)

        b1 = self.betas[0]
        root_correction = self._root_correction()
        rates = np.array(learning_rates, np.float64) * (root_correction / (1 - b1**t))  # [schedules]
        # m / (sqrt(v) / root_correction + eps) = root_correction * m / (sqrt(v) + eps * root_correction)
        self._rates = (rates @ self.multipliers).astype(np.float32)  # [columns]
        self._previous_eps, self._eps = self._eps, self.eps * root_correction

        changed = slice(max(0, t - len(self._ratio_powers)), t)
        self._unchanged = changed, self._before[changed].copy(), self._sums[changed].copy()
        self._before[changed] = self._after[changed]
        self._sums[changed] += self._ratio_powers[-(t - changed.start) :, None] * rates
        self._after[changed] = self._sums[changed]

    def undo_step(self) -> None:
        """Takes `begin_step` back; no row may have been committed since, and it cannot be done twice in a row."""
        changed, before, sums = self._unchanged
        self._after[changed], self._before[changed], self._sums[changed] = self._before[changed], before, sums
        self._eps = self._previous_eps
        self.step_count -= 1

    def _root_correction(self) -> float:
        """sqrt(1 - b2^t); 1 before the first step, when there are no moments to correct."""
        return math.sqrt(1 - self.betas[1] ** self.step_count) if self.step_count else 1.0

    def commit(
        self,
        parameters: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        last_step: Tensor,
        ids: Tensor | None,
        gradients: Tensor | None,
        *,
        gradient_rows: Tensor | None = None,
    ) -> None:
        """Brings rows to step t in place: all skipped steps, then step t with its gradient; stamps them t.

        Args:
            parameters, exp_avg, exp_avg_sq, last_step, ids: see the class.
            gradients: float32 [V, columns] or [any, columns] with gradient_rows; None where the gradient is zero.
            gradient_rows: int64 [V].

        Raises:
            ValueError: an argument has the wrong type, shape or layout, an id is out of range or out of order (nothing
                is changed), or some rows were already committed at step t (those are left alone).
        """
        state = (parameters, exp_avg, exp_avg_sq, last_step)
        self._visit(*state, ids, gradients, gradient_rows, None, None, store=True)

    def forward(
        self,
        parameters: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        last_step: Tensor,
        ids: Tensor | None,
        out: Tensor,
        gradients: Tensor | None = None,
        *,
        gradient_rows: Tensor | None = None,
        out_rows: Tensor | None = None,
    ) -> None:
        """Writes the values that rows have after step t to `out`; the rows themselves stay as they are.

        Args:
            parameters, exp_avg, exp_avg_sq, last_step, ids: see the class.
            out: float32 [V, columns], or [any, columns] with out_rows.
            gradients, gradient_rows: as for `commit`.
            out_rows: int64 [V], each row at most once.

        Raises:
            ValueError: as for `commit`.
        """
        state = (parameters, exp_avg, exp_avg_sq, last_step)
        self._visit(*state, ids, gradients, gradient_rows, out, out_rows, store=False)

    def forward_previous(
        self,
        parameters: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        last_step: Tensor,
        ids: Tensor | None,
        out: Tensor,
        *,
        out_rows: Tensor | None = None,
    ) -> None:
        """Writes the values that rows had before step t began, for rows that have not been committed since.

        Args:
            parameters, exp_avg, exp_avg_sq, last_step, ids, out, out_rows: as for `forward`.

        Raises:
            ValueError: as for `commit`.
        """
        state = (parameters, exp_avg, exp_avg_sq, last_step)
        self._visit(*state, ids, None, None, out, out_rows, store=False, previous=True)

    def commit_and_forward(
        self,
        parameters: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        last_step: Tensor,
        ids: Tensor | None,
        gradients: Tensor,
        out: Tensor,
        *,
        gradient_rows: Tensor | None = None,
        out_rows: Tensor | None = None,
    ) -> None:
        """Both at once: commits rows and writes their new values to `out`. Arguments and errors as for those."""
        state = (parameters, exp_avg, exp_avg_sq, last_step)
        self._visit(*state, ids, gradients, gradient_rows, out, out_rows, store=True)

    def dense(self, parameters: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradients: Tensor) -> None:
        """Ordinary Adam, step t, in place over all rows, none of which has ever skipped a step.

        Args:
            parameters, exp_avg, exp_avg_sq, gradients: float32 [N, columns].

        Raises:
            ValueError: an argument has the wrong type, shape or layout.
        """
        self._visit(parameters, exp_avg, exp_avg_sq, None, None, gradients, None, None, None, store=True)

    def _visit(
        self,
        parameters: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        last_step: Tensor | None,
        ids: Tensor | None,
        gradients: Tensor | None,
        gradient_rows: Tensor | None,
        out: Tensor | None,
        out_rows: Tensor | None,
        *,
        store: bool,
        previous: bool = False,
    ) -> None:
        if self.step_count == 0 and gradients is not None:
            raise ValueError("begin_step comes before the first gradients")
        n = parameters.shape[0]
        v = n if ids is None else ids.shape[0]
        any_size = -1
        _check("parameters", parameters, torch.float32, (n, self.columns))
        _check("exp_avg", exp_avg, torch.float32, (n, self.columns))
        _check("exp_avg_sq", exp_avg_sq, torch.float32, (n, self.columns))
        _check("last_step", last_step, torch.int32, (n,))
        _check("ids", ids, torch.int64, (v,))
        _check("gradients", gradients, torch.float32, (v if gradient_rows is None else any_size, self.columns))
        _check("gradient_rows", gradient_rows, torch.int64, (v,))
        _check("out", out, torch.float32, (v if out_rows is None else any_size, self.columns))
        _check("out_rows", out_rows, torch.int64, (v,))
        if v == 0:  # empty buffers may have no address, which the kernels would take for an absent one
            return
        native.adam_rows(
            parameters=parameters.detach(),
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            last_step=last_step,
            ids=ids,
            gradients=gradients,
            gradient_rows=gradient_rows,
            out=out,
            out_rows=out_rows,
            store=store,
            step=self.step_count - previous,
            skipped=self._after if gradients is None and not previous else self._before,
            decays=self._decays,
            multipliers=self.multipliers,
            rates=self._rates,
            gradient_weight=1 - self.betas[0],
            square_weight=1 - self.betas[1],
            eps=self._previous_eps if previous else self._eps,
            threads=self.threads,
        )


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor is None or as the kernels need it; -1 in `shape` stands for any size."""
    if tensor is None:
        return
    fits = tensor.ndim == len(shape) and all(b in (a, -1) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits or tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)} on the CPU; it is {found}{layout}")
