"""Colours made of harmonics as a compact store has them, against float64 and against the values that are fetched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.adam.stored_harmonics import StoredHarmonics, StoredRows
from offload.store.layout import RowState
from rendering.harmonics import real_harmonics
from tests.test_row_kernels import HostRows, assert_same_rows, random_host_rows
from tests.triton_places import ON_GPU, WITHOUT_GPU

POSITION = (0.3, -1.2, 2.5)
PLACES = [*WITHOUT_GPU, *ON_GPU]


@pytest.fixture(autouse=True)
def triton_where_a_test_wants_it(monkeypatch, request):
    """Let tensors on the CPU meet the kernels that a test is for."""
    kind, place = (request.node.callspec.params[name] for name in ("kind", "device"))
    monkeypatch.setattr("offload.backends._takes_triton", lambda device: kind == "triton" and device.type == place)


def stored(host: HostRows, ids: Tensor, *, in_order: bool) -> StoredRows:
    """Rows `ids` of a store; or, in order, of a view that has copies of them, and tables as the host rounds them."""
    if in_order:
        words, last_step = host.view(ids)
        skipped = host.tables.skipped()
        skipped = replace(skipped, sums=skipped.sums.float())
        return StoredRows(host.packed(words), None, last_step, skipped, has_constant=False)
    return StoredRows(host.state, ids, host.last_step, host.tables.skipped(), len(host.state.moments) == 2)


def current(host: HostRows, ids: Tensor) -> StoredRows:
    """The values of rows, which nothing need catch up."""
    return StoredRows(RowState(values_of(host, ids), ()), None, None, None, len(host.state.moments) == 2)


def values_of(host: HostRows, ids: Tensor) -> Tensor:
    """The current values of rows [V, columns]."""
    values = host.zeros(len(ids))
    host.kernels.fetch_rows(host.state, ids, ids, host.last_step, None, RowState(values, ()), host.tables)
    return values


def colors_in_float64(sh0: Tensor, shN: Tensor, means: Tensor, position: Tensor, degree: int) -> Tensor:
    """Colours [M, 3] of coefficients [M, 1, 3] and [M, columns], before they are cut."""
    directions = torch.nn.functional.normalize(means - position, dim=1)
    basis = torch.stack(list(real_harmonics(directions)), dim=1)[:, : (degree + 1) ** 2]  # [M, K]
    used = basis.shape[1] - 1
    coefficients = torch.cat([sh0, shN[:, : 3 * used].reshape(len(sh0), used, 3)], dim=1)
    return 0.5 + (basis[:, :, None] * coefficients).sum(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize(("degree", "of_degree"), [(3, 3), (3, 2), (3, 0), (2, 1), (1, 1), (0, 0)])
@pytest.mark.parametrize("form", ["compact, in order", "compact", "float32", "compact, values", "float32, values"])
def test_colors_and_gradients_are_those_of_the_values(kind, device, degree, of_degree, form):
    """Two thirds of the rows are drawn, in another order; some of the colours are cut."""
    torch.manual_seed(degree)
    host = random_host_rows(kind, device, "appearance", form.split(",")[0], degree)
    ids = torch.randperm(300)[:79].sort().values.to(device)
    geometry = 3 * torch.randn(79, 16, device=device)
    sh0 = geometry[:, 11:14].unflatten(1, (1, 3)).requires_grad_()  # not contiguous
    means = torch.randn(79, 3, device=device).requires_grad_()
    position = torch.tensor([POSITION], device=device).requires_grad_()
    drawn = torch.randperm(79)[:53].to(device)
    weights = torch.randn(53, 3, device=device)

    rows = current(host, ids) if "values" in form else stored(host, ids, in_order="order" in form)
    harmonics = StoredHarmonics(sh0, rows, of_degree)
    colors = harmonics.colors(means, position, torch.zeros_like(drawn), drawn)
    (colors * weights).sum().backward()

    values, before = values_of(host, ids).double(), 3 if form.startswith("float32") else 0
    constant = values[:, None, :before] if before else torch.zeros(79, 1, 3, device=device)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (sh0, means, position)]
    coefficients = (leaves[0] + constant)[drawn], values[drawn, before:]
    uncut = colors_in_float64(*coefficients, leaves[1][drawn], leaves[2], of_degree)
    (uncut.clamp(min=0) * weights).sum().backward()
    assert 0.1 < (uncut < 0).double().mean() < 0.9
    torch.testing.assert_close(colors.double(), uncut.clamp(min=0), rtol=1e-5, atol=1e-5)
    for leaf, other in zip((sh0, means, position), leaves, strict=True):
        expected = torch.zeros_like(other) if other.grad is None else other.grad  # of degree 0 directions have none
        # Of the order of ten, sums of 45 terms; a position's of 53 rows.
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize("degree", [3, 1])
def test_a_step_of_float32_without_values_is_that_on_the_gradient_itself(kind, device, degree):
    results = []
    for each, place in (("torch", "cpu"), (kind, device)):
        torch.manual_seed(degree)
        host = random_host_rows(each, place, "appearance", "float32", degree)
        ids = torch.randperm(300)[:79].sort().values.to(place)
        means, constant = (torch.randn(79, 3).to(place) for _ in range(2))
        constant[::3] = 0  # not drawn
        made = HarmonicsGradient(means, constant, POSITION, degree, has_constant=True)
        values, last_step = values_of(host, ids), host.last_step[ids]
        host.begin_step()
        if each == "torch" and not results:
            gradients = made.dense(host.columns)
            assert torch.equal(gradients[:, :3], constant)
            assert (gradients[:, 3 * (degree + 1) ** 2 :] == 0).all()
            host.kernels.step_host_rows(values, ids, last_step, gradients, host.state, host.tables)
        else:
            host.kernels.step_host_rows(None, ids, last_step, made, host.state, host.tables)
        results.append(host.tensors())
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=2e-6, atol=1e-7)  # rounded otherwise


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize("degree", [3, 1])
def test_a_step_without_values_is_the_step_on_those_that_are_fetched(kind, device, degree):
    """Bit for bit, in a view and in a store; after the first step, and where tables grow."""
    results = []
    for has_values in (True, False):
        torch.manual_seed(degree)
        host = random_host_rows(kind, device, "appearance", "compact", degree)
        ids = torch.randperm(300)[:79].sort().values.to(device)
        made = HarmonicsGradient(*(torch.randn(79, 3, device=device) for _ in range(2)), POSITION, degree)
        words, last_step = host.view(ids)
        values = host.values(words, last_step) if has_values else None
        resident = None if values is None else values.clone()
        host.begin_step()
        host.kernels.step_view_rows(values, ids, last_step, made, host.packed(words), host.tables)
        host.kernels.step_stored_rows(resident, ids, host.last_step, made, host.state, host.tables)
        results.append([*host.packed(words).tensors(), *host.tensors()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_a_step_of_geometry_without_values_is_the_step_on_those_that_are_fetched(kind, device):
    """Bit for bit but on a GPU, where two compiled kernels may fuse otherwise; with gradients that no colours tell."""
    results = []
    for has_values in (True, False):
        torch.manual_seed(0)
        host = random_host_rows(kind, device, "geometry", "compact")
        ids = torch.randperm(300)[:79].sort().values.to(device)
        gradients = torch.randn(79, 16, device=device)
        values = host.values(*host.view(ids)) if has_values else None
        host.begin_step()
        host.kernels.step_stored_rows(values, ids, host.last_step, gradients, host.state, host.tables)
        results.append(host.tensors())
    for actual, expected in zip(*results, strict=True):
        assert_same_rows(actual, expected, exact=device == "cpu")


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_what_catches_up_before_a_step_is_what_did_so_before_it_began(kind, device):
    torch.manual_seed(0)
    host = random_host_rows(kind, device, "appearance", "compact")
    for _ in range(3):
        before = host.tables.skipped()
        sums, eps = before.sums.clone(), before.eps
        host.begin_step()
        again, after = host.tables.skipped(previous=True), host.tables.skipped()
        assert torch.equal(again.sums, sums)
        assert again.eps == eps
        assert not torch.equal(after.sums, sums)
    host.tables.undo_step()
    assert torch.equal(host.tables.skipped().sums, sums)


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_nothing_is_drawn_and_several_cameras_are_refused(kind, device):
    host = random_host_rows(kind, device, "appearance", "compact")
    ids, nothing = torch.arange(5, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    sh0 = torch.zeros(5, 1, 3, device=device, requires_grad=True)
    harmonics = StoredHarmonics(sh0, stored(host, ids, in_order=False), 3)
    means = torch.zeros(5, 3, device=device, requires_grad=True)
    colors = harmonics.colors(means, torch.zeros(1, 3, device=device), nothing, nothing)
    assert colors.shape == (0, 3)
    colors.sum().backward()
    assert sh0.grad.count_nonzero() == means.grad.count_nonzero() == 0
    with pytest.raises(ValueError, match="one camera, there are 2"):
        harmonics.colors(means, torch.zeros(2, 3, device=device), nothing, nothing)
