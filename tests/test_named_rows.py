"""Rows that are named for rendering get the gradient that autograd would join."""

import pytest
import torch

from offload.models.named_rows import named_rows
from offload.store.layout import RowLayout
from tests.triton_places import ON_GPU, WITHOUT_GPU


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_gradients_are_joined(kind, device, count, monkeypatch):
    if kind != "torch":
        from offload.models import named_rows as module
        from offload.models import named_rows_triton

        monkeypatch.setattr(module, "kernels_for", lambda device, name: named_rows_triton)
    layout = RowLayout.of("geometry", 3, "compact")
    rows = torch.randn(count, layout.num_columns, device=device).requires_grad_()
    expected = rows.detach().clone().requires_grad_()
    for source, named in ((rows, named_rows(layout, rows)), (expected, layout.named(expected))):
        assert list(named) == ["means", "scales", "quats", "opacities", "sh0"]
        (named["means"].sin().sum() + named["quats"].square().sum() + (named["sh0"] ** 3).sum()).backward()
        assert source.grad.shape == source.shape
    assert torch.equal(rows.grad, expected.grad)
    assert rows.grad[:, 3:6].abs().sum() == 0
