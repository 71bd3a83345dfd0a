"""Which rows consecutive views have in common."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.triton_places import ON_GPU, WITHOUT_GPU


def overlap_of(kind: str, place: str, *views: Tensor) -> tuple[Tensor, ...]:
    """What there is in common, and behind it how many rows are moved."""
    if kind == "torch":
        from offload.pipelines.overlap import overlap
    else:
        from offload.pipelines.overlap_triton import overlap
    num_moved = torch.tensor(3, device=place)  # of views before
    found = overlap(*(view.to(place) for view in views), num_moved)
    return *(tensor.cpu() for tensor in found), num_moved.cpu() - 3


@pytest.mark.parametrize(("kind", "place"), WITHOUT_GPU + ON_GPU)
def test_each_row_is_found_where_it_is(kind, place):
    """By sets of Python; views that are empty, whole, one row, and longer than a block of the kernel."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for count, *shares in ((0, 1, 1, 1), (1, 1, 1, 0), (40, 0.3, 0.5, 0), (40, 0.5, 0, 0.5), (700, 0.5, 0.6, 0.7)):
        ids, present, previous = ((torch.rand(count, generator=generator) < s).nonzero()[:, 0] + 5 for s in shares)
        sources, moved, places, nearby, on_host, leaving, num_moved = overlap_of(kind, place, ids, present, previous)
        here, before = ({int(row): i for i, row in enumerate(rows)} for rows in (present, previous))
        for i, row in enumerate(ids.tolist()):
            assert int(sources[i]) == here.get(row, -1)
            assert int(places[i]) == (-1 if row in here else before.get(row, -1))
            assert (bool(moved[i]), bool(on_host[i])) == (row in here, row not in here and row not in before)
            assert bool(nearby[i]) == (row not in here and row in before)
            seen.add((row in here, row in before))
        assert leaving.tolist() == [row not in set(ids.tolist()) for row in present.tolist()]
        assert int(num_moved) == len(set(ids.tolist()) & set(present.tolist()))
        assert {len(found) for found in (sources, moved, places, nearby, on_host)} == {len(ids)}
    assert len(seen) == 4
