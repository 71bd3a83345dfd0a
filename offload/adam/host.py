"""Deferred Adam over rows of host memory, visited by the native kernels; the mathematics is in `deferral.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from offload.adam.bfloat16 import seed_of
from offload.adam.deferral import DeferralTables, SkippedSteps, checked_table
from offload.adam.harmonics import HarmonicsGradient, num_harmonics
from offload.backends import native, num_threads
from offload.store.layout import RowState

CODED_COLUMNS = (16, 32, 48)  # of rows whose moments are codes
MOST_MADE_COLUMNS = 48  # of rows whose gradient is made


class DeferredAdam(DeferralTables):
    """The optimizer of one store of rows: its step, its tables and the native kernels that visit rows.

    It holds no rows. Those are passed to each call as CPU tensors: `rows` [N, columns] in any of the forms of
    `RowState`, and `last_step` int32 [N]; a row that has never been updated, or whose optimizer state is reset, has
    moments of zero and last_step = step. `ids` int64 [V] are the rows to visit, strictly increasing, or None for all of
    them. Row i of the visit reads its gradient from row i of `gradients`, or from row gradient_rows[i], and writes its
    value, float32, to row i of `out`, or to row out_rows[i].

    The gradient of harmonics that one camera has seen may be made where a row is visited, of 24 bytes: `gradients` is
    then a `HarmonicsGradient`, whose `means` and `constant` are float32 [V, 3], or [any, 3] with gradient_rows; their
    rows may stand apart. Rows of the store then have at most 48 columns.

    Where moments are pairs or codes they are rounded at random when rows are committed, and values with codes; a row
    that does not lag and has no gradient stays as it is. The value after a step with a gradient is the one that is
    stored, rounded; the value of a row that is only caught up is not rounded in `out`. So it is on a device
    (`offload/adam/rows.py`).

    Each method passes over the memory of the visited rows once. Methods that write different rows may run at the same
    time in several threads; `begin_step` may not run beside any other.

    The kernels read tables in float32, rounded from the float64 sums when a step begins, and C_{t-1} beside C_t: rows
    with a gradient at t skip the steps before it alone. The sums are rounded otherwise than on a device, where a
    product and its addition are one operation, and powers are numpy's: in the last bit of float64, kept so that a run
    that is resumed ends with the bits that it would always have had.
    """

    def __init__(
        self,
        multipliers: Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        threads: int | None = None,
    ) -> None:
        """
        Args:
            multipliers, betas, eps: As for `DeferralTables`.
            threads: Threads of each call; the cores of this process if None.
        """
        self._before = self._after = np.zeros((0, len(multipliers)), np.float32)  # [capacity, schedules] C_{t-1}, C_t
        super().__init__(multipliers, betas, eps, torch.device("cpu"))
        self.threads = num_threads() if threads is None else threads
        self._column_rates = np.zeros(self.columns, np.float32)
        self._before_unchanged, self._unchanged = self._before[:0], self.sums[:, :0]  # what `begin_step` has changed

    @classmethod
    def from_tables(cls, tables: Mapping[str, Tensor], columns: slice = slice(None)) -> DeferredAdam:
        """Build the optimizer that left these tables, or one of some of its columns.

        Raises:
            ValueError: They do not belong together.
        """
        b1, b2 = tables["betas"].tolist()
        adam = cls(tables["multipliers"][:, columns], (b1, b2), tables["eps"].item())
        adam.load_state(tables)
        return adam

    def tables(self) -> dict[str, Tensor]:
        """Copy the tables, as for `DeferralTables`, with the float32 ones as they are."""
        steps = self.step + 1
        rounded = {"before": self._before, "after": self._after}
        return {
            **super().tables(),
            **{name: torch.from_numpy(table[:steps].copy()) for name, table in rounded.items()},
        }

    def undo_step(self) -> None:
        """Take `begin_step` back, as for `DeferralTables`."""
        super().undo_step()
        changed = self._changed
        self._after[changed], self._before[changed] = self._before[changed], self._before_unchanged

    def skipped_steps(self, device: torch.device, *, previous: bool = False) -> SkippedSteps:
        """Copy what `forward` catches rows up with to a device, on its current stream, without waiting.

        Args:
            device: Where rows will be caught up.
            previous: For values before step t began, as of `forward_previous`.
        """
        step, table = self.step - previous, self._before if previous else self._after
        sums = torch.from_numpy(table[: step + 1].T.copy())  # [schedules, steps]
        if device.type == "cuda":
            sums = sums.pin_memory()
        multipliers = self.multipliers.to(device, non_blocking=True)
        return SkippedSteps(sums.to(device, non_blocking=True), multipliers, self._corrected_eps(step), self.reach)

    def commit(
        self,
        rows: RowState,
        last_step: Tensor,
        ids: Tensor | None,
        gradients: Tensor | HarmonicsGradient | None,
        *,
        gradient_rows: Tensor | None = None,
    ) -> None:
        """Bring rows to step t in place: all skipped steps, then step t with its gradient; their last step becomes t.

        Args:
            rows, last_step, ids: See the class.
            gradients: float32 [V, columns] or [any, columns] with gradient_rows, or what they are made of, as the class
                says; None where the gradient is zero.
            gradient_rows: int64 [V].

        Raises:
            ValueError: An argument has the wrong type, shape or layout, an id is out of range or out of order (nothing
                is changed), or some rows were already committed at step t (those are left alone).
        """
        self._visit(rows, last_step, ids, gradients, gradient_rows, store=True)

    def forward(
        self,
        rows: RowState,
        last_step: Tensor,
        ids: Tensor | None,
        out: Tensor,
        gradients: Tensor | HarmonicsGradient | None = None,
        *,
        out_rows: Tensor | None = None,
    ) -> None:
        """Write the values that rows have after step t to `out`; the rows themselves stay as they are.

        Args:
            rows, last_step, ids: See the class.
            out: float32 [V, columns], or [any, columns] with out_rows.
            gradients: As for `commit`.
            out_rows: int64 [V], each row at most once.

        Raises:
            ValueError: As for `commit`.
        """
        self._visit(rows, last_step, ids, gradients, None, out, out_rows, store=False)

    def forward_previous(
        self, rows: RowState, last_step: Tensor, ids: Tensor | None, out: Tensor, *, out_rows: Tensor | None = None
    ) -> None:
        """Write the values that rows had before step t began, for rows that have not been committed since.

        Args:
            rows, last_step, ids, out, out_rows: As for `forward`.

        Raises:
            ValueError: As for `commit`.
        """
        self._visit(rows, last_step, ids, None, None, out, out_rows, store=False, previous=True)

    def commit_and_forward(
        self,
        rows: RowState,
        last_step: Tensor,
        ids: Tensor | None,
        gradients: Tensor | HarmonicsGradient,
        out: Tensor,
        *,
        gradient_rows: Tensor | None = None,
    ) -> None:
        """Do both at once: commit rows and write their new values to `out`. Arguments and errors as for those."""
        self._visit(rows, last_step, ids, gradients, gradient_rows, out, store=True)

    def dense(self, rows: RowState, gradients: Tensor) -> None:
        """Apply ordinary Adam, step t, in place to all rows, none of which has ever skipped a step.

        Args:
            rows: See the class; both moments float32.
            gradients: float32 [N, columns].

        Raises:
            ValueError: An argument has the wrong type, shape or layout.
        """
        self._visit(rows, None, None, gradients, None, store=True)

    def _visit(
        self,
        rows: RowState,
        last_step: Tensor | None,
        ids: Tensor | None,
        gradients: Tensor | HarmonicsGradient | None,
        gradient_rows: Tensor | None,
        out: Tensor | None = None,
        out_rows: Tensor | None = None,
        *,
        store: bool,
        previous: bool = False,
    ) -> None:
        if self.step == 0 and gradients is not None:
            raise ValueError("begin_step comes before the first gradients")
        n = rows.parameters.shape[0]
        v = n if ids is None else ids.shape[0]
        any_size = -1
        self._check_rows(rows, n)
        if last_step is None and len(rows.moments) != 2:
            raise ValueError("dense steps take float32 rows alone")
        _check("last_step", last_step, torch.int32, (n,))
        _check("ids", ids, torch.int64, (v,))
        num_gradients = v if gradient_rows is None else any_size
        dense, made = (None, gradients) if isinstance(gradients, HarmonicsGradient) else (gradients, None)
        _check("gradients", dense, torch.float32, (num_gradients, self.columns))
        if made is not None:
            self._check_made(made, num_gradients)
        _check("gradient_rows", gradient_rows, torch.int64, (v,))
        _check("out", out, torch.float32, (v if out_rows is None else any_size, self.columns))
        _check("out_rows", out_rows, torch.int64, (v,))
        if v == 0:  # empty buffers may have no address, which the kernels would take for an absent one
            return
        native.adam_rows(
            parameters=rows.parameters.detach(),
            moments=list(rows.moments),
            last_step=last_step,
            ids=ids,
            gradients=dense,
            gradient_rows=gradient_rows,
            means=made.means.detach() if made else None,
            constant=made.constant.detach() if made else None,
            position=made.position if made else (),
            harmonics=num_harmonics(made.sh_degree) if made else 0,
            has_constant=made.has_constant if made else False,
            out=out,
            out_rows=out_rows,
            store=store,
            step=self.step - previous,
            skipped=self._after if gradients is None and not previous else self._before,
            decays=self._rounded_decays,
            multipliers=self.multipliers,
            rates=self._column_rates,
            gradient_weight=1 - self.betas[0],
            square_weight=1 - self.betas[1],
            eps=self._corrected_eps(self.step - previous),
            reach=self.reach,
            seed=seed_of(self.step) & 0xFFFFFFFF,
            threads=self.threads,
        )

    def _check_rows(self, rows: RowState, n: int) -> None:
        """Raise ValueError unless rows [n, columns] have a form that the kernels know."""
        kinds: dict[str, torch.dtype]
        if not rows.moments:
            raise ValueError("rows have no moments")
        if len(rows.moments) == 2:
            kinds = {"parameters": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        elif rows.moments[0].dtype == torch.int32:
            kinds = {"parameters": torch.float32, "moments": torch.int32}
        elif self.columns in CODED_COLUMNS:
            kinds = {"parameters": torch.float16, "moments": torch.int16}
        else:
            raise ValueError(f"rows of codes have 16, 32 or 48 columns; these have {self.columns}")
        for tensor, (name, dtype) in zip(rows.tensors(), kinds.items(), strict=True):
            _check(name, tensor, dtype, (n, self.columns), rows_apart=True)

    def _check_made(self, made: HarmonicsGradient, rows: int) -> None:
        """Raise ValueError unless it is as the kernels need it, with so many rows, -1 for any number."""
        _check("means", made.means, torch.float32, (rows, 3), rows_apart=True)
        _check("constant", made.constant, torch.float32, (len(made.means), 3), rows_apart=True)
        columns = 3 * (num_harmonics(made.sh_degree) + made.has_constant)
        if not columns <= self.columns <= MOST_MADE_COLUMNS:
            raise ValueError(
                f"gradients of sh_degree {made.sh_degree} are made in {columns} to {MOST_MADE_COLUMNS} columns; "
                f"rows have {self.columns}"
            )

    def _corrected_rates(self, t: int, learning_rates: Sequence[float]) -> list[float]:
        correction = self._root_correction(t) / (1 - self.betas[0] ** t)
        return [rate * correction for rate in learning_rates]

    def _powers_of_ratio(self, window: int) -> Tensor:
        return torch.from_numpy(self._ratio ** np.arange(window, 0, -1, dtype=np.float64))

    def _add_step(self, changed: slice, rates: Sequence[float]) -> None:
        step_rates, sums = np.array(rates), self.sums.numpy()  # float64
        self._column_rates = (step_rates @ self.multipliers.numpy()).astype(np.float32)
        self._changed, self._unchanged = changed, self.sums[:, changed].clone()
        self._before_unchanged = self._before[changed].copy()
        self._before[changed] = self._after[changed]
        powers = self._ratio_powers.numpy()[len(self._ratio_powers) - (changed.stop - changed.start) :]
        sums[:, changed] += powers * step_rates[:, None]
        self._after[changed] = sums[:, changed].T

    def _sums_unchanged(self) -> Tensor:
        return self._unchanged

    def _load_sums(self, tables: Mapping[str, Tensor], steps: int) -> None:
        super()._load_sums(tables, steps)
        for name, table in (("before", self._before), ("after", self._after)):
            table[:steps] = checked_table(tables, name, (steps, self.schedules)).numpy()

    def _grow(self, capacity: int) -> None:
        super()._grow(capacity)
        self._before, self._after = _longer(self._before, capacity), _longer(self._after, capacity)
        powers = np.power(self.betas, np.arange(capacity, dtype=np.float64)[:, None])  # [capacity, 2]
        powers[powers < np.finfo(np.float32).tiny] = 0  # no denormal numbers: they are slow
        decays = powers.astype(np.float32)
        # 0.999 in float32 is off by 1e-8, and 1000 steps remember it: a third column keeps the rest of b2^k.
        self._rounded_decays = np.column_stack([decays, (powers[:, 1] - decays[:, 1]).astype(np.float32)])


def _longer(table: np.ndarray, capacity: int) -> np.ndarray:
    """Return a table of so many rows that begins with these and goes on with zeros."""
    longer = np.zeros((capacity, table.shape[1]), table.dtype)
    longer[: len(table)] = table
    return longer


def _check(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], *, rows_apart: bool = False
) -> None:
    """Raise ValueError unless the tensor is None or as the kernels need it; -1 in `shape` stands for any size.

    Args:
        rows_apart: The values of a row are contiguous, and the rows may stand apart.
    """
    if tensor is None:
        return
    fits = tensor.ndim == len(shape) and all(b in (a, -1) for a, b in zip(tensor.shape, shape, strict=True))
    contiguous = tensor.is_contiguous() or (rows_apart and fits and _are_rows(tensor))
    if not fits or tensor.dtype != dtype or tensor.device.type != "cpu" or not contiguous:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        layout = "" if contiguous else ", not contiguous"
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)} on the CPU; it is {found}{layout}")


def _are_rows(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]
