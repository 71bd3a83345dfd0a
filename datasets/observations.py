"""Checks a COLMAP model against itself: its points must lie where its photos saw them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pycolmap

PHOTOS, OF_PHOTO = 16, 64  # looked at, evenly from all, and observations of each
FEWEST = 64  # observations: of fewer nothing is said
FAR = 0.05  # of a picture's diagonal: a reconstruction leaves a thousandth


def misplaced_points(model_dir: Path, reconstruction: pycolmap.Reconstruction) -> list[str]:
    """Return a sentence where cameras do not see points where the photos' observations of them are.

    Poses of another convention, or points, poses and camera parameters of several reconstructions, show there, if the
    model's observations have been kept. Cameras that were scaled without the observations do not count: a factor on a
    photo's coordinates is taken out.

    Args:
        model_dir: Folder of the model, for the sentence.
        reconstruction: The model.
    """
    images = sorted((i for i in reconstruction.images.values() if i.has_pose), key=lambda image: image.name)
    distances = [_distances(reconstruction, image) for image in images[:: -(-len(images) // PHOTOS)]]
    observed = np.concatenate(distances) if distances else np.zeros(0)
    if len(observed) < FEWEST or np.median(observed) <= FAR:
        return []
    return [
        f"In {model_dir}, {np.mean(observed > FAR):.0%} of points do not lie where the photos saw them: poses, points "
        "and camera parameters are not of one reconstruction, or the poses do not map world to camera as COLMAP's do."
    ]


def _distances(reconstruction: pycolmap.Reconstruction, image: pycolmap.Image) -> np.ndarray:
    """Return how far from its observations a photo's camera sees their points, in diagonals of its picture  # [k]."""
    camera = reconstruction.cameras[image.camera_id]
    seen = [point for point in image.points2D if point.has_point3D()]
    seen = [p for p in seen[:: -(-len(seen) // OF_PHOTO) or 1] if p.point3D_id in reconstruction.points3D]
    if not seen:
        return np.zeros(0)
    pose = image.cam_from_world().matrix()
    points = np.array([reconstruction.points3D[point.point3D_id].xyz for point in seen]) @ pose[:, :3].T + pose[:, 3]
    pixels = [camera.img_from_cam(point) if point[2] > 0 else None for point in points]
    lost = np.array([pixel is None or not np.isfinite(pixel).all() for pixel in pixels])
    projected = np.array([[np.inf, np.inf] if bad else pixel for pixel, bad in zip(pixels, lost, strict=True)])
    observed = np.array([point.xy for point in seen])
    distances = np.full(len(seen), np.inf)
    if not lost.all():
        sizes = np.linalg.norm(projected[~lost], axis=1)
        factor = np.median(np.linalg.norm(observed[~lost], axis=1) / np.maximum(sizes, 1e-9))
        diagonal = np.hypot(camera.width, camera.height) * factor
        distances[~lost] = np.linalg.norm(factor * projected[~lost] - observed[~lost], axis=1) / max(diagonal, 1e-9)
    return distances
