"""Where photos stand that were not trained on, once the poses of the others have been corrected.

What all corrections share, a similarity of the whole scene, no photo tells from the truth, and the Gaussians have moved
with it: so do held-out cameras. It is that of the photos that agree, since one that nothing else shows may have gone
anywhere.

What is left may still be alike among photos that were taken beside each other. Then it is an error of the capture
rather than of a photo: a principal point that is not in the middle of the pictures shifts all cameras to one side in
their own axes, and on bonsai the trained photos all moved by a pixel of 800, each within 0.2 of what its neighbours
did. A held-out photo, which nobody has asked, has that error too. Or corrections are each photo's own, as where poses
were found one by one: then neighbours foretell nothing. Which it is the trained photos tell, each foretold by its
neighbours as if it had been held out.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree

from datasets.normalize import LEVER, camera_alignment, camera_points, transform_cameras
from modules.motions import corrections, rows_of

ROUNDS, OUTLIER = 5, 2.0
NEIGHBOURS = 5  # whose median foretells best on bonsai and seneca, of 1 to 17


class Foretelling:
    """Tell where held-out photos stand, by how those that were trained on have moved; for as many as are asked for."""

    def __init__(self, given: np.ndarray, found: np.ndarray, distances: np.ndarray, extent: float) -> None:
        """
        Args:
            given: [n, 4, 4] of trained photos, camera to world.
            found: [n, 4, 4] what these became.
            distances: [n], how far in front of them is what they look at.
            extent: Of the scene.
        """
        self._extent, self._distances = extent, distances
        self._motion = common_motion(given, found, extent)
        self._tree: cKDTree | None = None  # of the cameras; None where neighbours foretell nothing
        if len(given) <= NEIGHBOURS:
            return
        moved = transform_cameras(self._motion, given)
        tree, rows = cKDTree(_places(moved, extent)), rows_of(np.linalg.inv(moved) @ found, distances)
        units = np.array([LEVER, LEVER, LEVER, 1 / extent, 1 / extent, 1 / extent])
        missed = np.linalg.norm((rows - _median(rows[_nearest_others(tree)])) * units, axis=1)  # [n], extents
        if missed.mean() < np.linalg.norm(rows * units, axis=1).mean():
            self._tree, self._rows = tree, rows

    def poses(self, held_out: np.ndarray) -> np.ndarray:
        """Return the poses of held-out photos that go with those of trained ones.

        Args:
            held_out: [k, 4, 4] camera to world, as they are given.
        """
        held_out = transform_cameras(self._motion, held_out)
        if self._tree is None:
            return held_out
        _, nearest = self._tree.query(_places(held_out, self._extent), NEIGHBOURS)  # [k, NEIGHBOURS]
        rows, distances = _median(self._rows[nearest]), _median(self._distances[nearest])
        return held_out @ corrections(torch.from_numpy(rows), torch.from_numpy(distances)).numpy()


def common_motion(given: np.ndarray, found: np.ndarray, extent: float) -> np.ndarray:
    """Return the similarity [4, 4] by which most of the trained cameras have moved.

    By least squares over those that it misses by no more than `OUTLIER` times the median, found in a few rounds.

    Args:
        given: [n, 4, 4], camera to world.
        found: [n, 4, 4] what these became.
        extent: Of the scene.
    """
    if not len(given):
        return np.eye(4)
    motion, wanted = camera_alignment(given, found, extent), _places(found, extent)
    for _ in range(ROUNDS if len(given) > NEIGHBOURS else 0):
        missed = np.linalg.norm(_places(transform_cameras(motion, given), extent) - wanted, axis=1)
        agrees = missed <= OUTLIER * np.median(missed)
        motion = camera_alignment(given[agrees], found[agrees], extent)
    return motion


def _places(camtoworlds: np.ndarray, extent: float) -> np.ndarray:
    """Return the points [k, 12] by which cameras are far from each other."""
    return camera_points(camtoworlds, extent).reshape(-1, 12)


def _nearest_others(tree: cKDTree) -> np.ndarray:
    """Return the NEIGHBOURS nearest places to each in a tree, [n, NEIGHBOURS].

    A place itself is the first of its nearest, or any of them where photos were taken at one place, or none.
    """
    _, nearest = tree.query(tree.data, NEIGHBOURS + 1)  # [n, NEIGHBOURS + 1]
    is_other = nearest != np.arange(len(nearest))[:, None]
    is_other[is_other.all(axis=1), -1] = False
    return nearest[is_other].reshape(-1, NEIGHBOURS)


def _median(of_neighbours: np.ndarray) -> np.ndarray:
    """Return the median of each number of neighbours [k, NEIGHBOURS, ...], one of whom may have gone anywhere."""
    return np.median(of_neighbours, axis=1)
