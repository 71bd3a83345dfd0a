"""Columns of pairs in rows, by torch and by Triton's kernels."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from distributed import pairs
from tests.triton_places import ON_GPU, WITHOUT_GPU

PLACES = [pytest.param(*each.values, id=each.id, marks=each.marks) for each in (*WITHOUT_GPU, *ON_GPU)]
COUNTS = (0, 1, 300)


def module_of(kind: str) -> ModuleType:
    if kind == "torch":
        return pairs
    from distributed import pairs_triton

    return pairs_triton


def columns_of(count: int, num_features: int, device: str) -> list[torch.Tensor]:
    """What a pair has on its way out, but radii, of which columns that do not lie whole in memory are one."""
    generator = torch.Generator().manual_seed(count)
    shapes = (count, 2), (count, 3), (count,), (count, num_features), (count,)
    columns = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    columns[1] = columns[1].t().contiguous().t()
    return columns


@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize("is_ordered", [True, False])
def test_columns_come_as_they_went(kind, device, is_ordered):
    module = module_of(kind)
    for count in COUNTS:
        columns = columns_of(count, 4, device)
        columns.append(torch.arange(2 * count, dtype=torch.int32, device=device).view(count, 2) + 2**24 - 2 * count)
        places = None if is_ordered else torch.randperm(count, generator=torch.Generator().manual_seed(1)).to(device)
        rows = module.pack(columns, places)
        of_pair = rows if places is None else rows[places]
        assert rows.shape == (count, 13)
        assert torch.equal(of_pair[:, 2:5], columns[1])
        assert torch.equal(of_pair[:, 10], columns[4])
        found = [torch.full_like(column, 7, memory_format=torch.contiguous_format) for column in columns]
        module.unpack(rows, found, places)
        assert all(map(torch.equal, found, columns))


@pytest.mark.parametrize(("kind", "device"), PLACES)
@pytest.mark.parametrize("worst", [0.0, torch.inf, torch.nan])
def test_gradients_are_divided_and_marked(kind, device, worst):
    """Whether the last value of all, or none, is not finite."""
    module = module_of(kind)
    for count in COUNTS:
        columns = columns_of(count, 3, device)[:4]
        columns[3][-1:, -1] = worst
        found = [torch.empty_like(column, memory_format=torch.contiguous_format) for column in columns]
        spoiled = torch.zeros((), dtype=torch.uint8, device=device)
        module.unpack(module.pack(columns, None, spoiled), found, None, 3, torch.zeros_like(spoiled))
        assert spoiled == (count > 0 and worst != 0)
        for values, column in zip(found, columns, strict=True):
            torch.testing.assert_close(values, column / 3, rtol=1e-6, atol=0, equal_nan=True)
        module.unpack(module.pack(columns, None), found, None, 3, torch.ones_like(spoiled))
        assert all(values.isnan().all() for values in found)
