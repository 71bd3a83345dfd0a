"""Reads the initial points of a scene from a PLY file."""

from pathlib import Path

import numpy as np
from plyfile import PlyData

from errors import InputError


def read_points(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Points and colours of the `vertex` element of an ASCII or binary PLY file.

    Colours may be integers of 8 or 16 bits, or floats in [0, 1] or [0, 255].

    Returns:
        points [P, 3] float64 and colours [P, 3] uint8.

    Raises:
        InputError: the file is absent or damaged, has no points, no colours, or a point that is not finite.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: put the initial points there, or train without init_ply.")
    try:
        vertices = PlyData.read(str(path))["vertex"].data
    except Exception as error:  # plyfile, NumPy and the text decoder each have errors of their own
        raise InputError(f"{path} cannot be read as a PLY file with a vertex element ({error}).") from error
    for wanted in (("x", "y", "z"), ("red", "green", "blue")):
        missing = [name for name in wanted if name not in (vertices.dtype.names or ())]
        if missing:
            raise InputError(f"{path} lacks the vertex properties {', '.join(missing)}: write them as well.")
    if len(vertices) == 0:
        raise InputError(f"{path} holds no points: write some, or train without init_ply.")
    points = np.stack([vertices[name] for name in "xyz"], axis=1).astype(np.float64)
    not_finite = int((~np.isfinite(points).all(axis=1)).sum())
    if not_finite:
        raise InputError(f"{path} holds {not_finite} points that are not finite: remove them.")
    colors = np.stack([vertices[name] for name in ("red", "green", "blue")], axis=1)
    return points, _to_uint8(colors)


def _to_uint8(colors: np.ndarray) -> np.ndarray:
    if colors.dtype == np.uint8:
        return colors
    if colors.dtype == np.uint16:
        return (colors >> 8).astype(np.uint8)
    if np.issubdtype(colors.dtype, np.floating):
        colors = np.nan_to_num(colors)
        colors = colors * 255 if colors.max() <= 1 else colors
    return np.clip(np.round(colors), 0, 255).astype(np.uint8)
