"""The city block on disk, read back by pycolmap and OpenCV: neither shares code with the generator."""

import filecmp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
from scipy.ndimage import map_coordinates

from datasets import synthetic
from datasets.synthetic import ensure_city_block, write_city_block
from errors import InputError

SMALL = {"num_views": 12, "width": 96, "height": 64, "num_points": 500}
MODEL_FILES = ("cameras.bin", "images.bin", "points3D.bin")


def picture(data_dir: Path, name: str) -> np.ndarray:
    return cv2.imread(str(data_dir / "images" / name))[..., ::-1] / 255.0  # [H, W, 3]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A dataset whose points have no noise, at a resolution that shows the texture."""
    data_dir = tmp_path_factory.mktemp("exact") / "city"
    write_city_block(data_dir, num_views=12, width=200, height=160, num_points=2000, point_noise=0)
    return data_dir, pycolmap.Reconstruction(str(data_dir / "sparse" / "0"))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("noisy") / "city"
    write_city_block(data_dir, **SMALL)
    return data_dir, pycolmap.Reconstruction(str(data_dir / "sparse" / "0"))


def test_sizes_are_as_asked(noisy):
    data_dir, model = noisy
    camera = model.cameras[1]
    assert (len(model.images), len(model.points3D), len(model.cameras)) == (12, 500, 1)
    assert (camera.model.name, camera.width, camera.height) == ("PINHOLE", 96, 64)
    fx, fy, cx, cy = camera.params
    assert fx == fy == pytest.approx(48 / np.tan(np.deg2rad(29)))
    assert (cx, cy) == (48, 32)
    names = sorted(path.name for path in (data_dir / "images").iterdir())
    assert names == [model.images[index].name for index in sorted(model.images)]
    assert all(picture(data_dir, name).shape == (64, 96, 3) for name in names)


def test_views_look_down_at_the_block_in_flying_order(monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic, "render", lambda *_: np.zeros((6, 8, 3), np.uint8))  # where they are is asked
    write_city_block(tmp_path / "city", num_views=80, width=8, height=6, num_points=10)
    model = pycolmap.Reconstruction(str(tmp_path / "city" / "sparse" / "0"))
    images = [model.images[index] for index in sorted(model.images)]
    centers = np.array([image.projection_center() for image in images])
    forwards = np.array([image.viewing_direction() for image in images])
    aims = centers - forwards * (centers[:, 2] / forwards[:, 2])[:, None]
    assert (abs(centers[:, 2] - 55) < 3).all()
    assert (forwards[:, 2] < -0.6).all()  # steeper than 37 degrees down
    assert (abs(aims) < 36).all()  # the block's half side
    steps = np.linalg.norm(np.diff(centers, axis=0), axis=1)
    assert np.mean(steps < 20) > 0.9  # the others lead from one leg of the flight to the next
    is_test = np.arange(80) % 8 == 0
    to_train = np.linalg.norm(centers[is_test, None] - centers[~is_test], axis=-1)
    assert to_train.min(1).max() < 20  # each held-out view has neighbours to learn from


@pytest.mark.slow
def test_tracks_are_where_the_points_project(exact):
    _, model = exact
    for image in model.images.values():
        world_to_camera = image.cam_from_world().matrix()  # [3, 4]
        assert len(image.points2D) > 100
        for feature in image.points2D:
            point = model.points3D[feature.point3D_id]
            in_camera = world_to_camera @ [*point.xyz, 1]
            x, y = model.cameras[1].params[:2] * in_camera[:2] / in_camera[2] + model.cameras[1].params[2:]
            np.testing.assert_allclose(feature.xy, (x, y), atol=1e-6)
    for point_id, point in model.points3D.items():
        assert point.track.length() >= 1
        for element in point.track.elements:
            assert model.images[element.image_id].points2D[element.point2D_idx].point3D_id == point_id
        assert point.error == pytest.approx(0, abs=1e-6)


def color_errors(data_dir, model, shift=(0.0, 0.0), change_pose=lambda matrix: matrix) -> np.ndarray:
    """Points' colours against the pictures at the places where OpenCV projects them, [observations]."""
    fx, fy, cx, cy = model.cameras[1].params
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    errors = []
    for image in model.images.values():
        pose = change_pose(image.cam_from_world().matrix())
        seen = [model.points3D[f.point3D_id] for f in image.points2D]
        xyz, rgb = np.array([p.xyz for p in seen]), np.array([p.color for p in seen]) / 255
        at, _ = cv2.projectPoints(xyz, cv2.Rodrigues(pose[:, :3])[0], pose[:, 3], intrinsics, None)
        x, y = at[:, 0].T + np.array(shift)[:, None]
        pixels = picture(data_dir, image.name)
        # map_coordinates puts a pixel's centre at whole numbers, COLMAP at halves.
        found = [map_coordinates(pixels[..., c], [y - 0.5, x - 0.5], order=1, mode="nearest") for c in range(3)]
        errors.append(abs(np.stack(found, 1) - rgb).mean(1))
    return np.concatenate(errors)


@pytest.mark.slow
def test_points_have_the_colours_of_their_pixels(exact):
    errors = color_errors(*exact)
    assert np.median(errors) < 0.02
    assert np.mean(errors < 0.1) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pixels", [-0.5, 0.5])
def test_half_a_pixel_off_fits_worse(exact, axis, pixels):
    shift = np.eye(2)[axis] * pixels
    assert color_errors(*exact, shift=shift).mean() > 1.1 * color_errors(*exact).mean()


@pytest.mark.slow
def test_another_pose_convention_does_not_fit(exact):
    def inverted(pose):
        return np.hstack([pose[:, :3].T, -pose[:, :3].T @ pose[:, 3:]])

    def opengl(pose):
        return np.diag([1, -1, -1]) @ pose

    for wrong in (inverted, opengl):
        assert np.median(color_errors(*exact, change_pose=wrong)) > 0.08


@pytest.mark.slow
def test_hidden_points_are_in_no_track(exact):
    """A framed point that is missing from a track has a nearer one beside it in the picture."""
    _, model = exact
    fx, fy, cx, cy = model.cameras[1].params
    ids = np.array(sorted(model.points3D))
    xyz = np.array([model.points3D[i].xyz for i in ids])
    depth_order_held = hidden = 0
    for image in model.images.values():
        pose = image.cam_from_world().matrix()
        x, y, z = pose[:, :3] @ xyz.T + pose[:, 3:]
        at = np.stack([fx * x / z + cx, fy * y / z + cy], 1)
        framed = (z > 0) & ((at > 0) & (at < [200, 160])).all(1)
        seen = np.isin(ids, [f.point3D_id for f in image.points2D])
        assert not (seen & ~framed).any()
        for i in np.flatnonzero(framed & ~seen):
            near = np.flatnonzero(seen & (np.linalg.norm(at - at[i], axis=1) < 3))
            hidden += len(near) > 0
            depth_order_held += len(near) > 0 and z[near].min() < z[i]
    assert hidden > 50
    assert depth_order_held > 0.9 * hidden


@pytest.mark.slow
def test_points_lie_on_surfaces_and_noise_is_as_asked(exact, tmp_path):
    _, model = exact
    write_city_block(tmp_path / "city", num_views=12, width=200, height=160, num_points=2000, point_noise=0.3)
    other = pycolmap.Reconstruction(str(tmp_path / "city" / "sparse" / "0"))
    offsets = np.array([other.points3D[i].xyz - model.points3D[i].xyz for i in model.points3D])
    assert offsets.std() == pytest.approx(0.3, rel=0.05)
    heights = np.array([point.xyz[2] for point in model.points3D.values()])
    assert heights.min() == pytest.approx(0, abs=1e-4)
    assert np.mean(abs(heights) < 1e-4) > 0.3  # the ground is a plane
    assert 8 < heights.max() < 55


def first_hits(city, origins, directions, length, step=0.02):
    """How far rays get until they are in a box or under the ground, [R], infinite if they never are."""
    found = np.full(len(origins), np.inf)
    for distance in np.arange(step, length, step):
        at = origins + distance * directions
        inside = np.ones((len(at), len(city.low)), bool)  # [R, B]
        for axis in range(3):
            inside &= (at[:, axis, None] > city.low[:, axis]) & (at[:, axis, None] < city.high[:, axis])
        solid = inside.any(1) | (at[:, 2] < 0)
        found = np.where(solid & np.isinf(found), distance, found)
    return found


def test_rays_and_shadows_agree_with_marching_in_small_steps():
    rng = np.random.default_rng(0)
    city = synthetic.build_city(48, rng)
    origin = np.array([3.0, -20.0, 35.0])
    directions = np.column_stack([rng.uniform(-20, 20, 200), rng.uniform(0, 40, 200), np.full(200, -35.0)])
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    everywhere = [(box, slice(None), slice(None)) for box in range(len(city.low))]
    distance, hit = synthetic.cast(city, origin, directions.T[:, None], everywhere)
    marched = first_hits(city, origin + np.zeros((200, 1)), directions, 70)
    assert np.mean(abs(distance[0] - marched) < 0.05) > 0.99  # a step may pass an edge by
    assert np.mean(hit >= 0) > 0.3

    surface = origin + directions * (distance[0] - 1e-3)[:, None]
    dark = np.isfinite(first_hits(city, surface, synthetic.SUN + np.zeros((200, 1)), 40))
    # Only level surfaces: from a side turned away from the sun, marching would start inside its own box.
    level = (hit[0] < 0) | (abs(surface[:, 2] - city.high[hit[0], 2]) < 0.01)
    agree = synthetic.in_shadow(city, surface.T.astype(np.float32)) == dark
    assert 0.05 < dark[level].mean() < 0.8
    assert agree[level].mean() > 0.99


def test_a_picture_does_not_hang_on_how_many_rays_are_cast_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    city, camera = synthetic.build_city(48, rng), synthetic.Camera(33, 21)
    view = synthetic.plan_flight(3, 24, rng)[1]
    at_once = synthetic.render(city, camera, view)
    for most_rays in (1, 3 * 33 * 21):
        monkeypatch.setattr(synthetic, "MOST_RAYS", most_rays)
        assert np.array_equal(synthetic.render(city, camera, view), at_once)


@pytest.mark.slow
def test_the_picture_is_far_from_its_mean_colour(exact):
    data_dir, _ = exact
    pictures = [picture(data_dir, path.name) for path in (data_dir / "images").iterdir()]
    psnr = [-10 * np.log10(np.var(pixels, axis=(0, 1)).mean()) for pixels in pictures]
    assert 12 < np.mean(psnr) < 17


@pytest.mark.slow
def test_a_seed_fixes_every_byte_and_another_changes_them(noisy, tmp_path):
    first, _ = noisy
    again, other = tmp_path / "again", tmp_path / "other"
    write_city_block(again, **SMALL)
    write_city_block(other, **SMALL, seed=1)
    files = [f"images/{path.name}" for path in (first / "images").iterdir()]
    files += [f"sparse/0/{name}" for name in MODEL_FILES]
    assert len(files) == 15
    assert filecmp.cmpfiles(first, again, files, shallow=False)[0] == files
    assert filecmp.cmpfiles(first, other, files, shallow=False)[0] == ["sparse/0/cameras.bin"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_views": 1, "num_points": 1},
        {"num_views": 2, "width": 1, "height": 1},
        {"num_views": 5, "width": 20, "height": 70, "size": 20},
        {"num_views": 9, "size": 300.0},
    ],
)
def test_unusual_sizes(tmp_path, options):
    options = {**SMALL, "num_points": 50, **options}
    write_city_block(tmp_path / "city", **options)
    model = pycolmap.Reconstruction(str(tmp_path / "city" / "sparse" / "0"))
    assert (len(model.images), len(model.points3D)) == (options["num_views"], options["num_points"])
    assert np.isfinite([point.xyz for point in model.points3D.values()]).all()
    assert min(point.track.length() for point in model.points3D.values()) >= 1
    for image in model.images.values():
        assert picture(tmp_path / "city", image.name).shape == (options["height"], options["width"], 3)


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch, error):
    def fail_at_the_end(*_):
        assert len(list(tmp_path.rglob("*.png"))) == SMALL["num_views"]
        raise error

    monkeypatch.setattr(synthetic, "write_colmap", fail_at_the_end)
    with pytest.raises(error):
        write_city_block(tmp_path / "city", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_leaves_no_dataset(tmp_path):
    command = [sys.executable, "-m", "datasets.synthetic", "--data_dir", str(tmp_path / "city")]
    process = subprocess.Popen([*command, "--num_views", "300"], stderr=subprocess.DEVNULL)
    while not list(tmp_path.rglob("*.png")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "city").exists()


def test_a_full_disk_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.cv2, "imwrite", lambda *_: False)
    with pytest.raises(InputError, match="city cannot be written"):
        write_city_block(tmp_path / "city", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_ensure_makes_it_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(synthetic, "write_city_block", lambda data_dir: calls.append(data_dir))
    ensure_city_block(tmp_path / "city")
    (tmp_path / "city" / "sparse").mkdir(parents=True)
    ensure_city_block(tmp_path / "city")
    assert calls == [tmp_path / "city"]


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    for data_dir in (
        tmp_path / "mine",
        tmp_path / "mine" / "diary.txt",
        tmp_path / "mine" / "diary.txt" / "city",
    ):
        with pytest.raises(InputError, match="--data_dir"):
            ensure_city_block(data_dir)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "diary.txt"]


@pytest.mark.parametrize(
    "option", [{"num_views": 0}, {"width": 0}, {"height": -1}, {"num_points": 0}, {"size": 0.0}, {"seed": -1}]
)
def test_options_out_of_range_are_named(tmp_path, option):
    with pytest.raises(InputError, match=f"--{next(iter(option))} is "):
        write_city_block(tmp_path / "city", **option)


@pytest.mark.slow
def test_command_line(tmp_path):
    command = [sys.executable, "-m", "datasets.synthetic", "--data_dir", str(tmp_path / "city")]
    command += ["--num_views", "3", "--width", "40", "--height", "30", "--seed", "7"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert len(list((tmp_path / "city" / "images").iterdir())) == 3
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.count("\n") == 1
