import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from datasets.scene import load_scene, seen_distances
from errors import InputError
from tests.small_scene import SIZE, camera, camera_poses, write_scene


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_images_are_ordered_by_name_with_their_own_poses_and_cameras(tmp_path):
    names = ["b/2.png", "a.png", "b/10.png", "c.png"]
    cameras = [camera(), camera("PINHOLE", (50, 50, 24, 16), (48, 32))]
    write_scene(tmp_path, names, cameras)
    (tmp_path / "images/not in the model.png").write_bytes(b"")
    scene = load_scene(tmp_path)
    assert scene.image_names == ["a.png", "b/10.png", "b/2.png", "c.png"]
    assert scene.image_paths == [tmp_path / "images" / name for name in scene.image_names]
    widths = [scene.cameras[i].width for i in scene.camera_indices]
    assert widths == [48, 96, 96, 48]  # as names.index(name) % 2 says
    # The stored transform takes each input pose to the normalized one.
    for name, camtoworld in zip(scene.image_names, scene.camtoworlds, strict=True):
        pose = camera_poses(4)[names.index(name)]
        centre = -pose[:, :3].T @ pose[:, 3]
        np.testing.assert_allclose(camtoworld[:3, 3], scene.transform[:3] @ [*centre, 1], atol=1e-9)
    positions = scene.camtoworlds[:, :3, 3]
    distances = [np.linalg.norm(p - positions.mean(axis=0)) for p in positions]
    assert scene.scene_scale == pytest.approx(max(distances))


def test_scaled_intrinsics_follow_the_true_size(tmp_path):
    camera_item = camera("PINHOLE", (100, 110, 50.5, 33), (101, 67))
    scene = load_scene(write_scene(tmp_path, 3, [camera_item]), data_factor=4)
    made = scene.cameras[0]
    assert (made.width, made.height) == (25, 17)
    sx, sy = 25 / 101, 17 / 67  # not 1/4
    np.testing.assert_allclose(made.K, [[100 * sx, 0, 50.5 * sx], [0, 110 * sy, 33 * sy], [0, 0, 1]])


def test_pictures_of_one_camera_may_differ_in_size(tmp_path):
    sizes = [SIZE, (48, 32), SIZE]
    scene = load_scene(write_scene(tmp_path, 3, picture_sizes=sizes))
    assert [(scene.cameras[i].width, scene.cameras[i].height) for i in scene.camera_indices] == sizes
    assert scene.cameras[scene.camera_indices[1]].K[0, 0] == 40


def test_turned_picture_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"001\.png is 64x96 pixels.*\(96x64\)"):
        load_scene(write_scene(tmp_path, 3, picture_sizes=[SIZE, SIZE[::-1], SIZE]))


def test_initial_points_from_ply(tmp_path):
    write_scene(tmp_path)
    rng = np.random.default_rng(5)
    points = rng.normal(size=(50, 3)) * [3, 2, 1] + [3, -2, 5]
    rows = [f"{x} {y} {z} {i} 0 255" for i, (x, y, z) in enumerate(points)]
    header = "ply\nformat ascii 1.0\nelement vertex 50\n"
    header += "".join(f"property double {n}\n" for n in "xyz")
    header += "".join(f"property uchar {n}\n" for n in ("red", "green", "blue")) + "end_header\n"
    with pytest.raises(InputError, match=r"points\.ply does not exist"):
        load_scene(tmp_path, init_ply=True)
    (tmp_path / "sparse/0/points.ply").write_text(header + "\n".join(rows) + "\n")
    scene = load_scene(tmp_path, init_ply=True)
    assert scene.points.dtype == np.float32
    back = np.c_[scene.points, np.ones(50)] @ np.linalg.inv(scene.transform).T
    np.testing.assert_allclose(back[:, :3], points, atol=1e-5)
    assert scene.points_rgb[:, 0].tolist() == list(range(50))
    assert load_scene(tmp_path).points.shape == (60, 3)


def test_bad_datasets_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match="data_dir"):
        load_scene(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no COLMAP model"):
        load_scene(empty)
    no_points = write_scene(tmp_path / "no points", num_points=0)
    with pytest.raises(InputError, match=r"points3D.*give --init_ply"):
        load_scene(no_points)
    no_images = write_scene(tmp_path / "no images")
    shutil.rmtree(no_images / "images")
    with pytest.raises(InputError, match="images does not exist"):
        load_scene(no_images)
    one_place = write_scene(tmp_path / "one place", 2, poses=camera_poses(2)[[0, 0]])
    with pytest.raises(InputError, match="one place"):
        load_scene(one_place)
    truncated = write_scene(tmp_path / "truncated", ["a.jpg", "b.jpg"])
    path = truncated / "images/b.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"b\.jpg") as error:
        load_scene(truncated)
    assert "a.jpg" not in str(error.value)
    absent = write_scene(tmp_path / "absent")
    (absent / "images/003.png").unlink()
    with pytest.raises(InputError, match=r"missing from .*images: 003\.png\."):
        load_scene(absent)
    Image.new("RGB", SIZE).save(absent / "images/003.png")
    load_scene(absent)


def test_how_far_away_is_what_cameras_see(tmp_path):
    scene = load_scene(write_scene(tmp_path, 3, [camera("PINHOLE", (48, 48, 24, 16), (48, 32))]))
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[1] = np.diag([-1.0, 1, -1, 1])  # looks back, where nothing is
    poses[2, 2, 3] = 2.0  # stands farther ahead
    # In front of the first: three in the picture, one beside it, one behind.
    points = np.array([[0, 0, 3], [0.4, 0.3, 4], [-1, 0, 7], [9, 0, 8], [0, 30, -5]], np.float32)
    scene = replace(scene, camtoworlds=poses, points=points)
    assert seen_distances(scene, np.arange(3)).tolist() == [4, 3, 2]  # of none: the middle of the others
    assert seen_distances(scene, np.array([1])).tolist() == [0]
