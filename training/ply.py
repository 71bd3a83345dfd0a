"""Gaussians as a PLY file in the layout of the 3DGS reference implementation, which viewers read.

The file holds the normalized coordinates that were trained: float32 has no room for georeferenced ones. Its header, and
a JSON file of the same name beside it, say how to come back: input = offset + scale * rotation @ (x, y, z).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plyfile import PlyData
from torch import Tensor

from datasets.ply import check_counts
from errors import InputError, reason
from training.files import replacing, write_file

MODEL_SHARE = 128  # what is read and written at a time is at most this part of the model, which is never copied whole
FEWEST_ROWS, MOST_ROWS = 1 << 10, 1 << 14


def save_ply(
    path: Path, rows: Callable[[int, int], Mapping[str, Tensor]], num_gaussians: int, transform: np.ndarray
) -> None:
    """Write Gaussians in the model's (normalized) coordinates.

    Args:
        path: File to write; it appears under its name only when it is complete. The way back to the dataset's
            coordinates goes into a file beside it, with the suffix .json.
        rows: Gives the rows from one number up to another of the six stored parameter tensors, on any device.
        num_gaussians: How many there are.
        transform: [4, 4] similarity from the dataset's coordinates to the model's; kept as a comment as well.
    """
    num_rest = 3 * rows(0, 0)["shN"].shape[1]
    names = [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(num_rest)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]
    way_back, side_file = _way_back(transform), path.with_suffix(".json")
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment input = offset + scale * rotation @ (x, y, z), see {ascii(side_file.name)[1:-1]}",
        "comment offset_of_input " + " ".join(map(repr, way_back["offset"])),
        "comment transform_from_input " + " ".join(repr(float(x)) for x in np.ravel(transform)),
        f"element vertex {num_gaussians}",
        *(f"property float {name}" for name in names),
        "end_header",
    ]
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(("\n".join(header) + "\n").encode("ascii"))
        block_rows = min(max(num_gaussians // MODEL_SHARE, FEWEST_ROWS), MOST_ROWS)
        for first in range(0, num_gaussians, block_rows):
            block = rows(first, min(first + block_rows, num_gaussians))
            file.write(_columns(block).numpy().astype("<f4", copy=False).data)
    write_file(side_file, json.dumps(way_back, indent=2) + "\n")


def _way_back(transform: np.ndarray) -> dict[str, Any]:
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


def transform_of_ply(path: Path) -> np.ndarray | None:
    """Return the similarity [4, 4] from the dataset's coordinates to those of a PLY file that `save_ply` wrote.

    It stands in the header; a program that rewrote the file may have left it out, and then the JSON file beside says
    the same.

    Returns:
        None where neither says it, as of another program's file.

    Raises:
        InputError: What is said cannot be read.
    """
    key = "transform_from_input "
    side_file = path.with_suffix(".json")
    try:
        comments = PlyData.read(path, mmap=True).comments
        values = next((text[len(key) :].split() for text in comments if text.startswith(key)), None)
        if values is not None:
            return np.array(values, np.float64).reshape(4, 4)
        way_back = json.loads(side_file.read_text()) if side_file.is_file() else {}
        if not isinstance(way_back, dict) or not {"offset", "scale", "rotation"} <= way_back.keys():
            return None
        inverse = np.eye(4)
        inverse[:3, :3] = float(way_back["scale"]) * np.array(way_back["rotation"], np.float64)
        inverse[:3, 3] = way_back["offset"]
        return np.linalg.inv(inverse)
    except Exception as error:  # of plyfile, NumPy and json
        raise InputError(
            f"{path} or {side_file.name} beside it does not say how to come back to the dataset's coordinates "
            f"({reason(error)}): remove that file, or choose a complete PLY file."
        ) from error


def load_ply(path: Path) -> dict[str, Tensor]:
    """Read Gaussians from a 3DGS PLY file.

    Returns:
        The six stored parameter tensors on the CPU, N rows each.

    Raises:
        InputError: The file is missing, damaged, or holds no Gaussians.
    """
    try:
        check_counts(path)
        vertex = PlyData.read(path)["vertex"]
        num_rest = sum(property.name.startswith("f_rest_") for property in vertex.properties)

        def columns(*names: str) -> Tensor:
            return torch.from_numpy(np.stack([vertex[name].astype(np.float32) for name in names], axis=1))

        rest = [f"f_rest_{i}" for i in range(num_rest)]
        shN = columns(*rest) if rest else torch.zeros(len(vertex), 0)
        return {
            "means": columns("x", "y", "z"),
            "scales": columns("scale_0", "scale_1", "scale_2"),
            "quats": columns("rot_0", "rot_1", "rot_2", "rot_3"),
            "opacities": columns("opacity")[:, 0],
            "sh0": columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None, :],
            "shN": shN.reshape(len(vertex), 3, num_rest // 3).transpose(1, 2).contiguous(),
        }
    except Exception as error:  # plyfile, NumPy and torch each have errors of their own
        raise InputError(
            f"{path} cannot be read as a 3DGS PLY file ({reason(error)}): choose a complete one."
        ) from error
