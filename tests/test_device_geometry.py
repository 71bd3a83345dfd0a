"""Adam of geometry on the device against torch's, in float64 with dense gradients."""

from __future__ import annotations

import math

import pytest
import torch

from offload.device_geometry import GEOMETRY, DeviceGeometry
from tests.triton_places import NEEDS, TRITON_DEVICE

BETAS, EPS = (0.9, 0.999), 1e-15
RATES = {"means": 1e-3, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2}
SHAPES = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": ()}


def step_by_kernel(self: DeviceGeometry, ids, gradients, rates) -> None:
    self.step_count += 1
    self._step_on_cuda(ids, gradients, rates, math.sqrt(1 - BETAS[1] ** self.step_count))


@pytest.mark.parametrize(
    "step", [DeviceGeometry.step, pytest.param(step_by_kernel, marks=NEEDS)], ids=["torch", "triton"]
)
def test_equals_dense_adam_in_float64(step):
    n, generator = 1500, torch.Generator().manual_seed(0)
    device = torch.device(TRITON_DEVICE if step is step_by_kernel else "cpu")
    start = {name: torch.randn(n, *SHAPES[name], generator=generator) for name in GEOMETRY}
    geometry = DeviceGeometry(start, betas=BETAS, eps=EPS, device=device)
    exact = {name: value.double().requires_grad_() for name, value in start.items()}
    adam = torch.optim.Adam([{"params": [exact[name]], "lr": RATES[name]} for name in GEOMETRY], betas=BETAS, eps=EPS)
    for count in (0, 300, 1, 1500, 40, 0, 700) * 6:
        ids = torch.randperm(n, generator=generator)[:count].sort().values
        gradients = {name: torch.randn(count, *SHAPES[name], generator=generator) for name in GEOMETRY}
        step(geometry, ids.to(device), {name: g.to(device) for name, g in gradients.items()}, RATES)
        for name in GEOMETRY:
            exact[name].grad = torch.zeros_like(exact[name])
            exact[name].grad[ids] = gradients[name].double()
        adam.step()
    for name in GEOMETRY:
        change, expected = geometry.parameters[name].cpu().double() - start[name], exact[name].detach() - start[name]
        # Parameters of size 1 that move by 1e-2 are known to 6e-8 / 1e-2 after each of 42 roundings.
        assert (change - expected).norm() < 1e-4 * expected.norm()
        state = adam.state[exact[name]]
        for moment, expected in ((geometry.exp_avg, state["exp_avg"]), (geometry.exp_avg_sq, state["exp_avg_sq"])):
            assert (moment[name].cpu().double() - expected).norm() < 1e-5 * expected.norm()
