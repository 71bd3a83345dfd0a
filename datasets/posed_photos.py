"""What the readers of other programs' files share: photos with poses, which become a model as COLMAP's are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datasets.colmap import LARGEST_SIDE, SparseModel, check_names, damage_of
from datasets.image_files import picture_size
from datasets.paths import photo_names
from errors import InputError, read_as

_LARGEST_SKEW = 1e-3  # of a rotation's entries, that is rounding of float32 and not another kind of matrix
_LARGEST_COORDINATE = 1e100  # whose square is a number; in whatever unit, the universe is smaller
_LARGEST_RADIUS = 1e6  # at depth 1, which no camera has
HALF_PIXEL = 0.5  # as far as what is left out may move a point of the picture
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # of a camera's axes: y up, z backwards -> y down, z forwards


@dataclass(frozen=True)
class Lens:
    """Hold the intrinsic parameters of a camera, in pixels that are counted from the picture's corner."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, ...] = ()  # k1 k2 p1 p2 k3, or k1 k2 k3 k4 of a fisheye, as OpenCV defines them
    fisheye: bool = False


@dataclass(frozen=True)
class PosedPhoto:
    """Hold a photo's name in the folder of pictures, its pose and its lens."""

    name: str
    camtoworld: np.ndarray  # [4, 4] float64, OpenCV convention
    lens: Lens


class PhotoFinder:
    """Find photos of a dataset by what other programs call them: with other folders or letters, or without a suffix."""

    def __init__(self, data_dir: Path) -> None:
        """List the photos in `images`."""
        self.folder = data_dir / "images"
        self._names = photo_names(self.folder) if self.folder.is_dir() else set()
        self._by_end: dict[str, list[str]] = {}  # by the file's name, with its suffix and without, in any case
        for name in sorted(self._names):
            file = PurePosixPath(name)
            for end in {file.name.casefold(), file.stem.casefold()}:
                self._by_end.setdefault(end, []).append(name)

    def find(self, path: Path, label: str) -> str:
        """Return the name of the photo that is called `label`; where none is, the name that it should have.

        Args:
            path: The file that calls it so.
            label: A path or a name, with a suffix or without.

        Raises:
            InputError: There are several of that name.
        """
        parts = [part for part in PurePosixPath(label.replace("\\", "/")).parts if part != "/"]
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if name in self._names:
                return name
        end = parts[-1] if parts else label
        file = PurePosixPath(end.casefold())
        found = self._by_end.get(file.name, [])
        if not found and not file.suffix[1:].isdecimal():  # frame.0001 is no other photo of the name "frame"
            found = self._by_end.get(file.stem, [])
        if len(found) > 1:
            found = [name for name in found if end in (PurePosixPath(name).name, PurePosixPath(name).stem)] or found
        if len(found) > 1:
            raise InputError(
                f"{path} names a photo {label!r}, which may be {found[0]} or {found[1]} in {self.folder}: give the "
                "photos different names, and export again."
            )
        return found[0] if found else end

    def size_of(self, path: Path, whose: str, name: str) -> tuple[int, int]:
        """Return the width and height of a photo, which the file that names it does not say.

        Args:
            path: The file.
            whose: What it calls the photo.
            name: As `find` has returned it.

        Raises:
            InputError: It is not there, or no picture.
        """
        if name not in self._names:
            raise InputError(f"{path} names {whose}, which is not in {self.folder}: put it there.")
        return picture_size(self.folder / name)


def make_model(
    path: Path,
    photos: list[PosedPhoto],
    points: tuple[np.ndarray, np.ndarray] | None,
    remarks: list[str],
    masks: dict[str, str] | None = None,
) -> SparseModel:
    """Make a model of photos and points that another program's file holds.

    Args:
        path: The file, for sentences.
        photos: In any order.
        points: [P, 3] float64 and their colours [P, 3] uint8; None where there are none, and random ones are taken.
        remarks: Sentences for the user.
        masks: By name of the photo, the path of its mask in the folder of masks.

    Raises:
        InputError: There is no photo, or a pose or a lens that is none.
    """
    if not photos:
        raise InputError(
            f"{path} holds no photo with a pose: align the photos in the program that wrote it, and export again."
        )
    check_names(path, [photo.name for photo in photos])
    photos = sorted(photos, key=lambda photo: photo.name)
    camtoworlds = np.stack([photo.camtoworld for photo in photos])  # [n, 4, 4]
    for photo in photos:
        if not np.abs(photo.camtoworld).max() < _LARGEST_COORDINATE:  # or NaN
            raise InputError(f"{path} says that {photo.name} was taken infinitely far away: export it again.")
    lenses = list(dict.fromkeys(photo.lens for photo in photos))
    order = {lens: index for index, lens in enumerate(lenses)}
    params = np.zeros((len(lenses), 9))
    for row, lens in zip(params, lenses, strict=True):
        row[:4] = lens.fx, lens.fy, lens.cx, lens.cy
        row[4 : 4 + len(lens.distortion)] = lens.distortion
    if points is None:
        points = random_points(photos)
        remarks = [
            *remarks,
            f"{path.name} comes without points: training starts from {len(points[0]):,} random ones in the cameras' "
            "view, which takes longer and ends lower than points of the surface; put a points.ply beside it and give "
            "--init_ply if the program can export them.",
        ]
    worldtocams = camtoworlds.copy()
    worldtocams[:, :3, :3] = camtoworlds[:, :3, :3].transpose(0, 2, 1)
    worldtocams[:, :3, 3] = -(worldtocams[:, :3, :3] @ camtoworlds[:, :3, 3:])[..., 0]
    model = SparseModel(
        image_names=[photo.name for photo in photos],
        worldtocams=worldtocams,
        camera_indices=np.array([order[photo.lens] for photo in photos], np.int64),
        camera_models=["OPENCV_FISHEYE" if lens.fisheye else "OPENCV" for lens in lenses],
        camera_sizes=np.array([(lens.width, lens.height) for lens in lenses], np.int64),
        camera_params=params,
        points=points[0],
        points_rgb=points[1],
        remarks=remarks,
        masks=masks or {},
    )
    damage = damage_of(model)
    if damage:
        raise InputError(f"{path} is damaged ({damage[1]}): export it again.")
    return model


def rotation_of(path: Path, whose: str, matrix: np.ndarray) -> np.ndarray:
    """Return the rotation [3, 3] that a matrix of it is but for rounding. Raises InputError where it is none."""
    if np.isfinite(matrix).all():
        u, _, v = np.linalg.svd(matrix)
        if np.abs(u @ v - matrix).max() < _LARGEST_SKEW and np.linalg.det(matrix) > 0:
            return u @ v
    raise InputError(f"The pose of {whose} in {path} is no rotation and translation: export it again.")


def similarity_of(path: Path, whose: str, matrix: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Split a matrix [4, 4] into scale, rotation [3, 3] and translation [3]. Raises InputError where it has others."""
    determinant = float(np.linalg.det(matrix[:3, :3])) if np.isfinite(matrix).all() else 0.0
    if determinant <= 0:
        raise InputError(f"{whose} in {path} is no rotation, translation and scale: export it again.")
    scale = float(np.cbrt(determinant))
    return scale, rotation_of(path, whose, matrix[:3, :3] / scale), matrix[:3, 3]


def check_left_out(path: Path, lens: Lens, what: str, shift: float) -> list[str]:
    """Return a remark on a parameter that cannot be kept. Raises InputError where it moves more than half a pixel.

    Args:
        path: The file.
        lens: Whose parameter it is.
        what: Its name.
        shift: How far it moves the corner of the picture, in pixels.
    """
    if shift > HALF_PIXEL:
        raise InputError(
            f"{path} has cameras of {lens.width}x{lens.height} with {what}, which moves their corners by {shift:.2g} "
            "pixels and is not supported: calibrate without it, or export undistorted photos."
        )
    return [f"{what} in {path.name} is left out; it moves no pixel by more than {shift:.2g}."] if shift else []


def corner_radius(lens: Lens) -> float:
    """Return how far the farthest corner of the picture is from the optical axis, at depth 1, without distortion.

    It is bounded, so that its powers are numbers whatever a damaged file says of the focal length.
    """
    x = max(lens.cx, lens.width - lens.cx) / lens.fx
    y = max(lens.cy, lens.height - lens.cy) / lens.fy
    return min(math.hypot(x, y), _LARGEST_RADIUS)


def only_points_file(path: Path) -> Path | None:
    """Return the PLY file beside another program's file: of its own name, else the only one; None where none is.

    Raises:
        InputError: There are several, and none of its name.
    """
    files = sorted(file for file in path.parent.iterdir() if file.suffix.lower() == ".ply" and file.is_file())
    files = [file for file in files if file.stem == path.stem] or files
    if len(files) > 1:
        raise InputError(
            f"{files[0].name} and {files[1].name} lie beside {path}, which does not say where its points are: leave "
            f"one there, or name it {path.stem}.ply."
        )
    return files[0] if files else None


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError where it is none."""
    with read_as(path, "JSON", "export it again", (ValueError, RecursionError, OSError)):
        return json.loads(path.read_bytes())


def table(path: Path, whose: str, value: Any) -> Mapping[str, Any]:
    """Return a JSON object. Raises InputError where the value is none."""
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no {whose}: export it again, with the program's own exporter.")
    return value


def number(path: Path, whose: str, values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a number out of a table. Raises InputError where it lacks it, or it is no finite number."""
    value = values.get(key, default)
    if value is None:
        raise InputError(f"{path} lacks {key} of {whose}: export it again, with camera parameters.")
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise InputError(f"{path} says {str(value)[:40]!r} for {key} of {whose}, which is no number: export it again.")
    return result


def array(path: Path, whose: str, value: Any, *shapes: tuple[int, ...]) -> np.ndarray:
    """Return numbers as float64 of one of the shapes. Raises InputError where they are not."""
    try:
        result = np.array(value, np.float64)
    except (TypeError, ValueError):
        result = np.empty(0)
    if result.shape not in shapes or not np.isfinite(result).all():
        wanted = " or ".join("x".join(map(str, shape)) for shape in shapes)
        raise InputError(f"{path} has no {whose} of {wanted} finite numbers: export it again.")
    return result


def side(path: Path, whose: str, values: Mapping[str, Any], key: str) -> int:
    """Return a width or height in pixels. Raises InputError where there is none."""
    value = number(path, whose, values, key)
    if not 1 <= value <= LARGEST_SIDE:
        raise InputError(f"{path} says {value:g} for {key} of {whose}, which is no size of a picture: export it again.")
    return round(value)


def random_points(photos: list[PosedPhoto], count: int = 50_000) -> tuple[np.ndarray, np.ndarray]:
    """Draw points in the cameras' view, always the same ones, where a file comes without points.

    They lie around the depth at which the optical axes pass each other: under random pixels of random photos, from a
    quarter of that depth to three times it.

    Returns:
        [count, 3] float64 and gray colours [count, 3] uint8.
    """
    rng = np.random.default_rng(0)
    poses = np.stack([photo.camtoworld for photo in photos])
    origins, axes = poses[:, :3, 3], poses[:, :3, 2]
    # The point nearest to all axes: the sum of (I - a a^T) (x - o) is zero. Parallel axes leave it undetermined.
    across = np.eye(3) - axes[:, :, None] * axes[:, None]  # [n, 3, 3]
    centre = np.linalg.lstsq(across.sum(axis=0), (across @ origins[..., None]).sum(axis=0)[:, 0], rcond=1e-3)[0]
    extent = float(np.linalg.norm(origins - origins.mean(axis=0), axis=1).max()) or 1.0
    depth = np.median(((centre - origins) * axes).sum(axis=1))
    depth = depth if depth > 0.1 * extent else extent
    owners = rng.integers(len(photos), size=count)
    pixels, depths = rng.random((count, 2)), depth * np.exp(rng.uniform(np.log(0.25), np.log(3.0), count))
    lenses = [photo.lens for photo in photos]
    sizes = np.array([(lens.width, lens.height) for lens in lenses], np.float64)[owners]
    centres = np.array([(lens.cx, lens.cy) for lens in lenses])[owners]
    focals = np.array([(lens.fx, lens.fy) for lens in lenses])[owners]
    rays = np.c_[(pixels * sizes - centres) / focals, np.ones(count)]  # [count, 3] at depth 1
    points = origins[owners] + (poses[owners, :3, :3] @ (rays * depths[:, None])[..., None])[..., 0]
    return points, np.full((count, 3), 128, np.uint8)
