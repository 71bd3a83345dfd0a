"""Inputs that do not belong together, or that nothing is seen of, are refused or named before training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from plyfile import PlyData, PlyElement

from datasets.consistency import check_points, some_names
from datasets.normalize import transform_points
from datasets.scene import Scene, load_scene
from datasets.sight import check_views
from errors import InputError
from tests.small_scene import camera, camera_poses, write_scene

NEAR, FAR = 0.01, 1e10
UTM = np.array([476123.0, 5429876.0, 187.0])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def scene(tmp_path) -> Scene:
    return load_scene(write_scene(tmp_path / "scene", 9))


def test_a_sound_scene_has_no_warnings(scene):
    said: list[str] = []
    load_scene(scene.data_dir, say=said.append)
    assert not any(line.startswith("Warning") for line in said)
    assert check_views(scene, scene.points, NEAR, FAR) == []


@pytest.mark.parametrize(
    ("near_plane", "far_plane", "option"), [(50, FAR, "--near_plane 50"), (NEAR, 0.1, "--far_plane 0.1")]
)
def test_planes_that_cut_all_are_refused_with_the_depths_there_are(scene, near_plane, far_plane, option):
    with pytest.raises(InputError, match=f"{option}.* hide 100%") as error:
        check_views(scene, scene.points, near_plane, far_plane)
    least, most = (float(word) for word in str(error.value).split("depths of ")[1].split(" in ")[0].split(" to "))
    forwards = [(scene.points - pose[:3, 3]) @ pose[:3, 2] for pose in scene.camtoworlds[scene.train_ids]]
    assert np.min(forwards) < least < most < np.max(forwards)
    assert check_views(scene, scene.points, least, most) == []  # the remedy helps


def test_planes_that_cut_much_are_named(scene):
    forwards = np.concatenate([(scene.points - pose[:3, 3]) @ pose[:3, 2] for pose in scene.camtoworlds])
    (warning,) = check_views(scene, scene.points, float(np.quantile(forwards, 0.7)), FAR)
    assert warning.startswith("--near_plane")


@pytest.mark.parametrize("offset", [1e3, 5e6])
def test_points_that_no_picture_sees_are_refused(scene, offset):
    up = scene.camtoworlds[:, :3, 1].mean(axis=0)
    with pytest.raises(InputError, match=r"No training picture .* sees any of the 60 points"):
        check_views(scene, scene.points + offset * up, NEAR, FAR)


def test_one_point_in_view_is_enough_in_many_that_are_not(scene):
    """A sample of the points may leave it out."""
    up = scene.camtoworlds[:, :3, 1].mean(axis=0)
    many = np.tile(1e3 * up, (50_000, 1))
    many[77] = np.median(scene.points, axis=0)
    assert check_views(scene, many.astype(np.float32), NEAR, FAR) == []


@pytest.mark.parametrize("num_points", [60, 5000])
def test_cameras_that_look_away_are_refused(tmp_path, num_points):
    """As those of OpenGL do, which look along -z, where nobody has turned them."""
    poses = np.diag([1.0, -1.0, -1.0]) @ camera_poses(9)
    scene = load_scene(write_scene(tmp_path, 9, poses=poses, num_points=num_points))
    with pytest.raises(InputError, match=r"training picture .* sees any of"):
        check_views(scene, scene.points, NEAR, FAR)


def other_reading(how: str, poses: np.ndarray) -> np.ndarray:
    """[n, 3, 4] of which COLMAP's poses are what a program that writes them in another way means."""
    poses = np.concatenate([poses, np.tile([[[0.0, 0.0, 0.0, 1.0]]], (len(poses), 1, 1))], axis=1)
    turned = np.diag([1.0, -1.0, -1.0, 1.0])
    written = {
        "camera to world, where": np.linalg.inv(poses),
        "with OpenGL's axes": turned @ poses,
        "camera to world, with OpenGL's axes": np.linalg.inv(poses) @ turned,
    }
    return written[how][:, :3]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Scene:
    """A scene as it should be."""
    return load_scene(write_scene(tmp_path_factory.mktemp("sound"), 24, poses=camera_poses(24), num_points=5000))


@pytest.mark.parametrize("how", ["camera to world, where", "with OpenGL's axes", "camera to world, with OpenGL's axes"])
@pytest.mark.parametrize("offset", [pytest.param(0.0, marks=pytest.mark.slow), 1e4])
def test_poses_of_another_convention_are_named(tmp_path, sound, how, offset):
    poses = camera_poses(24)
    poses[:, :, 3] -= poses[:, :, :3] @ np.full(3, offset)
    data_dir = write_scene(tmp_path, 24, poses=other_reading(how, poses), num_points=5000)
    world = np.linalg.inv(sound.transform)
    points = transform_points(world, sound.points.astype(np.float64)) + offset
    scene = load_scene(data_dir)
    try:
        said = check_views(scene, transform_points(scene.transform, points), NEAR, FAR)
    except InputError as error:
        said = [str(error)]
    assert any(f"written {how}" in sentence for sentence in said)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_many_points_before_sound_cameras_are_not_taken_for_another_convention(sound, offset):
    moved = np.eye(4)
    moved[:3, 3] = offset
    scene = replace(sound, transform=sound.transform @ moved)  # the input's origin lies elsewhere
    assert check_views(scene, scene.points, NEAR, FAR) == []


def test_pictures_that_surround_the_cameras_are_not_taken_for_another_convention(tmp_path):
    """A room: the cameras stand near its middle and look outwards, at points all around."""
    poses = camera_poses(24)
    centres = np.random.default_rng(0).normal(size=(24, 3))
    poses[:, :, 3] = -(poses[:, :, :3] @ centres[:, :, None])[:, :, 0]
    scene = load_scene(write_scene(tmp_path, 24, poses=poses))
    points = np.random.default_rng(1).normal(size=(5000, 3))
    points *= 8 / np.linalg.norm(points, axis=1, keepdims=True)
    assert check_views(scene, transform_points(scene.transform, points), NEAR, FAR) == []


def test_a_principal_point_outside_the_picture_is_named_where_nothing_is_seen(tmp_path):
    """As of photos that were scaled down, and their camera's size with them, but not its parameters."""
    scene = load_scene(write_scene(tmp_path, 9, [camera(params=(80, 82, 48, 640))]))
    with pytest.raises(InputError, match=r"principal point 48, 640 of a camera lies outside its pictures of 96x64"):
        check_views(scene, scene.points, NEAR, FAR)


def test_points_without_colours_start_gray(tmp_path):
    data_dir = write_scene(tmp_path, 5)
    model = pycolmap.Reconstruction(str(data_dir / "sparse/0"))
    for point in model.points3D.values():
        point.color = np.zeros(3, np.uint8)
    model.write_binary(str(data_dir / "sparse/0"))
    said: list[str] = []
    scene = load_scene(data_dir, say=said.append)
    assert (scene.points_rgb == 128).all()
    assert any("all points are black" in line for line in said)


def test_one_camera_far_off_is_named_and_sets_no_scale(tmp_path):
    poses = camera_poses(9)
    usual = load_scene(write_scene(tmp_path / "a", 9, poses=poses))
    poses[3, 2, 3] += 3e5
    said: list[str] = []
    scene = load_scene(write_scene(tmp_path / "b", 9, poses=poses), say=said.append)
    assert scene.far_ids.tolist() == [3]
    assert scene.scene_scale == pytest.approx(usual.scene_scale, rel=0.3)
    (warning,) = (line for line in said if line.startswith("Warning"))
    assert "003.png" in warning
    assert "004.png" not in warning


def test_some_names():
    assert some_names(["a", "b", "c"]) == "a, b, c"
    assert some_names(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


# ------------------------------------------------------------------------------------------ points.ply and points3D


def cloud(seed: int, count: int = 2000) -> np.ndarray:
    """[P, 3] points of one surface, sampled anew for each seed."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(-3, 3, (count, 2))
    return np.c_[xy, np.sin(xy[:, 0]) + 0.3 * np.cos(2 * xy[:, 1])]


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_points_of_the_same_world_pass(offset):
    assert check_points(Path("points.ply"), cloud(0) + offset, cloud(1) + offset) == []


def test_few_points_of_the_model_say_nothing():
    assert check_points(Path("points.ply"), cloud(0) + 100, cloud(1, 20)) == []


@pytest.mark.parametrize("kind", ["elsewhere", "millimetres", "kilometres"])
def test_points_of_another_world_are_refused(kind):
    other = {
        "elsewhere": cloud(0) + UTM,
        "millimetres": 1e3 * cloud(0),
        "kilometres": 1e-3 * cloud(0),
    }
    with pytest.raises(InputError, match=r"points\.ply does not lie where points3D .* does"):
        check_points(Path("points.ply"), other[kind], cloud(1))


def test_points_that_are_turned_are_refused():
    turned = transform_points(np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]]), cloud(0))
    with pytest.raises(InputError, match="points3D"):
        check_points(Path("points.ply"), turned, cloud(1))


def test_points_of_a_part_of_the_scene_are_named():
    part = cloud(0)[cloud(0)[:, 0] > 1]
    (warning,) = check_points(Path("points.ply"), part, cloud(1))
    assert "points3D" in warning


def test_coordinates_that_float32_has_made_coarse_are_named():
    points = (cloud(0) + UTM).astype(np.float32).astype(np.float64)
    (warning,) = check_points(Path("points.ply"), points, np.zeros((0, 3)))
    assert "multiples of 0.5" in warning
    assert check_points(Path("points.ply"), cloud(0) + UTM, np.zeros((0, 3))) == []


def test_a_file_of_another_world_is_refused_when_the_scene_is_loaded(tmp_path):
    data_dir = write_scene(tmp_path / "scene", 5, num_points=200)
    rows = np.zeros(500, [(c, "f8") for c in "xyz"] + [(c, "u1") for c in ("red", "green", "blue")])
    for k, c in enumerate("xyz"):
        rows[c] = cloud(0, 500)[:, k] + 1e4
    PlyData([PlyElement.describe(rows, "vertex")]).write(str(data_dir / "sparse/0/points.ply"))
    with pytest.raises(InputError, match=r"points\.ply does not lie where points3D"):
        load_scene(data_dir, init_ply=True)
    load_scene(data_dir)
