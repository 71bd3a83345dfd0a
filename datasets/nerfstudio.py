"""Reads nerfstudio's transforms.json, which Polycam's, Record3D's and Metashape's converters and Instant NGP write too.

Conventions: https://docs.nerf.studio/quickstart/data_conventions.html
Poses map camera to world, with OpenGL's camera axes (y up, z backwards). nerfstudio shoots the ray of the first pixel
through cx - 0.5 (nerfstudio/cameras/cameras.py, `pixel_offset`), and copies COLMAP's cx: pixels are counted from the
corner. Distortion is OpenCV's (nerfstudio/cameras/camera_utils.py). `ply_file_path` lies in the world of the poses;
`applied_transform` [3, 4] and then `applied_scale` lead there from the world of the input, to which both are taken back
(nerfstudio/data/dataparsers/nerfstudio_dataparser.py). The camera model only tells fisheyes from others: distortion
counts whatever it is called. Depth images hold millimetres along the camera's axis, where the poses are in metres, and
0 where nothing is known (nerfstudio/data/datasets/depth_dataset.py, `depth_unit_scale_factor` in the dataparser).
Instant NGP's fields (camera_angle_x, is_fisheye, and those in `_OTHER_LENSES`) are those of
https://github.com/NVlabs/instant-ngp/blob/master/docs/nerf_dataset_tips.md and src/nerf_loader.cu beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datasets.colmap import DistanceMap, SparseModel
from datasets.paths import stays_inside
from datasets.ply import read_points
from datasets.posed_photos import (
    OPENGL_TO_OPENCV,
    Lens,
    PhotoFinder,
    PosedPhoto,
    array,
    check_left_out,
    corner_radius,
    make_model,
    number,
    read_json,
    rotation_of,
    side,
    similarity_of,
    table,
)
from errors import InputError

FILE = "transforms.json"
MILLIMETRE = 1e-3  # in the unit of the poses
_PERSPECTIVE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
_FISHEYE = ("OPENCV_FISHEYE", "FISHEYE")
_OTHER_LENSES = ("ftheta_p0", "latlong", "equirectangular", "orthographic")  # that Instant NGP names by a field alone
_NOT_USED = {
    "rolling_shutter": "a rolling shutter",
    "fisheye_crop_radius": "the radius of a fisheye's picture",
}


def find(data_dir: Path) -> list[Path]:
    """Return transforms.json where the dataset has one."""
    return [data_dir / FILE] if (data_dir / FILE).is_file() else []


def read(path: Path, data_dir: Path) -> SparseModel:
    """Read the poses, lenses, masks, depths and points of transforms.json.

    Args:
        path: The file.
        data_dir: The dataset, whose photos are in `images`.

    Raises:
        InputError: The file is damaged, lacks a field, or has cameras that are not supported.
    """
    meta = table(path, "JSON object", read_json(path))
    frames = meta.get("frames")
    if not isinstance(frames, list) or not frames:
        raise InputError(f"{path} lacks frames, the list of photos and poses: export it again.")
    axes = [str(meta[key]) for key in ("camera_convention", "coordinate_system") if key in meta]
    if any("opencv" in name.lower() or "colmap" in name.lower() for name in axes):
        raise InputError(
            f"{path} says that its poses have the camera axes of {axes[0][:40]}, and transforms.json is read with "
            "OpenGL's (y up, z backwards): export it for nerfstudio."
        )
    finder = PhotoFinder(data_dir)
    scale, rotation, translation = _applied(path, meta)
    photos, masks, distances, remarks = [], {}, {}, []
    for index, value in enumerate(frames):
        whose = f"frame {index}"
        frame = table(path, f"object for {whose}", value)
        file = frame.get("file_path")
        if not isinstance(file, str) or not file:
            raise InputError(f"{path} lacks file_path of {whose}: export it again.")
        name = finder.find(path, file)
        whose = f"frame {index} ({file[:100]})"
        pose = array(path, f"transform_matrix of {whose}", frame.get("transform_matrix"), (4, 4), (3, 4))
        camtoworld = np.eye(4)
        camtoworld[:3, :3] = rotation.T @ rotation_of(path, whose, pose[:3, :3])
        camtoworld[:3, 3] = rotation.T @ (pose[:3, 3] / scale - translation)
        lens, remarks_of_lens = _lens(path, whose, {**meta, **frame}, finder, name)
        remarks += [remark for remark in remarks_of_lens if remark not in remarks]
        photos.append(PosedPhoto(name, camtoworld @ OPENGL_TO_OPENCV, lens))
        if "mask_path" in frame:
            masks[name] = _mask(path, whose, frame["mask_path"], data_dir)
        if _is_given(frame.get("depth_file_path")):
            distances[name] = DistanceMap(
                _beside(path, "depth_file_path", frame["depth_file_path"]), MILLIMETRE / scale
            )
    if masks and len(masks) < len(photos):
        remarks.append(f"{path.name} names masks of {len(masks)} of {len(photos)} photos: the others are used whole.")
    for key, what in _NOT_USED.items():
        if any(_is_given(values.get(key)) for values in (meta, *frames)):
            remarks.append(f"{path.name} gives {key} ({what}), which is not used.")
    points = None
    if meta.get("ply_file_path"):
        xyz, colors = read_points(_beside(path, "ply_file_path", meta["ply_file_path"]))
        points = (xyz / scale - translation) @ rotation, colors
    return replace(make_model(path, photos, points, remarks, masks), distances=distances)


def _applied(path: Path, meta: Mapping[str, Any]) -> tuple[float, np.ndarray, np.ndarray]:
    """Return what has been applied to the input's world: x -> scale * (rotation @ x + translation)."""
    applied_scale = number(path, "the file", meta, "applied_scale", 1.0)
    if applied_scale <= 0:
        raise InputError(f"{path} says {applied_scale:g} for applied_scale, which must be positive: export it again.")
    matrix = np.eye(4)
    if "applied_transform" in meta:
        given = array(path, "applied_transform", meta["applied_transform"], (3, 4), (4, 4))
        matrix[:3] = given[:3]
    scale, rotation, translation = similarity_of(path, "applied_transform", matrix)
    return applied_scale * scale, rotation, translation / scale


def _lens(path: Path, whose: str, values: Mapping[str, Any], finder: PhotoFinder, name: str) -> tuple[Lens, list[str]]:
    """Return the lens of a frame, whose own fields go before those of the file, and remarks on it."""
    kind = str(values.get("camera_model", "OPENCV_FISHEYE" if values.get("is_fisheye") else "OPENCV")).upper()
    kind = next((key for key in _OTHER_LENSES if _is_given(values.get(key))), kind)
    if kind not in _PERSPECTIVE + _FISHEYE:
        raise InputError(
            f"{path} uses the camera model {kind[:40]}, which is not supported: export undistorted photos, or use one "
            f"of {', '.join(_PERSPECTIVE[:3] + _FISHEYE[:1])}."
        )
    if "w" in values or "h" in values:
        width, height = side(path, whose, values, "w"), side(path, whose, values, "h")
    else:
        width, height = finder.size_of(path, whose, name)
    if "fl_x" not in values and "camera_angle_x" in values:
        fx = width / 2 / math.tan(number(path, whose, values, "camera_angle_x") / 2)
    else:
        fx = number(path, whose, values, "fl_x")
    if "fl_y" not in values and "camera_angle_y" in values:
        fy = height / 2 / math.tan(number(path, whose, values, "camera_angle_y") / 2)
    else:
        fy = number(path, whose, values, "fl_y", fx)
    cx, cy = number(path, whose, values, "cx", width / 2), number(path, whose, values, "cy", height / 2)
    if not (fx > 0 and fy > 0):
        raise InputError(f"{path} has a focal length of {whose} that is not positive: export it again.")
    if "distortion_params" in values:
        listed = array(path, f"distortion_params of {whose}", values["distortion_params"], (6,))
        k1, k2, k3, k4, p1, p2 = listed.tolist()
    else:
        k1, k2, k3, k4, p1, p2 = (number(path, whose, values, key, 0.0) for key in ("k1", "k2", "k3", "k4", "p1", "p2"))
    if kind in _FISHEYE:
        return Lens(width, height, fx, fy, cx, cy, (k1, k2, k3, k4), fisheye=True), []
    lens = Lens(width, height, fx, fy, cx, cy, (k1, k2, p1, p2, k3))
    return lens, check_left_out(path, lens, "k4", abs(k4) * corner_radius(lens) ** 9 * max(fx, fy))


def _is_given(value: Any) -> bool:
    """Tell whether a field says something: it is there, and neither false nor zeros alone."""
    return any(map(bool, value)) if isinstance(value, list) else bool(value)


def _mask(path: Path, whose: str, value: Any, data_dir: Path) -> str:
    """Return the path of a frame's mask in the folder of masks."""
    parts = PurePosixPath(str(value).replace("\\", "/")).parts
    name = "/".join(parts[1:])
    if not parts or parts[0] != "masks" or not name or not stays_inside(name):
        raise InputError(
            f"{path} names {str(value)[:100]!r} as the mask of {whose}, and masks are read from {data_dir / 'masks'}: "
            "put them there, and name them masks/NAME in the file."
        )
    if not (data_dir / "masks" / name).is_file():
        raise InputError(
            f"{data_dir / 'masks' / name}, the mask of {whose} in {path}, does not exist: put it there, or take "
            "mask_path out of the file."
        )
    return name


_REMEDIES = {
    "ply_file_path": "put the points there, or take ply_file_path out of the file to start from random points",
    "depth_file_path": "put the depth images there, or take depth_file_path out of the file",
}


def _beside(path: Path, key: str, value: Any) -> Path:
    """Return a file that transforms.json names, by a path from where it lies."""
    name = str(value).replace("\\", "/")
    found = path.parent / name
    if not stays_inside(name) or not found.is_file():
        raise InputError(f"{path} names {str(value)[:100]!r} as {key}, which is no file beside it: {_REMEDIES[key]}.")
    return found
