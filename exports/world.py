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
    up_is_taken: bool  # nobody says which axis is vertical before: z is taken for it
    is_turned: bool  # to another vertical axis

    @property
    def axes(self) -> str:
        """Return what the axes are, or nothing where they are as training makes them."""
        return "" if self.up == "z" else AXES_OF_DATASET if self.up is None else AXES[self.up]

    def describe(self, world: World | None) -> str:
        """Return as words which coordinates these are."""
        where = "the dataset's coordinates" if world == "input" else "the file's own coordinates"
        if self.offset is not None:
            where += f" less {' '.join(map(repr, self.offset.tolist()))}"
        if self.up is None:
            return f"{where}, with its axes as they are"
        if self.up_is_taken:
            return f"{where}, of which z is taken for up" + (", turned to y down" if self.is_turned else "")
        return f"{where}, {'turned to' if self.is_turned else 'with'} {AXES[self.up]}"


def placement(transform: np.ndarray | None, own_up: Up | None, world: World | None, up: Up | None) -> Placement:
    """Return where Gaussians go.

    Args:
        transform: [4, 4] from the dataset's coordinates to the file's; None where it is not known.
        own_up: Which of the file's axes is vertical; None where it is not known.
        world: Whose coordinates are wanted; None leaves them as they are.
        up: Which axis shall be vertical, taking z for what is not known; None leaves the axes as they are.

    Raises:
        InputError: Those that are wanted are not known.
    """
    level = TURN[own_up or "z"].T  # the file's coordinates with z up
    if world == "normalized" and transform is not None and _is_of_dataset(transform, own_up):
        raise InputError(
            "--world normalized wants the coordinates of training, and the model's file is in those of the dataset and "
            "does not say which they were: leave it out, or name the checkpoint."
        )
    if world != "input":
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
    is_turned = up is not None and up != (up_before or "z")
    return Placement(move, crop_world, known, up or up_before, offset, up is not None and up_before is None, is_turned)


def _is_of_dataset(transform: np.ndarray, own_up: Up | None) -> bool:
    """Return whether coordinates are the dataset's, but for an offset and an axis turned up; training has others."""
    return np.allclose(transform[:3, :3], TURN[own_up or "z"][:3, :3], rtol=0, atol=1e-9)
