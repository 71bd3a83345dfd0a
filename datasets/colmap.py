"""Reads a COLMAP reconstruction, text by itself and binary through pycolmap, and remembers the result beside it.

File formats: https://colmap.github.io/format.html
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.cache import CacheFile, fingerprint
from datasets.colmap_binary import check_binary
from datasets.colmap_text import read_observations, read_text_model
from datasets.observations import Observations, all_of, misplaced_points
from datasets.paths import stays_inside
from errors import InputError, reason

if TYPE_CHECKING:
    import pycolmap

CACHE_NAME = "parsed_scene.npz"
CACHE_FORMAT = 5  # raised when the arrays of the cache change, or what a model is checked for
LARGEST_SIDE = 1_000_000  # pixels; a camera that claims more is damaged
PARTS = ("cameras", "images", "points3D")  # the files of a model; newer ones have rigs and frames as well

# Where each camera model keeps fx, fy, cx, cy and its distortion in COLMAP's parameter vector.
_PARAMETERS = {
    "SIMPLE_PINHOLE": ((0, 0, 1, 2), ()),
    "PINHOLE": ((0, 1, 2, 3), ()),
    "SIMPLE_RADIAL": ((0, 0, 1, 2), (3,)),  # k1
    "RADIAL": ((0, 0, 1, 2), (3, 4)),  # k1, k2
    "OPENCV": ((0, 1, 2, 3), (4, 5, 6, 7)),  # k1, k2, p1, p2
    "OPENCV_FISHEYE": ((0, 1, 2, 3), (4, 5, 6, 7)),  # k1, k2, k3, k4
}


_TEXTS = ("image_names", "camera_models", "remarks")  # of the fields below
_NOT_CACHED = ("masks", "distances")  # which COLMAP's models do not name


@dataclass(frozen=True)
class DistanceMap:
    """Hold a file with the depth of each pixel of a photo, along the camera's axis; 0 where it is not known."""

    path: Path
    unit: float  # of its values, in the model's world


@dataclass(frozen=True)
class SparseModel:
    """Hold a reconstruction as COLMAP or another program wrote it, in its own world and at its own image size.

    image_names: registered images, ordered by name. n images, k cameras, P points. Pixels are counted from the
    picture's corner, so that the first one's centre is at 0.5, 0.5.
    """

    image_names: list[str]
    worldtocams: np.ndarray  # [n, 4, 4] float64, OpenCV convention
    camera_indices: np.ndarray  # [n] int64
    camera_models: list[str]  # k names out of _PARAMETERS
    camera_sizes: np.ndarray  # [k, 2] int64, width and height in pixels
    # [k, 9] float64: fx, fy, cx, cy in pixels; then k1, k2, p1, p2, k3, or k1, k2, k3, k4 of a fisheye, zero-padded
    camera_params: np.ndarray
    points: np.ndarray  # [P, 3] float64
    points_rgb: np.ndarray  # [P, 3] uint8
    remarks: list[str] = field(default_factory=list)  # sentences for the user, of what looks wrong and was read
    masks: dict[str, str] = field(default_factory=dict)  # by image name, paths in the folder of masks; empty: by name
    distances: dict[str, DistanceMap] = field(default_factory=dict)  # by image name


def has_model(folder: Path) -> bool:
    """Tell whether a folder holds a COLMAP model, or a part of one."""
    return any((folder / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt"))


def model_suffixes(model_dir: Path) -> list[str]:
    """Return the formats in which a folder holds a whole model, ".bin" and ".txt", the one to be read first.

    That is the newer one: whoever edits a model as text leaves the binary files behind it, and whoever refines the
    binary files leaves the text.

    Raises:
        InputError: There is no whole model.
    """
    stamps: dict[str, int] = {}
    for suffix in (".bin", ".txt"):
        paths = [model_dir / (part + suffix) for part in PARTS]
        if all(path.is_file() for path in paths):
            stamps[suffix] = max(path.stat().st_mtime_ns for path in paths)
    if not stamps:
        suffix = ".bin" if (model_dir / "cameras.bin").is_file() else ".txt"
        missing = next(part for part in PARTS if not (model_dir / (part + suffix)).is_file())
        raise InputError(f"{model_dir / (missing + suffix)} is missing from the COLMAP model: export the model again.")
    return sorted(stamps, key=lambda suffix: -stamps[suffix])  # stable: binary where both are of one time


def load_model(model_dir: Path, data_dir: Path) -> SparseModel:
    """Load a reconstruction, from the cache where its files have not changed since.

    Args:
        model_dir: Folder of the model.
        data_dir: The dataset it belongs to.

    Raises:
        InputError: There is no model, or an unreadable or unsupported one.
    """
    files = _model_files(model_dir)
    cache = CacheFile(model_dir, data_dir, CACHE_NAME)
    key = {
        "format": np.array(CACHE_FORMAT),
        "input_names": np.array([path.name for path in files]),
        "input_stamps": fingerprint(files),
    }
    for arrays in cache.read():
        if all(np.array_equal(arrays.get(name, ()), value) for name, value in key.items()):
            model = _from_arrays(arrays)
            if model is not None:
                check_names(model_dir, model.image_names)  # the cache may have come with a stranger's dataset
                return model
    model = read_sparse_model(model_dir)
    cache.write(key | _to_arrays(model))
    return model


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Let what is done about SIGTERM be as it was; pycolmap, when it is imported, has its stack printed."""
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
        if handler is not None and current_thread() is main_thread():
            signal.signal(signal.SIGTERM, handler)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def open_model(model_dir: Path) -> pycolmap.Reconstruction:
    """Open a reconstruction as pycolmap reads it, of files that have been checked first, and check what comes back.

    Raises:
        InputError: Files are missing, damaged or unreadable, pycolmap reads other images out of them than they hold,
            or a name leads out of the dataset.
    """
    files = _model_files(model_dir)
    is_binary = files[0].suffix == ".bin"
    expected = {path.stem: check_binary(path) for path in files} if is_binary else {}
    try:
        with _keeping_sigterm():
            import pycolmap  # only here: a machine that holds a valid cache does without it
    except ImportError as error:
        raise InputError(
            f"pycolmap is needed to read {model_dir}, since no valid {CACHE_NAME} was found: "
            "install it with `pip install pycolmap==4.0.4`."
        ) from error
    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value  # the sentence below says it
    try:
        reconstruction = pycolmap.Reconstruction()
        (reconstruction.read_binary if is_binary else reconstruction.read_text)(str(model_dir))
        names = [image.name for image in reconstruction.images.values()]
    except Exception as error:  # a damaged file shows as ValueError, IndexError, UnicodeDecodeError, ...
        raise InputError(
            f"{model_dir} cannot be read as a COLMAP model ({reason(error)}): one of its files is damaged, or its "
            "camera model is unknown; export it again."
        ) from error
    check_names(model_dir, names)
    read = {
        "cameras": len(reconstruction.cameras),
        "images": len(reconstruction.images),
        "points3D": len(reconstruction.points3D),
    }
    for part, count in read.items():
        if is_binary and count != expected[part]:
            raise InputError(
                f"{model_dir / part}.bin holds {expected[part]} records, of which pycolmap reads {count}: "
                "export the model again."
            )
    if not is_binary and sorted(names) != sorted(image.name for image in read_text_model(model_dir).images):
        raise InputError(
            f"{model_dir / 'images.txt'} is written in a way that pycolmap does not read whole (names with blanks, or "
            "no lines for observations): write the model as .bin files."
        )
    return reconstruction


def read_sparse_model(model_dir: Path) -> SparseModel:
    """Read a reconstruction. Raises InputError for an unreadable or unsupported model."""
    suffix = _model_files(model_dir)[0].suffix
    model, observed_by = _read(model_dir)
    damage = damage_of(model)
    if damage:
        part, problem = damage
        raise InputError(f"{model_dir / (part + suffix)} is damaged ({problem}): export the model again.")
    return replace(model, remarks=model.remarks + misplaced_points(model_dir, model, observed_by))


def read_tracks(model_dir: Path) -> dict[str, np.ndarray]:
    """Read which points each photo of a reconstruction saw: by name, [k, 3] float64 in the model's world.

    Raises:
        InputError: The model is unreadable or unsupported.
    """
    model, observed_by = _read(model_dir)
    return {name: observed_by(index, all_of)[1] for index, name in enumerate(model.image_names)}


def _read(model_dir: Path) -> tuple[SparseModel, Observations]:
    suffix = _model_files(model_dir)[0].suffix
    return _read_binary(model_dir) if suffix == ".bin" else _read_text(model_dir)


def _read_binary(model_dir: Path) -> tuple[SparseModel, Observations]:
    reconstruction = open_model(model_dir)
    images = sorted((i for i in reconstruction.images.values() if i.has_pose), key=lambda image: image.name)
    if not images:
        raise InputError(f"{model_dir} holds no image with a pose: run COLMAP's mapper to the end.")
    camera_ids = sorted({image.camera_id for image in images})
    cameras = [reconstruction.cameras[camera_id] for camera_id in camera_ids]
    _check_supported(model_dir, [camera.model.name for camera in cameras])
    points = list(reconstruction.points3D.values())
    bottom_row = np.array([[0.0, 0.0, 0.0, 1.0]])

    def observed_by(index: int, choose: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        seen = [p for p in images[index].points2D if p.has_point3D() and p.point3D_id in reconstruction.points3D]
        chosen = [seen[k] for k in choose(np.arange(len(seen)))]
        xyz = [reconstruction.points3D[point.point3D_id].xyz for point in chosen]
        return np.array([point.xy for point in chosen]).reshape(-1, 2), np.array(xyz).reshape(-1, 3)

    model = SparseModel(
        image_names=[image.name for image in images],
        worldtocams=np.stack([np.concatenate([image.cam_from_world().matrix(), bottom_row]) for image in images]),
        camera_indices=np.searchsorted(camera_ids, [image.camera_id for image in images]),
        camera_models=[camera.model.name for camera in cameras],
        camera_sizes=np.array([_bounded(camera.width, camera.height) for camera in cameras], np.int64),
        camera_params=np.stack([_uniform_params(camera.model.name, camera.params) for camera in cameras]),
        points=np.array([point.xyz for point in points], np.float64).reshape(-1, 3),
        points_rgb=np.array([point.color for point in points], np.uint8).reshape(-1, 3),
    )
    return model, observed_by


def _read_text(model_dir: Path) -> tuple[SparseModel, Observations]:
    text = read_text_model(model_dir)
    images = sorted(text.images, key=lambda image: image.name)
    if not images:
        raise InputError(f"{model_dir / 'images.txt'} holds no image: run COLMAP's mapper to the end.")
    check_names(model_dir, [image.name for image in images])
    camera_ids = sorted({image.camera_id for image in images})
    cameras = [text.cameras[camera_id] for camera_id in camera_ids]
    _check_supported(model_dir, [camera.model for camera in cameras])
    worldtocams = np.tile(np.eye(4), (len(images), 1, 1))
    worldtocams[:, :3, :3] = _rotations(np.stack([image.rotation for image in images]))
    worldtocams[:, :3, 3] = np.stack([image.translation for image in images])
    order = np.argsort(text.point_ids)

    def observed_by(index: int, choose: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        pixels, ids = read_observations(model_dir, images[index])
        if not len(order):
            return pixels[:0], text.points
        rows = order[np.minimum(np.searchsorted(text.point_ids, ids, sorter=order), len(order) - 1)]
        chosen = choose(np.flatnonzero((text.point_ids[rows] == ids) & (ids >= 0)))
        return pixels[chosen], text.points[rows[chosen]]

    model = SparseModel(
        image_names=[image.name for image in images],
        worldtocams=worldtocams,
        camera_indices=np.searchsorted(camera_ids, [image.camera_id for image in images]),
        camera_models=[camera.model for camera in cameras],
        camera_sizes=np.array([_bounded(camera.width, camera.height) for camera in cameras], np.int64),
        camera_params=np.stack([_uniform_params(camera.model, camera.params) for camera in cameras]),
        points=text.points,
        points_rgb=text.points_rgb,
        remarks=text.remarks,
    )
    return model, observed_by


def _check_supported(model_dir: Path, camera_models: list[str]) -> None:
    for name in camera_models:
        if name not in _PARAMETERS:
            raise InputError(
                f"{model_dir} uses the camera model {name[:40]}, which is not supported: undistort the images with "
                f"COLMAP, or use one of {', '.join(_PARAMETERS)}."
            )


def _bounded(*size: int) -> list[int]:
    """Return a width and a height that an int64 holds; `damage_of` refuses what is beyond the largest side."""
    return [max(-1, min(side, LARGEST_SIDE + 1)) for side in size]


def _rotations(quaternions: np.ndarray) -> np.ndarray:
    """Turn [n, 4] quaternions w x y z of length 1 into rotation matrices  # [n, 3, 3]."""
    w, x, y, z = quaternions.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def damage_of(model: SparseModel) -> tuple[str, str] | None:
    """Find the part of a model that no reconstruction can contain, and why; None where there is none."""
    sizes, focal_lengths = model.camera_sizes, model.camera_params[:, :2]
    if not ((sizes > 0).all() and (sizes <= LARGEST_SIDE).all() and (focal_lengths > 0).all()):
        return "cameras", "a camera has no usable size or focal length"
    if not np.isfinite(model.camera_params).all():
        return "cameras", "a parameter is not finite"
    rotations = model.worldtocams[:, :3, :3]
    if not np.isfinite(model.worldtocams).all() or np.abs(np.linalg.det(rotations) - 1).max() > 1e-6:
        return "images", "a pose is not a rotation and a finite translation"
    if not np.isfinite(model.points).all():
        return "points3D", "a point is not finite"
    return None


def check_names(model_dir: Path, names: list[str]) -> None:
    """Raise InputError unless every name is a path that stays in the folder of pictures, and no two are equal."""
    for name in names:
        if not stays_inside(name):
            raise InputError(
                f"{model_dir} names a picture {name[:100]!r}, which is no path inside the folder of pictures: do not "
                "use this model, or write it with relative names."
            )
    if len(set(names)) < len(names):
        raise InputError(f"{model_dir} names a picture twice: export the model again.")


def _model_files(model_dir: Path) -> list[Path]:
    """Return the files that are read. Raises InputError where the model is not whole."""
    suffix = model_suffixes(model_dir)[0]
    names = PARTS if suffix == ".txt" else (*PARTS, "rigs", "frames")  # images.txt holds all poses
    return [path for path in (model_dir / (name + suffix) for name in names) if path.is_file()]


def _uniform_params(model_name: str, params: np.ndarray) -> np.ndarray:
    intrinsics, distortion = _PARAMETERS[model_name]
    uniform = np.zeros(9)
    uniform[:4] = params[list(intrinsics)]
    uniform[4 : 4 + len(distortion)] = params[list(distortion)]
    return uniform


def _to_arrays(model: SparseModel) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(value) for name, value in vars(model).items() if name not in _NOT_CACHED}
    # Names as UTF-8 bytes: NumPy's fixed-width strings would drop trailing NULs and need 4 bytes a letter.
    for name in _TEXTS:
        arrays[name] = np.frombuffer("\n".join(vars(model)[name]).encode(), np.uint8)
    return arrays


def _from_arrays(arrays: dict[str, np.ndarray]) -> SparseModel | None:
    """Return the model in a cache; None where its arrays do not belong together."""
    try:
        fields: dict[str, Any] = {
            name: arrays[name] for name in SparseModel.__dataclass_fields__ if name not in _NOT_CACHED
        }
        for name in _TEXTS:
            fields[name] = [text for text in fields[name].tobytes().decode().split("\n") if text]
        n, k, num_points = len(fields["image_names"]), len(fields["camera_models"]), len(fields["points"])
        expected = {
            "worldtocams": ((n, 4, 4), np.float64),
            "camera_indices": ((n,), np.int64),
            "camera_sizes": ((k, 2), np.int64),
            "camera_params": ((k, 9), np.float64),
            "points": ((num_points, 3), np.float64),
            "points_rgb": ((num_points, 3), np.uint8),
        }
        whole = all(fields[name].shape == s and fields[name].dtype == d for name, (s, d) in expected.items())
        whole &= set(fields["camera_models"]) <= set(_PARAMETERS)
        whole &= bool(np.isin(fields["camera_indices"], np.arange(k)).all())
        model = SparseModel(**fields)
        return model if whole and not damage_of(model) else None
    except (KeyError, ValueError):  # an array is absent; names are not UTF-8
        return None
