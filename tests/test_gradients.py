"""Steps with a gradient that is not finite: on the CPU, and the Triton kernels on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from offload.adam import finite as gradients_torch
from offload.adam.finite import FiniteGradients
from tests.triton_places import ON_GPU, WITHOUT_GPU

PLACES = [*WITHOUT_GPU, *ON_GPU[1:]]  # on a GPU with Triton only


def clear_unless_finite(kind: str):
    if kind == "torch":
        return gradients_torch.clear_unless_finite
    from offload.adam import finite_triton as gradients_triton

    return gradients_triton.clear_unless_finite


@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize("some_rows", [False, True])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf"), 3e38])
def test_all_are_cleared_unless_all_are_finite(kind, device, some_rows, value):
    torch.manual_seed(0)
    gradients = [torch.randn(300, *shape, device=device) for shape in ((3,), (), (15, 3))]
    ids = torch.cat([torch.arange(0, 300, 2), torch.tensor([4])]).to(device) if some_rows else None  # one comes twice
    gradients[2][298, 14, 2] = value
    before = [gradient.clone() for gradient in gradients]
    skipped = torch.tensor([7, 2, 0], dtype=torch.int32, device=device)
    clear_unless_finite(kind)(gradients, ids, skipped, 9)
    is_finite = abs(value) < float("inf")
    assert skipped.tolist() == ([7, 0, 0] if is_finite else [8, 3, 9])
    for gradient, expected in zip(gradients, before, strict=True):
        if not is_finite:
            expected[slice(None) if ids is None else ids] = 0
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_nothing_in_view(kind, device):
    gradients, none = [torch.ones(4, 3, device=device)], torch.zeros(0, dtype=torch.int64, device=device)
    skipped = torch.tensor([7, 2, 8], dtype=torch.int32, device=device)
    clear_unless_finite(kind)(gradients, none, skipped, 9)
    assert skipped.tolist() == [7, 0, 8]
    skipped[1] = 2
    clear_unless_finite(kind)([gradients[0][:0]], None, skipped, 10)
    assert skipped.tolist() == [7, 0, 8]
    assert gradients[0].min() == 1


@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize("some_rows", [False, True])
@pytest.mark.parametrize("spoiled", range(6))
def test_any_of_six_gradients_spoils_all(kind, device, some_rows, spoiled):
    """As many as a model has at most; of one block each, of more, and of none; the last value is what spoils."""
    gradients = [torch.ones(300, *shape, device=device) for shape in ((3,), (), (15, 3), (0,), (4,), (1, 3))]
    if spoiled == 3:
        gradients[spoiled] = torch.ones(300, 28, device=device)  # 8400 values are 3 blocks
    gradients[spoiled].view(300, -1)[299, -1] = float("nan")
    ids = torch.arange(1, 300, 2, device=device) if some_rows else None
    skipped = torch.zeros(3, dtype=torch.int32, device=device)
    clear_unless_finite(kind)(gradients, ids, skipped, 1)
    assert skipped.tolist() == [1, 1, 1]
    for gradient in gradients:
        assert not gradient[slice(None) if ids is None else ids].any()
        if ids is not None:
            assert gradient[::2].numel() == 0 or gradient[::2].min() == 1


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_skipped_steps_are_counted(monkeypatch, kind, device):
    monkeypatch.setattr("offload.adam.finite.clear_unless_finite", clear_unless_finite(kind))
    finite = FiniteGradients(torch.device(device))
    for value in (1.0, float("nan"), float("inf"), 1.0, float("nan")):
        leaves = torch.zeros(2, device=device), torch.zeros(1, device=device)
        for leaf, gradient in zip(leaves, ([1.0, 2.0], [value]), strict=True):
            leaf.grad = torch.tensor(gradient, device=device)
        finite.keep(leaves)
    assert finite.skipped_steps() == (3, 1)
    finite.keep([])
    assert finite.skipped_steps() == (3, 1)
