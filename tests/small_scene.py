"""Writes small COLMAP datasets for the tests of `datasets`."""

from pathlib import Path

import numpy as np
import pycolmap
from PIL import Image
from scipy.spatial.transform import Rotation

SIZE = (96, 64)  # width, height


def camera(model: str = "PINHOLE", params: tuple[float, ...] = (80, 82, 48, 32), size=SIZE) -> pycolmap.Camera:
    return pycolmap.Camera(model=model, width=size[0], height=size[1], params=params)


def ramp_picture(size: tuple[int, int] = SIZE) -> np.ndarray:
    """[H, W, 3] uint8 whose red grows with x and whose green grows with y, from 0 at one edge to 255 at the other."""
    width, height = size
    picture = np.full((height, width, 3), 40.0)
    picture[..., 0] = 255 * (np.arange(width) + 0.5) / width
    picture[..., 1] = 255 * (np.arange(height)[:, None] + 0.5) / height
    return np.round(picture).astype(np.uint8)


def camera_poses(num_images: int, seed: int = 0) -> np.ndarray:
    """[n, 3, 4] world-to-camera poses on a tilted ring around (3, -2, 5), looking inwards."""
    rng = np.random.default_rng(seed)
    tilt = Rotation.from_rotvec([0.3, -0.2, 0.5])
    poses = []
    for angle in np.linspace(0, 2 * np.pi, num_images, endpoint=False):
        turn = Rotation.from_euler("yxz", [angle, 0.2 + 0.1 * rng.random(), 0.1 * rng.random()]) * tilt
        position = np.array([3.0, -2.0, 5.0]) - turn.inv().apply([0, 0, 4 + rng.random()])
        poses.append(np.c_[turn.as_matrix(), -turn.apply(position)])
    return np.stack(poses)


def write_scene(
    data_dir: Path,
    names: list[str] | int = 5,
    cameras: list[pycolmap.Camera] | None = None,
    *,
    picture_sizes: list[tuple[int, int]] | None = None,
    num_points: int = 60,
    text: bool = False,
    model_dir: str = "sparse/0",
    write_pictures: bool = True,
    poses: np.ndarray | None = None,
    seed: int = 0,
) -> Path:
    """A dataset whose image i has the camera i % len(cameras) and a ramp for its picture."""
    rng = np.random.default_rng(seed)
    names = [f"{i:03d}.png" for i in range(names)] if isinstance(names, int) else names
    cameras = cameras or [camera()]
    model = pycolmap.Reconstruction()
    for index, item in enumerate(cameras):
        item.camera_id = index + 1
        model.add_camera_with_trivial_rig(item)
    poses = camera_poses(len(names), seed) if poses is None else poses
    for index, (name, pose) in enumerate(zip(names, poses, strict=True)):
        image = pycolmap.Image(name=name, camera_id=index % len(cameras) + 1, image_id=index + 1)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
        size = (
            picture_sizes[index]
            if picture_sizes
            else (cameras[index % len(cameras)].width, image_height(cameras, index))
        )
        if write_pictures:
            path = data_dir / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ramp_picture(size)).save(path)
    for xyz in rng.normal(size=(num_points, 3)) * [1.5, 0.9, 0.4] + [3, -2, 5]:
        model.add_point3D(xyz, pycolmap.Track(), rng.integers(0, 256, 3, dtype=np.uint8))
    folder = data_dir / model_dir
    folder.mkdir(parents=True)
    (model.write_text if text else model.write_binary)(str(folder))
    return data_dir


def image_height(cameras: list[pycolmap.Camera], index: int) -> int:
    return cameras[index % len(cameras)].height
