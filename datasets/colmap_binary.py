"""Walks through COLMAP's binary files before a library reads them.

pycolmap does not notice the end of a file: a truncated cameras.bin gives made-up parameters, and a damaged
points3D.bin or frames.bin asks for all memory or time there is. So the records are walked through first. Each
function here takes a record's start to its end.
"""

import mmap
import struct
from pathlib import Path

from errors import InputError


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


def check_binary(path: Path) -> int:
    """Walk through the records of a file.

    Returns:
        How many there are.

    Raises:
        InputError: The file is not a u64 count and as many records, to its last byte.
    """
    record_end = _RECORD_ENDS[path.stem]
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            (count,) = struct.unpack_from("<Q", data)
            position = 8
            for _ in range(count):
                position = record_end(data, position)
            if position == len(data):
                return count
    except (struct.error, ValueError, OverflowError):  # beyond the end; an empty file; no such camera model
        pass
    raise InputError(f"{path} is damaged, or from an unknown version of COLMAP: export the model again.")
