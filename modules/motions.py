"""Small motions of cameras as rows of six numbers, of which training and what it foretells are made.

A row is a turn, its axis times its angle in radians where that is small (`rotations`), and a shift in world units, both
in the camera's axes. The turn is about a place in front of the camera. A photo tells well how what it shows has
shifted, and badly how its camera has turned about that.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional


def corrections(rows: Tensor, distances: Tensor) -> Tensor:
    """Return what leads from the axes of corrected cameras to those of the given ones, [C, 4, 4] float64.

    Args:
        rows: [C, 6].
        distances: [C] float64, how far in front of each camera is the place about which it turns.
    """
    turns, shifts = rotations(rows[:, :3].double()), rows[:, 3:, None].double()
    places = functional.pad(distances[:, None, None], (0, 0, 2, 0))  # [C, 3, 1], on the third axis
    last = turns.new_tensor([0.0, 0, 0, 1]).expand(len(rows), 1, 4)
    return torch.cat([torch.cat([turns, places - turns @ places + shifts], dim=2), last], dim=1)


def rows_of(motions: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Return the rows [n, 6] of which `corrections` makes motions [n, 4, 4].

    Args:
        motions: float64.
        distances: As `corrections` takes them, [n].
    """
    quaternions = Rotation.from_matrix(motions[:, :3, :3]).as_quat()  # x y z w
    ahead = distances[:, None] * np.array([0.0, 0, 1])  # [n, 3]
    shifts = motions[:, :3, 3] + np.einsum("nij,nj->ni", motions[:, :3, :3], ahead) - ahead
    return np.concatenate([2 * quaternions[:, :3] / quaternions[:, 3:], shifts], axis=1)


def rotations(vectors: Tensor) -> Tensor:
    """Return the rotations [C, 3, 3] of the quaternions w = 1 and x y z = vectors / 2, of vectors [C, 3].

    They turn about the vectors, by their length in radians but for its cube / 12. Differentiable at zero, too.
    """
    x, y, z = (vectors / 2).unbind(dim=1)
    one = torch.ones_like(x)
    rows = [
        [one + x * x - y * y - z * z, 2 * (x * y - z), 2 * (x * z + y)],
        [2 * (x * y + z), one - x * x + y * y - z * z, 2 * (y * z - x)],
        [2 * (x * z - y), 2 * (y * z + x), one - x * x - y * y + z * z],
    ]
    norm2 = one + x * x + y * y + z * z
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1) / norm2[:, None, None]
