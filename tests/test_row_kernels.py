"""Rows that a device updates in host memory, in torch and in Triton, against dense `torch.optim.Adam` in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.adam import codes
from offload.adam import rows as row_kernels
from offload.adam.bfloat16 import pack, random_bits, unpack
from offload.adam.deferral import DeferralTables
from offload.adam.rows import float_moments
from offload.store.layout import GROUP_NAMES, PackedRows, ResidentRows, RowState, num_columns, packed_rows, packed_words
from offload.store.memory import HostArray
from tests.test_adam import APPEARANCE, EPS, GEOMETRY, DenseOracle, largest_row_error
from tests.tight_rows import in_other_form, same_rows
from tests.triton_places import ON_GPU, WITHOUT_GPU

BETAS = (0.9, 0.999)


def kernels_of(kind: str):
    if kind == "torch":
        return row_kernels
    from offload.adam import rows_triton as row_kernels_triton

    return row_kernels_triton


MOMENT_TYPES = {"float32": (torch.float32, torch.float32), "bfloat16": (torch.int32,)}
APART = ["float32", "bfloat16"]  # forms of rows: the moments of those that lie apart from their parameters
FORMS = [*APART, "compact"]  # or rows that are packed
# Of packed rows: the group, and the degree of the harmonics.
PACKED = [("geometry", 3), ("appearance", 3), ("appearance", 2), ("appearance", 1), ("appearance", 0)]
# In a compact store the constant colour goes with geometry.
COMPACT_GEOMETRY = torch.zeros(2, 16)
COMPACT_GEOMETRY[0, :3] = 1.0
COMPACT_GEOMETRY[1, 3:14] = torch.tensor([0.5] * 3 + [0.1] * 4 + [5.0] + [0.3] * 3)


def multipliers_of(group: str, form: str, degree: int = 3) -> Tensor:
    """Relative learning rates of the columns of rows; those at `degree` 3 are all that other forms have here."""
    if form != "compact":
        return {"appearance": APPEARANCE, "geometry": GEOMETRY}[group]
    if group == "geometry":
        return COMPACT_GEOMETRY
    multipliers = torch.zeros(1, num_columns(group, degree, "compact"))
    multipliers[:, : codes.num_values(degree)] = 1.0
    return multipliers


class HostRows:
    """N rows in pinned host memory, and the kernels that update them."""

    def __init__(
        self,
        n: int,
        group: str,
        betas: tuple[float, float],
        kind: str,
        device: str,
        form: str = "float32",
        degree: int = 3,
    ) -> None:
        # torch's own operations on a GPU cannot read pinned memory, so their rows lie on the device (through a clone,
        # since a copy must not cross the border of two pinned parts).
        self.kind, self.device, self.kernels = kind, device, kernels_of(kind)
        self.group, self.form, self.multipliers = group, form, multipliers_of(group, form, degree)
        self.columns = self.multipliers.shape[1]
        if form == "compact":
            shapes = [(packed_words(group, degree), torch.int32)]
        else:
            shapes = [(self.columns, dtype) for dtype in (torch.float32, *MOMENT_TYPES[form])]
        self.arrays = [self.array(n, *shape) for shape in shapes]
        if kind == "torch":
            self.arrays = [array.clone().to(device) for array in self.arrays]
        self.state = self.state_of(self.arrays)
        self.last_step = torch.zeros(n, dtype=torch.int32, device=device)
        self.tables = DeferralTables(self.multipliers, betas, EPS, torch.device(device))

    def array(self, n: int, columns: int, dtype: torch.dtype) -> Tensor:
        array = HostArray(columns, max_rows=n, dtype=dtype, pin=self.device == "cuda")
        array.resize(n)
        return array.tensor

    def state_of(self, arrays: list[Tensor]) -> RowState:
        if self.form == "compact":
            return packed_rows(arrays[0], self.group)
        return RowState(arrays[0], tuple(arrays[1:]))

    def whole_lines(self) -> RowState:
        """Copy the rows as lines of 64 bytes, in pinned memory where these are."""
        copies = []
        for tensor in self.arrays:
            rows, columns = tensor.shape
            copy = self.array(rows, -(-columns // 16) * 16, tensor.dtype)
            if self.kind == "torch":
                copy = copy.clone().to(self.device)
            copy[:, :columns] = tensor
            copies.append(copy)
        return self.state_of(copies)

    def fill(self, values: Tensor) -> None:
        """Set parameters [n, columns], but those of columns without any."""
        self.state.parameters.copy_(values * (self.multipliers.sum(0) > 0))

    def copy_from(self, other: HostRows) -> None:
        """Take the rows of another, bit for bit, and the steps that it has had."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for array, theirs in zip([*self.arrays, self.last_step], [*other.arrays, other.last_step], strict=True):
            array.copy_(theirs.clone())
        self.tables.load_state(other.tables.tables())

    @property
    def stored(self) -> PackedRows:
        return self.arrays[0], self.last_step

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of `state`, once the device has done what it was given: it writes into pinned memory."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.state.tensors()

    def packed(self, words: Tensor) -> RowState:
        return packed_rows(words, self.group)

    def begin_step(self) -> None:
        self.tables.begin_step([1e-2, 4e-3][: len(self.multipliers)])

    def step(self, ids: Tensor, gradients: Tensor, learning_rates: list[float]) -> None:
        """One step of a view, as the trainer does it: fetch, begin the step, update, write back."""
        ids, gradients = ids.to(self.device), gradients.to(self.device)
        if self.form == "compact":
            words, last_step = self.view(ids)
            values = self.values(words, last_step)
            self.tables.begin_step(learning_rates)
            self.kernels.step_view_rows(values, ids, last_step, gradients, self.packed(words), self.tables)
            self.kernels.write_packed_rows([(words, last_step)], ids, None, [self.stored])
            return
        rows = self.fetched(ids)
        self.tables.begin_step(learning_rates)
        self.kernels.step_rows(rows, ids, self.last_step, gradients, self.tables)
        self.kernels.write_rows(rows, ids, None, self.state)

    def view(self, ids: Tensor, wanted: Tensor | None = None) -> PackedRows:
        """Packed rows on the device, and the steps of their last updates; those that are not wanted are zero."""
        words = torch.zeros(len(ids), self.arrays[0].shape[1], dtype=torch.int32, device=self.device)
        last_step = torch.zeros(len(ids), dtype=torch.int32, device=self.device)
        self.kernels.read_packed_rows([self.stored], ids, wanted, [(words, last_step)])
        return words, last_step

    def values(self, words: Tensor, last_step: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Current values [V, columns] of packed rows on the device; zero where they are not wanted."""
        values = self.zeros(len(words))
        self.kernels.fetch_dated_rows(self.packed(words), None, last_step, wanted, RowState(values, ()), self.tables)
        return values

    def zeros(self, count: int) -> Tensor:
        return torch.zeros(count, self.columns, device=self.device)

    def new_rows(self, count: int) -> RowState:
        """Rows of zeros on the device."""
        rows = self.state.new_empty(count, torch.device(self.device))
        for tensor in rows.tensors():
            tensor.zero_()
        return rows

    def fetched(self, ids: Tensor, wanted: Tensor | None = None) -> RowState:
        """Rows on the device with their moments; those that are not wanted are zero."""
        rows = self.new_rows(len(ids))
        self.kernels.fetch_rows(self.state, ids, ids, self.last_step, wanted, rows, self.tables)
        return rows

    def current(self) -> RowState:
        """All rows after the last step, moments in float32 (where rounded, once more)."""
        ids, last_step = torch.arange(len(self.last_step), device=self.device), self.last_step.clone()
        if self.form == "compact":
            words, _ = self.view(ids)
            parameters, rows = self.values(words, last_step), self.packed(words)
            row_kernels.step_view_rows(parameters, ids, last_step, None, rows, self.tables)
        else:
            rows = self.fetched(ids)
            parameters = rows.parameters
            row_kernels.catch_up_rows(rows, ids, last_step, self.tables)
        moments = float_moments(rows.moments, self.tables.reach)
        return RowState(parameters.cpu(), tuple(moment.cpu() for moment in moments))


def assert_same_rows(actual: Tensor, expected: Tensor, *, exact: bool, rounded: bool = False) -> None:
    """Compare parameters or moments that one step has made of the same bits, on any device.

    Where operations are fused or approximated (`exp2` and `log2` on a GPU) their last bit differs, and what is rounded
    at random then falls to the other side, here and there: a value to the next float16, a moment to the next code. More
    steps would drive such rows apart: another second moment changes the next step.

    Args:
        actual, expected: Of a `RowState`.
        exact: Whether every bit is the same.
        rounded: Whether parameters are rounded to float16.
    """
    actual, expected = actual.cpu(), expected.cpu()
    if exact:
        assert torch.equal(actual, expected)
        return
    few = 1 + actual.numel() / 100
    if actual.dtype == torch.int16:
        assert (actual != expected).sum() <= few
        assert_neighbouring_codes(actual, expected)
    elif actual.dtype == torch.int32:
        assert (actual != expected).sum() <= few
        for moment, other in zip(unpack(actual), unpack(expected), strict=True):
            torch.testing.assert_close(moment, other, rtol=2 * 2**-7, atol=1e-5)
    else:
        tolerance = {"rtol": 2**-10, "atol": 2**-24} if rounded else {"rtol": 2e-6, "atol": 1e-7}
        torch.testing.assert_close(actual.float(), expected.float(), **tolerance)
        assert not rounded or (actual != expected).sum() <= 5 * few


def assert_neighbouring_codes(actual: Tensor, expected: Tensor) -> None:
    """Compare codes and the scales behind them, int16 [rows, columns]: codes of second moments differ by one at most.

    The next code's root is 4 % larger. A first moment is kept as its ratio to that, by a code up to 127 of the ratio's
    root, which becomes 2 % smaller: up to 3 codes, and rounding one more.
    """
    values = codes.num_values(codes.degree_of(actual.shape[1]))
    assert torch.equal(actual[:, values:], expected[:, values:])
    (second, first), (other_second, other_first) = ((words >> 8 & 0xFF, words & 0x7F) for words in (actual, expected))
    assert ((second - other_second).abs() <= 1).all()
    assert ((first - other_first).abs() <= 4).all()
    assert not ((actual ^ expected) & 0x80)[(first > 4) | (other_first > 4)].any()  # the sign


def random_host_rows(kind: str, device: str, group: str, form: str, degree: int = 3, n: int = 300) -> HostRows:
    """Rows with moments and last_step of all ages; the same bits for all kinds, on any device."""
    host, made = (HostRows(n, group, BETAS, *where, form, degree) for where in ((kind, device), ("torch", "cpu")))
    made.fill(torch.randn(n, made.columns))
    for _ in range(6):
        ids = torch.nonzero(torch.rand(n) < 0.3).squeeze(1)
        made.step(ids, torch.randn(len(ids), made.columns), [1e-2] * len(made.multipliers))
    host.copy_from(made)
    return host


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize("batch", [1, 4])
def test_sparse_steps_equal_dense_adam(kind, device, group, batch):
    torch.manual_seed(0)
    steps = 1000 if device == "cuda" else 400 if kind == "torch" else 100
    betas = (BETAS[0] ** batch, BETAS[1] ** batch)
    n, host = 120, HostRows(120, group, betas, kind, device)
    multipliers, columns = host.multipliers, host.columns
    host.state.parameters.copy_(torch.randn(n, columns))
    oracle = DenseOracle(host.state.parameters.cpu(), betas, multipliers)
    visible = 10 ** -(3.2 * torch.rand(n))  # gaps from 1 step to all of them
    for step in range(1, steps + 1):
        rates = 1e-2 * 0.01 ** (step / steps) * (0.5 + torch.rand(len(multipliers)).double())
        mask = torch.rand(n) < visible
        mask[0] = step in (1, steps)
        mask |= step == 1
        ids = torch.nonzero(mask).squeeze(1)
        gradients = torch.randn(len(ids), columns) * 10 ** (-8 * torch.rand(len(ids), 1))
        host.step(ids, gradients, rates.tolist())
        dense = torch.zeros(n, columns)
        dense[ids] = gradients
        oracle.step(dense, rates @ multipliers.double())
    assert host.last_step.min() < steps - steps // 3
    current = host.current()
    parameters, exp_avg, exp_avg_sq = oracle.state()
    updated = multipliers.sum(0) > 0
    assert largest_row_error(current.parameters[:, updated], parameters[:, updated]) < 5e-6
    # The first moment falls below float32 where a row has been left alone for a thousand steps.
    assert (current.moments[0].double() - exp_avg).norm() < 1e-6 * exp_avg.norm()
    assert largest_row_error(current.moments[1], exp_avg_sq) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("form", APART)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize("count", [1, 79, 300])
def test_triton_equals_torch(kind, device, group, count, form):
    """Try each kernel alone, with rows that are not wanted: what must not be touched stays bit for bit."""
    results = []
    for each, place in (("torch", "cpu"), (kind, device)):
        torch.manual_seed(count)
        host = random_host_rows(each, place, group, form)
        kernels, tables, columns = host.kernels, host.tables, host.columns
        ids = torch.randperm(300)[:count].sort().values.to(place)
        wanted = (torch.rand(count) < 0.6).to(place)
        fetched = host.fetched(ids, wanted)
        values = host.zeros(count)
        kernels.fetch_rows(host.state, ids, ids, host.last_step, None, RowState(values, ()), tables)
        rows = host.fetched(ids)
        places = torch.randint(count, (count // 2,)).sort().values.to(place)
        again = host.new_rows(count // 2)  # from rows on the device
        kernels.fetch_rows(rows, places, ids[places], host.last_step, None, again, tables)
        host.begin_step()
        kernels.step_rows(rows, ids, host.last_step, torch.randn(count, columns).to(place), tables)
        sources = torch.where(torch.rand(2 * count) < 0.5, torch.randint(count, (2 * count,)), -1).to(place)
        moved = host.new_rows(2 * count)
        kernels.move_rows(rows, sources, moved)
        kernels.write_rows(rows, ids, wanted, host.state)
        states = [tensor.cpu() for state in (fetched, again, rows, moved, host) for tensor in state.tensors()]
        results.append(([*states, values.cpu()], host.last_step.cpu()))
    for actual, expected in zip(results[1][0], results[0][0], strict=True):
        assert torch.equal(actual == 0, expected == 0)
        assert_same_rows(actual, expected, exact=device == "cpu" and actual.dtype == torch.int32)
    assert torch.equal(results[1][1], results[0][1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
@pytest.mark.parametrize(("group", "degree"), PACKED)
@pytest.mark.parametrize("count", [1, 79, 300])
@pytest.mark.parametrize("gradient", [True, False], ids=["step", "no gradient"])
def test_triton_equals_torch_for_packed_rows(kind, device, group, degree, count, gradient):
    """Try each kernel alone, over rows of a store and of a view; what must not be touched stays bit for bit."""
    results = []
    for each, place in (("torch", "cpu"), (kind, device)):
        torch.manual_seed(count)
        host = random_host_rows(each, place, group, "compact", degree)
        kernels, tables, columns = host.kernels, host.tables, host.columns
        ids = torch.randperm(300)[:count].sort().values.to(place)
        wanted = (torch.rand(count) < 0.6).to(place)
        words, last_step = host.view(ids)
        some, values = host.values(words, last_step, wanted), host.values(words, last_step)
        resident = host.zeros(count)
        kernels.fetch_rows(host.state, ids, ids, host.last_step, None, RowState(resident, ()), tables)
        places = torch.randint(count, (count // 2,)).to(place)
        again = host.zeros(count // 2)
        kernels.fetch_rows(host.packed(words), places, ids[places], host.last_step, None, RowState(again, ()), tables)
        fetched = [some.clone(), values.clone(), resident.clone(), again]
        gradients = None
        if gradient:
            host.begin_step()
            gradients = torch.randn(count, columns).to(place)
        kernels.step_view_rows(values, ids, last_step, gradients, host.packed(words), tables)
        dated = host.last_step.clone()
        dated[ids] = tables.step
        kernels.step_stored_rows(resident, ids, host.last_step, gradients, host.state, tables)
        assert torch.equal(host.last_step, dated)
        assert (last_step == tables.step).all()
        stepped = [*host.packed(words).tensors(), values, resident, *host.tensors()]
        results.append([[tensor.cpu() for tensor in tensors] for tensors in (fetched, stepped)])
    for actual, expected in zip(results[1][0], results[0][0], strict=True):
        assert torch.equal(actual == 0, expected == 0)
        assert_same_rows(actual, expected, exact=False)
    for actual, expected in zip(results[1][1], results[0][1], strict=True):
        assert torch.equal(actual == 0, expected == 0)
        exact = device == "cpu" and actual.dtype == torch.int32
        assert_same_rows(actual, expected, exact=exact, rounded=group == "appearance")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_a_retained_row_is_a_row_that_went_to_the_host_and_back(kind, device, group, form):
    torch.manual_seed(0)
    host = random_host_rows(kind, device, group, form)
    ids = torch.arange(0, 300, 7, device=device)
    gradients = torch.randn(len(ids), host.columns).to(device)
    if form != "compact":
        rows = host.fetched(ids)
        host.begin_step()
        host.kernels.step_rows(rows, ids, host.last_step, gradients, host.tables)
        host.kernels.write_rows(rows, ids, None, host.state)
        for actual, expected in zip(host.fetched(ids).tensors(), rows.tensors(), strict=True):
            assert torch.equal(actual, expected)
        return
    words, last_step = host.view(ids)
    values = host.values(words, last_step)
    host.begin_step()
    host.kernels.step_view_rows(values, ids, last_step, gradients, host.packed(words), host.tables)
    host.kernels.write_packed_rows([(words, last_step)], ids, None, [host.stored])
    sources = torch.randint(-1, len(ids), (100,)).to(device)  # of the next view
    retained, here = torch.zeros(100, words.shape[1], dtype=torch.int32, device=device), sources >= 0
    host.kernels.move_rows(RowState(words, ()), sources, RowState(retained, ()))
    assert not retained[~here].any()
    back, back_last_step = host.view(ids[sources], here)
    assert torch.equal(retained, back)
    assert torch.equal(back_last_step, torch.where(here, host.tables.step, 0).int())
    # And what was stepped is what is seen of it.
    assert torch.equal(host.values(back, back_last_step, here), values[sources] * here[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("form", APART)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize("gradient", [True, False], ids=["step", "no gradient"])
def test_a_step_on_the_host_is_that_of_rows_that_come_and_go(kind, device, group, form, gradient):
    """Bit for bit on the CPU: parameters alone come, with their last steps, and rows on the host fill whole lines."""
    torch.manual_seed(0)
    host = random_host_rows(kind, device, group, form)
    kernels, tables, columns = host.kernels, host.tables, host.columns
    wide = host.whole_lines()
    ids = torch.arange(0, 300, 7, device=device)
    last_step = host.last_step[ids]
    rows = host.fetched(ids)
    parameters = host.zeros(len(ids))
    wanted = (torch.arange(len(ids)) % 3 > 0).to(device)
    kernels.fetch_dated_rows(wide, ids, last_step, wanted, RowState(parameters, ()), tables)
    assert torch.equal(parameters, rows.parameters * wanted[:, None])
    kernels.move_rows(
        RowState(rows.parameters, ()),
        torch.where(wanted, -1, torch.arange(len(ids), device=device)),
        RowState(parameters, ()),
    )
    assert torch.equal(parameters, rows.parameters)
    if gradient:
        host.begin_step()
        gradients = torch.randn(len(ids), columns).to(device)
        kernels.step_rows(rows, ids, host.last_step, gradients, tables)
    else:
        gradients = None
        kernels.catch_up_rows(rows, ids, host.last_step, tables)
    kernels.write_rows(rows, ids, None, host.state)
    kernels.step_host_rows(parameters, ids, last_step, gradients, wide, tables)
    exact = device == "cpu"
    assert_same_rows(parameters, rows.parameters, exact=exact)
    for actual, expected in zip(wide.tensors(), host.tensors(), strict=True):
        assert not actual[:, columns:].any()
        assert_same_rows(actual[:, :columns], expected, exact=exact)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize(("group", "degree"), PACKED)
@pytest.mark.parametrize("gradient", [True, False], ids=["step", "no gradient"])
def test_a_step_in_the_store_is_that_of_packed_rows_that_come_and_go(kind, device, group, degree, gradient):
    """Bit for bit on the CPU."""
    torch.manual_seed(0)
    resident, host = (random_host_rows(kind, device, group, "compact", degree) for _ in range(2))
    host.copy_from(resident)
    ids = torch.arange(0, 300, 7, device=device)
    last_step, values = resident.last_step[ids], resident.zeros(len(ids))
    resident.kernels.fetch_rows(
        resident.state, ids, ids, resident.last_step, None, RowState(values, ()), resident.tables
    )
    words, view_last_step = host.view(ids)
    assert torch.equal(view_last_step, last_step)
    view_values = host.values(words, view_last_step)
    assert_same_rows(view_values, values, exact=device == "cpu")
    gradients = None
    if gradient:
        gradients = torch.randn(len(ids), host.columns).to(device)
        for rows in (resident, host):
            rows.begin_step()
    resident.kernels.step_stored_rows(values, ids, resident.last_step, gradients, resident.state, resident.tables)
    host.kernels.step_view_rows(view_values, ids, view_last_step, gradients, host.packed(words), host.tables)
    host.kernels.write_packed_rows([(words, view_last_step)], ids, None, [host.stored])
    exact, has_codes = device == "cpu", group == "appearance"
    assert_same_rows(view_values, values, exact=exact, rounded=has_codes)
    for actual, expected in zip(host.tensors(), resident.tensors(), strict=True):
        assert_same_rows(actual, expected, exact=exact, rounded=has_codes)
    assert torch.equal(host.last_step, resident.last_step)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("count", [1, 79, 300])
def test_tight_rows_are_read_and_stepped_as_others(kind, device, count):
    """Bit for bit on the CPU, over steps with gaps: a column has the same random bits, and no row those of another."""
    torch.manual_seed(count)
    host = random_host_rows(kind, device, "geometry", "compact", n=count)
    kernels, tables, exact = host.kernels, host.tables, device == "cpu"

    def gradients_of(ids: Tensor) -> Tensor:
        return torch.randn(len(ids), host.columns).to(device) * (host.multipliers.sum(0) > 0).to(device)

    for tensor in host.state.tensors():
        tensor[:, 14:] = 0  # which the gradients of other tests have reached, and those of training never do
    words, tight_step = in_other_form(host.arrays[0]).to(device), host.last_step.clone()
    tight, places = packed_rows(words, "geometry"), torch.arange(count, device=device)
    assert words.shape[1] == 28
    for step in range(24):
        ids = places[(torch.rand(count) < 0.4).to(device)]
        wanted = (torch.rand(len(ids)) < 0.6).to(device) if step % 5 == 0 else None
        gradients = None
        values = []
        for rows, last_step in ((host.state, host.last_step), (tight, tight_step)):
            values.append(host.zeros(len(ids)))
            kernels.fetch_rows(rows, ids, ids, last_step, wanted, RowState(values[-1], ()), tables)
        assert_same_rows(values[1], values[0], exact=exact)
        if step % 3:  # a step, with values or without; else rows catch up
            host.begin_step()
            gradients = gradients_of(ids)
        given = values if wanted is None and step % 4 else [None, None]
        of_both = ((host.state, host.last_step), (tight, tight_step))
        for some, (rows, last_step) in zip(given, of_both, strict=True):
            kernels.step_stored_rows(some, ids, last_step, gradients, rows, tables)
        if exact:
            assert same_rows(words, host.arrays[0]), step
        else:
            whole = in_other_form(words)
            for actual, expected in zip(host.packed(whole).tensors(), host.tensors(), strict=True):
                assert_same_rows(actual, expected, exact=False)
            words.copy_(in_other_form(host.arrays[0]))
        if given[0] is not None:
            assert_same_rows(values[1], values[0], exact=exact)
        assert torch.equal(tight_step, host.last_step)
    in_view = words.clone()  # kernels of a view are the same
    view, whole_view = packed_rows(in_view, "geometry"), host.arrays[0].clone().to(device)
    host.begin_step()
    gradients = gradients_of(places)
    for rows in (view, host.packed(whole_view)):
        kernels.step_view_rows(None, places, host.last_step.clone(), gradients, rows, tables)
    assert not exact or same_rows(in_view, whole_view)


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_tight_rows_are_not_copied(kind, device):
    """What copies rows between stores and views would take parts of other rows."""
    host, ids = HostRows(10, "geometry", BETAS, kind, device, "compact"), torch.arange(10, device=device)
    tight = in_other_form(host.arrays[0]).to(device), host.last_step.clone()
    whole = host.arrays[0].clone().to(device), host.last_step.clone()
    for source, target in ((host.stored, tight), (tight, whole), (tight, tight)):
        for copy in (host.kernels.read_packed_rows, host.kernels.write_packed_rows):
            with pytest.raises(ValueError, match="cannot be copied"):
                copy([source], ids, None, [target])
    if kind == "triton":
        halves = tight[0].view(torch.float32).view(20, 14)
        with pytest.raises(ValueError, match="vectors of four"):
            host.kernels.move_rows(RowState(halves, ()), ids, RowState(torch.empty_like(halves[:10]), ()))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("group", GROUP_NAMES)
def test_packed_rows_that_lag_by_no_step_stay_as_they_are(kind, device, group):
    """Bit for bit, though codes would be drawn anew: catching up again and again must not wear rows out."""
    torch.manual_seed(0)
    host = random_host_rows(kind, device, group, "compact")
    ids = torch.arange(300, device=device)
    (before, last_step), (in_view, _) = host.view(ids), host.view(ids)
    lags = last_step < host.tables.step
    assert 0 < lags.sum() < 300
    values = host.values(before, last_step)
    host.kernels.step_stored_rows(values.clone(), ids, host.last_step, None, host.state, host.tables)
    host.kernels.step_view_rows(values, ids, last_step, None, host.packed(in_view), host.tables)
    in_store, dated = host.view(ids)
    assert (dated == host.tables.step).all()
    assert (last_step == host.tables.step).all()
    for after in (in_store, in_view):
        changed = (after != before).any(1)
        assert changed[lags].any()
        assert not changed[~lags].any()
    once = in_view.clone()
    host.kernels.step_view_rows(values, ids, last_step, None, host.packed(in_view), host.tables)
    assert torch.equal(in_view, once)


def any_rows(groups: list[tuple[str, int]], count: int, device: str) -> list[PackedRows]:
    """Packed rows of groups and degrees, of any bits."""
    shapes = [(count, packed_words(group, degree)) for group, degree in groups]
    bits = [[torch.randint(-(2**31), 2**31, shape).int() for shape in (each, each[:1])] for each in shapes]
    return [(words.to(device), last_step.to(device)) for words, last_step in bits]


def clones(rows: list[PackedRows]) -> list[PackedRows]:
    return [(words.clone(), last_step.clone()) for words, last_step in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize(
    "groups", [*([each] for each in PACKED), [("geometry", 3), ("appearance", 3)], [("geometry", 3), ("appearance", 1)]]
)
@pytest.mark.parametrize("some", [False, True], ids=["all", "wanted"])
@pytest.mark.parametrize("count", [0, 1, 256, 2999])
def test_packed_rows_are_copied_as_they_are(kind, device, groups, some, count):
    """Of one group or both; more rows than thread blocks take at once, and tiles that are not full."""
    torch.manual_seed(0)
    n, kernels = 3000, kernels_of(kind)

    ids = torch.randperm(n)[:count].sort().values.to(device)
    wanted = (torch.rand(count) < 0.6).to(device) if some else None
    chosen = torch.ones(count, dtype=torch.bool, device=device) if wanted is None else wanted
    store, view = any_rows(groups, n, device), any_rows(groups, count, device)
    read, written = clones(view), clones(store)
    kernels.read_packed_rows(store, ids, wanted, read)
    kernels.write_packed_rows(view, ids, wanted, written)
    for in_store, in_view, was_read, was_written in zip(store, view, read, written, strict=True):
        for stored, seen, actual, actual_stored in zip(in_store, in_view, was_read, was_written, strict=True):
            expected = seen.clone()
            expected[chosen] = stored[ids][chosen]
            assert torch.equal(actual, expected)
            stored[ids[chosen]] = seen[chosen]
            assert torch.equal(actual_stored, stored)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("groups", [[("geometry", 3)], [("geometry", 3), ("appearance", 3)]])
@pytest.mark.parametrize("some", [False, True], ids=["all", "wanted"])
def test_resident_rows_are_read_and_written_where_they_are(kind, device, groups, some):
    """The store keeps what it had of them, and residents that are not wanted keep theirs."""
    torch.manual_seed(0)
    n, count, num_resident, kernels = 3000, 1100, 700, kernels_of(kind)

    ids = torch.randperm(n)[:count].sort().values.to(device)
    places = torch.full((n,), -1, dtype=torch.int32)
    places[torch.randperm(n)[:num_resident]] = torch.randperm(num_resident).int()
    places = places.to(device)
    wanted = (torch.rand(count) < 0.6).to(device) if some else None
    chosen = torch.ones(count, dtype=torch.bool, device=device) if wanted is None else wanted
    here, at = chosen & (places[ids] >= 0), places[ids].long()
    store, view, near = (any_rows(groups, count, device) for count in (n, count, num_resident))
    moved = torch.tensor([5, 7], device=device)
    read, written, near_written = clones(view), clones(store), clones(near)
    kernels.read_packed_rows(store, ids, wanted, read, ResidentRows(places, near, moved))
    kernels.write_packed_rows(view, ids, wanted, written, ResidentRows(places, near_written, moved))
    assert 0 < here.sum() < chosen.sum()
    assert moved.tolist() == [5 + int(here.sum()), 7 + int(here.sum())]
    everything = zip(store, view, near, read, written, near_written, strict=True)
    for stored, seen, resident, was_read, was_written, was_kept in (
        arrays for six in everything for arrays in zip(*six, strict=True)
    ):
        expected = seen.clone()
        expected[chosen] = stored[ids][chosen]
        expected[here] = resident[at[here]]
        assert torch.equal(was_read, expected)
        stored[ids[chosen & ~here]] = seen[chosen & ~here]
        assert torch.equal(was_written, stored)
        resident[at[here]] = seen[here]
        assert torch.equal(was_kept, resident)


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
def test_rows_that_lie_otherwise_are_refused(kind, device):
    """Kernels read by address: rows of a store in place of those of a view, halves of rows that are not one."""
    ids = torch.arange(10, device=device)
    for group in GROUP_NAMES:
        rows = HostRows(10, group, BETAS, kind, device, "compact")
        kernels, tables, values = rows.kernels, rows.tables, rows.zeros(10)
        parameters, (moments,) = rows.state.parameters, rows.state.moments
        rows.begin_step()
        with pytest.raises(ValueError, match="contiguous"):
            kernels.step_rows(rows.state, ids, rows.last_step, values, tables)
        with pytest.raises(ValueError, match="without their moments"):
            kernels.fetch_rows(rows.state, ids, ids, rows.last_step, None, rows.new_rows(10), tables)
        half = RowState(parameters[:, : rows.columns // 2], (moments[:, : rows.columns // 2],))
        for apart in [half, *([RowState(parameters.clone(), (moments.clone(),))] if group == "appearance" else [])]:
            with pytest.raises(ValueError, match="side by side"):
                kernels.fetch_rows(apart, ids, ids, rows.last_step, None, RowState(values, ()), tables)
            with pytest.raises(ValueError, match="side by side"):
                kernels.step_stored_rows(values, ids, rows.last_step, None, apart, tables)
            with pytest.raises(ValueError, match="side by side"):
                kernels.step_view_rows(values, ids, rows.last_step, None, apart, tables)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
@pytest.mark.parametrize("group", GROUP_NAMES)
def test_packed_rows_may_lie_beyond_what_32_bits_count(kind, device, group):
    """The last of 67 million rows of geometry, or 22 million of the appearance; on the CPU in memory never touched."""
    torch.manual_seed(0)
    near = HostRows(4, group, BETAS, kind, device, "compact")
    near.fill(torch.randn(4, near.columns))
    near.step(torch.arange(4), 1 + torch.rand(4, near.columns), [1e-2] * len(near.multipliers))
    kernels, tables, near_ids = near.kernels, near.tables, torch.arange(4, device=device)
    shape = 2**31 // (32 if group == "geometry" else 96) + 10, near.arrays[0].shape[1]  # of values
    far = [
        torch.zeros(size, dtype=torch.int32, device=device) if device == "cuda" else untouched_zeros(size)
        for size in (shape, shape[:1])
    ]
    far_ids = shape[0] - 4 + near_ids
    words, last_step = near.view(near_ids)
    kernels.write_packed_rows([(words, last_step)], far_ids, None, [(far[0], far[1])])
    near.begin_step()
    results = []
    for (stored, stored_last_step), ids in ((near.stored, near_ids), (far, far_ids)):
        back, rows = (torch.zeros_like(words), torch.zeros_like(last_step)), near.packed(stored)
        kernels.read_packed_rows([(stored, stored_last_step)], ids, None, [back])
        assert torch.equal(back[0], words)
        assert torch.equal(back[1], last_step)
        values, after = near.zeros(4), near.zeros(4)
        kernels.fetch_rows(rows, ids, ids, stored_last_step, None, RowState(values, ()), tables)
        before = values.clone()
        kernels.step_stored_rows(values, ids, stored_last_step, torch.ones_like(values), rows, tables)
        assert (stored_last_step[ids] == tables.step).all()
        kernels.fetch_dated_rows(rows, ids, last_step + 1, None, RowState(after, ()), tables)
        assert torch.equal(after, values)
        kernels.read_packed_rows([(stored, stored_last_step)], ids, None, [back])
        moments = float_moments(near.packed(back[0]).moments, tables.reach)
        results.append([before, after, *moments])
    # Other ids are rounded otherwise.
    tolerances = (0, 2**-10, 2**-4, 2 * codes.STEP_UP)
    for actual, expected, tolerance in zip(results[1], results[0], tolerances, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-6 if tolerance else 0)


def untouched_zeros(shape: tuple[int, int]) -> Tensor:
    """Integers that take memory where they are written."""
    try:
        return torch.from_numpy(np.zeros(shape, np.int32))
    except MemoryError:
        pytest.skip("this system promises no memory that it does not have")


def test_rounding_is_right_on_average():
    """Also of numbers between which bfloat16 has none, negative ones, tiny ones and those that it has."""
    values = torch.tensor([1.0, 1.001, -1.001, 3.14159, -1e-30, 1e30, 0.0, 65535.9])
    ids, columns = torch.arange(20_000), 48
    random = random_bits(ids, columns, step=7)[:, : len(values)]
    (m, v), exact = unpack(pack(values.expand_as(random), values.abs().expand_as(random), random)), values.double()
    assert torch.equal(m[:, [0, 6]], values[[0, 6]].expand(len(ids), 2))
    gap = 2**-7 * exact.abs()  # at most, between neighbours
    for rounded, expected in ((m, exact), (v, exact.abs())):
        assert ((rounded - expected).abs() <= gap).all()
        # The mean of n roundings has a deviation of at most half a gap over sqrt(n).
        assert ((rounded.double().mean(0) - expected).abs() <= 4 * 0.5 * gap / len(ids) ** 0.5).all()


@pytest.mark.slow
def test_random_bits_are_fair_and_independent():
    """Over rows, columns, steps and bits; 5 deviations are allowed."""
    ids = torch.arange(1000)
    draws = torch.stack([random_bits(ids, 48, step) for step in range(20)])  # [steps, rows, columns]
    bits = (draws[..., None] >> torch.arange(32)) & 1
    deviation = 0.5 / (draws.numel()) ** 0.5
    assert ((bits.double().mean((0, 1, 2)) - 0.5).abs() < 5 * deviation).all()
    signs = bits[..., [0, 15, 16, 31]].double() - 0.5
    for neighbours in (signs[1:] * signs[:-1], signs[:, 1:] * signs[:, :-1], signs[:, :, 1:] * signs[:, :, :-1]):
        assert (neighbours.mean((0, 1, 2)).abs() < 5 * 0.5 * deviation * 1.1).all()
    assert torch.equal(random_bits(ids[[5, 3]], 48, 3), draws[3, [5, 3]])  # whatever the order


def errors_of_steps_alike(host: HostRows, steps: int) -> dict[str, float]:
    """Take steps whose gradients stay alike, and compare with dense Adam in float64.

    Returns:
        Relative errors: of the mean of moments, `exp_avg` and `exp_avg_sq`, and of the mean way that parameters went,
        `way`; and those of single values, by norms, with `each ` before these names.
    """
    n, updated = len(host.last_step), host.multipliers.sum(0) > 0
    start = (1 + torch.rand(n, host.columns)).half().float() * updated
    host.fill(start)
    oracle = DenseOracle(start, BETAS, host.multipliers)
    periods = 1 + torch.arange(n) % 12  # of steps, of which a row takes one
    for step in range(steps):
        gradients = (1 + 0.5 * torch.randn(n, host.columns)) * updated
        chosen = (torch.arange(n) + step) % periods == 0
        rates = [1e-4] * len(host.multipliers)
        host.step(torch.nonzero(chosen).squeeze(1), gradients[chosen], rates)
        oracle.step(gradients * chosen[:, None], torch.tensor(rates).double() @ host.multipliers.double())
    current, (parameters, exp_avg, exp_avg_sq) = host.current(), oracle.state()
    pairs = {
        "exp_avg": (current.moments[0], exp_avg),
        "exp_avg_sq": (current.moments[1], exp_avg_sq),
        "way": (current.parameters - start, parameters - start),
    }
    errors = {}
    for name, (actual, expected) in pairs.items():
        actual, expected = actual[:, updated].double(), expected[:, updated]
        errors[name] = abs((actual.mean() / expected.mean()).item() - 1)
        errors[f"each {name}"] = ((actual - expected).norm() / expected.norm()).item()
    return errors


ROUNDED = [("bfloat16", "appearance"), ("compact", "geometry"), ("compact", "appearance")]  # forms and groups


def bounds_of_steps_alike(form: str, group: str, steps: int) -> dict[str, float]:
    """Bound what `errors_of_steps_alike` returns, where values are rounded at random.

    A moment in bfloat16 is off by at most 2^-8, with either sign. Of its roundings the second moment remembers some 500
    (b2 = 0.999), each up or down with what the last step has changed: a few percent. Two codes of it lie 9 % apart,
    which makes 25 % of each, 12 % of its root. So steps vary by as much, and are 2 % too long on average, which is the
    convexity of 1 / x. That is noise of single values; the mean of many follows.

    A float16 from 1 to 2 is rounded by a step of 2^-10, ten times an update: the way of each value is off by that
    noise, which falls with the root of the number of updates.
    """
    if (form, group) != ("compact", "appearance"):
        means, each = {"exp_avg": 1e-3, "exp_avg_sq": 3e-3, "way": 2e-3}, (0.008, 0.06, 0.01)
    else:
        means, each = {"exp_avg": 4e-3, "exp_avg_sq": 0.03, "way": 0.025}, (0.05, 0.35, 5 / steps**0.5)
    return {**means, **{f"each {name}": bound for name, bound in zip(means, each, strict=True)}}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU[1:]])
@pytest.mark.parametrize(("form", "group"), ROUNDED)
def test_what_is_rounded_is_right_on_average(kind, device, form, group):
    """Where gradients stay alike, steps change moments, and float16, by less than they hold; the mean must follow."""
    torch.manual_seed(0)
    steps = 40 if kind == "triton" and device == "cpu" else 700
    errors = errors_of_steps_alike(HostRows(64, group, BETAS, kind, device, form), steps)
    bounds = bounds_of_steps_alike(form, group, steps)
    assert all(errors[name] < bound for name, bound in bounds.items()), errors


@pytest.mark.slow
@pytest.mark.parametrize(("form", "group"), ROUNDED)
def test_rounding_to_the_nearest_would_be_noticed(monkeypatch, form, group):
    monkeypatch.setattr(
        row_kernels, "random_bits", lambda ids, columns, step: torch.full((len(ids), columns), 0x80009000)
    )
    torch.manual_seed(0)
    errors = errors_of_steps_alike(HostRows(64, group, BETAS, "torch", "cpu", form), 700)
    bounds = bounds_of_steps_alike(form, group, 700)
    noticed = {name for name, bound in bounds.items() if errors[name] > 2 * bound}
    assert noticed >= ({"exp_avg", "exp_avg_sq", "way"} if bounds["way"] > 0.01 else {"exp_avg", "exp_avg_sq"}), errors


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_rows_across_the_borders_of_pinned_parts(monkeypatch, form):
    """Kernels, unlike copies, may read and write across parts of memory that were registered one by one."""
    monkeypatch.setattr("offload.store.memory.PART_BYTES", 1 << 20)
    torch.manual_seed(0)
    n = 100_000
    host, expected = (HostRows(n, "appearance", BETAS, kind, "cuda", form) for kind in ("triton", "torch"))
    host.fill(torch.randn(n, 48))
    gradients = torch.randn(n // 2, 48)
    for ids in (torch.arange(0, n, 2), torch.arange(n // 2)):
        expected.copy_from(host)
        for rows in (host, expected):
            rows.step(ids, gradients, [1e-2])
        for actual, wanted in zip(host.tensors(), expected.tensors(), strict=True):
            assert_same_rows(actual, wanted, exact=False, rounded=form == "compact")
