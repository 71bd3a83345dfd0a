"""Rows that a device updates in host memory, in torch and in Triton, against dense `torch.optim.Adam` in float64."""

import pytest
import torch
from torch import Tensor

from offload.adam import rows as row_kernels
from offload.adam.bfloat16 import pack, random_bits, unpack
from offload.adam.deferral import DeferralTables
from offload.store.layout import RowState
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


def state_of(rows: int, columns: int, device: str, moments: str = "float32") -> RowState:
    parameters = torch.zeros(rows, columns, device=device)
    return RowState(parameters, tuple(torch.zeros_like(parameters, dtype=dtype) for dtype in MOMENT_TYPES[moments]))


def float32_moments(rows: RowState) -> tuple[Tensor, Tensor]:
    return rows.moments if len(rows.moments) == 2 else unpack(rows.moments[0])


class HostRows:
    """N rows in pinned host memory, and the kernels that update them."""

    def __init__(
        self, n: int, multipliers: Tensor, betas: tuple[float, float], kind: str, device: str, moments: str = "float32"
    ) -> None:
        # torch's own operations on a GPU cannot read pinned memory, so their rows lie on the device (through a clone,
        # since a copy must not cross the border of two pinned parts).
        self.kind, self.device, self.kernels = kind, device, kernels_of(kind)
        columns = multipliers.shape[1]
        dtypes, pin = (torch.float32, *MOMENT_TYPES[moments]), device == "cuda"
        self.arrays = [HostArray(columns, max_rows=n, dtype=dtype, pin=pin) for dtype in dtypes]
        for array in self.arrays:
            array.resize(n)
        parameters, *rest = (array.tensor for array in self.arrays)
        if kind == "torch":
            parameters, *rest = (tensor.clone().to(device) for tensor in (parameters, *rest))
        self.state = RowState(parameters, tuple(rest))
        self.last_step = torch.zeros(n, dtype=torch.int32, device=device)
        self.tables = DeferralTables(multipliers, betas, EPS, torch.device(device))

    def step(self, ids: Tensor, gradients: Tensor, learning_rates: list[float]) -> None:
        """One step of a view, as the trainer does it: fetch, begin the step, update, write back."""
        ids, gradients = ids.to(self.device), gradients.to(self.device)
        rows = self.fetched(ids)
        self.tables.begin_step(learning_rates)
        self.kernels.step_rows(rows, ids, self.last_step, gradients, self.tables)
        self.kernels.write_rows(rows, ids, None, self.state)

    def fetched(self, ids: Tensor, wanted: Tensor | None = None) -> RowState:
        """Rows on the device; those that are not wanted are zero."""
        rows = self.state.new_empty(len(ids), torch.device(self.device))
        for tensor in rows.tensors():
            tensor.zero_()
        self.kernels.fetch_rows(self.state, ids, ids, self.last_step, wanted, rows, self.tables)
        return rows

    def current(self) -> RowState:
        """All rows after the last step, moments in float32 (where rounded, once more)."""
        ids = torch.arange(len(self.last_step), device=self.device)
        rows = self.fetched(ids)
        row_kernels.catch_up_rows(rows, ids, self.last_step.clone(), self.tables)
        return RowState(rows.parameters.cpu(), tuple(moment.cpu() for moment in float32_moments(rows)))


def wide_copy(state: RowState) -> RowState:
    """Rows that fill whole lines of 64 bytes, in pinned memory where these are."""
    copies = []
    for tensor in state.tensors():
        rows, columns = tensor.shape
        array = HostArray(-(-columns // 16) * 16, max_rows=rows, dtype=tensor.dtype, pin=not tensor.is_cuda)
        array.resize(rows)
        copy = array.tensor.clone().to(tensor.device) if tensor.is_cuda else array.tensor
        copy[:, :columns] = tensor
        copies.append(copy)
    return RowState(copies[0], tuple(copies[1:]))


def random_host_rows(
    kind: str, device: str, multipliers: Tensor = APPEARANCE, n: int = 300, moments: str = "float32"
) -> HostRows:
    """Rows with moments and last_step of all ages."""
    host = HostRows(n, multipliers, BETAS, kind, device, moments)
    host.state.parameters.copy_(torch.randn(n, multipliers.shape[1]))
    for _ in range(6):
        ids = torch.nonzero(torch.rand(n) < 0.3).squeeze(1)
        host.step(ids, torch.randn(len(ids), multipliers.shape[1]), [1e-2] * len(multipliers))
    return host


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("multipliers", [APPEARANCE, GEOMETRY], ids=["appearance", "geometry"])
@pytest.mark.parametrize("batch", [1, 4])
def test_sparse_steps_equal_dense_adam(kind, device, multipliers, batch):
    torch.manual_seed(0)
    steps = 1000 if device == "cuda" else 400 if kind == "torch" else 100
    n, columns = 120, multipliers.shape[1]
    betas = (BETAS[0] ** batch, BETAS[1] ** batch)
    host = HostRows(n, multipliers, betas, kind, device)
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
@pytest.mark.parametrize("moments", MOMENT_TYPES)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
@pytest.mark.parametrize("multipliers", [APPEARANCE, GEOMETRY], ids=["appearance", "geometry"])
@pytest.mark.parametrize("count", [1, 79, 300])
def test_triton_equals_torch(kind, device, multipliers, count, moments):
    """Each kernel alone, with rows that are not wanted: what must not be touched stays bit for bit."""
    columns = multipliers.shape[1]
    results = []
    for each, place in (("torch", "cpu"), (kind, device)):
        torch.manual_seed(count)
        host = random_host_rows(each, place, multipliers, moments=moments)
        kernels, tables = host.kernels, host.tables
        ids = torch.randperm(300)[:count].sort().values.to(place)
        wanted = (torch.rand(count) < 0.6).to(place)
        fetched = host.fetched(ids, wanted)
        values = torch.zeros(count, columns, device=place)
        kernels.fetch_rows(host.state, ids, ids, host.last_step, None, RowState(values, ()), tables)
        rows = host.fetched(ids)
        places = torch.randint(count, (count // 2,)).sort().values.to(place)
        again = state_of(count // 2, columns, place, moments)  # from rows on the device
        kernels.fetch_rows(rows, places, ids[places], host.last_step, None, again, tables)
        tables.begin_step([1e-2] * len(multipliers))
        kernels.step_rows(rows, ids, host.last_step, torch.randn(count, columns).to(place), tables)
        sources = torch.where(torch.rand(2 * count) < 0.5, torch.randint(count, (2 * count,)), -1).to(place)
        moved = state_of(2 * count, columns, place, moments)
        kernels.move_rows(rows, sources, moved)
        kernels.write_rows(rows, ids, wanted, host.state)
        states = [tensor.cpu() for state in (fetched, again, rows, moved, host.state) for tensor in state.tensors()]
        results.append([*states, values.cpu(), host.last_step.cpu()])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual == 0, expected == 0)
        if actual.dtype == torch.int32 and device == "cpu":  # on a GPU a fused operation may change the last bit
            assert torch.equal(actual, expected)
        elif actual.dtype == torch.int32 and actual.ndim == 2 and len(actual):
            for half, other in zip(unpack(actual), unpack(expected), strict=True):
                torch.testing.assert_close(half, other, rtol=2**-6, atol=1e-5)
                assert (half == other).float().mean() > 0.99
        else:
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-7)
    assert torch.equal(results[1][-1], results[0][-1])


@pytest.mark.slow
@pytest.mark.parametrize("moments", MOMENT_TYPES)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_a_retained_row_is_a_row_that_went_to_the_host_and_back(kind, device, moments):
    torch.manual_seed(0)
    host = random_host_rows(kind, device, moments=moments)
    ids = torch.arange(0, 300, 7, device=device)
    rows = host.fetched(ids)
    host.tables.begin_step([1e-2])
    host.kernels.step_rows(rows, ids, host.last_step, torch.randn(len(ids), 48).to(device), host.tables)
    host.kernels.write_rows(rows, ids, None, host.state)
    for actual, expected in zip(host.fetched(ids).tensors(), rows.tensors(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("moments", MOMENT_TYPES)
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("multipliers", [APPEARANCE, GEOMETRY], ids=["appearance", "geometry"])
@pytest.mark.parametrize("gradient", [True, False], ids=["step", "no gradient"])
def test_a_step_on_the_host_is_that_of_rows_that_come_and_go(kind, device, multipliers, moments, gradient):
    """Bit for bit on the CPU: parameters alone come, with their last steps, and rows on the host fill whole lines."""
    torch.manual_seed(0)
    host = random_host_rows(kind, device, multipliers, moments=moments)
    kernels, tables, columns = host.kernels, host.tables, multipliers.shape[1]
    if device == "cuda":
        torch.cuda.synchronize()  # the last kernel may still write what is copied on the host
    wide = wide_copy(host.state)
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
        tables.begin_step([1e-2] * len(multipliers))
        gradients = torch.randn(len(ids), columns).to(device)
        kernels.step_rows(rows, ids, host.last_step, gradients, tables)
    else:
        gradients = None
        kernels.catch_up_rows(rows, ids, host.last_step, tables)
    kernels.write_rows(rows, ids, None, host.state)
    kernels.step_host_rows(parameters, ids, last_step, gradients, wide, tables)
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 2e-6, "atol": 1e-7}
    torch.testing.assert_close(parameters, rows.parameters, **tolerance)
    for actual, expected in zip(wide.tensors(), host.state.tensors(), strict=True):
        assert not actual[:, columns:].any()
        actual, expected = actual[:, :columns].cpu(), expected.cpu()
        if device == "cuda" and expected.dtype == torch.int32:
            assert (actual == expected).float().mean() > 0.99
        else:
            torch.testing.assert_close(actual, expected, **tolerance)


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


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU[1:]])
def test_bfloat16_moments_are_right_on_average(kind, device):
    """Where gradients stay alike, a step changes v by less than bfloat16 can hold; its mean must follow all the same.

    A rounding is off by at most 2^-8 with either sign, and of the 1000 steps that v remembers (b2 = 0.999) about 500
    count: so each value is off by some 2^-8 * sqrt(500) * 0.6 = 5 %, and the mean of many by little.
    """
    torch.manual_seed(0)
    steps = 40 if kind == "triton" and device == "cpu" else 700
    n = 64
    host = HostRows(n, APPEARANCE, BETAS, kind, device, moments="bfloat16")
    oracle = DenseOracle(torch.zeros(n, 48), BETAS)
    ids = torch.arange(n)
    for step in range(steps):
        gradients = 1 + 0.5 * torch.randn(n, 48)
        chosen = (ids + step) % 3 > 0  # rows take turns in skipping a step
        host.step(ids[chosen], gradients[chosen], [1e-3])
        oracle.step(gradients * chosen[:, None], 1e-3 * APPEARANCE[0].double())
    current = host.current()
    parameters, *moments = oracle.state()
    for actual, expected in zip(current.moments, moments, strict=True):
        assert abs(actual.double().mean() / expected.mean() - 1) < 0.005
        assert ((actual - expected).norm() / expected.norm()) < 0.06
    travelled = APPEARANCE[0] > 0
    error = (current.parameters - parameters)[:, travelled].norm() / parameters[:, travelled].norm()
    assert error < 0.01  # the steps of a value are off by half as much as v, and in both directions


@pytest.mark.cuda
def test_rows_across_the_borders_of_pinned_parts(monkeypatch):
    """Kernels, unlike copies, may read and write across parts of memory that were registered one by one."""
    monkeypatch.setattr("offload.store.memory.PART_BYTES", 1 << 20)
    torch.manual_seed(0)
    n = 100_000
    host, expected = (HostRows(n, APPEARANCE, BETAS, kind, "cuda") for kind in ("triton", "torch"))
    values, gradients = torch.randn(n, 48), torch.randn(n // 2, 48)
    for rows in (host, expected):
        rows.state.parameters.copy_(values)
        rows.step(torch.arange(0, n, 2), gradients, [1e-2])
        rows.step(torch.arange(n // 2), gradients, [1e-2])
    for actual, wanted in zip(host.state.tensors(), expected.state.tensors(), strict=True):
        torch.testing.assert_close(actual, wanted.cpu(), rtol=2e-6, atol=1e-7)
