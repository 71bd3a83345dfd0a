"""Checks a COLMAP model against itself: its points must lie where its photos saw them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets.colmap import SparseModel

PHOTOS, OF_PHOTO = 16, 64  # looked at, evenly from all, and observations of each
FEWEST = 64  # observations: of fewer nothing is said
FAR = 0.05  # of a picture's diagonal: a reconstruction leaves a thousandth

# Returns what the i-th photo of a model saw of its points: places in the photo [k, 2] in pixels, and the points [k, 3],
# both float64. Takes the photo's number, and what chooses of its observations, such as `sample` and `all_of`.
Observations = Callable[[int, Callable[[np.ndarray], np.ndarray]], tuple[np.ndarray, np.ndarray]]


def misplaced_points(model_dir: Path, model: SparseModel, observed_by: Observations) -> list[str]:
    """Return a sentence where cameras do not see points where the photos' observations of them are.

    Poses of another convention, or points, poses and camera parameters of several reconstructions, show there, if the
    model's observations have been kept. Cameras that were scaled without the observations do not count: a factor on a
    photo's coordinates is taken out.

    Args:
        model_dir: Folder of the model, for the sentence.
        model: The model.
        observed_by: What its photos saw; asked of `PHOTOS` of them.
    """
    photos = range(0, len(model.image_names), -(-len(model.image_names) // PHOTOS))
    observed = np.concatenate([_distances(model, index, *observed_by(index, sample)) for index in photos])
    if len(observed) < FEWEST or np.median(observed) <= FAR:
        return []
    return [
        f"In {model_dir}, {np.mean(observed > FAR):.0%} of points do not lie where the photos saw them: poses, points "
        "and camera parameters are not of one reconstruction, or the poses do not map world to camera as COLMAP's do."
    ]


def sample(items: np.ndarray) -> np.ndarray:
    """Return at most `OF_PHOTO` of a photo's observations, evenly from all."""
    return items[:: -(-len(items) // OF_PHOTO) or 1]


def all_of(items: np.ndarray) -> np.ndarray:
    """Return all of a photo's observations."""
    return items


def project(model_name: str, params: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Find where a camera sees points.

    Args:
        model_name: COLMAP's name of the camera model.
        params: [9] fx, fy, cx, cy, distortion as `SparseModel` keeps it, in pixels.
        points: [k, 3] in the camera's coordinates.

    Returns:
        [k, 2] in pixels; NaN of what lies behind the camera.
    """
    with np.errstate(all="ignore"):
        x, y = (points[:, :2] / np.where(points[:, 2:] > 0, points[:, 2:], np.nan)).T
        square = x * x + y * y
        k1, k2, p1, p2, k3 = params[4:]
        if model_name == "OPENCV_FISHEYE":
            radius = np.sqrt(square)
            angle = np.arctan(radius)
            turned = angle * angle
            bent = angle * (1 + turned * (k1 + turned * (k2 + turned * (p1 + turned * p2))))  # its k3 and k4
            factor = np.where(radius > 1e-9, bent / np.maximum(radius, 1e-9), 1.0)
            x, y = x * factor, y * factor
        else:
            radial = 1 + square * (k1 + square * (k2 + square * k3))
            x, y = (
                x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
                y * radial + 2 * p2 * x * y + p1 * (square + 2 * y * y),
            )
        return np.stack([x, y], axis=1) * params[:2] + params[2:4]


def _distances(model: SparseModel, index: int, pixels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return how far from its observations a photo's camera sees their points, in diagonals of its picture  # [k]."""
    distances = np.full(len(pixels), np.inf)
    camera = model.camera_indices[index]
    pose = model.worldtocams[index]
    projected = project(model.camera_models[camera], model.camera_params[camera], points @ pose[:3, :3].T + pose[:3, 3])
    found = np.isfinite(projected).all(axis=1) & np.isfinite(pixels).all(axis=1)
    if found.any():
        projected, pixels = projected[found], pixels[found]
        sizes = np.linalg.norm(projected, axis=1)
        factor = np.median(np.linalg.norm(pixels, axis=1) / np.maximum(sizes, 1e-9))
        diagonal = np.hypot(*model.camera_sizes[camera]) * factor
        distances[found] = np.linalg.norm(factor * projected - pixels, axis=1) / max(diagonal, 1e-9)
    return distances
