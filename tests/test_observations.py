"""A COLMAP model whose points do not lie where its own photos saw them is named."""

import codecs
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from datasets.colmap import _uniform_params, load_model
from datasets.colmap_text import read_observations, read_text_model
from datasets.observations import project
from tests.small_scene import SIZE, camera, camera_poses
from tests.test_camera import MODELS

Change = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def write_observed_model(
    folder: Path, change: Change, factor: float = 1.0, count: int = 300, *, text: bool = False
) -> Path:
    """Write what 9 cameras see of points; poses [n, 3, 4] and points [P, 3] are changed after that."""
    poses = camera_poses(9)
    points = np.random.default_rng(0).normal([3, -2, 5], size=(count, 3))
    lens = camera()
    lens.camera_id = 1
    seen: list[dict[int, np.ndarray]] = []
    for pose in poses:
        pixels = {k: lens.img_from_cam(pose[:, :3] @ point + pose[:, 3]) for k, point in enumerate(points)}
        seen.append({k: xy for k, xy in pixels.items() if xy is not None and ((xy >= 0) & (xy <= SIZE)).all()})
    poses, points = change(poses, points)
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(lens)
    tracks = [pycolmap.Track() for _ in points]
    for index, (pose, pixels) in enumerate(zip(poses, seen, strict=True)):
        features = pycolmap.Point2DList([pycolmap.Point2D(factor * xy) for xy in pixels.values()])
        image = pycolmap.Image(name=f"{index:03d}.png", camera_id=1, image_id=index + 1, points2D=features)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
        for feature, k in enumerate(pixels):
            tracks[k].add_element(index + 1, feature)
    for point, track in zip(points, tracks, strict=True):
        model.add_point3D(point, track, np.full(3, 99, np.uint8))
    folder.mkdir()
    (model.write_text if text else model.write_binary)(str(folder))
    return folder


def inverted(poses: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rotations = poses[:, :, :3].transpose(0, 2, 1)
    return np.concatenate([rotations, -rotations @ poses[:, :, 3:]], axis=2), points


CHANGES: dict[str, Change] = {
    "poses written camera to world": inverted,
    "mirrored points": lambda poses, points: (poses, points * [1, 1, -1]),
    "points in another unit": lambda poses, points: (poses, 30 * points),
    "poses in another order": lambda poses, points: (np.roll(poses, 3, axis=0), points),
}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_points_that_do_not_lie_where_photos_saw_them_are_named(tmp_path, change, text):
    folder = write_observed_model(tmp_path / "model", CHANGES[change], text=text)
    for _ in range(2):  # read, and from the cache
        (remark,) = load_model(folder, tmp_path).remarks
        assert "do not lie where the photos saw them" in remark
        assert str(folder) in remark


def unchanged(poses: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return poses, points


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_sound_model_is_not_disturbed(tmp_path, factor, text):
    """Nor one whose camera was scaled, and its observations left as they were."""
    folder = write_observed_model(tmp_path / "model", unchanged, factor, text=text)
    assert load_model(folder, tmp_path).remarks == []


def test_text_models_of_both_formats_hold_the_same_observations(tmp_path):
    """Each line that is sampled belongs to its photo: with a comment of another length, and the mark of Windows."""
    folder = write_observed_model(tmp_path / "model", unchanged, text=True)
    images = folder / "images.txt"
    oracle = pycolmap.Reconstruction()
    oracle.read_text(str(folder))
    images.write_bytes(codecs.BOM_UTF8 + b"# of a program\r\n" + images.read_bytes().replace(b"\n", b"\r\n"))
    for image in read_text_model(folder).images:
        pixels, ids = read_observations(folder, image)
        expected = oracle.find_image_with_name(image.name).points2D
        np.testing.assert_allclose(pixels, [point.xy for point in expected], atol=1e-6)
        assert ids.tolist() == [point.point3D_id for point in expected]


@pytest.mark.parametrize("damage", ["", "1.5 2.5 x", "nan inf 3", "1 2 18446744073709551615", "1 2 99999"])
def test_observations_that_are_damaged_say_nothing(tmp_path, damage):
    folder = write_observed_model(tmp_path / "model", inverted, text=True)
    lines = (folder / "images.txt").read_text().split("\n")
    good = " ".join(["1 2 -1"] * 10)  # as far as each line is looked at while the file is read
    kept = [f"{good} {damage}" if line[:1] != "#" and len(line.split()) > 10 else line for line in lines]
    (folder / "images.txt").write_text("\n".join(kept))
    assert load_model(folder, tmp_path).remarks == []


@pytest.mark.parametrize("model", MODELS)
def test_projection_is_colmaps(model):
    lens = camera(model, MODELS[model], (320, 240))
    points = np.random.default_rng(1).uniform([-2, -2, 0.5], [2, 2, 4], (500, 3))
    points[0, 2] = -1
    params = _uniform_params(model, lens.params)
    projected = project(model, params, points)
    assert np.isnan(projected[0]).all()
    np.testing.assert_allclose(projected[1:], lens.img_from_cam(points[1:]), atol=1e-6)


def test_few_observations_say_nothing(tmp_path):
    folder = write_observed_model(tmp_path / "model", inverted, count=5)
    assert load_model(folder, tmp_path).remarks == []
