"""Which way is up: what the photos of a scene agree on, by how they were held."""

from __future__ import annotations

import numpy as np

ROUNDS = 20  # of reweighting, after which nothing moves any more
SMALLEST = 0.02  # of a cosine: a camera that is level to about a degree counts no more than others
PARALLEL = 0.9  # length of the mean of viewing directions, which are then 25 degrees around it
ONE_LINE = 0.02  # below this share of the widest spread, right-hand sides lie on a line: there is one heading


def up_direction(camtoworlds: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the direction that is up in the world of some cameras.

    People and drones hold a camera level: its right-hand side lies in the horizon, wherever it looks, and up is what is
    perpendicular to all of them. That holds for cameras that look straight down as well, as soon as some of them
    are turned. Least absolute deviations (by reweighting) keep the few that are tilted, or turned on their side, from
    pulling on it.

    Where all right-hand sides lie on one line, as where every photo has one heading, they leave the direction open
    around it. Then up is what is up in the pictures, but not for a survey: where the cameras look in parallel and
    stand over an area wider than they are high above the points, they look down, and up is against their viewing
    direction.

    Args:
        camtoworlds: [n, 4, 4] rigid poses, in the OpenCV convention (x right, y down, z forward).
        points: [P, 3] points of the scene, which only tell how far it is away; may be empty.

    Returns:
        [3] unit vector.
    """
    rights, ups, forwards = camtoworlds[:, :3, 0], -camtoworlds[:, :3, 1], camtoworlds[:, :3, 2]  # each [n, 3]
    weights = np.ones(len(rights))
    for _ in range(ROUNDS):
        spreads, axes = np.linalg.eigh((weights[:, None] * rights).T @ rights)  # ascending; axes are columns
        weights = 1.0 / np.maximum(np.abs(rights @ axes[:, 0]), SMALLEST)
    if spreads[1] > ONE_LINE * spreads[2]:
        up = axes[:, 0]
        # The ground is looked down upon, and the sky is at the upper edge of pictures.
        return up if ((ups - forwards) @ up).sum() >= 0 else -up
    sideways = axes[:, 2]
    turned = np.linalg.norm(ups.mean(axis=0)) < 0.5  # up and down in the pictures cancel: they fly to and fro
    up = -forwards.mean(axis=0) if turned or is_survey(camtoworlds, points) else ups.mean(axis=0)
    up = up - (up @ sideways) * sideways
    length = np.linalg.norm(up)
    return up / length if length > 1e-6 else ups[0]


def is_survey(camtoworlds: np.ndarray, points: np.ndarray) -> bool:
    """Return whether cameras look in parallel from an area that is wider, both ways, than they are far from the scene.

    Args:
        camtoworlds: [n, 4, 4] rigid poses.
        points: [P, 3] points of the scene.
    """
    positions, forward = camtoworlds[:, :3, 3], camtoworlds[:, :3, 2].mean(axis=0)
    if np.linalg.norm(forward) < PARALLEL or len(points) == 0:
        return False
    forward = forward / np.linalg.norm(forward)
    distance = np.median(points @ forward) - np.median(positions @ forward)
    across = positions - positions.mean(axis=0)
    across = across - np.outer(across @ forward, forward)
    _, narrower, _ = np.linalg.svd(across.T @ across / len(across), compute_uv=False)  # variances; none along forward
    return bool(distance > 0 and 2.0 * np.sqrt(narrower) > 0.5 * distance)
