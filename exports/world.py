"""The coordinates of an export: the model's own or the dataset's, and which axis is vertical there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from errors import InputError
from training.ply import AXES, AXES_OF_DATASET, Up

World = Literal["normalized", "input"]

TURN: dict[Up, np.ndarray] = {  # [4, 4] from z up
    "z": np.eye(4),
    "y": np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]),
}
FARTHEST = 4096.0  # units: beyond it steps of float32 grow above 0.0003, a third of a millimetre where units are metres


@dataclass(frozen=True)
class Placement:
    """Hold where the Gaussians of a file come to lie."""

    move: np.ndarray  # [4, 4] from the file's coordinates to those of the export
    crop_world: np.ndarray  # [4, 4] from the file's coordinates to those in which --crop is given
    transform: np.ndarray | None  # [4, 4] from the dataset's coordinates to those of the export, where they are known
    up: Up | None  # which axis is vertical then
    offset: np.ndarray | None  # [3] of the dataset's coordinates, that those of the export lack

    @property
    def axes(self) -> str:
        """Return what the axes are, or nothing where they are as training makes them."""
        return "" if self.up == "z" else AXES_OF_DATASET if self.up is None else AXES[self.up]

    def describe(self, world: World) -> str:
        """Return as words which coordinates these are."""
        where = "the dataset's coordinates" if world == "input" else "the file's own coordinates"
        if self.offset is not None:
            where += f" less {' '.join(map(repr, self.offset.tolist()))}"
        return f"{where}, with {AXES[self.up]}" if self.up else f"{where}, with its axes as they are"


def placement(transform: np.ndarray | None, own_up: Up | None, world: World, up: Up | None) -> Placement:
    """Return where Gaussians go.

    Args:
        transform: [4, 4] from the dataset's coordinates to the file's; None where it is not known.
        own_up: Which of the file's axes is vertical; None where it is not known.
        world: Whose coordinates are wanted.
        up: Which axis shall be vertical, taking z for what is not known; None leaves the axes as they are.

    Raises:
        InputError: The dataset's coordinates are wanted and not known.
    """
    level = TURN[own_up or "z"].T  # the file's coordinates with z up
    if world == "normalized":
        move, crop_world, up_before, offset = np.eye(4), level, own_up, None
        if up is not None:
            move = level
    else:
        if transform is None:
            raise InputError(
                "--world input wants coordinates of the dataset, and neither the model's file nor a .json file beside "
                "it says which they are: leave it out, or name the checkpoint."
            )
        move, crop_world, up_before, offset = np.linalg.inv(transform), np.linalg.inv(transform), None, None
        if np.abs(move[:3, 3]).max() > FARTHEST:
            offset = move[:3, 3].copy()
            move[:3, 3] = 0
    if up is not None:
        move = TURN[up] @ move
    known = None if transform is None else move @ transform
    return Placement(move, crop_world, known, up or up_before, offset)
