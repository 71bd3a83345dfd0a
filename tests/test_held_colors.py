"""Harmonics decoded block by block give the colours, the gradients and the models of whole ones, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.aerial_scene import aerial_scene
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.models.streamed import StreamedGaussians
from offload.pipelines import held_rows
from offload.pipelines.held_rows import HeldRows
from offload.store.layout import RowLayout
from rendering import cpu_rasterizer
from rendering.held_colors import held_colors
from rendering.projection import Projection, project
from tests.aerial_training import CONFIG
from tests.gaussian_scenes import GaussianScene, random_scene, relative_error, weights_like
from tests.triton_places import INTERPRETED
from training import schedules
from training.views import render

NUM_ROWS = 181
IN_TRITON = [pytest.mark.slow, pytest.mark.skipif(not INTERPRETED, reason="needs Triton in its interpreter")]
RENDERINGS = [  # with what, of how many cameras, and the degree of the harmonics
    ("native", 1, 3),
    ("native", 2, 0),
    ("native", 2, 3),
    pytest.param("triton", 1, 0, marks=IN_TRITON),
    pytest.param("triton", 2, 3, marks=IN_TRITON),
]


@pytest.fixture
def few_rows(monkeypatch) -> None:
    """Lets views of more than 50 rows be decoded in blocks of 50."""
    monkeypatch.setattr(held_rows, "WHOLE_ROWS", 50)
    monkeypatch.setattr(held_rows, "BLOCK_ROWS", 50)


def projected(num_cameras: int) -> tuple[GaussianScene, Projection]:
    """Return Gaussians of which the first 100 are seen by no camera: two blocks have no pairs."""
    scene = random_scene(NUM_ROWS, seed=5, n_cameras=num_cameras)
    opacities = scene.opacities.clone()
    opacities[:100] = 0
    projection = project(
        scene.means, scene.quats, scene.scales, opacities, scene.viewmats, scene.Ks, scene.width, scene.height,
        near_plane=0.01, far_plane=1e10, radius_clip=0.0, eps2d=0.3, antialiased=False,
    )  # fmt: skip
    assert projection.gaussian_ids.min() >= 100
    return scene, projection


@pytest.mark.parametrize(("place", "num_cameras", "sh_degree"), RENDERINGS)
def test_colors_and_gradients_are_those_of_whole_tensors(few_rows, place, num_cameras, sh_degree):
    scene, projection = projected(num_cameras)
    means, sh0, shN = (each.detach().requires_grad_() for each in (scene.means, scene.sh0, scene.shN))
    viewmats = scene.viewmats.detach().requires_grad_()
    if place == "native":
        evaluate, cameras = partial(cpu_rasterizer._block_colors, sh_degree), viewmats
    else:
        from rendering import gsplat_rasterizer

        evaluate, cameras = partial(gsplat_rasterizer._block_colors, sh_degree), torch.inverse(viewmats)[:, :3, 3]
    expected = evaluate(means, sh0, shN, cameras, projection)
    weights = weights_like(expected)
    (expected * weights).sum().backward()
    whole = [each.grad.clone() for each in (means, sh0, viewmats, shN)]
    for each in (means, sh0, viewmats):
        each.grad = None

    held = HeldRows(NUM_ROWS, RowLayout.of("appearance", 3, "compact"), lambda rows: padded(scene.shN)[rows])
    cameras = viewmats if place == "native" else torch.inverse(viewmats)[:, :3, 3]
    colors = held_colors(held, evaluate, means, sh0, cameras, projection)
    (colors * weights).sum().backward()
    assert torch.equal(colors, expected)
    assert relative_error(viewmats.grad, whole[2]) < 1e-5  # a sum over blocks
    with torch.no_grad():
        means += 1  # as a step does before the gradient is made
        gradient = torch.cat([held.gradient(rows) for rows in held.blocks()])
    assert whole[3].any() == (sh_degree > 0)
    for actual, wanted in zip((means.grad, sh0.grad, gradient), (whole[0], whole[1], padded(whole[3])), strict=True):
        assert torch.equal(actual, wanted)
    held.grad.zero_()  # as after a gradient that is not finite
    assert not held.gradient(held.blocks()[-1]).any()


def padded(shN: Tensor) -> Tensor:
    """Lay harmonics [V, 15, 3] in rows [V, 48]."""
    return torch.nn.functional.pad(shN.detach().flatten(1), (0, 3))


def test_a_view_without_pairs_and_one_that_is_not_rendered(few_rows):
    scene, projection = projected(1)
    nothing = Projection(*(each[:0] for each in vars(projection).values() if each is not projection.row_offsets))
    held = HeldRows(NUM_ROWS, RowLayout.of("appearance", 3, "compact"), lambda rows: padded(scene.shN)[rows])
    assert not torch.cat([held.gradient(rows) for rows in held.blocks()]).any()
    means = scene.means.detach().requires_grad_()
    evaluate = partial(cpu_rasterizer._block_colors, 3)
    colors = held_colors(held, evaluate, means, scene.sh0, scene.viewmats, nothing)
    assert colors.shape == (0, 3)
    colors.sum().backward()
    assert not means.grad.any()
    assert not torch.cat([held.gradient(rows) for rows in held.blocks()]).any()
    with pytest.raises(RuntimeError, match="once in a step"):
        held.owe(colors, held.gradient)


@pytest.mark.parametrize("degree", [1, 2])
def test_gradients_have_the_columns_of_rows(degree):
    """Of these degrees rows are longer than their harmonics."""
    layout = RowLayout.of("appearance", degree, "compact")
    values = torch.rand(4, layout.num_columns)
    held = HeldRows(4, layout, values.__getitem__)
    coefficients = held.coefficients(slice(0, 3))
    held.owe(torch.ones(1, 3), lambda rows: 2 * held.coefficients(rows))
    expected = torch.zeros(3, layout.num_columns)
    expected[:, : coefficients[0].numel()] = 2 * coefficients.flatten(1)
    assert torch.equal(held.gradient(slice(0, 3)), expected)


@pytest.mark.parametrize("place", ["host", pytest.param("device", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_cameras", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_is_the_same_model(monkeypatch, place, num_cameras):
    """Also over a step of which a gradient is not finite, one that is undone, and displaced means."""
    expected, whole = train(place, num_cameras)
    monkeypatch.setattr(held_rows, "WHOLE_ROWS", 50)
    monkeypatch.setattr(held_rows, "BLOCK_ROWS", 50)
    actual, held = train(place, num_cameras)
    assert (whole, held) == (0, 9)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def train(place: str, num_cameras: int) -> tuple[dict[str, Tensor], int]:
    """Return the state after 8 steps, and in how many fetches harmonics were held."""
    n, device = 1000, torch.device("cpu")
    parameters, cameras = aerial_scene(n, seed=0, picture_scale=0.03)
    adam = AdamOptions(schedules.learning_rates(CONFIG, 3.2), lambda step: 1e-4, (0.9, 0.999))
    gaussians = StreamedGaussians(parameters, adam, device=device, geometry=place, state="compact", max_gaussians=n)
    size, num_held = (cameras.width, cameras.height), 0
    views = [Cameras(cameras.viewmats[i : i + num_cameras], cameras.Ks[i : i + num_cameras], *size) for i in range(9)]
    for step in range(8):
        for attempt in range(1 + (step == 4)):
            if attempt:
                gaussians.undo_step()
            rows = gaussians.fetch(views[step])
            num_held += isinstance(rows["shN"], HeldRows)
            gaussians.prefetch(views[step + 1])
            colors, _ = render(rows, views[step], CONFIG, sh_degree=min(step, 3))
            loss = (colors - 0.3).square().sum()
            (loss * float("nan") if step == 5 else loss).backward()
        if step == 3:
            gaussians.displace(torch.arange(3), torch.full((3, 3), 0.001))
        gaussians.update()
    assert gaussians.skipped_steps() == (1, 0)
    return gaussians.state(), num_held
