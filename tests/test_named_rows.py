"""Rows that are named and activated for rendering get the gradient that autograd would join."""

import pytest
import torch
from torch import Tensor

from offload.backends import kernels_for
from offload.models.named_rows import NamedRows
from offload.pipelines.groups import leaf_without_values
from offload.store.layout import RowLayout
from tests.triton_places import ON_GPU, WITHOUT_GPU
from training.gaussians import activate

LAYOUT = RowLayout.of("geometry", 3, "compact")
CASES = [  # what has a gradient
    (["means", "quats", "sh0"], ["scales", "opacities"]),  # in a step
    (["means", "scales", "quats", "opacities", "sh0"], ["scales", "opacities"]),  # with regularizers
    (["means", "scales", "quats", "opacities", "sh0"], []),
    (["sh0"], ["scales"]),
]
PLACES = [*WITHOUT_GPU, *ON_GPU]
# An exponential is good to two units in the last place of float32, and what is made of it is rounded twice; below 1e-37
# a GPU has zeros.
BITS = dict(rtol=4 * 2.0**-23, atol=1e-37)


@pytest.fixture(autouse=True)
def triton_where_a_test_wants_it(monkeypatch, request):
    """Let tensors on the CPU meet the kernels that a test is for."""
    kind, place = (request.node.callspec.params[name] for name in ("kind", "device"))
    monkeypatch.setattr("offload.backends._takes_triton", lambda device: kind == "triton" and device.type == place)


def taken(rows: Tensor, leaf: Tensor) -> NamedRows:
    """Name rows, whose gradient a leaf receives."""
    named = NamedRows({})
    named.take(LAYOUT, leaf, rows.detach)
    return named


def loss(values: list[Tensor]) -> Tensor:
    """Weigh each number otherwise."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=generator).to(value) for value in values]
    return torch.stack([(value * weight).sum() for value, weight in zip(values, weights, strict=True)]).sum()


@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize("count", [0, 1, 300])
@pytest.mark.parametrize(("names", "of_activated"), CASES)
def test_values_and_gradients_are_those_of_each_operation(kind, device, count, names, of_activated):
    torch.manual_seed(0)
    rows = 3 * torch.randn(count, LAYOUT.num_columns, device=device)
    leaf = leaf_without_values(*rows.shape, rows.device)
    exact = rows.double().requires_grad_()
    named, expected = taken(rows, leaf), LAYOUT.named(exact)
    activated, activated_expected = named.activated, activate({**expected, "shN": expected["sh0"]})
    assert list(named) == ["means", "scales", "quats", "opacities", "sh0"]
    for name, value in named.items():
        assert torch.equal(value.double(), expected[name])
    for name, value in activated.items():
        torch.testing.assert_close(value.double(), activated_expected[name], **BITS)
    assert named["means"].is_contiguous()
    assert named["quats"].is_contiguous()

    values = [named[name] for name in names] + [activated[name] for name in of_activated]
    loss(values).backward()
    loss([expected[name] for name in names] + [activated_expected[name] for name in of_activated]).backward()
    assert leaf.grad.shape == rows.shape
    assert leaf.grad.is_contiguous()
    # Products of four rounded numbers; 1 - o has the rounding of o, and two gradients may cancel each other.
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-6, atol=1e-6)
    assert (leaf.grad[:, 14:] == 0).all()
    if "scales" not in names + of_activated:
        assert (leaf.grad[:, 3:6] == 0).all()


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_a_leaf_without_values_takes_no_memory_and_tells_whoever_reads_it(kind, device):
    leaf = leaf_without_values(1000, 16, torch.device(device))
    assert leaf.untyped_storage().nbytes() == 4
    assert leaf.isnan().all()


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_activated_values_are_exact_over_their_range(kind, device):
    """From what vanishes to what is infinite, and what is no number."""
    rows = torch.zeros(4001, LAYOUT.num_columns, device=device)
    rows[:, 3] = rows[:, 10] = torch.linspace(-87, 88.7, 4001)
    activated = taken(rows, leaf_without_values(*rows.shape, rows.device)).activated
    torch.testing.assert_close(activated["scales"][:, 0].double(), rows[:, 3].double().exp(), **BITS)
    torch.testing.assert_close(activated["opacities"].double(), rows[:, 10].double().sigmoid(), **BITS)
    ends = torch.tensor([-torch.inf, -200.0, 200.0, torch.inf, torch.nan], device=device)
    rows[:5, 3] = rows[:5, 10] = ends
    activated = taken(rows, leaf_without_values(*rows.shape, rows.device)).activated
    torch.testing.assert_close(activated["scales"][:5, 0], ends.exp(), equal_nan=True)
    torch.testing.assert_close(activated["opacities"][:5], ends.sigmoid(), equal_nan=True)


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_rows_are_read_once_more_for_log_scales_and_logits_alone(kind, device):
    """All that rendering takes stays as it is where rows change, and so does what has been asked for before."""
    rows, reads = torch.randn(7, LAYOUT.num_columns, device=device), []
    before, leaf = LAYOUT.named(rows.clone()), leaf_without_values(*rows.shape, rows.device)
    assert leaf.untyped_storage().nbytes() == 4

    def read() -> Tensor:
        reads.append(None)
        return rows.clone()

    named = NamedRows({"colors": rows})
    named.take(LAYOUT, leaf, read)
    assert list(named) == ["colors", *LAYOUT.columns]
    assert all(torch.equal(named[name], before[name]) for name in ("means", "quats", "sh0"))
    assert len(reads) == 1
    with torch.no_grad():
        assert all(torch.equal(named[name], before[name]) for name in ("scales", "opacities"))
    assert named["scales"].requires_grad
    assert named["opacities"].requires_grad
    rows.zero_()
    for name, value in before.items():
        assert torch.equal(named[name], value)
    assert len(reads) == 2


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_names_that_were_set_or_deleted_are_not_read(kind, device):
    rows = torch.randn(5, LAYOUT.num_columns, device=device)
    named, others = taken(rows, leaf_without_values(*rows.shape, rows.device)), torch.zeros(5, 3, device=device)
    assert "scales" in named
    named["scales"] = others
    assert torch.equal(named["opacities"], rows[:, 10])
    assert named["scales"] is others
    named = taken(rows, leaf_without_values(*rows.shape, rows.device))
    del named["opacities"]
    assert torch.equal(named["scales"], rows[:, 3:6])
    assert "opacities" not in named


@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_parts_are_joined(kind, device, count):
    rows = torch.randn(count, LAYOUT.num_columns, device=device)
    parts = [rows[:, columns] for columns in LAYOUT.columns.values()]
    joined = kernels_for(rows.device, "offload.models.named_rows").join(parts, LAYOUT.num_columns)
    rows[:, 14:] = 0
    assert torch.equal(joined, rows)
