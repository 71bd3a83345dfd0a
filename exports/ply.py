"""3DGS's own PLY: all numbers in float32, with comments that say how to come back to the dataset's coordinates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exports.gaussians import Gaussians, Rows
from exports.world import Placement
from training.gaussians import PARAMETER_NAMES
from training.ply import save_ply, write_ply


def write_plain_ply(path: Path, gaussians: Gaussians) -> None:
    """Write Gaussians in the order of their file, block by block, without comments."""
    write_ply(path, _rows_of(gaussians), gaussians.count)


def write_commented_ply(path: Path, gaussians: Gaussians, place: Placement) -> None:
    """Write Gaussians with comments, as training does, and the file beside that says the same."""
    if place.transform is None:
        write_plain_ply(path, gaussians)
    else:
        save_ply(path, _rows_of(gaussians), gaussians.count, place.transform, axes=place.axes)


def ply_bytes(count: int, sh_degree: int) -> int:
    """Return how large the file will be at most."""
    return 8192 + 4 * count * (17 + 3 * ((sh_degree + 1) ** 2 - 1))


def _rows_of(gaussians: Gaussians) -> Callable[[int, int], Rows]:
    def rows(first: int, last: int) -> Rows:
        return gaussians.at(slice(first, last), PARAMETER_NAMES)

    return rows
