"""Views that are culled ahead, on geometry that is one step old or lags behind, miss nothing that is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from offload.adam.bfloat16 import pack, unpack
from offload.adam.deferral import largest_step
from offload.adam.options import AdamOptions
from offload.culling.boxes import Boxes
from offload.culling.cameras import Cameras, Margin
from offload.culling.margins import drift_after, largest_correction, largest_rounded_step, margin_ahead
from offload.culling.native import BlockBounds, visible_ids
from offload.models.deferred import compact_parts
from offload.models.forwarded import ForwardedGaussians
from offload.models.geometry_host import HostGeometry
from offload.models.offloaded import OffloadedGaussians
from offload.models.streamed import StreamedGaussians
from tests.test_culling import named_geometry, random_cameras, random_geometry

BETAS = (0.9, 0.999)
RATES = {"means": 2e-2, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 1e-3, "shN": 1e-3}
ROUNDED = [(StreamedGaussians, "device, compact"), (StreamedGaussians, "host, compact")]
ROUNDED += [(ForwardedGaussians, "device, compact"), (ForwardedGaussians, "host, compact")]
ON_THE_HOST, ON_THE_DEVICE = (
    [(kind, place) for kind in (ForwardedGaussians, StreamedGaussians)] for place in ("host", "device")
)
TRAINERS = [*ON_THE_HOST, *ON_THE_DEVICE]


def start(
    kind: type[OffloadedGaussians], place: str, means_lr: Callable[[int], float] = lambda step: RATES["means"]
) -> OffloadedGaussians:
    rows = random_geometry(3000, seed=0)
    parameters = named_geometry(rows)
    parameters |= {"sh0": torch.zeros(len(rows), 1, 3), "shN": torch.zeros(len(rows), 15, 3)}
    adam = AdamOptions(RATES, means_lr, BETAS)
    state = "compact" if place.endswith("compact") else "float32"
    place = place.removesuffix(", compact")
    return kind(parameters, adam, device=torch.device("cpu"), geometry=place, state=state, max_gaussians=3000)


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


@pytest.mark.parametrize(
    ("kind", "place"),
    [*ON_THE_HOST, *(pytest.param(*case, marks=pytest.mark.slow) for case in (*ON_THE_DEVICE, *ROUNDED))],
)
def test_views_culled_ahead_miss_nothing(kind, place):
    gaussians = start(kind, place)
    assert missed_rows(gaussians) == 0
    if isinstance(gaussians._geometry, HostGeometry):  # where bounds of blocks have followed the rows
        assert torch.equal(gaussians._geometry._bounds.bounds, BlockBounds(gaussians._geometry._culled_rows()).bounds)


# Boxes are so wide that they find these rows without a margin.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "place"), [*TRAINERS, ROUNDED[0], ROUNDED[2]])
def test_without_a_margin_rows_are_missed(kind, place):
    gaussians = start(kind, place)
    gaussians._geometry._margin = lambda lagging=True, know_drifts=False: Margin()
    assert missed_rows(gaussians) > 0


@pytest.mark.parametrize("kind", [pytest.param(ForwardedGaussians, marks=pytest.mark.slow), StreamedGaussians])
def test_without_a_margin_for_skipped_steps_rows_are_missed(kind):
    """Of geometry on the device tests/test_device_geometry.py shows it."""
    gaussians = start(kind, "host")
    margin_of = gaussians._geometry._margin
    gaussians._geometry._margin = lambda lagging: margin_of(lagging=False)
    assert missed_rows(gaussians) > 0


@pytest.mark.parametrize("decay", [1.0, 0.99, 0.7])
@pytest.mark.parametrize("betas", [BETAS, (0.8, 0.998)])
def test_means_drift_no_farther_than_boxes_know(betas, decay):
    """By the sum of the steps that a row skips, as `offload/adam/deferral.py` has it; nor much less far in the end."""
    adam = AdamOptions(RATES, lambda step: 0.02 * decay**step, betas)
    b1, b2 = betas
    for last in (1, 2, 10, 100, 1000, 20_000 if decay == 1.0 else 1000):
        drift, summed, shares = drift_after(adam, last - 1), 0.0, []
        for step in range(last + 1, last + 300):
            summed += adam.means_lr(step - 1) * (b1 / b2**0.5) ** (step - last) * (1 - b2**step) ** 0.5 / (1 - b1**step)
            shares.append(summed / (drift.per_ratio * largest_correction(betas, step)))
        assert 0.05 < max(shares) < 1.0
    assert decay < 1.0 or shares[-1] > 0.98
    assert drift.largest_ratio == largest_rounded_step(betas)


@pytest.mark.parametrize(("kind", "place"), [*TRAINERS, *ROUNDED])
def test_rows_that_lag_behind_at_larger_rates_are_caught_up_when_a_state_is_loaded(kind, place):
    """Culling allows for what present rates make of skipped steps: also of rows that skipped some long ago."""
    model = start(kind, place)
    for seed in (3, 7, 11, 5):
        rows = model.fetch(random_cameras(seed, count=1, fov=20))
        sum(rows[name].sum() for name in ("means", "scales", "quats", "opacities")).backward()
        model.update()
    state = {name: tensor.clone() for name, tensor in model.state().items()}
    assert bool((state["last_step/geometry"] < 4).any())
    expected = model.rows(0, model.num_gaussians)["means"]
    schedules = {"as it was": (1.0, 1.0), "larger": (2.0, 2.0), "lower": (0.5, 0.5), "lower at first": (0.5, 1.0)}
    for name, (first, then) in schedules.items():
        other = start(kind, place, lambda step, first=first, then=then: RATES["means"] * (first if step < 2 else then))
        other.load_state(state)
        caught_up = bool((other.state()["last_step/geometry"] == 4).all())
        assert caught_up == name.startswith("lower"), name
        torch.testing.assert_close(other.rows(0, other.num_gaussians)["means"], expected, rtol=1e-5, atol=1e-6)


def test_drifts_are_allowed_for_in_place_of_the_longest():
    adam = AdamOptions(RATES, lambda step: RATES["means"], BETAS, displacement=0.25)
    for steps_done in (0, 100, 10_000):
        all_of_it, step, own = (
            margin_ahead(adam, steps_done, lagging=lagging, rounded=True, know_drifts=know_drifts)
            for lagging, know_drifts in ((True, False), (False, True), (True, True))
        )
        assert own == replace(all_of_it, means=step.means, drift_correction=own.drift_correction)
        assert own.drift_correction == largest_correction(BETAS, steps_done + 1) <= 1
        assert step.drift_correction == all_of_it.drift_correction == 0
        drift = drift_after(adam, steps_done)
        longest = own.means + own.drift_correction * drift.per_ratio * drift.largest_ratio
        assert longest == pytest.approx(all_of_it.means, rel=1e-6)


PLACES_OF_ROWS = ["on the host", "partly on the device", "on the device"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("place", PLACES_OF_ROWS)
def test_boxes_that_have_followed_steps_are_those_made_anew(device, place):
    """To the last bit, or a run that is resumed, or has other residents, would fetch other rows than before."""
    rows, where = random_geometry(3000, seed=0), torch.device(device)
    parameters = named_geometry(rows)
    parameters |= {"sh0": torch.zeros(len(rows), 1, 3), "shN": torch.zeros(len(rows), 15, 3)}
    adam = AdamOptions(RATES, lambda step: RATES["means"] * 0.9**step, BETAS)
    if place == "on the device":
        gaussians = OffloadedGaussians(*compact_parts(parameters, adam, Boxes(where), where), where)
    else:
        there = dict(device=where, geometry="host", state="compact", max_gaussians=3000)
        share = 0.4 if place == "partly on the device" else 0.0
        gaussians = StreamedGaussians(parameters, adam, resident_share=share, **there)
    views = [random_cameras(seed, count=1, fov=20) for seed in range(40)]
    for cameras, upcoming in pairwise(views):
        drawn = gaussians.fetch(cameras)
        gaussians.prefetch(upcoming)
        sum((drawn[name] ** 2).sum() for name in ("means", "scales", "quats", "opacities")).backward()
        gaussians.update()
    gaussians.rows(0, 1)  # so that the store has all of them
    geometry = gaussians._geometry
    followed = geometry._bounds._boxes.clone()
    geometry._bounds_are_good = False
    geometry._make_bounds()
    assert torch.equal(followed, geometry._bounds._boxes)
    drifts = followed[7]
    assert len(drifts.unique()) > 10
    assert drifts.max() > 1.5 * drifts.min() > 0


def largest_ratio(betas: tuple[float, float], round_up: float) -> float:
    """The largest m / sqrt(v) that is stored after many steps, each with the gradient that makes it largest.

    Args:
        betas: Adam's decay rates.
        round_up: By how much m grows where it is stored, and v shrinks, over itself.
    """
    b1, b2 = betas
    m = v = 0.0
    for _ in range(3000):
        # Of g / sqrt(v) the best one: where the derivative of (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2) is zero.
        g = (1 - b1) * b2 * v / ((1 - b2) * b1 * m) if m > 0 else 1.0
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m, v = m * (1 + round_up), v * (1 - round_up)
        m, v = m / v**0.5, 1.0  # the scale is of no account
    return m


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.998), (0.5, 0.9)])
def test_the_largest_rounded_step_is_that_of_the_worst_gradients_and_roundings(betas):
    """Moments in bfloat16 may exceed the bound of Adam's by more than what float32 arithmetic is allowed for."""
    assert largest_ratio(betas, 0.0) == pytest.approx(largest_step(betas), rel=1e-6)
    worst = largest_ratio(betas, 2**-7)
    assert worst == pytest.approx(largest_rounded_step(betas), rel=1e-6)
    assert betas[0] < 0.9 or worst > 1.05 * largest_step(betas)


def test_what_is_stored_of_moments_keeps_to_the_bound():
    """With random bits that round m up and v down, and the gradients that are worst then."""
    b1, b2 = BETAS
    m, v = torch.zeros(2, 1, 64)
    scales = torch.logspace(-6, 3, 64)  # of gradients: mantissas of all kinds
    up, down = torch.tensor([[0xFFFF]]).expand(1, 64), torch.zeros(1, 64, dtype=torch.int64)
    largest = 0.0
    for _ in range(400):
        g = torch.where(m > 0, (1 - b1) * b2 * v / ((1 - b2) * b1 * m), scales)
        m, v = unpack(pack(b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, up | (down << 16)))
        largest = max(largest, float((m / v.sqrt()).max()))
    assert 1.01 * largest_step(BETAS) < largest <= largest_rounded_step(BETAS)
