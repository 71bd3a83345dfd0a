"""A COLMAP model whose points do not lie where its own photos saw them is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from datasets.colmap import load_model
from tests.small_scene import SIZE, camera, camera_poses

Change = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def write_observed_model(folder: Path, change: Change, factor: float = 1.0, count: int = 300) -> Path:
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
    model.write_binary(str(folder))
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


@pytest.mark.parametrize("change", CHANGES)
def test_points_that_do_not_lie_where_photos_saw_them_are_named(tmp_path, change):
    folder = write_observed_model(tmp_path / "model", CHANGES[change])
    for _ in range(2):  # read, and from the cache
        (remark,) = load_model(folder, tmp_path).remarks
        assert "do not lie where the photos saw them" in remark
        assert str(folder) in remark


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_sound_model_is_not_disturbed(tmp_path, factor):
    """Nor one whose camera was scaled, and its observations left as they were."""
    folder = write_observed_model(tmp_path / "model", lambda poses, points: (poses, points), factor)
    assert load_model(folder, tmp_path).remarks == []


def test_few_observations_say_nothing(tmp_path):
    folder = write_observed_model(tmp_path / "model", inverted, count=5)
    assert load_model(folder, tmp_path).remarks == []
