"""Reads OpenDroneMap's reconstruction, which is OpenSfM's: opensfm/reconstruction.json, and cameras.json beside it.

Format: https://opensfm.org/docs/dataset.html, conventions and camera models: https://opensfm.org/docs/geometry.html
Rotation (an angle-axis vector) and translation map world to camera, x right, y down, z forwards. Lengths in a picture
are shares of its larger side, from its middle: a pixel's centre (column + 0.5, row + 0.5) less half the picture's size
(opensfm/features.py, `normalized_image_coordinates`), so pixels count from the corner. Brown's distortion is OpenCV's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from datasets.colmap import SparseModel
from datasets.posed_photos import Lens, PhotoFinder, PosedPhoto, array, make_model, number, read_json, side, table
from errors import InputError

_PLACES = ("opensfm/reconstruction.json", "reconstruction.json")
_PERSPECTIVE = ("perspective", "simple_radial", "radial", "brown")
_FISHEYE = ("fisheye", "fisheye_opencv")


def find(data_dir: Path) -> list[Path]:
    """Return reconstruction.json in opensfm, or in the dataset itself."""
    return [data_dir / place for place in _PLACES if (data_dir / place).is_file()][:1]


def read(path: Path, data_dir: Path) -> SparseModel:
    """Read the reconstruction of most photos.

    Args:
        path: reconstruction.json.
        data_dir: The dataset, whose photos are in `images`.

    Raises:
        InputError: The file is damaged, lacks a field, or has cameras that are not supported.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} holds no list of reconstructions: run OpenDroneMap or OpenSfM again.")
    parts = [table(path, "reconstruction", part) for part in content]
    shots_of_parts = [table(path, "shots of a reconstruction", part.get("shots")) for part in parts]
    sizes = [len(shots) for shots in shots_of_parts]
    largest = sizes.index(max(sizes))
    remarks = []
    if len(parts) > 1:
        remarks.append(
            f"{path.name} holds {len(parts)} reconstructions that were not joined: the largest, of {max(sizes):,} "
            f"photos, is used, and {sum(sizes) - max(sizes):,} photos of the others are not."
        )
    part = parts[largest]
    cameras = dict(table(path, "cameras", part.get("cameras")))
    beside = data_dir / "cameras.json"
    if beside.is_file():  # what the project was started with, or ended with; the reconstruction's own go first
        cameras = {**table(beside, "cameras", read_json(beside)), **cameras}
    finder = PhotoFinder(data_dir)
    lenses: dict[str, Lens] = {}
    photos = []
    for shot_name, value in shots_of_parts[largest].items():
        shot = table(path, f"shot {shot_name}", value)
        camera = str(shot.get("camera"))
        if camera not in cameras:
            raise InputError(f"{path} lacks the camera {camera[:100]!r} of shot {shot_name}: export it again.")
        if camera not in lenses:
            lenses[camera] = _lens(path, f"camera {camera!r}", table(path, f"camera {camera}", cameras[camera]))
        rotation, _ = cv2.Rodrigues(array(path, f"rotation of shot {shot_name}", shot.get("rotation"), (3,)))
        translation = array(path, f"translation of shot {shot_name}", shot.get("translation"), (3,))
        camtoworld = np.eye(4)
        camtoworld[:3, :3], camtoworld[:3, 3] = rotation.T, -rotation.T @ translation
        photos.append(PosedPhoto(finder.find(path, shot_name), camtoworld, lenses[camera]))
    return make_model(path, photos, _points(path, part), remarks)


def _lens(path: Path, whose: str, values: Mapping[str, Any]) -> Lens:
    """Return the lens of a camera."""
    kind = str(values.get("projection_type", "perspective"))
    if kind not in _PERSPECTIVE + _FISHEYE:
        raise InputError(
            f"{path} uses the camera model {kind[:40]}, which is not supported: reconstruct with one of "
            f"{', '.join(_PERSPECTIVE + _FISHEYE)} (OpenDroneMap's --camera-lens)."
        )
    width, height = side(path, whose, values, "width"), side(path, whose, values, "height")
    size = max(width, height)
    if "focal" in values:
        fx = fy = number(path, whose, values, "focal") * size
    else:
        fx, fy = number(path, whose, values, "focal_x") * size, number(path, whose, values, "focal_y") * size
    cx = width / 2 + number(path, whose, values, "c_x", 0.0) * size
    cy = height / 2 + number(path, whose, values, "c_y", 0.0) * size
    k1, k2, k3, k4, p1, p2 = (number(path, whose, values, key, 0.0) for key in ("k1", "k2", "k3", "k4", "p1", "p2"))
    if kind in _FISHEYE:
        return Lens(width, height, fx, fy, cx, cy, (k1, k2, k3, k4), fisheye=True)
    return Lens(width, height, fx, fy, cx, cy, (k1, k2, p1, p2, k3))


def _points(path: Path, part: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the points of a reconstruction and their colours; None where it has none."""
    values = [table(path, "point", point) for point in table(path, "points", part.get("points", {})).values()]
    if not values:
        return None
    shape = (len(values), 3)
    points = array(path, "coordinates of points", [point.get("coordinates") for point in values], shape)
    colors = array(path, "color of points", [point.get("color") for point in values], shape)
    return points, np.clip(np.round(colors), 0, 255).astype(np.uint8)
