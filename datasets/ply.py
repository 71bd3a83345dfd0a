"""Reads the initial points of a scene from a PLY file."""

from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from plyfile import PlyData

from errors import InputError, read_as

# A header is a few lines; a file that is none is not searched for a line's end to its own end.
_LONGEST_LINE = 4096
_LONGEST_HEADER = 1 << 20

_LARGEST_SHARE = 2.0  # of the full value, which some colours that were computed are a little above

_BELOW = 0.1  # of the largest: colours that were computed are a little below 0

_SCALARS = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}


def read_points(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read points and colours of the `vertex` element of an ASCII or binary PLY file.

    Colours may be integers or floats of any size: those up to 255 are 8-bit ones, up to 4095 12-bit ones, those beyond
    are 16-bit ones, and floats up to 1 are shares.

    Returns:
        points [P, 3] float64 and colours [P, 3] uint8.

    Raises:
        InputError: the file is absent or damaged, has no points, no colours, a point or
            colour that is not finite, or colours below 0.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: put the initial points there, or train without --init_ply.")
    with read_as(path, "a PLY file with a vertex element"):
        check_counts(path)
        vertices = _read_ascii(path)
        if vertices is None:
            vertices = PlyData.read(str(path))["vertex"].data
        names = vertices.dtype.names or ()
        lists = [name for name in (*"xyz", "red", "green", "blue") if name in names and vertices[name].dtype == object]
        if lists:
            raise ValueError(f"{lists[0]} is a list")
    for wanted in (("x", "y", "z"), ("red", "green", "blue")):
        missing = [name for name in wanted if name not in (vertices.dtype.names or ())]
        if missing:
            raise InputError(f"{path} lacks the vertex properties {', '.join(missing)}: write them as well.")
    if len(vertices) == 0:
        raise InputError(f"{path} holds no points: write some, or train without --init_ply.")
    points = np.stack([vertices[name] for name in "xyz"], axis=1).astype(np.float64)
    not_finite = int((~np.isfinite(points).all(axis=1)).sum())
    if not_finite:
        raise InputError(f"{path} holds {not_finite} points that are not finite: remove them.")
    colors = np.stack([vertices[name] for name in ("red", "green", "blue")], axis=1)
    if not np.isfinite(colors).all():
        raise InputError(f"{path} holds colours that are not finite: remove their points.")
    if colors.min() < -_BELOW * max(1.0, float(colors.max())):
        raise InputError(f"{path} holds colours below 0, down to {colors.min():g}: write them as 0 to 255.")
    return points, _to_uint8(colors)


def _read_header(file: BinaryIO) -> list[list[str]]:
    """Return the words of each line to end_header, where the file then stands."""
    header: list[list[str]] = []
    while not header or header[-1] != ["end_header"]:
        line = file.readline(_LONGEST_LINE)
        if not line.endswith(b"\n") or file.tell() > _LONGEST_HEADER:
            raise ValueError("no end_header")
        header.append(line.decode("latin-1").split())
        if header[0] != ["ply"]:
            raise ValueError("no PLY file")
    return header


def check_counts(path: Path) -> None:
    """Raise ValueError where the header promises more than the file can hold, before memory is set aside for it."""
    with open(path, "rb") as file:
        header = _read_header(file)
        remaining = path.stat().st_size - file.tell()
    is_ascii = ["format", "ascii", "1.0"] in header
    promised = count = 0  # bytes, of the elements so far; rows of the present one
    for before, words in pairwise(header):
        if before[:1] == ["element"] and count and words[:1] != ["property"]:
            raise ValueError(f"{count} rows without a property")
        if words[:1] == ["element"]:
            count = int(words[2])
            if count < 0:
                raise ValueError(f"{count} rows")
        elif words[:1] == ["property"]:  # a value is a digit and a separator, a list at least its length
            kind = words[2] if words[1] == "list" else words[1]
            promised += count * (2 if is_ascii else np.dtype(_SCALARS[kind]).itemsize)
    if promised > remaining + 1:  # the last line may lack its end
        raise ValueError(f"its header promises {promised} bytes or more, {remaining} follow")


def _read_ascii(path: Path) -> np.ndarray | None:
    """Read the vertices of an ASCII file that begins with them, as a structured array; None for any other file.

    plyfile reads these too, at 7 seconds for a million points.
    """
    with open(path, "rb") as file:
        header = _read_header(file)
        starts = [index for index, words in enumerate(header) if words[:1] == ["element"]]
        if ["format", "ascii", "1.0"] not in header or not starts or header[starts[0]][1] != "vertex":
            return None
        own_lines = header[starts[0] + 1 : starts[1] if len(starts) > 1 else None]
        properties = [words[1:] for words in own_lines if words[:1] == ["property"]]
        if any(kind == "list" for kind, *_ in properties):
            return None
        count = int(header[starts[0]][2])
        dtype = np.dtype([(name, _SCALARS[kind]) for kind, name in properties])
        vertices = np.loadtxt(file, dtype, comments=None, max_rows=count, ndmin=1) if count else np.empty(0, dtype)
    if len(vertices) < count:
        raise ValueError(f"{len(vertices)} of {count} vertices")
    return vertices


def _to_uint8(colors: np.ndarray) -> np.ndarray:
    """Convert colours of any type to 0..255.

    What they range to is told by their largest value, since programs write 8-bit colours into all types: 1 (only of
    floats), 255, 4095, or 65535.
    """
    if colors.dtype == np.uint8:
        return colors
    values = colors.astype(np.float64)
    largest = values.max(initial=0.0)
    if np.issubdtype(colors.dtype, np.floating) and largest <= _LARGEST_SHARE:
        values = values * 255
    elif largest > _LARGEST_SHARE * 255:
        values = values // (16 if largest < 4096 else 256)  # the upper byte of 12 bits, or of 16
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
