"""Rows that a device updates in host memory, in torch and in Triton, against dense `torch.optim.Adam` in float64."""

import importlib.util
import os

import pytest
import torch
from test_adam import APPEARANCE, EPS, GEOMETRY, DenseOracle, largest_row_error
from torch import Tensor

from offload import row_kernels
from offload.catch_up import CatchUpTables
from offload.host_memory import HostArray
from offload.row_kernels import RowState

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BETAS = (0.9, 0.999)

WITHOUT_GPU = [pytest.param("torch", "cpu", id="torch")]
if INTERPRETED and importlib.util.find_spec("triton"):
    WITHOUT_GPU.append(pytest.param("triton", "cpu", id="triton, interpreted"))
ON_GPU = [pytest.param(kind, "cuda", id=f"{kind} on cuda", marks=pytest.mark.cuda) for kind in ("torch", "triton")]


def kernels_of(kind: str):
    if kind == "torch":
        return row_kernels
    from offload import row_kernels_triton

    return row_kernels_triton


def state_of(rows: int, columns: int, device: str) -> RowState:
    return RowState(*(torch.zeros(rows, columns, device=device) for _ in range(3)))


class HostRows:
    """N rows in pinned host memory, and the kernels that update them."""

    def __init__(self, n: int, multipliers: Tensor, betas: tuple[float, float], kind: str, device: str) -> None:
        # torch's own operations on a GPU cannot read pinned memory, so their rows lie on the device (through a clone,
        # since a copy must not cross the border of two pinned parts).
        self.kind, self.device, self.kernels = kind, device, kernels_of(kind)
        columns = multipliers.shape[1]
        self.arrays = [HostArray(columns, max_rows=n, pin=device == "cuda") for _ in range(3)]
        for array in self.arrays:
            array.resize(n)
        self.state = RowState(*(array.tensor for array in self.arrays))
        if kind == "torch":
            self.state = RowState(*(tensor.clone().to(device) for tensor in self.state.tensors()))
        self.stamps = torch.zeros(n, dtype=torch.int32, device=device)
        self.tables = CatchUpTables(multipliers, betas, EPS, torch.device(device))

    def step(self, ids: Tensor, gradients: Tensor, learning_rates: list[float]) -> None:
        """One step of a view, as the trainer does it: fetch, begin the step, update, write back."""
        rows = state_of(len(ids), self.tables.columns, self.device)
        ids, gradients = ids.to(self.device), gradients.to(self.device)
        self.kernels.fetch_rows(self.state, self.stamps, ids, None, rows, self.tables)
        self.tables.begin_step(learning_rates)
        self.kernels.step_rows(rows, gradients, self.tables.step_sizes())
        self.kernels.write_rows(rows, ids, None, self.state, self.stamps, self.tables.step)

    def current(self) -> RowState:
        rows = state_of(len(self.stamps), self.tables.columns, self.device)
        ids = torch.arange(len(self.stamps), device=self.device)
        self.kernels.fetch_rows(self.state, self.stamps, ids, None, rows, self.tables)
        return RowState(*(tensor.cpu() for tensor in rows.tensors()))


def random_host_rows(kind: str, device: str, multipliers: Tensor = APPEARANCE, n: int = 300) -> HostRows:
    """Rows with moments and stamps of all ages."""
    host = HostRows(n, multipliers, BETAS, kind, device)
    host.state.parameters.copy_(torch.randn(n, multipliers.shape[1]))
    for _ in range(6):
        ids = torch.nonzero(torch.rand(n) < 0.3).squeeze(1)
        host.step(ids, torch.randn(len(ids), multipliers.shape[1]), [1e-2] * len(multipliers))
    return host


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
    oracle = DenseOracle(host.state.parameters.cpu(), betas)
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
    assert host.stamps.min() < steps - steps // 3
    current = host.current()
    parameters, exp_avg, exp_avg_sq = oracle.state()
    updated = multipliers.sum(0) > 0
    assert largest_row_error(current.parameters[:, updated], parameters[:, updated]) < 5e-6
    # The first moment falls below float32 where a row has been left alone for a thousand steps.
    assert (current.exp_avg.double() - exp_avg).norm() < 1e-6 * exp_avg.norm()
    assert largest_row_error(current.exp_avg_sq, exp_avg_sq) < 5e-6


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], *ON_GPU[1:]])
@pytest.mark.parametrize("multipliers", [APPEARANCE, GEOMETRY], ids=["appearance", "geometry"])
@pytest.mark.parametrize("count", [1, 79, 300])
def test_triton_equals_torch(kind, device, multipliers, count):
    """Each kernel alone, with rows that are not wanted: what must not be touched stays bit for bit."""
    columns = multipliers.shape[1]
    results = []
    for each, place in (("torch", "cpu"), (kind, device)):
        torch.manual_seed(count)
        host = random_host_rows(each, place, multipliers)
        kernels, tables = host.kernels, host.tables
        ids = torch.randperm(300)[:count].sort().values.to(place)
        wanted = (torch.rand(count) < 0.6).to(place)
        rows = state_of(count, columns, place)
        kernels.fetch_rows(host.state, host.stamps, ids, wanted, rows, tables)
        fetched = [tensor.cpu().clone() for tensor in rows.tensors()]
        values = torch.zeros(count, columns, device=place)
        kernels.read_rows(host.state, host.stamps, ids, values, tables)
        kernels.fetch_rows(host.state, host.stamps, ids, None, rows, tables)
        tables.begin_step([1e-2] * len(multipliers))
        kernels.step_rows(rows, torch.randn(count, columns).to(place), tables.step_sizes())
        sources = torch.where(torch.rand(2 * count) < 0.5, torch.randint(count, (2 * count,)), -1).to(place)
        moved = state_of(2 * count, columns, place)
        kernels.move_rows(rows, sources, moved)
        kernels.write_rows(rows, ids, wanted, host.state, host.stamps, tables.step)
        states = [tensor.cpu() for state in (rows, moved, host.state) for tensor in state.tensors()]
        results.append([*fetched, values.cpu(), *states, host.stamps.cpu()])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual == 0, expected == 0)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-7)
    assert torch.equal(results[1][-1], results[0][-1])


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_a_retained_row_is_a_row_that_went_to_the_host_and_back(kind, device):
    torch.manual_seed(0)
    host = random_host_rows(kind, device)
    ids = torch.arange(0, 300, 7, device=device)
    rows = state_of(len(ids), 48, device)
    host.kernels.fetch_rows(host.state, host.stamps, ids, None, rows, host.tables)
    host.tables.begin_step([1e-2])
    host.kernels.step_rows(rows, torch.randn(len(ids), 48).to(device), host.tables.step_sizes())
    host.kernels.write_rows(rows, ids, None, host.state, host.stamps, host.tables.step)
    again = state_of(len(ids), 48, device)
    host.kernels.fetch_rows(host.state, host.stamps, ids, None, again, host.tables)
    for actual, expected in zip(again.tensors(), rows.tensors(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.cuda
def test_rows_across_the_borders_of_pinned_parts(monkeypatch):
    """Kernels, unlike copies, may read and write across parts of memory that were registered one by one."""
    monkeypatch.setattr("offload.host_memory.PART_BYTES", 1 << 20)
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
