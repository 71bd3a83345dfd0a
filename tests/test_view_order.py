"""Views arranged within windows: every view once per epoch, and neighbours that see the same points."""

from itertools import islice, pairwise, permutations

import numpy as np
import pytest

from benchmarks.aerial_scene import aerial_scene, geometry_rows, one_by_one
from configs import Config
from datasets.loader import training_loader
from datasets.scene import load_scene
from datasets.view_order import ViewWindows, path, sample_of, sees
from offload.culling.native import BlockBounds, visible_ids
from tests.small_scene import write_scene
from training.views import View


@pytest.fixture(scope="module")
def aerial() -> tuple[list[set[int]], ViewWindows]:
    """What each of 64 cameras needs to render, by culling, and windows of 16 of them."""
    parameters, cameras = aerial_scene(20_000, seed=0)
    geometry = geometry_rows(parameters)
    bounds = BlockBounds(geometry)
    visible = [set(visible_ids(geometry, bounds, camera).tolist()) for camera in one_by_one(cameras)]
    sizes = [(cameras.width, cameras.height)] * 64
    viewmats, Ks = cameras.viewmats.numpy(), cameras.Ks.numpy()
    return visible, ViewWindows.of_cameras(parameters["means"].numpy(), viewmats, Ks, sizes, 16)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return load_scene(write_scene(tmp_path_factory.mktemp("scene"), 23))


def retained(visible: list[set[int]], order: np.ndarray) -> float:
    """Share of rows that stay on the device from one view to the next."""
    shared = sum(len(visible[a] & visible[b]) for a, b in pairwise(order))
    return shared / sum(len(visible[view]) for view in order)


def test_neighbours_on_the_aerial_scene_share_more_the_larger_the_window(aerial):
    visible, windows = aerial
    drawn = np.random.default_rng(0).permutation(64)
    shares = [retained(visible, ViewWindows(windows.seen, window).arrange(drawn)) for window in (1, 4, 16, 64)]
    assert shares[0] == retained(visible, drawn)
    assert shares[0] < 0.2
    assert shares[1] > 1.4 * shares[0]
    assert shares[2] > 1.4 * shares[1]
    assert shares[3] > 1.1 * shares[2]


def test_windows_keep_their_views(aerial):
    drawn = np.random.default_rng(1).permutation(64)[:50]  # the last window has 2 views
    arranged = aerial[1].arrange(drawn)
    assert arranged[0] == drawn[0]
    assert arranged.tolist() != drawn.tolist()
    for first in range(0, 50, 16):
        assert sorted(arranged[first : first + 16]) == sorted(drawn[first : first + 16])


def test_a_window_goes_on_from_the_last_view_of_the_one_before(aerial):
    visible, windows = aerial
    joints, others = [], []
    for seed in range(10):
        drawn = np.random.default_rng(seed).permutation(64)
        arranged = windows.arrange(drawn)
        for first in (16, 32, 48):
            shared = [len(visible[arranged[first - 1]] & visible[view]) for view in arranged[first : first + 16]]
            joints.append(shared[0])
            others.append(np.mean(shared))
    assert np.mean(joints) > 2 * np.mean(others)


def test_one_view_in_a_window_changes_nothing(aerial):
    drawn = np.random.default_rng(2).permutation(64)
    assert ViewWindows(aerial[1].seen, 1).arrange(drawn).tolist() == drawn.tolist()


def test_short_paths_are_nearly_the_best():
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = rng.random((7, 2))
        overlaps = (1000 * np.exp(-4 * np.linalg.norm(places[:, None] - places, axis=2))).astype(np.int64)

        def total(order, overlaps=overlaps) -> int:
            return sum(overlaps[a, b] for a, b in pairwise(order))

        best = max(total((0, *rest)) for rest in permutations(range(1, 7)))
        found = path(overlaps)
        assert (found[0], sorted(found)) == (0, list(range(7)))
        assert total(found) >= 0.9 * best


def test_views_that_share_nothing_stay_as_drawn():
    assert path(np.zeros((5, 5), np.int64)).tolist() == [0, 1, 2, 3, 4]
    assert path(np.zeros((1, 1), np.int64)).tolist() == [0]


def test_points_in_the_picture_are_those_that_culling_keeps():
    """Points are Gaussians without extent."""
    parameters, cameras = aerial_scene(3000, seed=1)
    parameters["scales"].fill_(-20)
    parameters["opacities"].fill_(0)
    geometry = geometry_rows(parameters)
    bounds = BlockBounds(geometry)
    for index, camera in enumerate(one_by_one(cameras)[:8]):
        seen = sees(
            parameters["means"].double().numpy(),
            cameras.viewmats[index].double().numpy(),
            cameras.Ks[index].double().numpy(),
            cameras.width,
            cameras.height,
        )
        kept = set(visible_ids(geometry, bounds, camera).tolist())
        found = set(np.flatnonzero(seen).tolist())
        assert found <= kept
        assert len(kept) < 1.05 * len(found) + 5  # which reach 3 pixels further


def test_samples_are_spread():
    points = np.arange(300, dtype=np.float32).reshape(100, 3)
    assert sample_of(points, 100).shape[0] <= 100
    assert sample_of(points, 10)[:, 0].max() > 250
    assert sample_of(points[:4], 10).tolist() == points[:4].tolist()


def order(scene, steps: int, **options) -> list[list[int]]:
    train_ids = np.arange(1, 23)
    with training_loader(scene, train_ids, num_workers=1, **options) as loader:
        return [batch.image_ids.tolist() for batch in islice(loader, steps)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_resumed_run_continues_the_order(scene, batch_size):
    options = {"seed": 3, "view_window": 8, "batch_size": batch_size}
    whole = order(scene, 40, **options)
    assert whole != order(scene, 40, **{**options, "view_window": 1})
    for start in (1, 9, 23, 37):
        assert order(scene, 40 - start, **options, start_step=start) == whole[start:]


@pytest.mark.parametrize("window", [1, 5, 100])
def test_every_view_comes_once_per_epoch(scene, window):
    views = np.concatenate(order(scene, 33, seed=1, view_window=window, batch_size=2))
    drawn = np.concatenate(order(scene, 33, seed=1, batch_size=2))
    for epoch in (slice(0, 22), slice(22, 44), slice(44, 66)):
        assert sorted(views[epoch]) == list(range(1, 23))
    assert (views.tolist() == drawn.tolist()) == (window == 1)


def test_pictures_come_with_their_cameras(scene):
    with training_loader(scene, np.arange(23), view_window=8) as loader:
        for batch in islice(loader, 5):
            expected = np.linalg.inv(scene.camtoworlds[batch.image_ids.item()])
            np.testing.assert_allclose(
                View.from_batch(batch, Config(), batch.Ks.device).cameras.viewmats[0], expected, atol=1e-5
            )
