"""Gradients of harmonics that the CPU's Adam makes, against autograd, torch's Adam in float64 and given gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from offload.adam.codes import num_values
from offload.adam.harmonics import HarmonicsGradient
from offload.adam.host import DeferredAdam
from offload.store.layout import RowState
from rendering.harmonics import real_harmonics
from tests.test_adam import APPEARANCE, BETAS, EPS, DenseOracle, largest_row_error, random_rows
from tests.test_compact_adam import assert_same_but_for_ties
from tests.test_harmonics_gradient import POSITION, gradients_of

TYPES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "pairs": (torch.float32, torch.int32),
    "codes": (torch.float16, torch.int16),
}
# (form, degree of the harmonics in a row, whether the constant one is before them): the rows that there are
FORMS = [
    ("float32", 3, True),
    ("float32", 3, False),
    ("pairs", 3, True),
    *(("codes", degree, False) for degree in (1, 2, 3)),
]


@dataclass
class Visited:
    """Rows of all ages that a step will visit."""

    rows: RowState
    last_step: Tensor
    adam: DeferredAdam

    @classmethod
    def random(cls, form: str, degree: int, has_constant: bool, n: int) -> Visited:
        columns, values = 16 * degree, num_values(degree) + 3 * has_constant
        multipliers = (torch.arange(columns)[None] < values).float()
        adam = DeferredAdam(multipliers, BETAS, EPS, threads=1)
        parameters, *moments = (torch.zeros(n, columns, dtype=dtype) for dtype in TYPES[form])
        parameters[:, :values].normal_()
        visited = cls(RowState(parameters, tuple(moments)), torch.zeros(n, dtype=torch.int32), adam)
        for _ in range(5):
            adam.begin_step([1e-2])
            ids = torch.nonzero(torch.rand(n) < 0.5)[:, 0]
            adam.commit(visited.rows, visited.last_step, ids, torch.randn(len(ids), columns) * multipliers)
        adam.begin_step([2e-2])
        return visited

    def copy(self) -> Visited:
        parameters, *moments = (tensor.clone() for tensor in self.rows.tensors())
        return replace(self, rows=RowState(parameters, tuple(moments)), last_step=self.last_step.clone())

    def commit(self, ids: Tensor | None, gradients: Tensor | HarmonicsGradient, **named: Tensor) -> Visited:
        """Commit copies of the rows."""
        copy = self.copy()
        self.adam.commit(copy.rows, copy.last_step, ids, gradients, **named)
        return copy

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.rows.tensors(), self.last_step


def made_of(count: int, degree: int, has_constant: bool = False) -> HarmonicsGradient:
    """Means and gradients of all sizes, side by side.

    A third is not drawn, of which some lie where the camera is, infinitely far away or nowhere. One is drawn there.
    """
    both = torch.randn(count, 6)
    both[:, 3:] *= 10 ** (-6 * torch.rand(count, 1))
    both[::3, 3:] = 0
    for place, where in enumerate((torch.tensor(POSITION), torch.inf, torch.nan)):
        both[3 * place :: 9, :3] = where
    both[1:2, :3] = torch.tensor(POSITION)
    return HarmonicsGradient(both[:, :3], both[:, 3:], POSITION, degree, has_constant)


def take(made: HarmonicsGradient, rows: Tensor | slice) -> HarmonicsGradient:
    return replace(made, means=made.means[rows], constant=made.constant[rows])


def same(visited: Visited, others: Visited) -> bool:
    return all(map(torch.equal, visited.tensors(), others.tensors()))


@pytest.mark.parametrize("has_constant", [True, False])
@pytest.mark.parametrize("degree", range(4))
def test_it_is_that_of_autograd(degree, has_constant):
    """A first moment that was zero is the gradient times 1 - b1."""
    torch.manual_seed(degree)
    means, constant, of_harmonics = gradients_of(301, 3, degree)
    expected = torch.cat([constant, of_harmonics[:, :45]], dim=1) if has_constant else of_harmonics
    adam, rows = DeferredAdam(torch.ones(1, 48), BETAS, EPS, threads=2), random_rows(301, 48)
    adam.begin_step([1e-3])
    state, last_step = rows.state()
    adam.commit(state, last_step, None, HarmonicsGradient(means, constant, POSITION, degree, has_constant))
    made = rows.exp_avg / (1 - BETAS[0])
    assert torch.equal(made == 0, expected == 0)
    # The difference of a mean and the camera is rounded, which directions at a tenth of that distance see tenfold.
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=2e-5)


def test_many_steps_are_those_of_torch_adam():
    """Degrees grow, and rows are seen from other places, now and then."""
    torch.manual_seed(0)
    n, steps = 60, 80
    adam, rows = DeferredAdam(APPEARANCE, BETAS, EPS, threads=2), random_rows(n, 48)
    oracle, means = DenseOracle(rows.parameters, BETAS), torch.randn(n, 3)
    for step in range(steps):
        degree, position = 4 * step // steps, tuple((3 + torch.rand(3)).tolist())
        ids = torch.nonzero(torch.rand(n) < 0.3)[:, 0]
        both = torch.cat([means[ids], torch.randn(len(ids), 3)], dim=1)
        rates = torch.tensor([1e-2 / (1 + step)], dtype=torch.float64)
        adam.begin_step(rates.tolist())
        adam.commit(*rows.state(), ids, HarmonicsGradient(both[:, :3], both[:, 3:], position, degree, True))

        directions = torch.nn.functional.normalize(both[:, :3].double() - torch.tensor(position).double(), dim=1)
        basis = torch.stack(list(real_harmonics(directions)), dim=1)  # [V, 16]
        basis[:, (degree + 1) ** 2 :] = 0
        products = (basis / basis[:, :1])[:, :, None] * both[:, None, 3:].double()
        oracle.step(
            torch.zeros(n, 48, dtype=torch.float64).index_add(0, ids, products.flatten(1)), rates @ APPEARANCE.double()
        )
    adam.commit(*rows.state(), None, None)
    for actual, expected in zip(rows.all(), oracle.state(), strict=False):
        assert largest_row_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    ("form", "degree", "has_constant", "of_degree"),
    [(*form, of_degree) for form in FORMS for of_degree in range(form[1] + 1)],
)
def test_rows_become_what_given_gradients_make_them(form, degree, has_constant, of_degree):
    torch.manual_seed(of_degree)
    visited, made = Visited.random(form, degree, has_constant, 601), made_of(500, of_degree, has_constant)
    ids = torch.nonzero(torch.rand(601) < 0.6)[:, 0]
    gradient_rows = torch.randperm(500)[: len(ids)]
    expected = visited.commit(ids, made.dense(16 * degree), gradient_rows=gradient_rows)
    actual = visited.commit(ids, made, gradient_rows=gradient_rows)
    assert torch.equal(actual.last_step, expected.last_step)
    if form == "float32":  # gradients differ in last bits, of harmonics that are nearly zero in more
        for tensor, other in zip(actual.rows.tensors(), expected.rows.tensors(), strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)
    else:
        assert_same_but_for_ties(actual.rows, expected.rows, visited.adam.reach)
    assert not any(tensor.isnan().any() for tensor in actual.rows.tensors())


@pytest.mark.parametrize(("form", "degree", "has_constant"), FORMS)
def test_a_row_is_the_same_however_it_is_visited(form, degree, has_constant):
    """By itself or among others, forwarded or committed, with its gradient in any row of a buffer of any layout."""
    torch.manual_seed(0)
    n = 200
    visited, made = Visited.random(form, degree, has_constant, n), made_of(150, degree, has_constant)
    ids = torch.nonzero(torch.rand(n) < 0.6)[:, 0][:115]  # the last batch is not full
    gradient_rows, columns = torch.randperm(150)[: len(ids)], 16 * degree
    expected = visited.commit(ids, made, gradient_rows=gradient_rows)
    assert not torch.equal(expected.rows.parameters, visited.rows.parameters)

    sorted_made = take(made, gradient_rows)
    assert same(visited.commit(ids, sorted_made), expected)
    visited.adam.threads = 2
    assert same(visited.commit(ids, sorted_made), expected)
    single = visited.copy()
    for i in range(len(ids)):
        single.adam.commit(single.rows, single.last_step, ids[i : i + 1], take(sorted_made, slice(i, i + 1)))
    assert same(single, expected)

    both, out, unsorted = visited.copy(), torch.empty(len(ids), columns), torch.full((n, columns), 7.0)
    visited.adam.forward(both.rows, both.last_step, ids, out, sorted_made)
    assert same(both, visited)
    assert torch.equal(out, expected.rows.parameters[ids].float())
    out_rows = torch.randperm(n)[: len(ids)]
    visited.adam.forward(both.rows, both.last_step, ids, unsorted, sorted_made, out_rows=out_rows)
    assert torch.equal(unsorted[out_rows], out)
    committed = torch.empty_like(out)
    visited.adam.commit_and_forward(both.rows, both.last_step, ids, made, committed, gradient_rows=gradient_rows)
    assert same(both, expected)
    assert torch.equal(committed, out)


@pytest.mark.parametrize(("form", "degree", "has_constant"), FORMS)
def test_rows_that_are_refused_take_no_gradient_of_others(form, degree, has_constant):
    torch.manual_seed(0)
    visited, made = Visited.random(form, degree, has_constant, 70), made_of(70, degree, has_constant)
    refused = torch.tensor([0, 3, 15, 16, 17, 40, 69])
    others = torch.ones(70, dtype=torch.bool)
    others[refused] = False
    ids = torch.nonzero(others)[:, 0]
    visited.last_step[refused] = 100
    expected = visited.commit(ids, take(made, ids))
    rows = visited.copy()
    with pytest.raises(ValueError, match="they were left alone"):
        rows.adam.commit(rows.rows, rows.last_step, None, made)
    assert same(rows, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: {"means": made.means[:1]}, r"means must be contiguous torch.float32 \[2, 3\]"),
        (lambda made: {"means": made.means.double()}, "means must be contiguous torch.float32"),
        (lambda made: {"means": torch.zeros(3, 2).T}, "means must be .* not contiguous"),
        (lambda made: {"means": torch.zeros(2, 4)}, "means must be"),
        (lambda made: {"means": made.means.to("meta")}, "means must be .* on meta"),
        (lambda made: {"constant": made.constant[:1]}, r"constant must be contiguous torch.float32 \[2, 3\]"),
        (lambda made: {"constant": made.constant.half()}, "constant must be contiguous torch.float32"),
        (lambda made: {"constant": torch.zeros(1, 3).expand(2, 3)}, "constant must be .* not contiguous"),
        (lambda made: {"constant": made.constant.to("meta")}, "constant must be .* on meta"),
        (lambda made: {"sh_degree": 2}, "sh_degree 2 are made in 24 to 48 columns; rows have 16"),
        (lambda made: {"position": (0.0, 1.0)}, "what gradients are made of does not fit together"),
    ],
)
def test_wrong_parts_are_refused_and_change_nothing(change: Callable, message):
    visited, made = Visited.random("codes", 1, False, 10), made_of(2, 1)
    rows, ids = visited.copy(), torch.tensor([2, 3])
    with pytest.raises(ValueError, match=message):
        rows.adam.commit(rows.rows, rows.last_step, ids, replace(made, **change(made)))
    assert same(rows, visited)
    rows.adam.commit(rows.rows, rows.last_step, ids, made)  # as they were, they are right


@pytest.mark.parametrize(("count", "gradient_rows"), [(2, [0, 2]), (2, [-1, 0]), (0, [0, 1])])
def test_rows_of_gradients_that_are_not_there_are_refused(count, gradient_rows):
    visited = Visited.random("float32", 3, True, 10)
    rows = visited.copy()
    with pytest.raises(ValueError, match="row of gradients"):
        rows.adam.commit(
            rows.rows,
            rows.last_step,
            torch.tensor([2, 3]),
            made_of(count, 3, True),
            gradient_rows=torch.tensor(gradient_rows),
        )
    assert same(rows, visited)


def test_rows_of_more_columns_are_refused():
    adam, rows = DeferredAdam(torch.ones(1, 50), BETAS, EPS), random_rows(2, 50)
    adam.begin_step([1e-3])
    with pytest.raises(ValueError, match="in 45 to 48 columns; rows have 50"):
        adam.commit(*rows.state(), None, made_of(2, 3))


def test_nothing_visible_changes_nothing():
    visited = Visited.random("codes", 3, False, 10)
    assert same(visited.commit(torch.empty(0, dtype=torch.int64), made_of(0, 3)), visited)
