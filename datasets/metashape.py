"""Reads Agisoft Metashape's cameras.xml (File > Export > Export Cameras) and the points beside it.

Lenses: appendix "Camera models" of the user manual (https://www.agisoft.com/downloads/user-manuals/), whose equations
stand in https://www.agisoft.com/forum/index.php?action=profile;area=showposts;u=220832 as well. The origin is the
picture's corner, and the first pixel's centre 0.5, 0.5; cx and cy count from the middle; x' is multiplied by f + b1; p1
and p2 are OpenCV's p2 and p1
(https://photogrammetrycommunity.github.io/metashape-expert-manual/workflow/camera-calibration/distortion-model-opencv-colmap/).
A fisheye's angle stands for the radius in the same polynomials, unless it is what Metashape 2 calls equisolid.
Poses: a camera's transform maps camera (x right, y down, z forwards) to its chunk or component, whose own transform
(rotation, translation, scale) maps to the world, as nerfstudio's importer reads them too.

The points may have been exported in the chunk's own coordinates, or in local ones, with its scale or without: that
world is taken in which the cameras see most of them.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from datasets.colmap import SparseModel
from datasets.ply import read_points
from datasets.posed_photos import (
    Lens,
    PhotoFinder,
    PosedPhoto,
    array,
    check_left_out,
    corner_radius,
    make_model,
    number,
    only_points_file,
    rotation_of,
    side,
)
from errors import InputError, counted, read_as

_SAMPLE = 20_000  # points, and
_PHOTOS = 50  # photos, that tell in which world the points are
_LEAST_SEEN = 0.05  # of the points, in the usual photo
_FISHEYES = ("fisheye", "equidistant_fisheye")


def find(data_dir: Path) -> list[Path]:
    """Return the XML files in the dataset that Metashape wrote, cameras.xml first."""
    files = sorted(data_dir.glob("*.xml"), key=lambda path: (path.name.lower() != "cameras.xml", path.name))
    return [path for path in files if path.is_file() and b"<chunk" in _start(path)]


def read(path: Path, data_dir: Path) -> SparseModel:
    """Read the aligned cameras, their sensors, and the PLY file beside them.

    Args:
        path: The XML file.
        data_dir: The dataset, whose photos are in `images`.

    Raises:
        InputError: The file is damaged, lacks a field, or has cameras that are not supported.
    """
    with read_as(path, "XML", "export the cameras again", (ElementTree.ParseError, ValueError, LookupError, OSError)):
        root = ElementTree.parse(path).getroot()
    chunks = root.findall(".//chunk")
    if not chunks:
        raise InputError(f"{path} holds no chunk: export the cameras from Metashape again.")
    chunk = max(chunks, key=lambda part: len(part.findall("cameras//camera/transform")))
    remarks = []
    if len(chunks) > 1:
        remarks.append(f"{path.name} holds {len(chunks)} chunks: the one of most aligned cameras is used.")
    sensors = {sensor.get("id"): sensor for sensor in chunk.iterfind("sensors/sensor")}
    worlds = {part.get("id"): part.find("transform") for part in chunk.iterfind("components/component")}
    finder = PhotoFinder(data_dir)
    lenses: dict[str | None, Lens] = {}
    photos, similarities, unaligned = [], [], 0
    for camera in chunk.iterfind("cameras//camera"):
        label, transform = camera.get("label", ""), camera.findtext("transform")
        if transform is None or camera.get("enabled", "true") in ("0", "false"):
            unaligned += 1
            continue
        sensor_id = camera.get("sensor_id")
        if sensor_id not in lenses:
            if sensor_id not in sensors:
                raise InputError(f"{path} lacks sensor {sensor_id} of camera {label!r}: export the cameras again.")
            lenses[sensor_id], new_remarks = _lens(path, sensors[sensor_id])
            remarks += new_remarks
        pose = array(path, f"transform of camera {label!r}", transform.split(), (16,)).reshape(4, 4)
        pose[:3, :3] = rotation_of(path, f"camera {label!r}", pose[:3, :3])
        world = worlds.get(camera.get("component_id"))
        similarities.append(_similarity(path, chunk.find("transform") if world is None else world))
        photos.append(PosedPhoto(finder.find(path, label), pose, lenses[sensor_id]))
    if unaligned:
        remarks.append(f"{path.name} holds {counted(unaligned, 'camera')} not aligned or not enabled: not used.")
    points_path = only_points_file(path)
    points = None if points_path is None else read_points(points_path)
    if photos:
        photos = _in_the_world_of(path, points_path, photos, similarities, points)
    return make_model(path, photos, points, remarks)


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def _lens(path: Path, sensor: ElementTree.Element) -> tuple[Lens, list[str]]:
    """Return the lens of a sensor, as it was adjusted, and remarks on it."""
    whose = f"sensor {sensor.get('label') or sensor.get('id')}"
    kind = sensor.get("type", "frame")
    if kind not in ("frame", *_FISHEYES):
        raise InputError(
            f"{path} uses cameras of type {kind[:40]}, which is not supported: export undistorted photos, or align as "
            "frame or equidistant fisheye cameras."
        )
    calibrations = sensor.findall("calibration")
    adjusted = [calibration for calibration in calibrations if calibration.get("class") == "adjusted"]
    if not calibrations:
        raise InputError(f"{path} lacks the calibration of {whose}: align the photos, and export the cameras again.")
    calibration = (adjusted or calibrations)[0]
    size = calibration.find("resolution")
    size = sensor.find("resolution") if size is None else size
    if size is None:
        raise InputError(f"{path} lacks the resolution of {whose}: export the cameras again.")
    width, height = side(path, whose, size.attrib, "width"), side(path, whose, size.attrib, "height")
    values = {element.tag: element.text for element in calibration}
    f = number(path, whose, values, "f")
    keys = ("cx", "cy", "b1", "b2", "k1", "k2", "k3", "k4", "p1", "p2", "p3", "p4")
    cx, cy, b1, b2, k1, k2, k3, k4, p1, p2, p3, p4 = (number(path, whose, values, key, 0.0) for key in keys)
    if not (f > 0 and f + b1 > 0):
        raise InputError(f"{path} has a focal length of {whose} that is not positive: export the cameras again.")
    fisheye = kind in _FISHEYES
    distortion = (k1, k2, k3, k4) if fisheye else (k1, k2, p2, p1, k3)
    lens = Lens(width, height, f + b1, f, width / 2 + cx, height / 2 + cy, distortion, fisheye)
    radius = corner_radius(lens)
    remarks = check_left_out(path, lens, "b2", abs(b2) * radius)
    shutter = sensor.find("property[@name='rolling_shutter']")
    if shutter is not None and shutter.get("value", "").lower() not in ("", "0", "false", "disabled"):
        remarks.append(f"{path.name} was aligned with a rolling shutter ({whose}), which is not used.")
    if fisheye:
        remarks += check_left_out(path, lens, "p1 and p2 of a fisheye", 3 * (abs(p1) + abs(p2)) * radius**2 * f)
    else:
        remarks += check_left_out(path, lens, "k4", abs(k4) * radius**9 * f)
        higher = 3 * (abs(p1) + abs(p2)) * (abs(p3) + abs(p4) * radius**2) * radius**4 * f
        remarks += check_left_out(path, lens, "p3 and p4", higher)
    return lens, remarks


def _similarity(path: Path, transform: ElementTree.Element | None) -> tuple[float, np.ndarray, np.ndarray]:
    """Return scale, rotation [3, 3] and translation [3] of a chunk or component; 1, I and 0 where it has none."""
    if transform is None:
        return 1.0, np.eye(3), np.zeros(3)
    texts = {element.tag: element.text for element in transform}
    rotation = array(path, "rotation of the chunk", (texts.get("rotation") or "1 0 0 0 1 0 0 0 1").split(), (9,))
    translation = array(path, "translation of the chunk", (texts.get("translation") or "0 0 0").split(), (3,))
    scale = number(path, "the chunk", texts, "scale", 1.0)
    if scale <= 0:
        raise InputError(f"{path} says {scale:g} for the scale of the chunk: export the cameras again.")
    return scale, rotation_of(path, "the chunk", rotation.reshape(3, 3)), translation


def _in_the_world_of(
    path: Path,
    points_path: Path | None,
    photos: list[PosedPhoto],
    similarities: list[tuple[float, np.ndarray, np.ndarray]],
    points: tuple[np.ndarray, np.ndarray] | None,
) -> list[PosedPhoto]:
    """Return the photos in that world of Metashape's in which they see most of the points.

    Raises:
        InputError: They see hardly any in each.
    """
    worlds = []
    for with_scale, with_similarity in ((True, True), (False, True), (True, False)):
        moved = []
        for photo, (scale, rotation, translation) in zip(photos, similarities, strict=True):
            pose = photo.camtoworld.copy()
            if with_similarity:
                pose[:3, :3] = rotation @ pose[:3, :3]
                with np.errstate(over="ignore"):  # `make_model` refuses infinity
                    pose[:3, 3] = rotation @ pose[:3, 3] + translation / scale
                    pose[:3, 3] *= scale if with_scale else 1.0
            moved.append(PosedPhoto(photo.name, pose, photo.lens))
        worlds.append(moved)
    if points is None:
        return worlds[0]
    sample = points[0][:: -(-len(points[0]) // _SAMPLE)]
    shares = [_usual_share(world[:: -(-len(world) // _PHOTOS)], sample) for world in worlds]
    best = int(np.argmax(shares))
    if shares[best] < _LEAST_SEEN:
        raise InputError(
            f"The cameras of {path} see {shares[best]:.0%} of the points of {points_path}, in any of the file's "
            "coordinates: export the points in local coordinates, or take the file away to start from random points."
        )
    return worlds[best]


def _usual_share(photos: list[PosedPhoto], points: np.ndarray) -> float:
    """Return the share of the points [S, 3] that the median photo has in it, without distortion."""
    shares = []
    for photo in photos:
        lens = photo.lens
        local = (points - photo.camtoworld[:3, 3]) @ photo.camtoworld[:3, :3]  # [S, 3]
        ahead = local[local[:, 2] > 0]
        x, y = lens.fx * ahead[:, 0] / ahead[:, 2] + lens.cx, lens.fy * ahead[:, 1] / ahead[:, 2] + lens.cy
        inside = (x >= 0) & (x <= lens.width) & (y >= 0) & (y <= lens.height)
        shares.append(inside.sum() / len(points))
    return float(np.median(shares))
