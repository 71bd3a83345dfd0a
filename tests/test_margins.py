"""Views that are culled ahead, on geometry that is one step old or lags behind, miss nothing that is drawn."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras, Margin
from offload.culling.native import BlockBounds, visible_ids
from offload.models.forwarded import ForwardedGaussians
from offload.models.offloaded import OffloadedGaussians
from offload.models.streamed import StreamedGaussians
from tests.test_culling import random_cameras, random_geometry

BETAS = (0.9, 0.999)
RATES = {"means": 2e-2, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 1e-3, "shN": 1e-3}
TRAINERS = [(kind, place) for kind in (ForwardedGaussians, StreamedGaussians) for place in ("device", "host")]


def start(kind: type[OffloadedGaussians], place: str) -> OffloadedGaussians:
    rows = random_geometry(3000, seed=0)
    parameters = {"means": rows[:, :3], "scales": rows[:, 3:6], "quats": rows[:, 6:10], "opacities": rows[:, 10]}
    parameters |= {"sh0": torch.zeros(len(rows), 1, 3), "shN": torch.zeros(len(rows), 15, 3)}
    adam = AdamOptions(RATES, lambda step: RATES["means"], BETAS)
    return kind(parameters, adam, device=torch.device("cpu"), geometry=place, max_gaussians=3000)


def drawn_now(gaussians: OffloadedGaussians, cameras: Cameras) -> Tensor:
    """What cameras may draw of the current values, without any margin."""
    values = gaussians.rows(0, gaussians.num_gaussians)
    columns = [values[name].view(gaussians.num_gaussians, -1) for name in ("means", "scales", "quats", "opacities")]
    geometry = torch.cat([*columns, torch.zeros(gaussians.num_gaussians, 1)], dim=1)
    return visible_ids(geometry, BlockBounds(geometry), cameras)


def missed_rows(gaussians: OffloadedGaussians) -> int:
    """How many rows that a view may draw were not fetched for it, in steps that move rows as far as Adam can."""
    # What a wide view has moved may enter the narrow one after it.
    views = [random_cameras(seed, count=1, fov=fov) for seed in (3, 7, 11, 5) for fov in (60, 30)] * 6
    missed = num_drawn = 0
    for step, (cameras, upcoming) in enumerate(pairwise(views)):
        rows = gaussians.fetch(cameras)
        gaussians.prefetch(upcoming)
        size = (BETAS[1] / BETAS[0]) ** step  # growing gradients give the longest steps
        sum(size * rows[name].sum() for name in ("means", "scales", "quats", "opacities")).backward()
        gaussians.update()
        drawn = drawn_now(gaussians, upcoming)
        found = gaussians.state()["upcoming/ids"]
        num_drawn += len(drawn)
        missed += int((~torch.isin(drawn, found)).sum())
    assert num_drawn > 1000
    return missed


@pytest.mark.parametrize(("kind", "place"), TRAINERS)
def test_views_culled_ahead_miss_nothing(kind, place):
    gaussians = start(kind, place)
    assert missed_rows(gaussians) == 0
    if place == "host":  # where bounds of blocks have followed the rows
        assert torch.equal(gaussians._geometry._bounds.bounds, BlockBounds(gaussians._geometry._culled_rows()).bounds)


@pytest.mark.parametrize(("kind", "place"), TRAINERS)
def test_without_a_margin_rows_are_missed(kind, place):
    gaussians = start(kind, place)
    gaussians._geometry._margin = lambda lagging: Margin()
    assert missed_rows(gaussians) > 0


@pytest.mark.parametrize("kind", [ForwardedGaussians, StreamedGaussians])
def test_without_a_margin_for_skipped_steps_rows_are_missed(kind):
    """Of geometry on the device tests/test_device_geometry.py shows it."""
    gaussians = start(kind, "host")
    margin_of = gaussians._geometry._margin
    gaussians._geometry._margin = lambda lagging: margin_of(lagging=False)
    assert missed_rows(gaussians) > 0
