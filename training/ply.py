"""Gaussians as a PLY file in the layout of the 3DGS reference implementation, which viewers read.

The file holds the normalized coordinates that were trained: float32 has no room for georeferenced ones. Its header, and
a JSON file of the same name beside it, say how to come back: input = offset + scale * rotation @ (x, y, z).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from plyfile import PlyData
from torch import Tensor

from datasets.ply import check_counts
from distributed.mesh import Ranks
from distributed.together import failing_together
from errors import InputError, read_as, reason
from training.files import open_new, replacing, write_file
from training.gaussians import PARAMETER_NAMES

MODEL_SHARE = 128  # what is read and written at a time is at most this part of the model, which is never copied whole
FEWEST_ROWS, MOST_ROWS = 1 << 10, 1 << 14
TRANSFORM_COMMENT, AXES_COMMENT = "transform_from_input ", "axes "  # how these comments begin

Up = Literal["y", "z"]
# Training makes z vertical. Viewers take the axes of COLMAP and 3DGS, y down, and turn them over when they draw.
AXES: dict[Up, str] = {"z": "x right, y forward, z up", "y": "x right, y down, z forward"}
AXES_OF_DATASET = "those of the dataset"  # of which nobody says what is up


def save_ply(
    path: Path,
    rows: Callable[[int, int], Mapping[str, Tensor]],
    num_gaussians: int,
    transform: np.ndarray,
    *,
    axes: str = "",
    ranks: Ranks | None = None,
) -> None:
    """Write Gaussians in the model's (normalized) coordinates, with the way back to the dataset's.

    Args:
        path: File to write; it appears under its name only when it is complete. The way back to the dataset's
            coordinates goes into a file beside it, with the suffix .json.
        rows: Gives the rows from one number up to another of the six stored parameter tensors, on any device.
        num_gaussians: How many there are.
        transform: [4, 4] similarity from the dataset's coordinates to the model's; kept as a comment as well.
        axes: What the axes are, where that is not what training makes them.
        ranks: Each of which has other rows; they write them into one file, at their places, in the order of the ranks.

    Raises:
        OSError: It cannot be written; at all ranks where it cannot at one.
    """
    side_file = path.with_suffix(".json")
    comments = [
        f"input = offset + scale * rotation @ (x, y, z), see {ascii(side_file.name)[1:-1]}",
        "offset_of_input " + " ".join(map(repr, way_back(transform)["offset"])),
        TRANSFORM_COMMENT + " ".join(repr(float(x)) for x in np.ravel(transform)),
        *([AXES_COMMENT + axes] if axes else []),
    ]
    if ranks is None:
        write_ply(path, rows, num_gaussians, comments)
    else:
        _write_together(path, rows, num_gaussians, comments, ranks)
    if ranks is None or ranks.leads:
        write_way_back(side_file, transform, axes=axes)


def write_ply(
    path: Path, rows: Callable[[int, int], Mapping[str, Tensor]], num_gaussians: int, comments: Sequence[str] = ()
) -> None:
    """Write Gaussians as they are; the arguments are those of `save_ply`, and lines of comments for the header."""
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(_header(rows, num_gaussians, comments))
        _write_rows(file, rows, num_gaussians)


def _write_together(
    path: Path,
    rows: Callable[[int, int], Mapping[str, Tensor]],
    num_gaussians: int,
    comments: Sequence[str],
    ranks: Ranks,
) -> None:
    """Write one file by all ranks: the first makes it, with its header, and gives it its name in the end."""
    counts = ranks.gather(num_gaussians)
    header = _header(rows, sum(counts), comments)
    row_bytes = 4 * len(_column_names(rows))
    partial = ranks.broadcast(path.with_name("partial_" + path.name))
    try:
        with failing_together(ranks):
            if ranks.leads:
                file = open_new(partial)
                try:
                    os.truncate(file, len(header) + sum(counts) * row_bytes)
                    os.pwrite(file, header, 0)
                finally:
                    os.close(file)
        with failing_together(ranks), open(partial, "r+b") as own_rows:
            own_rows.seek(len(header) + sum(counts[: ranks.rank]) * row_bytes)
            _write_rows(own_rows, rows, num_gaussians)
        with failing_together(ranks):
            if ranks.leads:
                os.replace(partial, path)
    finally:
        if ranks.leads:
            partial.unlink(missing_ok=True)


def _header(rows: Callable[[int, int], Mapping[str, Tensor]], num_gaussians: int, comments: Sequence[str]) -> bytes:
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {comment}" for comment in comments),
        f"element vertex {num_gaussians}",
        *(f"property float {name}" for name in _column_names(rows)),
        "end_header",
    ]
    return ("\n".join(header) + "\n").encode("ascii")


def _column_names(rows: Callable[[int, int], Mapping[str, Tensor]]) -> list[str]:
    num_rest = 3 * rows(0, 0)["shN"].shape[1]
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(num_rest)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]


def _write_rows(file: BinaryIO, rows: Callable[[int, int], Mapping[str, Tensor]], num_gaussians: int) -> None:
    block_rows = min(max(num_gaussians // MODEL_SHARE, FEWEST_ROWS), MOST_ROWS)
    for first in range(0, num_gaussians, block_rows):
        block = rows(first, min(first + block_rows, num_gaussians))
        file.write(_columns(block).numpy().astype("<f4", copy=False).data)


def write_way_back(path: Path, transform: np.ndarray, *, axes: str = "") -> None:
    """Write how to come from a model's coordinates to the dataset's.

    Args:
        path: Of the JSON file.
        transform: [4, 4] similarity from the dataset's coordinates to the model's.
        axes: What the model's axes are, where that is not what training makes them.
    """
    content = {**way_back(transform), **({"axes": axes} if axes else {})}
    write_file(path, json.dumps(content, indent=2) + "\n")


def way_back(transform: np.ndarray) -> dict[str, Any]:
    """Return offset [3], scale and rotation [3][3] from the model's coordinates to the dataset's."""
    inverse = np.linalg.inv(transform)
    scale = np.cbrt(np.linalg.det(inverse[:3, :3]))
    return {
        "offset": inverse[:3, 3].tolist(),
        "scale": float(scale),
        "rotation": (inverse[:3, :3] / scale).tolist(),
    }


def _columns(block: Mapping[str, Tensor]) -> Tensor:
    block = {name: value.cpu() for name, value in block.items()}
    means = block["means"]
    return torch.cat(
        [
            means,
            torch.zeros_like(means),  # normals, which 3DGS leaves empty
            block["sh0"].flatten(1),
            block["shN"].transpose(1, 2).flatten(1),  # all of red, then green, then blue
            block["opacities"][:, None],
            block["scales"],
            block["quats"],
        ],
        dim=1,
    )  # [M, 17 + 3 (K - 1)]


def frame_of_ply(path: Path) -> tuple[np.ndarray | None, Up | None]:
    """Return the similarity [4, 4] from the dataset's coordinates to those of a PLY file, and which of its axes is up.

    They stand in the header of a file of `save_ply`; a program that rewrote the file may have left them out, and then
    the JSON file beside says the same. What that file lacks is printed.

    Returns:
        None for what neither says, as of another program's file.

    Raises:
        InputError: What is said cannot be read.
    """
    side_file = path.with_suffix(".json")
    with _read_as_gaussians(path):
        check_counts(path)
        comments = PlyData.read(path, mmap=True).comments
    values = _after(TRANSFORM_COMMENT, comments)
    try:
        if values is not None:
            frame = np.array(values.split(), np.float64).reshape(4, 4), _up(_after(AXES_COMMENT, comments))
            _check_beside(side_file)
            return frame
        beside = _frame_beside(side_file) if side_file.is_file() else None
    except PermissionError:
        raise
    except Exception as error:  # of NumPy and json
        at_fault, remedy = f"The header of {path}", "choose another PLY file"
        if values is None:
            at_fault, remedy = f"{path} says nothing itself, and {side_file.name} beside it", "remove that file"
        raise InputError(
            f"{at_fault} does not say how to come back to the dataset's coordinates ({reason(error)}): {remedy}."
        ) from error
    if side_file.is_file() and beside is None:
        print(f"Warning: {side_file} does not say how to come back to the dataset's coordinates, and is not used.")
    return beside or (None, None)


def _check_beside(side_file: Path) -> None:
    """Tell of a file beside a PLY file, whose own header is enough, that is damaged."""
    try:
        is_whole = not side_file.is_file() or _frame_beside(side_file) is not None
    except PermissionError:  # nothing is wanted of it
        return
    except Exception:  # of the disk, NumPy and json
        is_whole = False
    if not is_whole:
        print(
            f"Warning: {side_file} is damaged or another program's; the PLY file itself says what should stand there."
        )


def _frame_beside(side_file: Path) -> tuple[np.ndarray, Up | None] | None:
    """Return what the JSON file beside a PLY file says, as `frame_of_ply`; None where it says nothing of this."""
    way_back = json.loads(side_file.read_text())
    if not isinstance(way_back, dict) or not {"offset", "scale", "rotation"} <= way_back.keys():
        return None
    inverse = np.eye(4)
    inverse[:3, :3] = float(way_back["scale"]) * np.array(way_back["rotation"], np.float64)
    inverse[:3, 3] = way_back["offset"]
    return np.linalg.inv(inverse), _up(way_back.get("axes"))


def _up(axes: object) -> Up | None:
    """Return which axis is vertical of a file that says how to come back: as training makes it, if it says no axes."""
    return next((up for up, text in AXES.items() if text == (axes or AXES["z"])), None)


def _after(key: str, comments: Sequence[str]) -> str | None:
    return next((text[len(key) :] for text in comments if text.startswith(key)), None)


def _read_as_gaussians(path: Path) -> AbstractContextManager[None]:
    """Say in one sentence what of a PLY file cannot be read."""
    return read_as(path, "a 3DGS PLY file", "choose a complete one")


class PlyRows:
    """Reads rows of a 3DGS PLY file where it lies on disk."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            InputError: It is missing, damaged, or does not hold Gaussians.
        """
        self._path = path
        with _read_as_gaussians(self._path):
            check_counts(path)
            self._vertex = PlyData.read(path, mmap=True)["vertex"].data  # structured, [N]
            names = set(self._vertex.dtype.names or ())
            rest = sum(name.startswith("f_rest_") for name in names)
            self._columns = {
                "means": ["x", "y", "z"],
                "scales": [f"scale_{i}" for i in range(3)],
                "quats": [f"rot_{i}" for i in range(4)],
                "opacities": ["opacity"],
                "sh0": [f"f_dc_{i}" for i in range(3)],
                "shN": [f"f_rest_{i}" for i in range(rest)],
            }
            if "packed_position" in names:
                raise ValueError("it is a compressed one, which keeps its numbers in few bits")
            missing = [name for columns in self._columns.values() for name in columns if name not in names]
            if missing:
                raise ValueError(f"there is no property {missing[0]}")
            if rest % 3:
                raise ValueError(f"it has {rest} properties f_rest_*, which are not as many of each colour")
        self.num_gaussians = len(self._vertex)
        self.num_harmonics = rest // 3 + 1  # of each colour

    def parameter(self, name: str, rows: slice | Tensor) -> Tensor:
        """Return some rows [M, ...] of one of the six stored parameters on the CPU."""
        with _read_as_gaussians(self._path):
            vertex = self._vertex[rows if isinstance(rows, slice) else rows.numpy()]
            columns = [vertex[column].astype(np.float32) for column in self._columns[name]]
            values = np.stack(columns, axis=1) if columns else np.zeros((len(vertex), 0), np.float32)
        tensor = torch.from_numpy(values)  # [M, columns]
        if name == "opacities":
            return tensor[:, 0]
        if name == "sh0":
            return tensor[:, None, :]
        if name == "shN":
            return tensor.reshape(len(tensor), 3, self.num_harmonics - 1).transpose(1, 2).contiguous()
        return tensor


def load_ply(path: Path) -> dict[str, Tensor]:
    """Read Gaussians from a 3DGS PLY file.

    Returns:
        The six stored parameter tensors on the CPU, N rows each.

    Raises:
        InputError: The file is missing, damaged, or does not hold Gaussians.
    """
    rows = PlyRows(path)
    return {name: rows.parameter(name, slice(None)) for name in PARAMETER_NAMES}
