"""Reads RealityScan's (formerly RealityCapture's) CSV "Internal/External camera parameters", and a PLY beside it.

Columns: #name, x, y, alt, heading, pitch, roll, f, px, py, k1, k2, k3, k4, t1, t2; some may be absent.
https://dev.epicgames.com/documentation/realityscan/camera-geometry-in-realityscan-camera-models-and-coordinate-systems-reference
https://dev.epicgames.com/community/learning/knowledge-base/vzwB/capturing-reality-realitycapture-xmp-camera-math

f is that of a film 36 mm wide, so f / 36, px and py are shares of the picture's larger side; px and py count from its
middle. Angles are in degrees: camera to world, with OpenGL's camera axes, is Rz(-heading) Rx(pitch) Ry(roll), as
nerfstudio's importer has it (https://docs.nerf.studio/quickstart/custom_dataset.html). Brown's t1 and t2 are OpenCV's
p2 and p1, as AliceVision's and Camorph's importers have it. The file has no sizes: those of the pictures are taken.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from datasets.colmap import SparseModel
from datasets.image_files import picture_size
from datasets.ply import read_points
from datasets.posed_photos import (
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
from errors import InputError

_NEEDED = ("x", "y", "alt", "heading", "pitch", "roll", "f")
_FILM = 36.0  # mm, the width to which f belongs


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
    for row in _rows(path)[1:]:
        whose = f"photo {row[0][:100]!r}"
        if len(row) != len(columns):
            raise InputError(f"{path} has {len(row)} values for {whose}, and {len(columns)} columns: export it again.")
        values = dict(zip(columns, row, strict=True))
        name = finder.find(path, row[0])
        if not (finder.folder / name).is_file():
            raise InputError(f"{path} names {whose}, which is not in {finder.folder}: put it there.")
        lens, remarks_of_lens = _lens(path, whose, values, picture_size(finder.folder / name))
        remarks += [remark for remark in remarks_of_lens if remark not in remarks]
        heading, pitch, roll = (number(path, whose, values, key) for key in ("heading", "pitch", "roll"))
        camtoworld = np.eye(4)
        camtoworld[:3, :3] = Rotation.from_euler("ZXY", [-heading, pitch, roll], degrees=True).as_matrix()
        camtoworld[:3, 3] = [number(path, whose, values, key) for key in ("x", "y", "alt")]
        photos.append(PosedPhoto(name, camtoworld @ OPENGL_TO_OPENCV, lens))
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
    if b"name" not in start or b"heading" not in start:
        return None
    rows = _rows(path)
    columns = [column.lstrip("#").lower() for column in rows[0]] if rows else []
    return columns if columns[:1] == ["name"] and "heading" in columns else None


def _lens(path: Path, whose: str, values: dict[str, str], size: tuple[int, int]) -> tuple[Lens, list[str]]:
    """Return the lens of a photo of this width and height, and remarks on it."""
    width, height = size
    larger = max(size)
    focal = number(path, whose, values, "f") / _FILM * larger
    if focal <= 0:
        raise InputError(f"{path} has a focal length of {whose} that is not positive: export it again.")
    cx = width / 2 + number(path, whose, values, "px", 0.0) * larger
    cy = height / 2 + number(path, whose, values, "py", 0.0) * larger
    k1, k2, k3, k4, t1, t2 = (number(path, whose, values, key, 0.0) for key in ("k1", "k2", "k3", "k4", "t1", "t2"))
    lens = Lens(width, height, focal, focal, cx, cy, (k1, k2, t2, t1, k3))
    return lens, check_left_out(path, lens, "k4", abs(k4) * corner_radius(lens) ** 9 * focal)
