"""Reads COLMAP's text format, line by line, as strictly as its readers are lenient.

Programs write images.txt in their own ways: without the empty line that stands for no observations, with blanks in
names, in the encoding of Windows. A reader that goes by the parity of lines or by blanks then loses photos in silence.
So each line here is known by what it holds, and one that is nothing known is named.
"""

import codecs
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from errors import InputError

# How many parameters follow the size of a camera of each model that COLMAP knows.
NUM_PARAMETERS = {
    **{"SIMPLE_PINHOLE": 3, "PINHOLE": 4, "SIMPLE_RADIAL": 4, "RADIAL": 5, "OPENCV": 8, "OPENCV_FISHEYE": 8},
    **{"FULL_OPENCV": 12, "FOV": 5, "SIMPLE_RADIAL_FISHEYE": 4, "RADIAL_FISHEYE": 5, "THIN_PRISM_FISHEYE": 12},
    **{"RAD_TAN_THIN_PRISM_FISHEYE": 16, "SIMPLE_DIVISION": 4, "DIVISION": 5, "SIMPLE_FISHEYE": 3, "FISHEYE": 4},
}
_PROMISE = re.compile(rb"#\s*Number of (\w+):\s*(\d+)")


@dataclass
class TextCamera:
    """One line of cameras.txt."""

    model: str
    width: int  # pixels, as is height
    height: int
    params: np.ndarray  # float64, in COLMAP's order


@dataclass
class TextImage:
    """One image of images.txt."""

    name: str
    camera_id: int
    rotation: np.ndarray  # [4] float64 quaternion w x y z of length 1, world to camera
    translation: np.ndarray  # [3] float64
    observations_at: int | None = None  # byte of images.txt at which their line begins


@dataclass
class TextModel:
    """Hold what stands in the three files."""

    cameras: dict[int, TextCamera]
    images: list[TextImage]
    point_ids: np.ndarray  # [P] int64
    points: np.ndarray  # [P, 3] float64
    points_rgb: np.ndarray  # [P, 3] uint8
    remarks: list[str] = field(default_factory=list)  # sentences for the user, of what looks wrong and was read


def read_text_model(model_dir: Path) -> TextModel:
    """Read cameras.txt, images.txt and points3D.txt of a folder.

    Returns:
        The model. Observations of points in images are checked to be such, and left to `read_observations`.

    Raises:
        InputError: A line is none of its file's, with the number of the line.
    """
    remarks: list[str] = []
    cameras = _read_cameras(model_dir / "cameras.txt", remarks)
    images = _read_images(model_dir / "images.txt", cameras, remarks)
    point_ids, points, points_rgb = _read_points(model_dir / "points3D.txt", remarks)
    return TextModel(cameras, images, point_ids, points, points_rgb, remarks)


def read_observations(model_dir: Path, image: TextImage) -> tuple[np.ndarray, np.ndarray]:
    """Read where an image saw which points.

    Args:
        model_dir: Folder of the model that the image has been read from.
        image: Of that model.

    Returns:
        Places [k, 2] float64 in pixels, and ids [k] int64 of the points there, -1 for none; nothing where the line is
        damaged.
    """
    words: list[bytes] = []
    if image.observations_at is not None:
        with open(model_dir / "images.txt", "rb") as file:
            file.seek(image.observations_at)
            words = file.readline().split()
    try:
        numbers = np.array(words, np.float64).reshape(-1, 3)
    except ValueError:
        numbers = np.zeros((0, 3))
    numbers = numbers[np.isfinite(numbers).all(axis=1) & (np.abs(numbers[:, 2]) < 2**53)]
    return numbers[:, :2], numbers[:, 2].astype(np.int64)


def _read_cameras(path: Path, remarks: list[str]) -> dict[int, TextCamera]:
    cameras: dict[int, TextCamera] = {}
    lines = _Lines(path)
    for number, line in lines:
        words = line.split()
        if not words:
            continue
        try:
            camera_id, model = int(words[0]), words[1].decode()
            width, height, *params = (float(word) for word in words[2:])
            if not model.isidentifier():
                raise ValueError
        except (ValueError, IndexError):
            raise _unreadable(path, number, line, "CAMERA_ID MODEL WIDTH HEIGHT PARAMETERS") from None
        wanted = NUM_PARAMETERS.get(model)
        if wanted is not None and len(params) != wanted:
            raise InputError(
                f"{path}, line {number} gives a camera of the model {model} {len(params)} parameters, which has "
                f"{wanted}: export the model again."
            )
        if not (width == round(_finite(width)) and height == round(_finite(height))):
            raise _unreadable(path, number, line, "a camera whose width and height are whole numbers of pixels")
        if camera_id in cameras:
            raise InputError(f"{path}, line {number} gives the camera {camera_id} again: export the model again.")
        cameras[camera_id] = TextCamera(model, int(width), int(height), np.array(params, np.float64))
    lines.compare_with_promise("cameras", len(cameras), remarks)
    return cameras


def _read_images(path: Path, cameras: dict[int, TextCamera], remarks: list[str]) -> list[TextImage]:
    images: list[TextImage] = []
    ids: set[int] = set()
    after_image = False  # whether a line of observations may follow
    lines = _Lines(path)
    for number, line in lines:
        if not line.strip():
            after_image = False
            continue
        found = _image_of(line)
        if after_image and _is_observations(line) and not (found and _is_surely_image(found[1], cameras)):
            after_image = False
            images[-1].observations_at = lines.at
            continue
        if found is None:
            raise _unreadable(path, number, line, "IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, or its observations")
        image_id, image = found
        if image.camera_id not in cameras:
            raise InputError(
                f"{path}, line {number} names the camera {image.camera_id}, which cameras.txt lacks: export the model "
                "again."
            )
        length = float(np.linalg.norm(image.rotation))
        if not (math.isfinite(length) and length > 1e-6):
            raise InputError(f"{path}, line {number} holds a rotation that is none: export the model again.")
        if image_id in ids:
            raise InputError(f"{path}, line {number} gives the image {image_id} again: export the model again.")
        ids.add(image_id)
        image.rotation /= length
        images.append(image)
        after_image = True
    lines.compare_with_promise("images", len(images), remarks)
    return images


def _image_of(line: bytes) -> tuple[int, TextImage] | None:
    words = line.split(None, 9)
    if len(words) < 10:
        return None
    try:
        numbers = np.array([float(word) for word in words[1:8]], np.float64)
        return int(words[0]), TextImage(_decoded(words[9].strip()), int(words[8]), numbers[:4], numbers[4:])
    except ValueError:
        return None


def _is_surely_image(image: TextImage, cameras: dict[int, TextCamera]) -> bool:
    """Tell whether a line that could be observations too has a known camera and a rotation."""
    return image.camera_id in cameras and abs(float(np.linalg.norm(image.rotation)) - 1) < 0.01


def _is_observations(line: bytes) -> bool:
    """Tell whether a line is made of X Y POINT3D_ID; of a long line the first ones are looked at."""
    words = line.split()
    try:
        for word in words[:30]:
            float(word)
    except ValueError:
        return False
    return len(words) % 3 == 0


def _read_points(path: Path, remarks: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids: list[int] = []
    xyz: list[tuple[float, float, float]] = []
    rgb: list[tuple[int, int, int]] = []
    lines = _Lines(path)
    for number, line in lines:
        words = line.split(None, 8)
        if not words:
            continue
        try:
            point_id, x, y, z, red, green, blue, _ = words[:8]
            ids.append(int(point_id) if point_id.isdigit() and len(point_id) < 18 else -1)
            xyz.append((float(x), float(y), float(z)))
            color = (int(red), int(green), int(blue))
        except ValueError:
            raise _unreadable(path, number, line, "POINT3D_ID X Y Z R G B ERROR TRACK") from None
        if not (min(color) >= 0 and max(color) <= 255):
            raise InputError(f"{path}, line {number} holds a colour that is not from 0 to 255: write it so.")
        rgb.append(color)
    lines.compare_with_promise("points", len(xyz), remarks)
    points, colors = np.array(xyz, np.float64).reshape(-1, 3), np.array(rgb, np.uint8).reshape(-1, 3)
    return np.array(ids, np.int64), points, colors


class _Lines:
    """Iterates over the lines of a file, with their numbers from 1, and keeps what its comments promise."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._promised: int | None = None  # by COLMAP's comment, such as "# Number of images: 49"
        self.at = 0  # byte at which the present line begins

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with open(self._path, "rb") as file:
            after = 0
            for number, line in enumerate(file, 1):
                self.at, after = after, after + len(line)
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise InputError(f"{self._path} is written in UTF-16: save it as UTF-8.")
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.lstrip().startswith(b"#"):
                    promise = _PROMISE.search(line)
                    self._promised = int(promise[2]) if promise else self._promised
                else:
                    yield number, line

    def compare_with_promise(self, what: str, count: int, remarks: list[str]) -> None:
        """Remark where the file holds another number than its first lines say: it may have been cut short."""
        if self._promised is not None and self._promised != count:
            remarks.append(f"{self._path} holds {count:,} {what}, and {self._promised:,} by its own first lines.")


def _decoded(name: bytes) -> str:
    """Decode a name: UTF-8, or what Windows programs write in its place."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("cp1252", errors="replace")


def _finite(number: float) -> float:
    return number if math.isfinite(number) else 0.5  # which is no whole number


def _unreadable(path: Path, number: int, line: bytes, wanted: str) -> InputError:
    words = "".join(c if c.isprintable() else "?" for c in _decoded(line.strip()[:60]))
    return InputError(f"{path}, line {number} ({words!r}) is not {wanted}: export the model again.")
