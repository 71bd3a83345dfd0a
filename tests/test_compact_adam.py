"""Deferred Adam on the CPU over rows whose moments are pairs or codes, beside what a device does (`adam/rows.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from offload.adam import codes
from offload.adam import rows as row_kernels
from offload.adam.deferral import DeferralTables
from offload.adam.host import DeferredAdam
from offload.adam.rows import float_moments
from offload.store.layout import RowState, packed_rows, packed_words
from tests.test_adam import BETAS, EPS
from tests.test_row_kernels import ROUNDED, HostRows, bounds_of_steps_alike, errors_of_steps_alike, multipliers_of

TINY = torch.finfo(torch.float32).tiny  # what is smaller is zero, or rounded to few bits
STEPS = 100_000  # that have been before
RATES = (3e-3, 1e-3)  # of the schedules
# (group, degree of the harmonics): the rows that there are
PACKED = [("geometry", 3), ("appearance", 3), ("appearance", 2), ("appearance", 1), ("appearance", 0)]


@dataclass
class Twins:
    """The same packed rows twice, with an optimizer on the CPU and one in torch; row i was updated at last_step[i]."""

    group: str
    multipliers: Tensor
    words: Tensor  # [N, words] int32
    last_step: Tensor  # [N] int32
    native: DeferredAdam
    tables: DeferralTables

    @classmethod
    def random(cls, group: str, degree: int, n: int, threads: int = 2) -> Twins:
        """Rows of all ages, up to 100,000 steps, some never updated, some with blocks of zeros."""
        multipliers = multipliers_of(group, "compact", degree)
        native = DeferredAdam(multipliers, BETAS, EPS, threads)
        tables = DeferralTables(multipliers, BETAS, EPS, torch.device("cpu"))
        words = torch.zeros(n, packed_words(group, degree), dtype=torch.int32)
        last_step = (STEPS - 10 ** (5 * torch.rand(n))).int().clamp(min=0)
        twins = cls(group, multipliers, words, last_step, native, tables)
        sizes = 10 ** (-6 * torch.rand(n, 1))  # also of what is denormal as a float16
        twins.rows.parameters.copy_(torch.randn(n, twins.columns) * sizes * twins.updated)
        gradients, ids = twins.gradients(n), torch.arange(n)
        m, v = (1 - BETAS[0]) * gradients, (1 - BETAS[1]) * gradients**2
        random = row_kernels.random_bits(ids, twins.columns, step=7)
        rows = RowState(twins.rows.parameters.float(), twins.rows.moments)
        row_kernels.store_moments(rows, m, v, random, tables.reach)
        for adam in (native, tables):
            adam.load_state({"step_count": torch.tensor(STEPS)})
            adam.begin_step(RATES[: len(multipliers)])
        return twins

    @property
    def columns(self) -> int:
        return self.multipliers.shape[1]

    @property
    def updated(self) -> Tensor:
        """[columns] bool: those with values."""
        return self.multipliers.sum(0) > 0

    @property
    def rows(self) -> RowState:
        return packed_rows(self.words, self.group)

    def gradients(self, count: int) -> Tensor:
        """Gradients of 1e-12 ... 1e3, alike or not alike within a row; some of them, and of the rows, are zero."""
        sizes = 10 ** (15 * torch.rand(count, self.columns) - 12)
        sizes[::3] = sizes[::3, :1]
        sizes[torch.rand(count, self.columns) < 0.1] = 0
        sizes[:, :9] *= torch.rand(count, 1) > 0.1  # a whole degree
        sizes[::17] = 0
        return torch.where(self.updated, torch.randn(count, self.columns) * sizes, 0.0)

    def copy(self) -> tuple[RowState, Tensor]:
        return packed_rows(self.words.clone(), self.group), self.last_step.clone()

    def expected(self, ids: Tensor, gradients: Tensor | None) -> tuple[RowState, Tensor, Tensor]:
        """Visit rows as a device does; return all rows and their last steps after it, and values [V, columns].

        What is denormal in float32 is zero, as in the native kernels.
        """
        torch.set_flush_denormal(True)  # of this thread, which torch does not leave for so few values
        try:
            return self._expected(ids, gradients)
        finally:
            torch.set_flush_denormal(False)

    def _expected(self, ids: Tensor, gradients: Tensor | None) -> tuple[RowState, Tensor, Tensor]:
        rows, last_step = self.copy()
        values = torch.zeros(len(ids), self.columns)
        if gradients is not None:  # what is fetched stands before this step
            self.tables.undo_step()
        row_kernels.fetch_rows(rows, ids, ids, last_step, None, RowState(values, ()), self.tables)
        if gradients is not None:
            self.tables.begin_step(RATES[: len(self.multipliers)])
        seen = values.clone() if gradients is None else values  # what is sent ahead is not rounded
        row_kernels.step_stored_rows(values, ids, last_step, gradients, rows, self.tables)
        return rows, last_step, seen


def some_of(n: int) -> Tensor:
    ids = torch.nonzero(torch.rand(n) < 0.6).squeeze(1)
    return ids if len(ids) else torch.tensor([0])


def assert_same_but_for_ties(actual: RowState, expected: RowState, reach: float) -> None:
    """Compare rows bit for bit, but for few and for the sign of zeros.

    Both sides compute in float32 with operations in another order, so that a value differs in its last bits, here and
    there. Of a value that is rounded at random such a bit tips one of 2^13 over (and where a step is larger than the
    value that it changes, several bits differ); of a code, one of 2^16. A scale that tips over takes all codes of its
    block with it.
    """
    pairs = expected.moments[0].dtype == torch.int32
    if pairs:
        torch.testing.assert_close(actual.parameters, expected.parameters, rtol=1e-6, atol=1e-7)
    else:
        same = actual.parameters == expected.parameters
        assert same.float().mean() > 0.995
        torch.testing.assert_close(actual.parameters, expected.parameters, rtol=2**-10, atol=2**-24)
    (m, v), (other_m, other_v) = (float_moments(rows.moments, reach) for rows in (actual, expected))
    assert (m == other_m).float().mean() > 0.998
    assert (v == other_v).float().mean() > 0.998
    torch.testing.assert_close(v, other_v, rtol=2 * (2**-7 if pairs else codes.STEP_UP), atol=TINY)
    if pairs:
        torch.testing.assert_close(m, other_m, rtol=2 * 2**-7, atol=TINY)
    else:  # the next code's square, and as much as the root is off
        largest = reach * other_v.sqrt()
        gap = (2 * codes.LARGEST_RATIO * (other_m.abs() / largest).sqrt() + 3) / codes.LARGEST_RATIO**2 * largest
        assert ((m - other_m).abs() <= gap + codes.STEP_UP * other_m.abs())[largest > 0].all()


@pytest.mark.parametrize(
    ("group", "degree"), [pytest.param(*each, marks=pytest.mark.slow) if each[1] in (1, 2) else each for each in PACKED]
)
@pytest.mark.parametrize(("n", "threads"), [(1, 1), (7, 2), (8, 1), (601, 2)])
@pytest.mark.parametrize("with_gradients", [True, False], ids=["step", "no gradient"])
def test_rows_become_what_they_become_on_a_device(group, degree, n, threads, with_gradients):
    torch.manual_seed(n)
    twins = Twins.random(group, degree, n, threads)
    ids = some_of(n)
    gradients = twins.gradients(len(ids)) if with_gradients else None
    expected, expected_last_step, expected_values = twins.expected(ids, gradients)
    rows, last_step = twins.copy()
    before, _ = twins.copy()

    values = torch.full((len(ids), twins.columns), 7.0)
    twins.native.forward(rows, last_step, ids, values, gradients)
    torch.testing.assert_close(
        values, expected_values, rtol=2**-10 if with_gradients and group == "appearance" else 2e-6, atol=2e-7
    )
    assert all(map(torch.equal, rows.tensors(), before.tensors()))
    assert torch.equal(last_step, twins.last_step)

    twins.native.commit(rows, last_step, ids, gradients)
    assert torch.equal(last_step, expected_last_step)
    assert_same_but_for_ties(rows, expected, twins.tables.reach)
    others = torch.ones(n, dtype=torch.bool)
    others[ids] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(rows.tensors(), before.tensors(), strict=True))
    if gradients is not None:  # what is forwarded is what is stored, rounded
        assert torch.equal(rows.parameters[ids].float(), values)
        both, stamps = twins.copy()
        twins.native.commit_and_forward(both, stamps, ids, gradients, out := torch.empty_like(values))
        assert all(map(torch.equal, both.tensors(), rows.tensors()))
        assert torch.equal(out, values)


@pytest.mark.parametrize(("group", "degree"), PACKED)
def test_columns_without_values_hold_scales_and_zeros(group, degree):
    torch.manual_seed(0)
    twins = Twins.random(group, degree, 100)
    twins.native.commit(twins.rows, twins.last_step, None, twins.gradients(100))
    assert not twins.rows.parameters[:, ~twins.updated].any()
    assert not twins.rows.moments[0][:, twins.updated.sum() + (degree if group == "appearance" else 0) :].any()


@pytest.mark.parametrize(("group", "degree"), PACKED[:2])
def test_values_before_the_step_that_has_begun(group, degree):
    torch.manual_seed(0)
    twins = Twins.random(group, degree, 301)
    ids, out = some_of(301), torch.empty(0)
    expected = torch.empty(len(ids), twins.columns)
    twins.native.undo_step()
    twins.native.forward(twins.rows, twins.last_step, ids, expected)
    twins.native.begin_step(RATES[: len(twins.multipliers)])
    out = torch.empty_like(expected)
    twins.native.forward_previous(twins.rows, twins.last_step, ids, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("group", "degree"), PACKED[:2])
def test_rows_that_do_not_lag_are_not_rounded_again(group, degree):
    torch.manual_seed(0)
    twins = Twins.random(group, degree, 300)
    twins.native.commit(twins.rows, twins.last_step, torch.arange(0, 300, 2), twins.gradients(150))
    before = twins.words.clone()
    twins.native.commit(twins.rows, twins.last_step, None, None)
    assert torch.equal(twins.words[::2], before[::2])
    assert (twins.words[1::2] != before[1::2]).any(1).float().mean() > 0.9
    assert (twins.last_step == twins.native.step).all()
    before = twins.words.clone()
    twins.native.commit(twins.rows, twins.last_step, None, None)
    assert torch.equal(twins.words, before)


@pytest.mark.parametrize(("group", "degree"), PACKED[:2])
def test_neither_threads_nor_the_order_of_visits_matter(group, degree):
    torch.manual_seed(0)
    twins = Twins.random(group, degree, 3000)
    ids = some_of(3000)
    gradients, results = twins.gradients(len(ids)), []
    for threads in (1, 2, 5):
        twins.native.threads = threads
        rows, last_step = twins.copy()
        twins.native.commit(rows, last_step, ids, gradients)
        results.append(rows)
    rows, last_step = twins.copy()
    for part in (slice(701, None), slice(0, 701)):
        twins.native.commit(rows, last_step, ids[part], gradients[part])
    for other in (*results[1:], rows):
        assert all(map(torch.equal, results[0].tensors(), other.tensors()))


@pytest.mark.parametrize(("group", "degree"), PACKED[:2])
def test_rows_of_staging_buffers_at_any_alignment(group, degree):
    torch.manual_seed(0)
    twins = Twins.random(group, degree, 100)
    ids, columns = torch.arange(0, 100, 3), twins.columns
    staged = twins.gradients(50)
    gradient_rows, out_rows = torch.randperm(50)[: len(ids)], torch.randperm(60)[: len(ids)]
    expected, last_step = twins.copy()
    twins.native.commit_and_forward(
        expected, last_step, ids, staged[gradient_rows], values := torch.empty(len(ids), columns)
    )
    memory = torch.empty(60 * columns + 3)
    for offset in range(4):
        out = memory[offset : offset + 60 * columns].view(60, columns)
        rows, last_step = twins.copy()
        twins.native.forward(rows, last_step, ids, out, staged[gradient_rows], out_rows=out_rows)
        assert torch.equal(out[out_rows], values)
        out = out[: len(ids)]
        twins.native.commit_and_forward(rows, last_step, ids, staged, out, gradient_rows=gradient_rows)
        assert torch.equal(out, values)
        assert all(map(torch.equal, rows.tensors(), expected.tensors()))


class NativeRows(HostRows):
    """Packed rows that the CPU's kernels update."""

    def __init__(self, n: int, group: str) -> None:
        super().__init__(n, group, BETAS, "torch", "cpu", "compact")
        self.native = DeferredAdam(self.multipliers, BETAS, EPS)

    def step(self, ids: Tensor, gradients: Tensor, learning_rates: list[float]) -> None:
        self.native.begin_step(learning_rates)
        self.tables.begin_step(learning_rates)  # for `current`
        self.native.commit(self.state, self.last_step, ids, gradients)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "group"), ROUNDED[1:])
def test_what_is_rounded_is_right_on_average(form, group):
    """Where gradients stay alike, steps change moments, and float16, by less than they hold; the mean must follow."""
    torch.manual_seed(0)
    errors = errors_of_steps_alike(NativeRows(64, group), 700)
    bounds = bounds_of_steps_alike(form, group, 700)
    assert all(errors[name] < bound for name, bound in bounds.items()), errors


def test_pairs_need_not_be_packed():
    """Any number of columns, and moments in a tensor of their own."""
    torch.manual_seed(0)
    n, columns = 50, 13
    multipliers = torch.rand(2, columns)
    adam, tables = DeferredAdam(multipliers, BETAS, EPS), DeferralTables(multipliers, BETAS, EPS, torch.device("cpu"))
    rows, expected = (RowState(torch.ones(n, columns), (torch.zeros(n, columns).int(),)) for _ in range(2))
    last_step, expected_last_step, ids = torch.zeros(n).int(), torch.zeros(n).int(), torch.arange(n)
    for _ in range(3):
        gradients = torch.randn(n, columns)
        for each in (adam, tables):
            each.begin_step(RATES)
        adam.commit(rows, last_step, None, gradients)
        row_kernels.step_rows(expected, ids, expected_last_step, gradients, tables)
    assert_same_but_for_ties(rows, expected, tables.reach)


@pytest.mark.parametrize(
    ("parameters", "moments", "message"),
    [
        (torch.zeros(3, 48), (torch.zeros(3, 48).short(),), "parameters must be contiguous torch.float16"),
        (torch.zeros(3, 48).half(), (torch.zeros(3, 48).int(),), "parameters must be contiguous torch.float32"),
        (torch.zeros(3, 48).half(), (torch.zeros(2, 48).short(),), r"moments must be .* \[3, 48\]"),
        (torch.zeros(3, 96).half()[:, ::2], (torch.zeros(3, 48).short(),), "not contiguous"),
        (torch.zeros(1, 48).half().expand(3, 48), (torch.zeros(3, 48).short(),), "not contiguous"),
        (torch.zeros(3, 48).half(), (torch.zeros(3, 48).half(),), "moments must be contiguous torch.int16"),
        (torch.zeros(3, 48), (), "rows have no moments"),
    ],
)
def test_rows_of_other_forms_are_refused(parameters, moments, message):
    adam = DeferredAdam(torch.ones(1, 48), BETAS, EPS)
    adam.begin_step([1e-3])
    with pytest.raises(ValueError, match=message):
        adam.commit(RowState(parameters, moments), torch.zeros(3).int(), None, torch.zeros(3, 48))


def test_rows_of_codes_have_whole_lines_and_no_dense_steps():
    adam = DeferredAdam(torch.ones(1, 45), BETAS, EPS)
    adam.begin_step([1e-3])
    rows = RowState(torch.zeros(3, 45).half(), (torch.zeros(3, 45).short(),))
    with pytest.raises(ValueError, match="16, 32 or 48 columns; these have 45"):
        adam.commit(rows, torch.zeros(3).int(), None, torch.zeros(3, 45))
    adam = DeferredAdam(torch.ones(1, 48), BETAS, EPS)
    adam.begin_step([1e-3])
    with pytest.raises(ValueError, match="dense steps take float32 rows alone"):
        adam.dense(packed_rows(torch.zeros(3, 48).int(), "appearance"), torch.zeros(3, 48))
