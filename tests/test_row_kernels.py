"""Rows that a device updates in host memory, in torch and in Triton, against dense `torch.optim.Adam` in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.adam import codes
from offload.adam import rows as row_kernels
from offload.adam.bfloat16 import pack, random_bits, unpack
from offload.adam.deferral import DeferralTables, largest_step
from offload.adam.rows import float_moments
from offload.store.layout import GROUP_NAMES, RowState, num_columns, packed_rows, packed_words
from offload.store.memory import HostArray
from tests.test_adam import APPEARANCE, EPS, GEOMETRY, DenseOracle, largest_row_error
from tests.triton_places import ON_GPU, WITHOUT_GPU

BETAS = (0.9, 0.999)


def kernels_of(kind: str):
    if kind == "torch":
        return row_kernels
    from offload.adam import rows_triton as row_kernels_triton

    return row_kernels_triton


MOMENT_TYPES = {"float32": (torch.float32, torch.float32), "bfloat16": (torch.int32,)}
FORMS = ["float32", "bfloat16", "compact"]  # of rows: the moments of those that are not packed, or packed ones
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

    def step(self, ids: Tensor, gradients: Tensor, learning_rates: list[float]) -> None:
        """One step of a view, as the trainer does it: fetch, begin the step, update, write back."""
        ids, gradients = ids.to(self.device), gradients.to(self.device)
        rows = self.fetched(ids)
        self.tables.begin_step(learning_rates)
        self.kernels.step_rows(rows, ids, self.last_step, gradients, self.tables)
        self.kernels.write_rows(rows, ids, None, self.state)

    def new_rows(self, count: int, device: str) -> RowState:
        """Rows of zeros on a device."""
        rows = self.state.new_empty(count, torch.device(device))
        for tensor in rows.tensors():
            tensor.zero_()
        return rows

    def fetched(self, ids: Tensor, wanted: Tensor | None = None) -> RowState:
        """Rows on the device; those that are not wanted are zero."""
        rows = self.new_rows(len(ids), self.device)
        self.kernels.fetch_rows(self.state, ids, ids, self.last_step, wanted, rows, self.tables)
        return rows

    def current(self) -> RowState:
        """All rows after the last step, moments in float32 (where rounded, once more)."""
        ids = torch.arange(len(self.last_step), device=self.device)
        rows = self.fetched(ids)
        row_kernels.catch_up_rows(rows, ids, self.last_step.clone(), self.tables)
        moments = float_moments(rows.moments, self.tables.reach)
        return RowState(rows.parameters.cpu(), tuple(moment.cpu() for moment in moments))


def assert_same_rows(actual: Tensor, expected: Tensor, *, exact: bool, rounded: bool) -> None:
    """Compare parameters or moments, on any device.

    Args:
        actual, expected: Of a `RowState`.
        exact: Whether every bit is the same. Where operations are fused or approximated their last bit is not, and what
            is rounded at random then falls to the other side, here and there.
        rounded: Whether parameters are rounded to float16.
    """
    actual, expected = actual.cpu(), expected.cpu()
    if exact:
        assert torch.equal(actual, expected)
    elif actual.dtype.is_floating_point:
        tolerance = {"rtol": 2**-10, "atol": 2**-24} if rounded else {"rtol": 2e-6, "atol": 1e-7}
        torch.testing.assert_close(actual, expected, **tolerance)
        assert not rounded or len(actual) == 0 or (actual == expected).float().mean() > 0.95
    elif len(actual):
        assert (actual == expected).float().mean() > 0.99
        reach = largest_step(BETAS)
        for moment, other in zip(float_moments([actual], reach), float_moments([expected], reach), strict=True):
            code_step = codes.STEP_UP if actual.dtype == torch.int16 else 2**-7
            torch.testing.assert_close(moment, other, rtol=2 * code_step, atol=1e-5)


def random_host_rows(kind: str, device: str, group: str, form: str, degree: int = 3, n: int = 300) -> HostRows:
    """Rows with moments and last_step of all ages."""
    host = HostRows(n, group, BETAS, kind, device, form, degree)
    host.fill(torch.randn(n, host.columns))
    for _ in range(6):
        ids = torch.nonzero(torch.rand(n) < 0.3).squeeze(1)
        host.step(ids, torch.randn(len(ids), host.columns), [1e-2] * len(host.multipliers))
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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize("count", [1, 79, 300])
def test_triton_equals_torch(kind, device, group, count, form):
    assert_triton_equals_torch(kind, device, group, count, form, degree=3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_triton_equals_torch_at_other_degrees(kind, device, degree):
    assert_triton_equals_torch(kind, device, "appearance", 79, "compact", degree)


def assert_triton_equals_torch(kind: str, device: str, group: str, count: int, form: str, degree: int) -> None:
    """Try each kernel alone, with rows that are not wanted: what must not be touched stays bit for bit."""
    results = []
    for each, place in (("torch", "cpu"), (kind, device)):
        torch.manual_seed(count)
        host = random_host_rows(each, place, group, form, degree)
        kernels, tables, columns = host.kernels, host.tables, host.columns
        ids = torch.randperm(300)[:count].sort().values.to(place)
        wanted = (torch.rand(count) < 0.6).to(place)
        fetched = host.fetched(ids, wanted)
        values = torch.zeros(count, columns, device=place)
        kernels.fetch_rows(host.state, ids, ids, host.last_step, None, RowState(values, ()), tables)
        rows = host.fetched(ids)
        places = torch.randint(count, (count // 2,)).sort().values.to(place)
        again = host.new_rows(count // 2, place)  # from rows on the device
        kernels.fetch_rows(rows, places, ids[places], host.last_step, None, again, tables)
        tables.begin_step([1e-2] * len(host.multipliers))
        kernels.step_rows(rows, ids, host.last_step, torch.randn(count, columns).to(place), tables)
        sources = torch.where(torch.rand(2 * count) < 0.5, torch.randint(count, (2 * count,)), -1).to(place)
        moved = host.new_rows(2 * count, place)
        kernels.move_rows(rows, sources, moved)
        kernels.write_rows(rows, ids, wanted, host.state)
        states = [tensor.cpu() for state in (fetched, again, rows, moved, host.state) for tensor in state.tensors()]
        results.append(([*states, values.cpu()], host.last_step.cpu()))
    has_codes = form == "compact" and group == "appearance"
    for actual, expected in zip(results[1][0], results[0][0], strict=True):
        assert torch.equal(actual == 0, expected == 0)
        exact = device == "cpu" and actual.dtype == torch.int32
        assert_same_rows(actual, expected, exact=exact, rounded=has_codes)
    assert torch.equal(results[1][1], results[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_a_retained_row_is_a_row_that_went_to_the_host_and_back(kind, device, group, form):
    torch.manual_seed(0)
    host = random_host_rows(kind, device, group, form)
    ids = torch.arange(0, 300, 7, device=device)
    rows = host.fetched(ids)
    host.tables.begin_step([1e-2] * len(host.multipliers))
    gradients = torch.randn(len(ids), host.columns).to(device)
    host.kernels.step_rows(rows, ids, host.last_step, gradients, host.tables)
    host.kernels.write_rows(rows, ids, None, host.state)
    for actual, expected in zip(host.fetched(ids).tensors(), rows.tensors(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("group", GROUP_NAMES)
@pytest.mark.parametrize("gradient", [True, False], ids=["step", "no gradient"])
def test_a_step_on_the_host_is_that_of_rows_that_come_and_go(kind, device, group, form, gradient):
    """Bit for bit on the CPU: parameters alone come, with their last steps, and rows on the host fill whole lines."""
    torch.manual_seed(0)
    host = random_host_rows(kind, device, group, form)
    kernels, tables, columns = host.kernels, host.tables, host.columns
    if device == "cuda":
        torch.cuda.synchronize()  # the last kernel may still write what is copied on the host
    wide = host.whole_lines()
    ids = torch.arange(0, 300, 7, device=device)
    last_step = host.last_step[ids]
    rows = host.fetched(ids)
    parameters = torch.zeros(len(ids), columns, device=device)
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
        tables.begin_step([1e-2] * len(host.multipliers))
        gradients = torch.randn(len(ids), columns).to(device)
        kernels.step_rows(rows, ids, host.last_step, gradients, tables)
    else:
        gradients = None
        kernels.catch_up_rows(rows, ids, host.last_step, tables)
    kernels.write_rows(rows, ids, None, host.state)
    kernels.step_host_rows(parameters, ids, last_step, gradients, wide, tables)
    has_codes = form == "compact" and group == "appearance"
    # Rows with codes are caught up by torch's operations.
    exact = device == "cpu" and (kind == "torch" or gradient or not has_codes)
    assert_same_rows(parameters, rows.parameters, exact=exact, rounded=has_codes)
    for actual, expected in zip(wide.tensors(), host.state.tensors(), strict=True):
        assert not actual[:, columns:].any()
        assert_same_rows(actual[:, :columns], expected, exact=exact, rounded=has_codes)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("group", GROUP_NAMES)
def test_packed_rows_that_lag_by_no_step_stay_as_they_are(kind, device, group):
    """Bit for bit, though codes would be drawn anew: catching up again and again must not wear rows out."""
    torch.manual_seed(0)
    host = random_host_rows(kind, device, group, "compact")
    ids = torch.arange(300, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    before, last_step = host.arrays[0].clone(), host.last_step.clone()
    lags = last_step < host.tables.step
    assert 0 < lags.sum() < 300
    parameters = host.fetched(ids).parameters
    host.kernels.step_host_rows(parameters, ids, last_step, None, host.state, host.tables)
    host.last_step.fill_(host.tables.step)
    rows = host.fetched(ids)
    once = rows.moments[0].clone()
    host.kernels.catch_up_rows(rows, ids, host.last_step, host.tables)  # as rows that come and go
    assert torch.equal(rows.moments[0], once)
    if device == "cuda":
        torch.cuda.synchronize()
    changed = (host.arrays[0] != before).any(1).to(device)
    assert changed[lags].any()
    assert not changed[~lags].any()


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
def test_rows_that_lie_otherwise_are_refused(kind, device):
    """Kernels read by address: rows of a store in place of those of a view, halves of rows that are not one."""
    host = HostRows(10, "appearance", BETAS, kind, device, "compact")
    geometry = HostRows(10, "geometry", BETAS, kind, device, "compact")
    ids, gradients = torch.arange(10, device=device), torch.zeros(10, 48, device=device)
    for rows in (host, geometry):
        rows.tables.begin_step([1e-2] * len(rows.multipliers))
        with pytest.raises(ValueError, match="contiguous"):
            rows.kernels.step_rows(rows.state, ids, rows.last_step, gradients[:, : rows.columns], rows.tables)
    apart = RowState(host.state.parameters[:, :32], (host.state.moments[0][:, :32],))
    with pytest.raises(ValueError, match="side by side"):
        host.kernels.fetch_rows(apart, ids, ids, host.last_step, None, host.new_rows(10, device), host.tables)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
@pytest.mark.parametrize("group", GROUP_NAMES)
def test_packed_rows_may_lie_beyond_what_32_bits_count(kind, device, group):
    """The last of 67 million rows of geometry, or 22 million of the appearance; on the CPU in memory never touched."""
    near = HostRows(4, group, BETAS, kind, device, "compact")
    shape = 2**31 // (32 if group == "geometry" else 96) + 10, near.arrays[0].shape[1]  # of values
    far = torch.zeros(shape, dtype=torch.int32, device=device) if device == "cuda" else untouched_zeros(shape)
    results = []
    for rows, ids in ((near.state, torch.arange(4)), (packed_rows(far, group), len(far) - 4 + torch.arange(4))):
        torch.manual_seed(0)
        tables = DeferralTables(near.multipliers, BETAS, EPS, torch.device(device))
        ids, last_step = ids.to(device), torch.zeros(4, dtype=torch.int32, device=device)
        values = near.new_rows(4, device)
        values.parameters.copy_(torch.randn(4, near.columns).half())
        near.kernels.write_rows(values, ids, None, rows)
        tables.begin_step([1e-2] * len(near.multipliers))
        near.kernels.step_host_rows(values.parameters, ids, last_step, torch.ones_like(values.parameters), rows, tables)
        fetched = near.new_rows(4, device)
        near.kernels.fetch_dated_rows(rows, ids, last_step + 1, None, fetched, tables)
        results.append([fetched.parameters, *float_moments(fetched.moments, tables.reach)])
    for actual, expected, tolerance in zip(results[1], results[0], (2**-10, 2**-4, 2 * codes.STEP_UP), strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-6)  # other ids are rounded otherwise


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
    values, gradients = torch.randn(n, 48), torch.randn(n // 2, 48)
    for rows in (host, expected):
        rows.fill(values)
        rows.step(torch.arange(0, n, 2), gradients, [1e-2])
        rows.step(torch.arange(n // 2), gradients, [1e-2])
    for actual, wanted in zip(host.state.tensors(), expected.state.tensors(), strict=True):
        assert_same_rows(actual, wanted, exact=False, rounded=form == "compact")
