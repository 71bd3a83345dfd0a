import struct

import numpy as np
import pytest

from datasets.ply import read_points
from errors import InputError

POINTS = [(1.5, -2.25, 3.0), (400000.125, 5.0, -6.5)]
COLORS = [(255, 0, 7), (1, 128, 254)]


def header(kind: str, xyz: str, rgb: str, count: int = 2) -> str:
    properties = [f"property {xyz} {n}" for n in "xyz"] + [f"property {rgb} {n}" for n in ("red", "green", "blue")]
    return "\n".join(["ply", f"format {kind} 1.0", f"element vertex {count}", *properties, "end_header", ""])


def ascii_ply(xyz: str = "float", rgb: str = "uchar", colors=COLORS) -> bytes:
    rows = [" ".join(map(str, (*p, *c))) for p, c in zip(POINTS, colors, strict=True)]
    return (header("ascii", xyz, rgb) + "\n".join(rows) + "\n").encode()


def binary_ply(order: str) -> bytes:
    rows = [struct.pack(f"{order}3d3B", *p, *c) for p, c in zip(POINTS, COLORS, strict=True)]
    kind = "binary_little_endian" if order == "<" else "binary_big_endian"
    return header(kind, "double", "uchar").encode() + b"".join(rows)


@pytest.mark.parametrize(
    "content",
    [
        ascii_ply(),
        ascii_ply("double", "float", [[c / 255 for c in color] for color in COLORS]),
        ascii_ply("double", "float", COLORS),
        ascii_ply("float", "int"),
        ascii_ply("float", "ushort", [[c * 256 + 99 for c in color] for color in COLORS]),
        ascii_ply("float", "ushort", [[c * 16 + 9 for c in color] for color in COLORS]),  # 12 bits
        binary_ply("<"),
        binary_ply(">"),
        # A comment, other properties, and another element after and before the vertices.
        ascii_ply()
        .replace(b"element", b"comment element vertex\nelement")
        .replace(b"end_header", b"element face 1\nproperty list uchar int i\nend_header")
        + b"3 0 1 0\n",
        ascii_ply().replace(b"element", b"element extra 1\nproperty float f\nelement").replace(b"1.5 ", b"9\n1.5 ", 1),
    ],
)
def test_points_and_colors(tmp_path, content):
    path = tmp_path / "points.ply"
    path.write_bytes(content)
    points, colors = read_points(path)
    assert points.dtype == np.float64
    np.testing.assert_array_equal(points, POINTS)
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(colors, COLORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (ascii_ply("float", "float", [[0.5, float("nan"), 0.2], [1, 1, 1]]), "colours that are not finite"),
        (ascii_ply("float", "short", [[c - 128 for c in color] for color in COLORS]), "colours below 0, down to -128"),
        (b"hello", "cannot be read"),
        (b"\x00\xff" * 50, "cannot be read"),
        (binary_ply("<")[:-5], "cannot be read"),
        (ascii_ply()[:-30], "cannot be read"),
        (ascii_ply()[:-5], "cannot be read"),
        (ascii_ply().replace(b"float", b"quaternion"), "cannot be read"),
        (ascii_ply().replace(b"vertex", b"face"), "cannot be read"),
        (ascii_ply().replace(b" red", b" r"), "lacks the vertex properties red"),
        (ascii_ply().replace(b"3.0", b"nan"), "1 points that are not finite"),
        (header("ascii", "float", "uchar", 0).encode(), "holds no points"),
    ],
)
def test_bad_files_are_one_sentence_that_names_them(tmp_path, content, message):
    path = tmp_path / "points.ply"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_points(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
