"""Every offloading trainer trains the GPU-only trainer's model, from the same seed on the same pictures.

How near can two runs be? What two trainers may compute differently are roundings: rendering the visible rows is
bit-equal to rendering all of them (tested below), but torch rounds exp() and sigmoid() by where a number stands, the
host's Adam evaluates its formula in another order, and deferred steps are applied at once. Training multiplies
roundings: Adam scales the smallest gradient to a full step, and a pixel that passes the threshold of alpha (1/255)
changes the gradients of all that it shows. How much, GPU-only training tells about itself, from three starts in which
every number is one float off. A trainer may differ from it by a few times that, and by no less than 1e-4.

tests/test_one_algorithm.py takes the rendering out, and with it the chaos: there the bound is 1e-6.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from configs import Config
from datasets.loader import training_loader
from datasets.scene import load_scene
from datasets.synthetic import write_city_block
from offload.culling.native import BlockBounds, visible_ids
from offload.models.tiled import ViewTile
from offload.store.host_store import HostStore
from offload.tiles.boxes import Tile
from rendering.losses import photometric_loss
from rendering.rasterize import rasterize
from tests import sabotage
from tests.training_scripts import EXACT, MCMC, anisotropic_start, start_one_ulp_off, train
from trainers import TRAINERS
from training.gaussians import activate
from training.views import View

OFFLOADING = [name for name in EXACT if name != "gpu_only"]
DEFERRING = ["optimized", "streamed"]  # on the host, and on the device

AS_MANY_ROWS = ("--refine_start_iter", 10**6, "--max_steps", 120, "--sh_degree_interval", 30)
OTHER_MODES = ("--batch_size", 2, "--antialiased", "--random_background", "--max_steps", 50, "--sh_degree_interval", 10)
DENSIFYING = (
    *("--max_steps", 400, "--refine_start_iter", 50, "--refine_every", 50, "--refine_stop_iter", 350),
    *("--grow_grad2d", 0.002, "--sh_degree_interval", 100, "--test_every", 2),
)
RELOCATING = (*MCMC, "--max_steps", 60)
STARTS = (1, 2, 3)  # draws of `start_one_ulp_off`
LARGEST_SIZE_DIFFERENCE = 0.0025  # of the number of Gaussians
LARGEST_PSNR_DIFFERENCE = 0.05  # dB


class Reference(NamedTuple):
    """What GPU-only training gives, and by how much it differs from itself."""

    options: tuple
    gaussians: dict[str, Tensor]
    bounds: dict[str, float]  # on the relative norm of the difference of each parameter


@pytest.fixture(scope="module", autouse=True)
def _anisotropic_start():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("training.beginning.initial_gaussians", anisotropic_start)
        yield


@pytest.fixture(scope="module")
def city_block(tmp_path_factory) -> Path:
    """The demo scene with fewer and smaller pictures; a view shows half of it."""
    data_dir = tmp_path_factory.mktemp("data") / "city_block"
    write_city_block(data_dir, num_views=24, width=96, height=72, num_points=2000)
    return data_dir


@pytest.fixture(
    scope="module", params=[AS_MANY_ROWS, OTHER_MODES, RELOCATING], ids=["120 steps", "other modes", "mcmc"]
)
def reference(request, city_block, tmp_path_factory) -> Reference:
    results = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as monkeypatch:
        gaussians = train_by_name(monkeypatch, "gpu_only", city_block, results / "gpu_only", *request.param)
        chaos = dict.fromkeys(gaussians, 0.0)  # the largest of several: whether one pixel falls the other way is chance
        for draw in STARTS:
            start = functools.partial(start_one_ulp_off, draw=draw)
            monkeypatch.setattr("training.beginning.initial_gaussians", start)
            moved = train_by_name(monkeypatch, "gpu_only", city_block, results / f"one_ulp_off_{draw}", *request.param)
            differences = relative_differences(moved, gaussians)
            chaos = {name: max(value, differences[name]) for name, value in chaos.items()}
    assert 1e-7 < min(chaos.values()) < max(chaos.values()) < 1e-2  # not so much that anything would pass
    return Reference(request.param, gaussians, {name: max(1e-4, 4 * value) for name, value in chaos.items()})


def train_by_name(monkeypatch, trainer: str, data_dir: Path, result_dir: Path, *options: object) -> dict[str, Tensor]:
    way = TRAINERS[trainer]
    return train(monkeypatch, way.load(), data_dir, result_dir, *options, *way.arguments)


def relative_differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over that of the expected values, for each parameter."""
    return {name: ((actual[name] - value).norm() / value.norm()).item() for name, value in expected.items()}


def watch_fine_tiles(monkeypatch) -> list[Tile | None]:
    """Let small pictures be cut too; receives what is rendered at once, None where that is a whole view."""
    script, tiles = TRAINERS["split"].load(), []
    render_part = script.render_part

    def watched_render_part(part: ViewTile, *arguments, **options):
        tiles.append(part.tile)
        return render_part(part, *arguments, **options)

    monkeypatch.setattr(script, "render_part", watched_render_part)
    monkeypatch.setattr("offload.tiles.boxes.SMALLEST", 16)
    return tiles


@pytest.mark.slow
@pytest.mark.parametrize("trainer", OFFLOADING)
def test_same_model_as_gpu_only(monkeypatch, city_block, tmp_path, reference, trainer):
    options, tiles = reference.options, []
    if trainer == "split":
        options, tiles = (*options, "--split_threshold", 0.15), watch_fine_tiles(monkeypatch)
    actual = train_by_name(monkeypatch, trainer, city_block, tmp_path, *options)
    assert trainer != "split" or sum(tile is not None for tile in tiles) > 0.5 * len(tiles)
    differences = relative_differences(actual, reference.gaussians)
    assert all(differences[name] < bound for name, bound in reference.bounds.items()), (differences, reference.bounds)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", DEFERRING)
@pytest.mark.parametrize("reference", [AS_MANY_ROWS], ids=["120 steps"], indirect=True)
def test_a_catch_up_that_is_one_step_off_is_noticed(monkeypatch, city_block, tmp_path, reference, trainer):
    sabotage.catch_up_one_step_off(monkeypatch)
    actual = train_by_name(monkeypatch, trainer, city_block, tmp_path, *reference.options)
    differences = relative_differences(actual, reference.gaussians)
    for name in ("scales", "quats", "opacities", "sh0", "shN"):
        assert differences[name] > 5 * reference.bounds[name], (differences, reference.bounds)


def test_rendering_visible_rows_is_bit_equal_to_rendering_all(city_block):
    """Picture and gradients, wherever activated numbers are: only where torch computes them do roundings differ."""
    scene = load_scene(city_block)
    parameters = anisotropic_start(
        scene.points, scene.points_rgb, sh_degree=3, init_opacity=0.1, init_scale=1.0, seed=0
    )
    parameters["shN"].normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    geometry = HostStore(parameters, "geometry", max_gaussians=len(scene.points)).rows.parameters
    bounds = BlockBounds(geometry)
    with training_loader(scene, scene.train_ids, batch_size=1, seed=0, num_workers=1, pin_memory=False) as loader:
        for _ in range(4):
            view = View.from_batch(next(loader), Config(), torch.device("cpu"))
            ids = visible_ids(geometry, bounds, view.cameras)
            assert len(ids) < len(scene.points)
            everything = torch.arange(len(scene.points))
            picture_of_all, gradients_of_all = picture_and_gradients(parameters, everything, view)
            picture, gradients = picture_and_gradients(parameters, ids, view)
            assert torch.equal(picture, picture_of_all)
            assert all(torch.equal(gradients_of_all[name][ids], gradient) for name, gradient in gradients.items())


def picture_and_gradients(parameters: dict[str, Tensor], rows: Tensor, view: View) -> tuple[Tensor, dict[str, Tensor]]:
    """The picture of some rows, and the gradients of what the rasterizer takes of them."""
    activated = activate(parameters)
    activated["colors"] = torch.cat([parameters["sh0"], parameters["shN"]], dim=1)
    leaves = {name: value[rows].requires_grad_() for name, value in activated.items()}
    c = view.cameras
    colors, *_ = rasterize(**leaves, viewmats=c.viewmats, Ks=c.Ks, width=c.width, height=c.height, sh_degree=3)
    photometric_loss(colors, view.images).backward()
    return colors.detach(), {name: leaf.grad for name, leaf in leaves.items()}


class Outcome(NamedTuple):
    num_gaussians: int
    psnr: float  # dB


class Difference(NamedTuple):
    """How a trainer's outcomes differ from those of GPU-only training: the medians over the starts, without sign."""

    size: float  # as a share of the number of Gaussians
    psnr: float  # dB

    @property
    def is_rounding(self) -> bool:
        return self.size <= LARGEST_SIZE_DIFFERENCE and self.psnr <= LARGEST_PSNR_DIFFERENCE


def densify(trainer: str, data_dir: Path, result_dir: Path, starts: tuple[int, ...] = STARTS) -> list[Outcome]:
    """Train with densification from each of the starts."""
    outcomes = []
    for draw in starts:
        with pytest.MonkeyPatch.context() as monkeypatch:
            start = functools.partial(start_one_ulp_off, draw=draw)
            monkeypatch.setattr("training.beginning.initial_gaussians", start)
            results = result_dir / str(draw)
            gaussians = train_by_name(monkeypatch, trainer, data_dir, results, *DENSIFYING)
        quality = json.loads((results / "stats/val_step400.json").read_text())
        outcomes.append(Outcome(len(gaussians["means"]), quality["psnr"]))
    return outcomes


def median_difference(actual: list[Outcome], expected: list[Outcome]) -> Difference:
    pairs = list(zip(actual, expected, strict=True))
    return Difference(
        statistics.median(abs(ours.num_gaussians / theirs.num_gaussians - 1) for ours, theirs in pairs),
        statistics.median(abs(ours.psnr - theirs.psnr) for ours, theirs in pairs),
    )


@pytest.fixture(scope="module")
def small_block(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data") / "city_block"
    write_city_block(data_dir, num_views=24, width=64, height=48, num_points=600)
    return data_dir


@pytest.fixture(scope="module")
def densified(small_block, tmp_path_factory) -> list[Outcome]:
    """What GPU-only training comes to from each of the starts."""
    outcomes = densify("gpu_only", small_block, tmp_path_factory.mktemp("densified"))
    assert all(outcome.num_gaussians > 1.5 * 600 for outcome in outcomes)
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("trainer", OFFLOADING)
def test_densification_comes_to_the_same_size_and_quality(small_block, tmp_path, densified, trainer):
    """Pairs of runs from one start are compared, and the median of three pairs counts.

    Now and then a row on the brink of a threshold goes the other way and takes others along. Where a share p of all
    pairs differs by more than is allowed, two of three do in 3 p^2 of the tests. Of 25 pairs, under AVX-512, AVX2 and
    neither, none differed by more than one row of 1790 and 0.03 dB: with p = 1/27 one test in 240 would err.
    """
    outcomes = densify(trainer, small_block, tmp_path, STARTS[:2])
    pairs = zip(outcomes, densified, strict=False)
    if not all(median_difference([ours], [theirs]).is_rounding for ours, theirs in pairs):
        outcomes += densify(trainer, small_block, tmp_path, STARTS[2:])  # where two agree, a third does not decide
    difference = median_difference(outcomes, densified[: len(outcomes)])
    assert difference.is_rounding, difference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_trainer", "trainer"),
    [
        *itertools.product([sabotage.catch_up_one_step_off, sabotage.no_decay_of_moments], DEFERRING),
        (sabotage.smaller_gradients_on_the_screen, "streamed"),  # all trainers have one strategy
    ],
)
def test_a_wrong_trainer_comes_to_another_size(monkeypatch, small_block, tmp_path, densified, break_trainer, trainer):
    """Even from one start, by twice what is allowed."""
    break_trainer(monkeypatch)
    difference = median_difference(densify(trainer, small_block, tmp_path, STARTS[:1]), densified[:1])
    assert difference.size > 2 * LARGEST_SIZE_DIFFERENCE, difference
