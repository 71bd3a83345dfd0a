"""Reads camera paths of users: JSON of key poses in the coordinates of the input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from errors import InputError

KEY = "camtoworlds"
ROTATED = 1e-3  # by which a rotation's columns may miss unit length and right angles: files are rounded


def read_key_poses(path: Path) -> np.ndarray:
    """Return the key poses of a path, in their order.

    The file holds `{"camtoworlds": [pose, ...]}`, each pose of 4 x 4 numbers, row by row: camera to world, in the
    OpenCV convention (x right, y down, z forward) and in the coordinates of the dataset's own model.

    Args:
        path: The JSON file.

    Returns:
        [M, 4, 4] float64 rigid poses, M at least 1.

    Raises:
        InputError: The file is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"--trajectory {path} is neither flight, orbit, ellipse or spiral nor a file that can be read "
            f"({error.strerror}): give one of them."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}): give a file of poses (docs/checkpoints.md).") from error
    if not isinstance(content, dict) or not isinstance(content.get(KEY), list) or not content[KEY]:
        raise InputError(f'{path} has no list "{KEY}" of poses: give a file of poses (docs/checkpoints.md).')
    poses = []
    for index, given in enumerate(content[KEY]):
        try:
            pose = np.array(given, np.float64)
        except (ValueError, TypeError):
            pose = np.empty(0)
        if pose.shape != (4, 4) or not np.isfinite(pose).all() or np.abs(pose).max() > 1e12:
            raise InputError(f"Pose {index} of {path} is not 4 x 4 finite numbers: write its four rows.")
        turn = pose[:3, :3]
        if np.abs(turn.T @ turn - np.eye(3)).max() > ROTATED or np.linalg.det(turn) < 0:
            raise InputError(f"Pose {index} of {path} is not rigid: its upper left 3 x 3 must be a rotation.")
        u, _, vt = np.linalg.svd(turn)
        rigid = np.eye(4)
        rigid[:3, :3], rigid[:3, 3] = u @ vt, pose[:3, 3]
        poses.append(rigid)
    return np.stack(poses)
