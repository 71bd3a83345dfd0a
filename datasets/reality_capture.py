"""Reads RealityScan's (formerly RealityCapture's) CSV "Internal/External camera parameters", and a PLY beside it.

Columns: #name, x, y, alt, heading, pitch, roll, f, px, py, k1, k2, k3, k4, t1, t2; some may be absent. RealityScan 2
calls four of them yaw, f_35mm, px_norm and py_norm.
https://dev.epicgames.com/documentation/realityscan/camera-geometry-in-realityscan-camera-models-and-coordinate-systems-reference
https://dev.epicgames.com/community/learning/knowledge-base/vzwB/capturing-reality-realitycapture-xmp-camera-math

f is that of a film 36 mm wide, so f / 36, px and py are shares of the picture's larger side; px and py count from its
middle. Angles are in degrees. Yaw, pitch and roll turn an aircraft's axes (nose, right wing, down) by Rz Ry Rx in a
world of north, east and down; the camera looks down from it, its picture's upper side towards the nose. In the file's
own world of east, north and up that makes Rz(-heading) Rx(pitch) Ry(roll) of camera to world with OpenGL's camera axes,
as nerfstudio's importer has it too (https://docs.nerf.studio/quickstart/custom_dataset.html). Brown's t1 and t2 are
OpenCV's p2 and p1. The file has no sizes: those of the pictures are taken.

A division lens has k1 alone, and the file does not say that it is one. The documentation divides undistorted points by
1 + k1 r^2, which bends lines the other way than Fitzgibbon's model does, and a published export of a wide-angle lens
has the sign of Fitzgibbon's. So k1 alone is refused where it matters.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from datasets.colmap import SparseModel
from datasets.image_files import is_turned
from datasets.ply import read_points
from datasets.posed_photos import (
    HALF_PIXEL,
    OPENGL_TO_OPENCV,
    Lens,
    PhotoFinder,
    PosedPhoto,
    check_left_out,
    corner_radius,
    make_model,
    number,
    only_points_file,
)
from errors import InputError, counted

_NEEDED = ("x", "y", "alt", "heading", "pitch", "roll", "f")
_CALLED = {"yaw": "heading", "f_35mm": "f", "px_norm": "px", "py_norm": "py"}  # by RealityScan 2, and before
_LENS = ("k1", "k2", "k3", "k4", "t1", "t2")
_OF_LENSES = re.compile(r"[bkpst]\d+|skew|aspect.*")  # columns of customized exports that change what a pixel sees
_FILM = 36.0  # mm, the width to which f belongs
_DEGREES = 0.2  # between the cameras of a scene whose coordinates are longitude and latitude, at most: 20 km, and
_FAR_OFF = 300  # times as far as that from 0, 0, at least


def find(data_dir: Path) -> list[Path]:
    """Return the CSV files in the dataset that have RealityScan's columns."""
    return [path for path in sorted(data_dir.glob("*.csv")) if path.is_file() and _columns(path) is not None]


def read(path: Path, data_dir: Path) -> SparseModel:
    """Read poses and lenses of a CSV file, and the PLY file beside it.

    Args:
        path: The CSV file.
        data_dir: The dataset, whose photos are in `images`.

    Raises:
        InputError: The file lacks a column or a value, or has cameras that are not supported.
    """
    columns = _columns(path) or []
    missing = [column for column in _NEEDED if column not in columns]
    if missing:
        raise InputError(
            f"{path} lacks the columns {', '.join(missing)}: export Internal/External camera parameters from "
            "RealityScan's Registration menu."
        )
    finder = PhotoFinder(data_dir)
    photos: list[PosedPhoto] = []
    remarks: list[str] = []
    turned: list[str] = []
    for row in _rows(path)[1:]:
        whose = f"photo {row[0][:100]!r}"
        if len(row) != len(columns):
            raise InputError(f"{path} has {len(row)} values for {whose}, and {len(columns)} columns: export it again.")
        values = dict(zip(columns, row, strict=True))
        name = finder.find(path, row[0])
        lens, remarks_of_lens = _lens(path, whose, values, finder.size_of(path, whose, name))
        remarks += [remark for remark in remarks_of_lens if remark not in remarks]
        turned += [name] if is_turned(finder.folder / name) else []
        heading, pitch, roll = (number(path, whose, values, key) for key in ("heading", "pitch", "roll"))
        camtoworld = np.eye(4)
        camtoworld[:3, :3] = Rotation.from_euler("ZXY", [-heading, pitch, roll], degrees=True).as_matrix()
        camtoworld[:3, 3] = [number(path, whose, values, key) for key in ("x", "y", "alt")]
        photos.append(PosedPhoto(name, camtoworld @ OPENGL_TO_OPENCV, lens))
    _check_not_in_degrees(path, photos)
    if turned:
        remarks.append(
            f"EXIF turns {counted(len(turned), 'photo')} of {path.name} for display, such as {turned[0]}: poses are "
            "taken to be those of the pixels as they are stored."
        )
    points_path = only_points_file(path)
    return make_model(path, photos, None if points_path is None else read_points(points_path), remarks)


def _rows(path: Path) -> list[list[str]]:
    """Return the lines that hold something, but for the one that counts the cameras."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    try:
        rows = [[value.strip() for value in row] for row in csv.reader(text.splitlines())]
    except csv.Error:
        return []
    return [row for row in rows if any(row) and not row[0].startswith("#cameras")]


def _columns(path: Path) -> list[str] | None:
    """Return the names of the columns; None where the file is not RealityScan's."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if b"name" not in start.lower() or b"roll" not in start.lower():
        return None
    rows = _rows(path)
    columns = [column.lstrip("#").strip().lower() for column in rows[0]] if rows else []
    columns = [_CALLED.get(column, column) for column in columns]
    return columns if columns[:1] == ["name"] and {"heading", "pitch", "roll"} <= set(columns) else None


def _lens(path: Path, whose: str, values: dict[str, str], size: tuple[int, int]) -> tuple[Lens, list[str]]:
    """Return the lens of a photo of this width and height, and remarks on it."""
    width, height = size
    larger = max(size)
    focal = number(path, whose, values, "f") / _FILM * larger
    if focal <= 0:
        raise InputError(f"{path} has a focal length of {whose} that is not positive: export it again.")
    cx = width / 2 + number(path, whose, values, "px", 0.0) * larger
    cy = height / 2 + number(path, whose, values, "py", 0.0) * larger
    k1, k2, k3, k4, t1, t2 = (number(path, whose, values, key, 0.0) for key in _LENS)
    lens = Lens(width, height, focal, focal, cx, cy, (k1, k2, t2, t1, k3))
    _check_other_parameters(path, whose, values)
    radius = corner_radius(lens)
    if k1 and not any((k2, k3, k4, t1, t2)) and 2 * abs(k1) * radius**3 * focal > HALF_PIXEL:  # between both
        raise InputError(
            f"{path} gives {whose} k1 = {k1:g} and no other coefficient, as a division lens has it, and does not say "
            "which lens that is: set Alignment settings > Distortion model to Brown3, align again, and export again."
        )
    return lens, check_left_out(path, lens, "k4", abs(k4) * radius**9 * focal)


def _check_other_parameters(path: Path, whose: str, values: dict[str, str]) -> None:
    """Raise InputError where a column changes the lens and is not among those that are read."""
    for key in values:
        neutral = 1.0 if key.startswith("aspect") else 0.0
        if key not in _LENS and _OF_LENSES.fullmatch(key) and number(path, whose, values, key) != neutral:
            raise InputError(
                f"{path} gives {whose} {key} = {values[key][:40]}, a parameter of the lens that is not supported: set "
                "Alignment settings > Distortion model to Brown3, align again, and export again."
            )


def _check_not_in_degrees(path: Path, photos: list[PosedPhoto]) -> None:
    """Raise InputError where x and y look like longitude and latitude, in which the scene is a line."""
    if not photos:
        return
    places = np.array([photo.camtoworld[:2, 3] for photo in photos])  # [n, 2]
    extent = np.ptp(places, axis=0).max()
    in_range = (np.abs(places) <= [180, 90]).all()
    if in_range and 0 < extent < _DEGREES and np.linalg.norm(places.mean(axis=0)) > _FAR_OFF * extent:
        x, y = places[0]
        raise InputError(
            f"{path} has x = {x:g} and y = {y:g}, which look like longitude and latitude in degrees: export camera "
            "parameters and points in a local or projected coordinate system, whose unit is a length."
        )
