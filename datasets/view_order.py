"""The order of training views: drawn at random, then arranged within windows so that neighbours see the same points.

Rows of Gaussians that two consecutive views share need not travel (as in CLM, arXiv 2511.04951, and TideGS, arXiv
2605.20150). What two views share is counted on a sample of the scene's points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datasets.scene import Scene

SAMPLE = 4096  # points that stand for all
ONES = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(axis=1, dtype=np.uint8)


def sees(points: np.ndarray, worldtocam: np.ndarray, K: np.ndarray, width: int, height: int) -> np.ndarray:
    """Tell which points a camera has in its picture.

    Args:
        points: [S, 3] in world units.
        worldtocam: [4, 4].
        K: [3, 3], pixels.
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.

    Returns:
        [S] bool.
    """
    in_camera = points @ worldtocam[:3, :3].T + worldtocam[:3, 3]  # [S, 3]
    depth = in_camera[:, 2:]
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = (in_camera @ K.T)[:, :2] / depth  # [S, 2]
    inside = (depth > 0) & (pixels >= 0) & (pixels <= (width, height))  # [S, 2]
    return inside.all(axis=1)


def sample_of(points: np.ndarray, count: int) -> np.ndarray:
    """Take at most `count` of the points [P, 3], evenly from all of them, as float64."""
    return points[:: len(points) // count + 1].astype(np.float64)


@dataclass(frozen=True)
class ViewWindows:
    """Arranges each window of consecutive drawn views into a path along which neighbours see many points in common."""

    seen: np.ndarray  # [n, SAMPLE / 16] uint16, a bit for each view and sampled point
    window: int  # views

    @staticmethod
    def of_scene(scene: Scene, window: int) -> ViewWindows:
        """Make windows of a dataset's pictures, by their indices."""
        cameras = [scene.cameras[index] for index in scene.camera_indices]
        sizes = [(camera.width, camera.height) for camera in cameras]
        Ks = [camera.K for camera in cameras]
        return ViewWindows.of_cameras(scene.points, list(np.linalg.inv(scene.camtoworlds)), Ks, sizes, window)

    @staticmethod
    def of_cameras(
        points: np.ndarray,
        worldtocams: Sequence[np.ndarray],
        Ks: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
        window: int,
    ) -> ViewWindows:
        """Make windows of n cameras.

        Args:
            points: [P, 3] in world units, of which a sample is taken.
            worldtocams: n times [4, 4].
            Ks: n times [3, 3], pixels.
            sizes: n times width and height of the picture in pixels.
            window: Views in a window.
        """
        points = sample_of(points, SAMPLE)
        seen = np.zeros((len(Ks), SAMPLE), bool)
        for row, worldtocam, K, size in zip(seen, worldtocams, Ks, sizes, strict=True):
            row[: len(points)] = sees(points, worldtocam, K, *size)
        return ViewWindows(np.packbits(seen, axis=1).view(np.uint16), window)

    def arrange(self, drawn: np.ndarray) -> np.ndarray:
        """Arrange each window of an epoch's views; the last window may be shorter.

        Args:
            drawn: [n] indices of views in the order in which they were drawn.

        Returns:
            [n] the same indices. The first view of all stays the first; a window goes on from the last view of the
            window before.
        """
        arranged = drawn[:1]
        for first in range(0, len(drawn), self.window):
            rest = drawn[max(first, 1) : first + self.window]
            views = np.concatenate([arranged[-1:], rest])  # [W + 1]
            arranged = np.concatenate([arranged, views[path(self._overlaps(views))[1:]]])
        return arranged

    def _overlaps(self, views: np.ndarray) -> np.ndarray:
        """Count the points that each two of the views have in common, [W, W] int64."""
        # Not as a product of matrices: its threads would wait for the cores that other threads keep busy.
        seen = self.seen[views]
        return np.stack([ONES[seen & one].sum(axis=1, dtype=np.int64) for one in seen])


def path(overlaps: np.ndarray) -> np.ndarray:
    """Find an order of views, from the first one on, in which neighbours overlap much.

    Each is followed by the one left that overlaps most with it; then parts of the path are turned round as long as
    that adds to the sum of overlaps (2-opt, Croes 1958).

    Args:
        overlaps: [W, W] int64, symmetric.

    Returns:
        [W] a permutation that begins with 0.
    """
    order = np.zeros(len(overlaps), np.int64)
    left = np.ones(len(overlaps), bool)
    left[0] = False
    for place in range(1, len(order)):
        order[place] = np.where(left, overlaps[order[place - 1]], -1).argmax()
        left[order[place]] = False
    turned = True
    while turned:
        turned = False
        for first in range(1, len(order) - 1):
            # To turn order[first : last + 1], last from first + 1 on, gains and loses an overlap at both of its ends.
            before, begin, lasts, after = order[first - 1], order[first], order[first + 1 :], order[first + 2 :]
            gain = overlaps[before, lasts] - overlaps[before, begin]  # [last]
            gain[:-1] += overlaps[begin, after] - overlaps[lasts[:-1], after]
            best = gain.argmax()
            if gain[best] > 0:
                part = slice(first, first + best + 2)
                order[part] = order[part][::-1].copy()
                turned = True
    return order
