"""Adam of geometry on the device against torch's, in float64 with dense gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offload.adam import geometry as adam_kernels
from offload.adam.options import AdamOptions
from offload.adam.state import load_deferred
from offload.culling import kernels as culling_kernels
from offload.culling.cameras import Margin
from offload.models.geometry_device import GEOMETRY, DeviceGeometry
from tests.oracles import culling as oracle
from tests.test_culling import random_cameras
from tests.triton_places import ON_GPU, WITHOUT_GPU

BETAS, EPS = (0.9, 0.999), 1e-15
RATES = {"means": 1e-3, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2}
SHAPES = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": ()}
N = 1500
COUNTS = (0, 300, 1, 1500, 40, 0, 700) * 6  # rows with a gradient, of each step


def means_lr(step: int) -> float:
    return 1e-3 * 0.97**step


class Exact:
    """Dense Adam."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        self.values = {name: value.double().requires_grad_() for name, value in start.items()}
        groups = [{"params": [self.values[name]], "lr": RATES[name]} for name in GEOMETRY]
        self.adam = torch.optim.Adam(groups, betas=BETAS, eps=EPS)

    def step(self, step: int, ids: Tensor, gradients: dict[str, Tensor]) -> None:
        self.adam.param_groups[0]["lr"] = means_lr(step)
        for name, value in self.values.items():
            value.grad = torch.zeros_like(value)
            value.grad[ids] = gradients[name].double()
        self.adam.step()


def trained(kind: str, device: str, speed: float = 1.0) -> tuple[DeviceGeometry, dict[str, Tensor], Exact]:
    """Geometry after some steps, what it was before, and what it should be where learning rates are not multiplied."""
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(N, *SHAPES[name], generator=generator) for name in GEOMETRY}
    start["scales"] -= 4.0  # so that a picture shows some of them
    rates = {name: speed * rate for name, rate in RATES.items()}
    adam = AdamOptions(rates, lambda step: speed * means_lr(step), BETAS, EPS)
    geometry = DeviceGeometry(start, adam, device=torch.device(device))
    geometry._kernels, geometry._culling = adam_kernels, culling_kernels
    if kind == "triton":
        from offload.adam import geometry_triton
        from offload.culling import kernels_triton

        geometry._kernels, geometry._culling = geometry_triton, kernels_triton
    exact = Exact(start)
    for step, count in enumerate(COUNTS):
        ids = torch.randperm(N, generator=generator)[:count].sort().values
        gradients = {name: torch.randn(count, *SHAPES[name], generator=generator) for name in GEOMETRY}
        geometry.update(ids.to(device), {name: gradient.to(device) for name, gradient in gradients.items()})
        exact.step(step, ids, gradients)
    return geometry, start, exact


def read(geometry: DeviceGeometry) -> dict[str, Tensor]:
    return {name: geometry.read(name) for name in GEOMETRY}


def check_parameters(values: dict[str, Tensor], start: dict[str, Tensor], exact: Exact) -> None:
    for name in GEOMETRY:
        change, expected = values[name].cpu().double() - start[name], exact.values[name].detach() - start[name]
        # Parameters of size 1 that move by 1e-2 are known to 6e-8 / 1e-2 after each of 42 roundings.
        assert (change - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_what_is_read_equals_dense_adam_in_float64(kind, device):
    geometry, start, exact = trained(kind, device)
    assert 0 < (geometry.last_step < len(COUNTS)).float().mean() < 0.9  # rows lag behind
    before = {name: array.clone() for name, array in geometry.arrays_by_name().items()}
    check_parameters(geometry.gather(torch.arange(N, device=geometry.device)), start, exact)
    assert all(torch.equal(array, before[name]) for name, array in geometry.arrays_by_name().items())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_what_is_settled_equals_dense_adam_in_float64(kind, device):
    geometry, start, exact = trained(kind, device)
    some = torch.arange(0, N, 3)
    geometry.catch_up(some)
    assert (geometry.last_step[some.to(geometry.device)] == len(COUNTS)).all()
    assert (geometry.last_step < len(COUNTS)).any()
    geometry.catch_up(None)
    check_parameters(read(geometry), start, exact)
    assert (geometry.last_step == len(COUNTS)).all()
    arrays = geometry.arrays_by_name()
    for name in GEOMETRY:
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = exact.adam.state[exact.values[name]][moment]
            assert (arrays[f"{moment}/{name}"].cpu().double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_culling_sees_through_the_lag(kind, device):
    geometry, _, _ = trained(kind, device, speed=300.0)
    cameras = random_cameras(seed=1, count=2, fov=40)
    margin, twice, lag_margin = (Margin(*[change] * 4) for change in (1e-5, 2e-5, 30.0))
    geometry._margin = lambda lagging: lag_margin if lagging else margin
    found = set(geometry.visible_ids(cameras).tolist())
    geometry._margin = lambda lagging: margin
    too_few = set(geometry.visible_ids(cameras).tolist())
    lagging = {name: array.clone() for name, array in read(geometry).items()}
    geometry.catch_up(None)
    settled = read(geometry)
    stale = set(oracle.visible_ids(**lagging, cameras=cameras, margin=margin).tolist())
    exact = set(oracle.visible_ids(**settled, cameras=cameras, margin=Margin()).tolist())
    assert len(exact) > 100
    assert exact <= found <= set(oracle.visible_ids(**settled, cameras=cameras, margin=twice).tolist())
    assert not exact <= stale
    assert not exact <= too_few


def test_what_was_settled_before_a_state_was_loaded_is_settled_again():
    geometry, start, exact = trained("torch", "cpu")
    state = {name: array.clone() for name, array in geometry.arrays_by_name().items()}
    state |= {"step_count": torch.tensor(len(COUNTS)), "last_step/geometry": geometry.last_step.clone()}
    state |= {f"deferral/geometry/{name}": table for name, table in geometry.tables.tables().items()}
    geometry.catch_up(None)
    load_deferred(geometry, "geometry", geometry.tables, geometry._rates, state)
    assert torch.equal(geometry.last_step, state["last_step/geometry"])
    geometry.catch_up(None)
    check_parameters(read(geometry), start, exact)
