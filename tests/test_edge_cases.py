"""The least and the most there can be, in every trainer: Gaussians, those in view, those left, threads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from configs import Config
from datasets.loader import evaluation_loader
from datasets.scene import load_scene
from offload.culling.native import BlockBounds, visible_ids
from offload.store.host_store import HostStore
from tests.training_scripts import QUICK_TRAINERS, ROUNDED, anisotropic_start, slow_but, train
from trainers import TRAINERS
from training.checkpoints import load_checkpoint
from training.gaussians import PARAMETER_NAMES
from training.views import View

OFFLOADING = [name for name in TRAINERS if name != "gpu_only"]
NO_DENSIFICATION = ("--refine_start_iter", 10**6, "--max_steps", 30, "--sh_degree_interval", 10)
EVERYWHERE, ONCE, NOWHERE = range(3)  # rows of `in_all_views_in_one_and_in_none`


def train_from(monkeypatch, start: dict[str, Tensor], trainer: str, data_dir: Path, result_dir: Path, *options: object):
    """The Gaussians after training a trainer from these."""
    copy = {name: value.clone() for name, value in start.items()}
    monkeypatch.setattr("training.beginning.initial_gaussians", lambda *arguments, **options: copy)
    way = TRAINERS[trainer]
    return train(monkeypatch, way.load(), data_dir, result_dir, *options, *way.arguments)


def assert_same(trainer: str, actual: dict[str, Tensor], reference: Reference) -> None:
    """Rounded states may differ by a share of the way that training has gone."""
    for name in PARAMETER_NAMES:
        expected = reference.trained[name]
        if trainer in ROUNDED:
            way = (expected - reference.start[name]).norm()
            assert (actual[name] - expected).norm() <= 0.05 * way, name
        else:
            torch.testing.assert_close(actual[name], expected, rtol=1e-3, atol=1e-4)


def first_gaussians(data_dir: Path, num_gaussians: int) -> dict[str, Tensor]:
    scene = load_scene(data_dir)
    options = {"sh_degree": 3, "init_opacity": 0.3, "init_scale": 1.0, "seed": 0}
    return anisotropic_start(scene.points[:num_gaussians], scene.points_rgb[:num_gaussians], **options)


def visible_per_view(data_dir: Path, gaussians: dict[str, Tensor]) -> list[list[int]]:
    """The rows that each training view shows."""
    scene = load_scene(data_dir)
    geometry = HostStore(gaussians, "geometry", max_gaussians=1000).rows.parameters
    with evaluation_loader(scene, scene.train_ids, num_workers=1) as loader:
        views = [View.from_batch(batch, Config(), torch.device("cpu")) for batch in loader]
    return [visible_ids(geometry, BlockBounds(geometry), view.cameras).tolist() for view in views]


def one_gaussian(city_block: Path) -> dict[str, Tensor]:
    start = {name: value[:1] for name, value in first_gaussians(city_block, 2).items()}
    assert any(visible_per_view(city_block, start))
    return start


def in_all_views_in_one_and_in_none(city_block: Path) -> dict[str, Tensor]:
    start = first_gaussians(city_block, 3)
    scene = load_scene(city_block)
    camera = scene.camtoworlds[scene.train_ids[0]]
    start["means"][EVERYWHERE] = torch.from_numpy(scene.points.mean(axis=0))
    start["means"][ONCE] = torch.from_numpy(camera[:3, 3] + 0.02 * camera[:3, 2])  # just before one camera
    start["means"][NOWHERE] = torch.from_numpy(camera[:3, 3] - 50 * camera[:3, 2])  # far behind all
    start["scales"] += np.log(0.004) - start["scales"].mean(dim=1, keepdim=True)
    shown = visible_per_view(city_block, start)
    counts = [sum(row in rows for rows in shown) for row in (EVERYWHERE, ONCE, NOWHERE)]
    assert counts == [len(shown), 1, 0]
    return start


def seen_by_every_view(city_block: Path) -> dict[str, Tensor]:
    start = first_gaussians(city_block, 20)
    center = start["means"].mean(dim=0)
    start["means"] = center + 0.05 * (start["means"] - center)
    start["scales"] -= 1.0
    assert visible_per_view(city_block, start) == [list(range(20))] * len(load_scene(city_block).train_ids)
    return start


class Reference(NamedTuple):
    """Gaussians to start from, and what GPU-only training makes of them."""

    start: dict[str, Tensor]
    trained: dict[str, Tensor]


@pytest.fixture(scope="module")
def reference(request, city_block, tmp_path_factory) -> Reference:
    """Of the function that makes the start, which is the parameter."""
    start = request.param(city_block)
    folder = tmp_path_factory.mktemp("gpu_only")
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained = train_from(monkeypatch, start, "gpu_only", city_block, folder, *NO_DENSIFICATION)
    assert not torch.equal(trained["means"], start["means"])
    return Reference(start, trained)


def starting_from(make_start) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("reference", [make_start], ids=[make_start.__name__], indirect=True)


@pytest.mark.slow
@starting_from(one_gaussian)
@pytest.mark.parametrize("trainer", OFFLOADING)
def test_one_gaussian(monkeypatch, city_block, tmp_path, reference, trainer):
    actual = train_from(monkeypatch, reference.start, trainer, city_block, tmp_path, *NO_DENSIFICATION)
    assert_same(trainer, actual, reference)


@starting_from(in_all_views_in_one_and_in_none)
@pytest.mark.parametrize("trainer", slow_but(("split",), OFFLOADING))
def test_rows_in_all_views_in_one_and_in_none(monkeypatch, city_block, tmp_path, reference, trainer):
    start = reference.start
    actual = train_from(monkeypatch, start, trainer, city_block, tmp_path, *NO_DENSIFICATION)
    assert_same(trainer, actual, reference)
    for name in PARAMETER_NAMES:
        assert torch.equal(actual[name][NOWHERE], start[name][NOWHERE])
    for row in (EVERYWHERE, ONCE):
        assert not torch.equal(actual["means"][row], start["means"][row])


@pytest.mark.slow
@starting_from(seen_by_every_view)
@pytest.mark.parametrize("trainer", OFFLOADING)
def test_every_view_shows_all_rows(monkeypatch, city_block, tmp_path, reference, trainer):
    """With more threads than rows, and than blocks of rows, as well."""
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    actual = train_from(monkeypatch, reference.start, trainer, city_block, tmp_path, *NO_DENSIFICATION)
    assert_same(trainer, actual, reference)


@pytest.mark.parametrize("trainer", slow_but(QUICK_TRAINERS, TRAINERS))
def test_no_view_shows_a_row(monkeypatch, city_block, tmp_path, trainer):
    start = first_gaussians(city_block, 50)
    start["means"] += 1e6
    actual = train_from(monkeypatch, start, trainer, city_block, tmp_path, "--max_steps", 5, "--random_background")
    assert all(torch.equal(actual[name], start[name]) for name in PARAMETER_NAMES)


@pytest.mark.cuda
@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_view_shows_a_row_on_a_gpu(monkeypatch, city_block, tmp_path, trainer):
    """Where gsplat's kernels would be given no Gaussian at all."""
    start = first_gaussians(city_block, 50)
    start["means"] += 1e6
    options = ("--device", "cuda", "--max_steps", 5, "--random_background")
    actual = train_from(monkeypatch, start, trainer, city_block, tmp_path, *options)
    assert all(torch.equal(actual[name].cpu(), start[name]) for name in PARAMETER_NAMES)


@pytest.mark.parametrize("trainer", slow_but(QUICK_TRAINERS, TRAINERS))
def test_a_refinement_that_would_leave_none_stops_with_all_saved(monkeypatch, city_block, tmp_path, capsys, trainer):
    options = ("--max_steps", 40, "--refine_start_iter", 5, "--refine_every", 10, "--prune_opa", 0.49)
    with pytest.raises(SystemExit, match="1"):
        train_from(monkeypatch, first_gaussians(city_block, 50), trainer, city_block, tmp_path, *options)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("Stopped: ")
    assert "would remove all" in message
    assert "--prune_opa" in message
    assert load_checkpoint(tmp_path / "ckpts/ckpt_11.pt").steps == 11


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_gaussian_survives_a_refinement(monkeypatch, city_block, tmp_path, trainer):
    start = first_gaussians(city_block, 40)
    start["opacities"][1:] = -8.0  # transparent
    options = ("--max_steps", 40, "--refine_start_iter", 5, "--refine_every", 10, "--grow_grad2d", 1e3)
    actual = train_from(monkeypatch, start, trainer, city_block, tmp_path, *options)
    assert len(actual["means"]) == 1
    assert actual["means"].isfinite().all()
