"""Deferred Adam on the host, native and in plain torch, against dense `torch.optim.Adam` in float64."""

import os
from dataclasses import dataclass

import pytest
import torch
from gaussian_offload_native import offload as native_kernels
from torch import Tensor

from offload.adam.host import DeferredAdam
from offload.backends import num_threads
from offload.store.layout import RowState
from tests.oracles.adam import ReferenceAdam

BETAS, EPS = (0.9, 0.999), 1e-15
# Learning rates of the columns of a row relative to those of their schedule.
APPEARANCE = torch.tensor([[1.0] * 3 + [1 / 20] * 45])  # sh0, shN
GEOMETRY = torch.tensor([[1.0] * 3 + [0.0] * 9, [0.0] * 3 + [0.5] * 3 + [0.1] * 4 + [5.0] + [0.0]])  # means, the rest


@dataclass
class Rows:
    parameters: Tensor  # [N, columns]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    last_step: Tensor  # [N]

    def all(self) -> tuple[Tensor, ...]:
        return self.parameters, self.exp_avg, self.exp_avg_sq, self.last_step

    def state(self) -> tuple[RowState, Tensor]:
        """As the optimizers take them."""
        return RowState(self.parameters, (self.exp_avg, self.exp_avg_sq)), self.last_step

    def copy(self) -> "Rows":
        return Rows(*(tensor.clone() for tensor in self.all()))


def random_rows(n: int, columns: int, dtype: torch.dtype = torch.float32) -> Rows:
    parameters = torch.randn(n, columns, dtype=torch.float64).to(dtype)
    return Rows(
        parameters, torch.zeros_like(parameters), torch.zeros_like(parameters), torch.zeros(n, dtype=torch.int32)
    )


def stepped_rows(n: int, columns: int, multipliers: Tensor, steps: int = 6) -> tuple[DeferredAdam, Rows]:
    """Rows with moments and stamps of all ages, some never updated, and their optimizer; a step has begun."""
    rows, adam = random_rows(n, columns), DeferredAdam(multipliers, BETAS, EPS, threads=2)
    for _ in range(steps):
        adam.begin_step([1e-2] * len(multipliers))
        ids = torch.nonzero(torch.rand(n) < 0.3)[:, 0]
        adam.commit(*rows.state(), ids, torch.randn(len(ids), columns))
    adam.begin_step([2e-2] * len(multipliers))
    return adam, rows


class DenseOracle:
    """`torch.optim.Adam` in float64, one parameter for all columns that share their learning rate at every step."""

    def __init__(self, parameters: Tensor, betas: tuple[float, float], multipliers: Tensor = APPEARANCE) -> None:
        kinds, kind_of_column = multipliers.unique(dim=1, return_inverse=True)
        self.columns = [torch.nonzero(kind_of_column == kind)[:, 0] for kind in range(kinds.shape[1])]
        self.parameters = [parameters[:, columns].double().requires_grad_() for columns in self.columns]
        groups = [{"params": [parameter], "lr": 0.0} for parameter in self.parameters]
        self.adam = torch.optim.Adam(groups, betas=betas, eps=EPS)

    def step(self, gradients: Tensor, learning_rates: Tensor) -> None:
        """gradients [N, columns], learning_rates [columns]."""
        for parameter, columns, group in zip(self.parameters, self.columns, self.adam.param_groups, strict=True):
            group["lr"] = learning_rates[columns[0]].item()
            parameter.grad = gradients[:, columns].double()
        self.adam.step()

    def reset(self, ids: Tensor) -> None:
        for moments in self.adam.state.values():
            moments["exp_avg"][ids] = 0
            moments["exp_avg_sq"][ids] = 0

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """parameters, exp_avg, exp_avg_sq, each [N, columns]."""
        moments = [[self.adam.state[p][name] for p in self.parameters] for name in ("exp_avg", "exp_avg_sq")]
        order = torch.cat(self.columns).argsort()
        return tuple(torch.cat([t.detach() for t in tensors], 1)[:, order] for tensors in (self.parameters, *moments))


def largest_row_error(actual: Tensor, expected: Tensor) -> float:
    """The largest of the rows' relative errors (norms); float32 knows nothing below 1e-30."""
    errors = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return errors.max().item()


def train(adam, rows: Rows, oracle: DenseOracle, steps: int, visible: Tensor) -> None:
    """Sparse random gradients of all sizes for some of the `visible` [N] shares, changing rates, some resets."""
    n, columns = rows.parameters.shape
    multipliers = torch.as_tensor(adam.multipliers).double()
    for step in range(1, steps + 1):
        decay, noise = 0.01 ** (step / steps), 0.5 + torch.rand(len(multipliers)).double()
        rates = 1e-2 * decay * noise  # [schedules]
        adam.begin_step(rates.tolist())
        mask = torch.rand(n) < visible
        if step == 1:
            mask[:] = True
        if step in (1, steps):  # and nothing in between for row 0: a gap of steps - 1
            mask[0] = True
        elif mask[0]:
            mask[0] = False
        ids = torch.nonzero(mask)[:, 0]
        gradients = torch.randn(len(ids), columns) * 10 ** (-8 * torch.rand(len(ids), 1))
        adam.commit(*rows.state(), ids, gradients.to(rows.parameters.dtype))
        dense = torch.zeros(n, columns)
        dense[ids] = gradients
        oracle.step(dense, rates @ multipliers)
        if step % 150 == 0:  # densification
            reset = torch.randperm(n)[: n // 10]
            reset = reset[reset != 0]
            adam.forward(*rows.state(), None, values := torch.empty_like(rows.parameters))
            rows.parameters[reset] = values[reset]
            rows.exp_avg[reset] = 0
            rows.exp_avg_sq[reset] = 0
            rows.last_step[reset] = adam.step
            oracle.reset(reset)


def native(multipliers: Tensor, betas: tuple[float, float]) -> DeferredAdam:
    return DeferredAdam(multipliers, betas, EPS, threads=2)


def reference(multipliers: Tensor, betas: tuple[float, float]) -> ReferenceAdam:
    return ReferenceAdam(multipliers, betas, EPS)


@pytest.mark.slow
@pytest.mark.parametrize("make", [native, reference])
@pytest.mark.parametrize("multipliers", [APPEARANCE, GEOMETRY], ids=["appearance", "geometry"])
@pytest.mark.parametrize("batch", [1, 4])
def test_thousand_sparse_steps_equal_dense_adam(make, multipliers, batch):
    torch.manual_seed(0)
    n, columns, steps = 200, multipliers.shape[1], 1000
    betas = (BETAS[0] ** batch, BETAS[1] ** batch)
    adam, rows = make(multipliers, betas), random_rows(n, columns)
    oracle = DenseOracle(rows.parameters, betas, multipliers)
    train(adam, rows, oracle, steps, visible=10 ** -(3.2 * torch.rand(n)))  # gaps from 1 to 999 steps
    assert rows.last_step.min() < steps - 300

    forwarded = torch.empty_like(rows.parameters)
    adam.forward(*rows.state(), None, forwarded)
    adam.commit(*rows.state(), None, None)
    assert torch.equal(rows.last_step, torch.full((n,), steps, dtype=torch.int32))
    parameters, exp_avg, exp_avg_sq = oracle.state()
    assert largest_row_error(forwarded, parameters) < 1e-5
    assert largest_row_error(rows.parameters, parameters) < 1e-5
    assert largest_row_error(rows.exp_avg, exp_avg) < 1e-5
    assert largest_row_error(rows.exp_avg_sq, exp_avg_sq) < 1e-5


def test_reference_in_float64_is_dense_adam_to_rounding():
    torch.manual_seed(0)
    adam, rows = ReferenceAdam(GEOMETRY, BETAS, EPS), random_rows(40, 12, torch.float64)
    oracle = DenseOracle(rows.parameters, BETAS, GEOMETRY)
    train(adam, rows, oracle, steps=120, visible=torch.full((40,), 0.05))
    adam.commit(*rows.state(), None, None)
    # What remains is eps = 1e-15 beside sqrt(v), from 1e-9 on.
    for actual, expected, bound in zip(rows.all(), oracle.state(), (1e-6, 1e-12, 1e-12), strict=False):
        assert largest_row_error(actual, expected) < bound


def test_catching_up_one_step_too_few_is_seen():
    torch.manual_seed(0)
    errors = []
    for shift in (0, 1):
        adam, rows = native(APPEARANCE, BETAS), random_rows(50, 48)
        oracle = DenseOracle(rows.parameters, BETAS)
        for _ in range(20):
            rates = torch.tensor([1e-2], dtype=torch.float64)
            adam.begin_step(rates.tolist())
            ids = torch.nonzero(torch.rand(50) < 0.1)[:, 0]
            gradients = torch.randn(len(ids), 48)
            rows.last_step += shift * (rows.last_step > 0) * (rows.last_step < adam.step - 1)
            adam.commit(*rows.state(), ids, gradients)
            rows.last_step[:] -= shift * (rows.last_step > 0) * (rows.last_step < adam.step)
            oracle.step(torch.zeros(50, 48).index_add(0, ids, gradients), rates @ APPEARANCE.double())
        adam.commit(*rows.state(), None, None)
        errors.append([largest_row_error(a, b) for a, b in zip(rows.all(), oracle.state(), strict=False)])
    assert max(errors[0]) < 1e-5
    assert min(errors[1]) > 1e-4


@pytest.mark.parametrize("multipliers", [APPEARANCE, GEOMETRY], ids=["appearance", "geometry"])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_forward_gives_what_commit_stores_and_leaves_the_rows(multipliers, with_gradients):
    torch.manual_seed(0)
    columns = multipliers.shape[1]
    adam, rows = stepped_rows(1500, columns, multipliers)
    before, ids = rows.copy(), torch.nonzero(torch.rand(1500) < 0.5)[:, 0]
    gradients = torch.randn(len(ids), columns) if with_gradients else None
    forwarded = torch.empty(len(ids), columns)
    adam.forward(*rows.state(), ids, forwarded, gradients)
    assert all(map(torch.equal, rows.all(), before.all()))

    adam.commit(*rows.state(), ids, gradients)
    assert torch.equal(rows.parameters[ids], forwarded)
    assert not torch.equal(rows.parameters[ids], before.parameters[ids])
    others = torch.ones(1500, dtype=torch.bool)
    others[ids] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(rows.all(), before.all(), strict=True))


def test_commit_and_forward_is_commit_then_forward():
    torch.manual_seed(0)
    adam, rows = stepped_rows(700, 48, APPEARANCE)
    both, ids = rows.copy(), torch.nonzero(torch.rand(700) < 0.5)[:, 0]
    gradients, out = torch.randn(len(ids), 48), torch.empty(len(ids), 48)
    adam.commit(*rows.state(), ids, gradients)
    adam.commit_and_forward(*both.state(), ids, gradients, out)
    assert all(map(torch.equal, rows.all(), both.all()))
    assert torch.equal(out, rows.parameters[ids])


def test_rows_of_larger_staging_buffers():
    torch.manual_seed(0)
    adam, rows = stepped_rows(700, 48, APPEARANCE)
    same, ids = rows.copy(), torch.nonzero(torch.rand(700) < 0.5)[:, 0]
    v = len(ids)
    staged_gradients, staged_values = torch.randn(900, 48), torch.full((800, 48), 7.0)
    gradient_rows, out_rows = torch.randperm(900)[:v], torch.randperm(800)[:v]
    out, expected = torch.empty(v, 48), torch.empty(v, 48)
    adam.forward(*rows.state(), ids, staged_values, staged_gradients[gradient_rows], out_rows=out_rows)
    adam.commit_and_forward(*rows.state(), ids, staged_gradients, out, gradient_rows=gradient_rows)
    adam.commit_and_forward(*same.state(), ids, staged_gradients[gradient_rows], expected)
    assert all(map(torch.equal, rows.all(), same.all()))
    assert torch.equal(out, expected)
    assert torch.equal(staged_values[out_rows], expected)
    untouched = torch.ones(800, dtype=torch.bool)
    untouched[out_rows] = False
    assert (staged_values[untouched] == 7).all()


def test_staging_buffers_of_any_alignment():
    torch.manual_seed(0)
    adam, rows = stepped_rows(100, 48, APPEARANCE)
    expected, memory = torch.empty(100, 48), torch.empty(100 * 48 + 3)
    adam.forward(*rows.state(), None, expected)
    for offset in range(4):
        out = memory[offset : offset + 100 * 48].view(100, 48)
        adam.forward(*rows.state(), None, out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("columns", [1, 3, 12, 13, 16, 27, 48, 50])
@pytest.mark.parametrize("n", [1, 5, 1030])
def test_native_visits_equal_the_reference_at_any_size(n, columns):
    torch.manual_seed(0)
    multipliers = torch.rand(3, columns)
    ours, theirs = DeferredAdam(multipliers, BETAS, EPS, threads=7), ReferenceAdam(multipliers, BETAS, EPS)
    rows = random_rows(n, columns)
    expected = Rows(rows.parameters.double(), rows.exp_avg.double(), rows.exp_avg_sq.double(), rows.last_step.clone())
    for share in (1.0, 0.5, 0.0, 0.7):
        ids = torch.nonzero(torch.rand(n) < share)[:, 0]
        gradients, out = torch.randn(len(ids), columns), torch.empty(len(ids), columns)
        expected_out = out.double()
        for adam, state, g, o in ((ours, rows, gradients, out), (theirs, expected, gradients.double(), expected_out)):
            adam.begin_step([1e-2, 2e-2, 0.0])
            adam.commit_and_forward(*state.state(), ids, g, o)
        torch.testing.assert_close(out.double(), expected_out, rtol=1e-6, atol=1e-7)
    for actual, value in zip(rows.all(), expected.all(), strict=True):
        torch.testing.assert_close(actual.double(), value.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("n", "multipliers"), [(1, APPEARANCE), (600, APPEARANCE), (600, GEOMETRY)])
def test_dense_is_torch_adam(n, multipliers):
    torch.manual_seed(0)
    columns = multipliers.shape[1]
    adam, rows = DeferredAdam(multipliers, BETAS, EPS, threads=3), random_rows(n, columns)
    oracle = DenseOracle(rows.parameters, BETAS, multipliers)
    for step in range(50):
        rates = torch.full((len(multipliers),), 1e-2 / (1 + step), dtype=torch.float64)
        gradients = torch.randn(n, columns) * (torch.rand(n, 1) < 0.3)
        adam.begin_step(rates.tolist())
        adam.dense(rows.state()[0], gradients)
        oracle.step(gradients, rates @ multipliers.double())
    for actual, expected in zip(rows.all(), oracle.state(), strict=False):
        assert largest_row_error(actual, expected) < 2e-6


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    adam, rows = stepped_rows(5000, 12, GEOMETRY)
    ids = torch.nonzero(torch.rand(5000) < 0.9)[:, 0]
    gradients, results = torch.randn(len(ids), 12), []
    for threads in (1, 2, 5, 64):
        adam.threads = threads
        copy = rows.copy()
        adam.commit(*copy.state(), ids, gradients)
        results.append(copy)
    for other in results[1:]:
        assert all(map(torch.equal, results[0].all(), other.all()))


def test_a_parameter_without_gradient_stays_and_a_tiny_one_is_finite():
    adam, rows = DeferredAdam(torch.ones(1, 4), BETAS, EPS, threads=1), random_rows(1, 4)
    start, gradient = rows.parameters.clone(), torch.tensor([[0.0, 1e-30, 1e-10, 1.0]])
    oracle = DenseOracle(rows.parameters, BETAS, torch.ones(1, 4))
    for step in range(60):
        adam.begin_step([1e-2])
        if step == 0:
            adam.commit(*rows.state(), None, gradient)
        oracle.step(gradient * (step == 0), torch.full((4,), 1e-2))
    out = torch.empty(1, 4)
    adam.forward(*rows.state(), None, out)
    assert out[0, 0] == start[0, 0]
    assert out[0, 1] == start[0, 1]  # eps holds it back
    torch.testing.assert_close(out.double(), oracle.state()[0], rtol=0, atol=1e-5)


def test_moments_do_not_drift_over_many_steps():
    adam, rows = DeferredAdam(torch.ones(1, 16), BETAS, EPS, threads=1), random_rows(1, 16)
    gradients, steps = torch.rand(1, 16) + 0.5, 5000
    for _ in range(steps):
        adam.begin_step([1e-3])
        adam.commit(*rows.state(), None, gradients)
    for moment, beta, power in ((rows.exp_avg, BETAS[0], 1), (rows.exp_avg_sq, BETAS[1], 2)):
        expected = (1 - beta**steps) * gradients.double() ** power
        # Without fused multiply-add a step rounds twice, at worst always the same way: what 1 / (1 - beta) steps add.
        rtol = 2**-23 / (1 - beta) if native_kernels.INSTRUCTION_SET == "baseline" else 4e-6
        torch.testing.assert_close(moment.double(), expected, rtol=rtol, atol=0)


@pytest.mark.slow
def test_a_gap_of_200_000_steps():
    adam, rows = DeferredAdam(torch.ones(1, 4), BETAS, EPS, threads=1), random_rows(3, 4)
    before = rows.copy()
    adam.begin_step([1e-2])
    gradients = torch.ones(3, 4)
    adam.commit(*rows.state(), None, gradients)
    for _ in range(200_000):
        adam.begin_step([1e-2])
    # Since then m / sqrt(v) has faded: the sum of its 200 001 steps, in float64.
    b1, b2 = BETAS
    i = torch.arange(1, 200_002, dtype=torch.float64)
    m, v = (1 - b1) * b1 ** (i - 1), (1 - b2) * b2 ** (i - 1)
    travel = (1e-2 * m / (1 - b1**i) / ((v / (1 - b2**i)).sqrt() + EPS)).nan_to_num().sum()
    out = torch.empty(3, 4)
    adam.forward(*rows.state(), None, out)
    torch.testing.assert_close(out.double(), before.parameters.double() - travel, rtol=1e-6, atol=1e-7)
    adam.commit(*rows.state(), None, gradients)
    assert torch.equal(rows.exp_avg, torch.full((3, 4), 1 - b1))
    torch.testing.assert_close(rows.exp_avg_sq, torch.full((3, 4), 1 - b2))
    assert rows.last_step.tolist() == [200_001] * 3


def test_nothing_visible_changes_nothing():
    adam, rows = stepped_rows(10, 48, APPEARANCE)
    before, none = rows.copy(), torch.empty(0, dtype=torch.int64)
    adam.commit(*rows.state(), none, torch.empty(0, 48))
    adam.forward(*rows.state(), none, torch.empty(0, 48))
    adam.commit_and_forward(*rows.state(), none, torch.empty(0, 48), torch.empty(0, 48))
    assert all(map(torch.equal, rows.all(), before.all()))
    empty = random_rows(0, 48)
    adam.commit(*empty.state(), None, torch.empty(0, 48))
    adam.forward(*empty.state(), None, torch.empty(0, 48))


def test_before_the_first_step_values_are_those_stored():
    adam, rows = DeferredAdam(APPEARANCE, BETAS, EPS, threads=1), random_rows(3, 48)
    before, out = rows.copy(), torch.empty(3, 48)
    adam.forward(*rows.state(), None, out)
    adam.commit(*rows.state(), None, None)
    assert torch.equal(out, before.parameters)
    assert all(map(torch.equal, rows.all(), before.all()))


def int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("ids", int64(3, 2), "ids must increase"),
        ("ids", int64(2, 2), "ids must increase"),
        ("ids", int64(-1, 2), "ids must increase"),
        ("ids", int64(2, 10), "ids must increase"),
        ("ids", torch.tensor([1, 2], dtype=torch.int32), "ids must be contiguous torch.int64"),
        ("ids", int64(1, 2, 3, 4)[::2], "not contiguous"),
        ("gradients", torch.zeros(3, 48), r"gradients must be contiguous torch.float32 \[2, 48\]"),
        ("gradients", torch.zeros(2, 48, dtype=torch.float64), "gradients must be"),
        ("gradient_rows", int64(0, 2), "row of gradients"),
        ("gradient_rows", int64(-1, 0), "row of gradients"),
        ("gradient_rows", int64(0), "gradient_rows must be"),
        ("out", torch.zeros(1, 48), "out must be"),
        ("out", torch.zeros(48, 2).T, "out must be"),
        ("parameters", torch.zeros(10, 12), "parameters must be"),
        ("exp_avg", torch.zeros(9, 48), "exp_avg must be"),
        ("exp_avg_sq", torch.zeros(10, 48, dtype=torch.float16), "exp_avg_sq must be"),
        ("last_step", torch.zeros(10, dtype=torch.int64), "last_step must be"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(argument, value, message):
    adam, rows = stepped_rows(10, 48, APPEARANCE)
    arguments = {
        "parameters": rows.parameters,
        "exp_avg": rows.exp_avg,
        "exp_avg_sq": rows.exp_avg_sq,
        "last_step": rows.last_step,
        "ids": int64(2, 3),
        "gradients": torch.ones(2, 48),
        "gradient_rows": int64(1, 0),
        "out": torch.zeros(2, 48),
    }
    if argument == "gradients":
        arguments["gradient_rows"] = None

    def commit_and_forward(parameters, exp_avg, exp_avg_sq, last_step, **others: Tensor) -> None:
        adam.commit_and_forward(RowState(parameters, (exp_avg, exp_avg_sq)), last_step, **others)

    before = rows.copy()
    with pytest.raises(ValueError, match=message):
        commit_and_forward(**{**arguments, argument: value})
    assert all(map(torch.equal, rows.all(), before.all()))
    commit_and_forward(**arguments)  # as they were, they are right


@pytest.mark.parametrize("row", [2, -1])
def test_rows_to_forward_to_that_are_not_there_are_refused(row):
    adam, rows = stepped_rows(10, 48, APPEARANCE)
    out = torch.full((2, 48), 7.0)
    with pytest.raises(ValueError, match="row of out"):
        adam.forward(*rows.state(), int64(2, 3), out, torch.ones(2, 48), out_rows=int64(0, row))
    assert (out == 7).all()


@pytest.mark.parametrize("stamp", [-1, 7, 1_000_000])
def test_impossible_stamps_are_refused_and_left_alone(stamp):
    adam, rows = stepped_rows(10, 48, APPEARANCE)  # step 7 has begun
    rows.last_step[4] = stamp
    before = rows.copy()
    with pytest.raises(ValueError, match="last_step"):
        adam.commit(*rows.state(), int64(3, 4, 5), torch.ones(3, 48))
    assert all(torch.equal(a[4], b[4]) for a, b in zip(rows.all(), before.all(), strict=True))
    assert rows.last_step.tolist()[3:6] == [7, stamp, 7]


def test_impossible_settings_are_refused():
    for betas in ((0.999, 0.9), (-0.1, 0.9), (0.9, 1.0)):
        with pytest.raises(ValueError, match="betas"):
            DeferredAdam(APPEARANCE, betas, EPS)
    with pytest.raises(ValueError, match="eps"):
        DeferredAdam(APPEARANCE, BETAS, 0.0)
    with pytest.raises(ValueError, match="multipliers"):
        DeferredAdam(APPEARANCE[0], BETAS, EPS)
    adam, rows = DeferredAdam(APPEARANCE, BETAS, EPS), random_rows(2, 48)
    with pytest.raises(ValueError, match="begin_step"):
        adam.commit(*rows.state(), None, torch.empty(2, 48))
    with pytest.raises(ValueError, match="2 learning rates for 1 schedules"):
        adam.begin_step([1.0, 1.0])


@pytest.mark.parametrize(("variable", "expected"), [("3", 3), ("5,2", 5), ("0", None), ("many", None), ("", None)])
def test_number_of_threads(monkeypatch, variable, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert num_threads() == (expected or len(os.sched_getaffinity(0)))
