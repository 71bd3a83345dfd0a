"""Parts of a picture, rendered alone, against the whole picture."""

from __future__ import annotations

import pytest
import torch

from rendering.rasterize import rasterize
from rendering.region import Region
from tests.gaussian_scenes import gradients, random_scene, relative_error, render

# Of a picture of 170 x 92: not on the rasterizer's tiles, at borders and corners, a single pixel.
REGIONS = [
    Region(0, 0, 170, 92),
    Region(11, 7, 96, 53),
    Region(128, 64, 42, 28),
    Region(0, 33, 16, 16),
    Region(169, 91, 1, 1),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OPTIONS = {"sh_degree": 3, "backgrounds": True, "rasterize_mode": "antialiased"}


@pytest.fixture(params=DEVICES)
def scene(request):
    return random_scene(600, seed=3, n_cameras=2, width=170, height=92).to(request.param, torch.float32)


@pytest.mark.parametrize("region", REGIONS, ids=str)
def test_a_region_equals_that_part_of_the_picture(scene, region):
    whole, whole_alphas, _ = render(rasterize, scene, **OPTIONS)
    part, part_alphas, info = render(rasterize, scene, region=region, **OPTIONS)
    rows, columns = slice(region.y, region.y + region.height), slice(region.x, region.x + region.width)
    assert part.shape == (2, region.height, region.width, 3)
    assert (part - whole[:, rows, columns]).abs().max() < 1e-5
    assert (part_alphas - whole_alphas[:, rows, columns]).abs().max() < 1e-5
    assert (info["width"], info["height"]) == (170, 92)


def test_gradients_of_the_parts_add_up(scene):
    """Weights of the pixels' random sum are those of the whole picture, so the sum over parts is the whole's."""
    whole, _, info = render(rasterize, scene, **OPTIONS)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(whole)
    info["means2d"].retain_grad()
    parameters = [scene.means, scene.quats, scene.scales, scene.opacities, scene.sh0, scene.shN]
    (whole * weights).sum().backward()
    expected, expected_means2d = [p.grad.clone() for p in parameters], info["means2d"].grad.clone()
    for p in parameters:
        p.grad = None
    means2d_grad = torch.zeros_like(expected_means2d)
    for x in (0, 53, 101):
        for y in (0, 40):
            region = Region(x, y, {0: 53, 53: 48, 101: 69}[x], {0: 40, 40: 52}[y])
            part, _, info = render(rasterize, scene, region=region, **OPTIONS)
            info["means2d"].retain_grad()
            (part * weights[:, y : y + region.height, x : x + region.width]).sum().backward()
            means2d_grad += info["means2d"].grad
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert relative_error(parameter.grad, gradient) < 1e-5
    assert relative_error(means2d_grad, expected_means2d) < 1e-5


def test_harmonics_in_two_tensors_equal_those_in_one(scene):
    together = gradients(scene, *render(rasterize, scene, sh_degree=2)[:2])

    def apart(means, quats, scales, opacities, colors, *cameras, **options):
        return rasterize(means, quats, scales, opacities, (scene.sh0, scene.shN), *cameras, **options)

    for name, gradient in gradients(scene, *render(apart, scene, sh_degree=2)[:2]).items():
        assert relative_error(gradient, together[name]) < 1e-5, name  # sums on CUDA have no fixed order
