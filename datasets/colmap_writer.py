"""Writes cameras and poses of a scene as a COLMAP model in text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial.transform import Rotation

from datasets.camera import Camera
from datasets.normalize import transform_cameras, transform_points
from datasets.scene import Scene


def text_model(scene: Scene, camtoworlds: np.ndarray) -> dict[str, str]:
    """Return the files of a COLMAP model (https://colmap.github.io/format.html) by their names.

    Its world is the input's. Cameras are those of the pictures as the scene has them, at their scale and with their
    distortion; points are those of the scene, without tracks.

    Args:
        scene: What the model is of.
        camtoworlds: [n, 4, 4] float64, poses of its images, in its normalized world.
    """
    back = np.linalg.inv(scene.transform)
    points = transform_points(back, scene.points.astype(np.float64))
    texts = {
        "cameras": (_camera_line(number, camera) for number, camera in enumerate(scene.cameras, 1)),
        "images": _image_lines(scene, transform_cameras(back, camtoworlds)),
        "points3D": _point_lines(points, scene.points_rgb),
    }
    return {f"{name}.txt": "".join(f"{line}\n" for line in lines) for name, lines in texts.items()}


def _camera_line(number: int, camera: Camera) -> str:
    K, k = camera.source_K, camera.distortion
    intrinsics = [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]
    if camera.fisheye:
        model, parameters = "OPENCV_FISHEYE", [*intrinsics, *k]
    elif not camera.is_distorted:
        model, parameters = "PINHOLE", intrinsics
    elif k[4] == 0:
        model, parameters = "OPENCV", [*intrinsics, *k[:4]]
    else:
        model, parameters = "FULL_OPENCV", [*intrinsics, *k, 0.0, 0.0, 0.0]
    return f"{number} {model} {camera.source_width} {camera.source_height} {_numbers(parameters)}"


def _image_lines(scene: Scene, camtoworlds: np.ndarray) -> Iterator[str]:
    turns = Rotation.from_matrix(camtoworlds[:, :3, :3]).inv()
    quaternions = turns.as_quat()[:, [3, 0, 1, 2]]  # w first
    translations = -turns.apply(camtoworlds[:, :3, 3])
    for index, name in enumerate(scene.image_names):
        pose = _numbers([*quaternions[index], *translations[index]])
        yield f"{index + 1} {pose} {scene.camera_indices[index] + 1} {name}"
        yield ""  # observations: none


def _point_lines(points: np.ndarray, colors: np.ndarray) -> Iterator[str]:
    for number, (point, color) in enumerate(zip(points.tolist(), colors.tolist(), strict=True), 1):
        yield f"{number} {_numbers(point)} {color[0]} {color[1]} {color[2]} 0"


def _numbers(values: list[float]) -> str:
    return " ".join(repr(float(value)) for value in values)  # that are read as they were
