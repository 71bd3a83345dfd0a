"""Reads a COLMAP reconstruction through pycolmap, and remembers the result in a cache beside it.

File formats: https://colmap.github.io/format.html
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.cache import CacheFile, fingerprint
from datasets.paths import stays_inside
from errors import InputError, reason

if TYPE_CHECKING:
    import pycolmap

CACHE_NAME = "parsed_scene.npz"
CACHE_FORMAT = 1  # raised when the arrays of the cache change
LARGEST_SIDE = 1_000_000  # pixels; a camera that claims more is damaged

# Where each camera model keeps fx, fy, cx, cy and its distortion in COLMAP's parameter vector.
_PARAMETERS = {
    "SIMPLE_PINHOLE": ((0, 0, 1, 2), ()),
    "PINHOLE": ((0, 1, 2, 3), ()),
    "SIMPLE_RADIAL": ((0, 0, 1, 2), (3,)),  # k1
    "RADIAL": ((0, 0, 1, 2), (3, 4)),  # k1, k2
    "OPENCV": ((0, 1, 2, 3), (4, 5, 6, 7)),  # k1, k2, p1, p2
    "OPENCV_FISHEYE": ((0, 1, 2, 3), (4, 5, 6, 7)),  # k1, k2, k3, k4
}


@dataclass(frozen=True)
class SparseModel:
    """A reconstruction as COLMAP wrote it, in its own world and at its own image size.

    image_names: registered images, ordered by name. n images, k cameras, P points.
    """

    image_names: list[str]
    worldtocams: np.ndarray  # [n, 4, 4] float64, OpenCV convention
    camera_indices: np.ndarray  # [n] int64
    camera_models: list[str]  # k names out of _PARAMETERS
    camera_sizes: np.ndarray  # [k, 2] int64, width and height in pixels
    camera_params: np.ndarray  # [k, 8] float64: fx, fy, cx, cy, then the distortion, zero-padded
    points: np.ndarray  # [P, 3] float64
    points_rgb: np.ndarray  # [P, 3] uint8


def find_model_dir(data_dir: Path) -> Path:
    """`sparse/0` or `sparse` of a dataset, whichever holds a model; InputError where neither does."""
    for model_dir in (data_dir / "sparse" / "0", data_dir / "sparse"):
        if any((model_dir / f"cameras.{suffix}").is_file() for suffix in ("bin", "txt")):
            return model_dir
    raise InputError(
        f"{data_dir} holds no COLMAP model: expected cameras, images and points3D (.bin or .txt) in "
        f"{data_dir / 'sparse' / '0'} or {data_dir / 'sparse'}."
    )


def load_sparse_model(data_dir: Path) -> SparseModel:
    """The dataset's reconstruction, from the cache where its files have not changed since.

    Raises InputError where there is no model, or an unreadable or unsupported one.
    """
    model_dir = find_model_dir(data_dir)
    files = _model_files(model_dir)
    cache = CacheFile(model_dir, data_dir, CACHE_NAME)
    key = {
        "format": np.array(CACHE_FORMAT),
        "input_names": np.array([path.name for path in files]),
        "input_stamps": fingerprint(files),
    }
    for arrays in cache.read():
        if all(np.array_equal(arrays.get(name), value) for name, value in key.items()):
            model = _from_arrays(arrays)
            if model is not None:
                _check_names(model_dir, model.image_names)  # the cache may have come with a stranger's dataset
                return model
    model = read_sparse_model(model_dir)
    cache.write(key | _to_arrays(model))
    return model


def open_model(model_dir: Path) -> "pycolmap.Reconstruction":
    """The reconstruction as pycolmap reads it, of files that have been checked first.

    Raises InputError for missing, damaged or unreadable files, and for names that lead out of the dataset.
    """
    files = _model_files(model_dir)
    if files[0].suffix == ".bin":
        for path in files:
            _check_binary(path)
    try:
        import pycolmap  # only here: a machine that holds a valid cache does without it
    except ImportError as error:
        raise InputError(
            f"pycolmap is needed to read {model_dir}, since no valid {CACHE_NAME} was found: "
            "install it with `pip install pycolmap==4.0.4`."
        ) from error
    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value  # the sentence below says it
    try:
        reconstruction = pycolmap.Reconstruction(str(model_dir))
        names = [image.name for image in reconstruction.images.values()]
    except Exception as error:  # a damaged file shows as ValueError, IndexError, UnicodeDecodeError, ...
        raise InputError(
            f"{model_dir} cannot be read as a COLMAP model ({reason(error)}): one of its files is damaged, or its "
            "camera model is unknown; export it again."
        ) from error
    _check_names(model_dir, names)
    return reconstruction


def read_sparse_model(model_dir: Path) -> SparseModel:
    """Parse a reconstruction with pycolmap. Raises InputError for an unreadable or unsupported model."""
    suffix = _model_files(model_dir)[0].suffix
    reconstruction = open_model(model_dir)
    images = sorted((i for i in reconstruction.images.values() if i.has_pose), key=lambda image: image.name)
    if not images:
        raise InputError(f"{model_dir} holds no image with a pose: run COLMAP's mapper to the end.")
    camera_ids = sorted({image.camera_id for image in images})
    cameras = [reconstruction.cameras[camera_id] for camera_id in camera_ids]
    for camera in cameras:
        if camera.model.name not in _PARAMETERS:
            raise InputError(
                f"{model_dir} uses the camera model {camera.model.name}, which is not supported: undistort the "
                f"images with COLMAP, or use one of {', '.join(_PARAMETERS)}."
            )
    points = list(reconstruction.points3D.values())
    bottom_row = np.array([[0.0, 0.0, 0.0, 1.0]])
    model = SparseModel(
        image_names=[image.name for image in images],
        worldtocams=np.stack([np.concatenate([image.cam_from_world().matrix(), bottom_row]) for image in images]),
        camera_indices=np.searchsorted(camera_ids, [image.camera_id for image in images]),
        camera_models=[camera.model.name for camera in cameras],
        camera_sizes=np.array([[min(s, LARGEST_SIDE + 1) for s in (c.width, c.height)] for c in cameras], np.int64),
        camera_params=np.stack([_uniform_params(camera.model.name, camera.params) for camera in cameras]),
        points=np.array([point.xyz for point in points], np.float64).reshape(-1, 3),
        points_rgb=np.array([point.color for point in points], np.uint8).reshape(-1, 3),
    )
    damage = _damage(model)
    if damage:
        part, problem = damage
        raise InputError(f"{model_dir / (part + suffix)} is damaged ({problem}): export the model again.")
    return model


def _damage(model: SparseModel) -> tuple[str, str] | None:
    """The part of a model that no reconstruction can contain, and why; None where there is none."""
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


def _check_names(model_dir: Path, names: list[str]) -> None:
    """InputError unless every name is a relative path that stays in the folder of pictures, and no two are equal."""
    for name in names:
        if not stays_inside(name):
            raise InputError(
                f"{model_dir} names a picture {name[:100]!r}, which is no path inside the folder of pictures: do not "
                "use this model, or write it with relative names."
            )
    if len(set(names)) < len(names):
        raise InputError(f"{model_dir} names a picture twice: export the model again.")


def _model_files(model_dir: Path) -> list[Path]:
    """The files that pycolmap reads, binary before text; InputError where one of the three is missing."""
    suffix = ".bin" if (model_dir / "cameras.bin").is_file() else ".txt"
    required = [model_dir / (name + suffix) for name in ("cameras", "images", "points3D")]
    for path in required:
        if not path.is_file():
            raise InputError(f"{path} is missing from the COLMAP model: export the model again.")
    optional = [model_dir / (name + suffix) for name in ("rigs", "frames")]
    return required + [path for path in optional if path.is_file()]


def _uniform_params(model_name: str, params: np.ndarray) -> np.ndarray:
    intrinsics, distortion = _PARAMETERS[model_name]
    uniform = np.zeros(8)
    uniform[:4] = params[list(intrinsics)]
    uniform[4 : 4 + len(distortion)] = params[list(distortion)]
    return uniform


def _to_arrays(model: SparseModel) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(value) for name, value in vars(model).items()}
    # Names as UTF-8 bytes: NumPy's fixed-width strings would drop trailing NULs and need 4 bytes a letter.
    for name in ("image_names", "camera_models"):
        arrays[name] = np.frombuffer("\n".join(vars(model)[name]).encode(), np.uint8)
    return arrays


def _from_arrays(arrays: dict[str, np.ndarray]) -> SparseModel | None:
    """The model in a cache; None where its arrays do not belong together."""
    try:
        fields = {name: arrays[name] for name in SparseModel.__dataclass_fields__}
        for name in ("image_names", "camera_models"):
            fields[name] = fields[name].tobytes().decode().split("\n")
        n, k, num_points = len(fields["image_names"]), len(fields["camera_models"]), len(fields["points"])
        expected = {
            "worldtocams": ((n, 4, 4), np.float64),
            "camera_indices": ((n,), np.int64),
            "camera_sizes": ((k, 2), np.int64),
            "camera_params": ((k, 8), np.float64),
            "points": ((num_points, 3), np.float64),
            "points_rgb": ((num_points, 3), np.uint8),
        }
        whole = all(fields[name].shape == s and fields[name].dtype == d for name, (s, d) in expected.items())
        whole &= set(fields["camera_models"]) <= set(_PARAMETERS)
        whole &= bool(np.isin(fields["camera_indices"], np.arange(k)).all())
        model = SparseModel(**fields)
        return model if whole and not _damage(model) else None
    except (KeyError, ValueError):  # an array is absent; names are not UTF-8
        return None


# pycolmap does not notice the end of a file: a truncated cameras.bin gives made-up parameters, and a damaged
# points3D.bin or frames.bin asks for all memory or time there is. So the records are walked through first. Each
# function here takes a record's start to its end.


def _camera_end(data: mmap.mmap, start: int) -> int:
    (model_id,) = struct.unpack_from("<i", data, start + 4)  # id u32, model i32, width u64, height u64
    params_by_model_id = (3, 4, 4, 5, 8, 8, 12, 5, 4, 5, 12, 16, 4, 5, 3, 4)
    if model_id not in range(len(params_by_model_id)):
        raise ValueError
    return start + 24 + 8 * params_by_model_id[model_id]


def _image_end(data: mmap.mmap, start: int) -> int:
    name_end = data.find(b"\0", start + 64)  # id u32, quaternion 4 f64, translation 3 f64, camera u32
    (num_points,) = struct.unpack_from("<Q", data, name_end + 1 if name_end > 0 else len(data))
    return name_end + 9 + 24 * num_points  # x f64, y f64, point id u64


def _point_end(data: mmap.mmap, start: int) -> int:
    (track_length,) = struct.unpack_from("<Q", data, start + 43)  # id u64, xyz 3 f64, rgb 3 u8, error f64
    return start + 51 + 8 * track_length  # image u32, index u32


def _rig_end(data: mmap.mmap, start: int) -> int:
    (num_sensors,) = struct.unpack_from("<I", data, start + 4)  # id u32, count u32
    position = start + (16 if num_sensors else 8)  # the reference sensor: type i32, id u32
    for _ in range(1, num_sensors):
        (has_pose,) = struct.unpack_from("<B", data, position + 8)  # type i32, id u32, flag u8, pose 7 f64
        position += 65 if has_pose else 9
    return position


def _frame_end(data: mmap.mmap, start: int) -> int:
    (num_data,) = struct.unpack_from("<I", data, start + 64)  # id u32, rig u32, pose 7 f64
    return start + 68 + 16 * num_data  # sensor type i32, sensor u32, data u64


_RECORD_ENDS = {
    "cameras": _camera_end,
    "images": _image_end,
    "points3D": _point_end,
    "rigs": _rig_end,
    "frames": _frame_end,
}


def _check_binary(path: Path) -> None:
    """InputError unless the file is a u64 count and as many records, to its last byte."""
    record_end = _RECORD_ENDS[path.stem]
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            (count,) = struct.unpack_from("<Q", data)
            position = 8
            for _ in range(count):
                position = record_end(data, position)
            if position == len(data):
                return
    except (struct.error, ValueError, OverflowError):  # beyond the end; an empty file; no such camera model
        pass
    raise InputError(f"{path} is damaged, or from an unknown version of COLMAP: export the model again.")
