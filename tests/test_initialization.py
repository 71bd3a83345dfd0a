"""Initial Gaussians, learning rates and schedules."""

from dataclasses import asdict
from decimal import Decimal
from typing import get_type_hints

import numpy as np
import pytest
import torch

from configs import Config, scene_config
from offload.models.device import DeviceGaussians
from training import schedules
from training.gaussians import activate, initial_gaussians, neighbour_distances
from training.measured import last_step


def test_neighbour_distances_by_brute_force():
    points = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    nearest = np.sort(distances, axis=1)[:, 1:4]
    expected = np.sqrt((nearest**2).mean(axis=1))
    assert np.allclose(neighbour_distances(points), expected, rtol=1e-4)


@pytest.mark.parametrize("num_points", [1, 2, 3, 10])
def test_few_and_repeated_points_have_a_size(num_points):
    distances = neighbour_distances(np.zeros((num_points, 3), np.float32))
    assert distances.shape == (num_points,)
    assert (distances > 0).all()
    assert np.isfinite(distances).all()


def test_initial_gaussians_show_the_colours_of_the_points():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 3)).astype(np.float32)
    colors = rng.integers(0, 256, (30, 3), np.uint8)
    gaussians = initial_gaussians(points, colors, sh_degree=3, init_opacity=0.1, init_scale=2.0, seed=0)
    activated = activate(gaussians)
    # The constant spherical harmonic is 1 / (2 sqrt(pi)), and the rasterizer adds 0.5.
    sh0, shN = activated["colors"]
    shown = sh0[:, 0] / (2 * np.sqrt(np.pi)) + 0.5
    assert torch.allclose(shown, torch.from_numpy(colors) / 255.0, atol=1e-6)
    assert torch.allclose(activated["opacities"], torch.tensor(0.1))
    expected = torch.from_numpy(2.0 * neighbour_distances(points))[:, None].expand(-1, 3)
    assert torch.allclose(activated["scales"], expected, rtol=1e-5)
    assert (sh0.shape, shN.shape) == ((30, 1, 3), (30, 15, 3))


def test_one_adam_step_is_that_of_dense_adam_in_float64():
    rng = np.random.default_rng(0)
    initial = initial_gaussians(
        rng.normal(size=(30, 3)).astype(np.float32),
        rng.integers(0, 256, (30, 3), np.uint8),
        sh_degree=3,
        init_opacity=0.1,
        init_scale=1.0,
        seed=0,
    )
    cfg = Config(batch_size=4)
    rates = schedules.learning_rates(cfg, scene_scale=2.0)
    betas = schedules.adam_betas(4)
    assert betas == pytest.approx((0.6561, 0.999**4))
    assert rates["opacities"] == pytest.approx(0.1)
    assert rates["means"] == pytest.approx(2 * 2 * 1.6e-4)
    gaussians = DeviceGaussians(initial, schedules.adam_options(cfg, scene_scale=2.0), device=torch.device("cpu"))
    oracle = {name: value.double().requires_grad_() for name, value in initial.items()}
    adam = torch.optim.Adam([{"params": [oracle[name]], "lr": rates[name]} for name in oracle], betas=betas, eps=1e-15)
    for step in range(20):
        for name, parameter in gaussians.fetch(None).items():
            parameter.grad = torch.from_numpy(rng.normal(size=parameter.shape).astype(np.float32))
            oracle[name].grad = parameter.grad.double()
        adam.param_groups[0]["lr"] = 2 * 2 * 1.6e-4 * 0.01 ** (step / cfg.max_steps)
        adam.step()
        gaussians.update()
    for name, value in gaussians.rows(0, gaussians.num_gaussians).items():
        assert torch.allclose(value.double(), oracle[name], rtol=1e-5, atol=1e-6), name


def test_means_decay_to_one_percent_and_sh_degrees_come_one_by_one():
    cfg = Config(max_steps=3000, sh_degree_interval=1000)
    assert schedules.means_lr(cfg, 5.0, 0) == pytest.approx(5 * 1.6e-4)
    assert schedules.means_lr(cfg, 5.0, 1500) == pytest.approx(0.1 * 5 * 1.6e-4)
    assert schedules.means_lr(cfg, 5.0, 3000) == pytest.approx(0.01 * 5 * 1.6e-4)
    degrees = [schedules.sh_degree(cfg, step) for step in (0, 999, 1000, 2999, 3000, 9000)]
    assert degrees == [0, 0, 1, 2, 3, 3]


# Whole numbers that are no steps of a schedule.
NO_STEPS = {
    *("test_every", "test_after", "num_workers", "keep", "shares", "seed", "video_size", "viewer", "batch_size"),
    *("log_every", "profile", "view_window", "max_gaussians", "target_gaussians", "sh_degree"),
}


@pytest.mark.parametrize("scaler", ["1", "0.1", "0.25", "0.29", "0.57", "1.1", "4"])
def test_steps_scaler_scales_every_schedule(scaler):
    kinds = get_type_hints(Config).items()
    names = {name for name, kind in kinds if kind in (int, list[int], list[int] | None)} - NO_STEPS
    given = Config(
        steps_scaler=float(scaler), timelapse=300, refine_scale2d_stop_iter=1000, pause_refine_after_reset=50
    )
    scaled = given.with_scaled_steps()
    assert scaled.steps_scaler == 1.0
    for name, value in asdict(scaled).items():
        steps = getattr(given, name)
        if name in names:
            listed = steps if isinstance(steps, list) else [steps]
            wanted = [int((each * Decimal(scaler)).to_integral_value()) for each in listed]
            assert wanted == (value if isinstance(value, list) else [value]), name
        elif name != "steps_scaler":
            assert value == steps, name
    assert last_step(asdict(given)) == scaled.max_steps == last_step(asdict(scaled))


def test_scaled_intervals_stay_intervals_and_none_stays_none():
    scaled = Config(steps_scaler=1e-3, timelapse=300).with_scaled_steps()
    assert (scaled.timelapse, scaled.refine_every, scaled.sh_degree_interval, scaled.reset_every) == (1, 1, 1, 3)
    assert scaled.refine_start_iter == 0
    assert Config(steps_scaler=0.5).with_scaled_steps().timelapse == 0


def test_scene_facts():
    aerial = scene_config("aerial")
    assert (aerial.data_factor, aerial.test_every, aerial.test_after, aerial.init_ply) == (
        1.2,
        -1,
        5620,
        True,
    )
    assert scene_config("sztu", position_lr=1.6e-5).data_factor == 3.4175
    assert scene_config("residence").test_after == 2561
    assert scene_config("rubble").test_every == 83
