"""The model that is exported, a checkpoint or a 3DGS PLY file: it stays on disk, and rows are read when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from datasets.normalize import is_similarity
from errors import InputError
from offload.adam.state import CurrentValues, num_gaussians_of, sh_degree_of
from training.checkpoints import load_checkpoint
from training.files import result_folder_of
from training.measured import read_options
from training.model_files import check_model_file
from training.ply import PlyRows, Up, frame_of_ply

DEGREES = {(degree + 1) ** 2: degree for degree in range(4)}  # of spherical harmonics, by how many there are


@dataclass(frozen=True)
class Source:
    """Hold what a file says of its Gaussians, and read them."""

    path: Path
    num_gaussians: int
    sh_degree: int
    transform: np.ndarray | None  # [4, 4] from the dataset's coordinates to the file's; None where it says none
    up: Up | None  # which of the file's axes is vertical; None where it does not say
    antialiased: bool  # trained with the compensation of Mip-Splatting
    background: str  # that it was trained before, as the option; black where the file does not say
    parameter: Callable[[str, slice | Tensor], Tensor]  # rows [M, ...] of one of the six stored parameters, on the CPU


def open_source(path: Path) -> Source:
    """Open a checkpoint or PLY file.

    Raises:
        InputError: It cannot be read, or holds no Gaussians.
    """
    check_model_file(path)
    with open(path, "rb") as file:
        is_ply = file.read(3) == b"ply"
    source = _open_ply(path) if is_ply else _open_checkpoint(path)
    if source.num_gaussians == 0:
        raise InputError(f"{path} holds no Gaussians: choose another file.")
    if source.transform is not None and not is_similarity(source.transform):
        raise InputError(f"{path} holds no usable transform to the dataset's coordinates: choose another file.")
    return source


def _open_checkpoint(path: Path) -> Source:
    checkpoint = load_checkpoint(path)
    return Source(
        path,
        num_gaussians_of(checkpoint.state),
        sh_degree_of(checkpoint.state),
        checkpoint.transform,
        "z",
        checkpoint.options.get("antialiased") is True,
        str(checkpoint.options.get("background", "black")),
        CurrentValues(checkpoint.state).parameter,
    )


def _open_ply(path: Path) -> Source:
    rows = PlyRows(path)
    if rows.num_harmonics not in DEGREES:
        raise InputError(
            f"{path} holds {rows.num_harmonics} harmonics of each colour, which no degree has: choose a 3DGS PLY file "
            "of degree 0 to 3."
        )
    transform, up = frame_of_ply(path)
    options = read_options(result_folder_of(path)) or {}  # the file says nothing of what is behind it, but its run does
    background = str(options.get("background", "black"))
    return Source(
        path, rows.num_gaussians, DEGREES[rows.num_harmonics], transform, up, False, background, rows.parameter
    )
