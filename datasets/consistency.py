"""Checks that the parts of a dataset belong together: initial points with the model's, cameras with each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from errors import InputError

HARDLY_ANY = 0.05  # of the model's points lie near others: these are refused
TOO_FEW = 0.5  # of the same: a warning
NEARBY = 0.05  # of the model's extent
PROBES, CLOUD = 2048, 1 << 18  # points of the model that are looked for, and of those that they are looked for among
NAMES = 3  # of photos in a sentence


def check_points(path: Path, points: np.ndarray, model_points: np.ndarray) -> list[str]:
    """Check that initial points from a file of their own lie where the model's points lie.

    Args:
        path: Of the file.
        points: [P, 3] from it.
        model_points: [M, 3] of the model, in the same world if the file belongs to it.

    Returns:
        Sentences to warn with.

    Raises:
        InputError: They lie elsewhere.
    """
    warnings = []
    middle = np.median(points, axis=0)
    size = np.median(np.linalg.norm(points - middle, axis=1))
    step = float(np.spacing(np.abs(middle).max().astype(np.float32)))
    if step > 0.001 * size and np.array_equal(points, points.astype(np.float32)):
        warnings.append(
            f"{path} holds float32 coordinates near {np.abs(middle).max():.6g}, which are multiples of {step:g}, "
            f"{step / size:.1%} of the cloud's size: write them as double."
        )
    if len(model_points) < 100:  # which may lie anywhere
        return warnings
    model_size = np.median(np.linalg.norm(model_points - np.median(model_points, axis=0), axis=1))
    cloud = points[:: len(points) // CLOUD + 1]
    distances, _ = cKDTree(cloud).query(
        model_points[:: len(model_points) // PROBES + 1], distance_upper_bound=NEARBY * model_size
    )
    shared = np.isfinite(distances).mean()
    ratio = size / model_size
    sentence = (
        f"{path} does not lie where points3D of the same model does ({shared:.0%} of points3D have a point of it "
        f"nearby, and its extent is {ratio:.2g} times theirs): bring it into the model's coordinates, or train without "
        "init_ply"
    )
    if shared < HARDLY_ANY:
        raise InputError(sentence + ".")
    return [*warnings, sentence + ", if it should."] if shared < TOO_FEW or not 0.1 < ratio < 10 else warnings


def far_camera_warnings(names: Sequence[str], positions: np.ndarray, is_far: np.ndarray, extent: float) -> list[str]:
    """Return a sentence on the cameras that stand far off the scene, where there are any.

    Args:
        names: n names of photos.
        positions: [n, 3] of their cameras.
        is_far: [n] bool, as `datasets.normalize.far_cameras` says.
        extent: Of the scene, in the same units.
    """
    if not is_far.any():
        return []
    distances = np.linalg.norm(positions - np.median(positions, axis=0), axis=1)
    photos = some_names([name for name, far in zip(names, is_far, strict=True) if far])
    return [
        f"{photos}: taken from {distances[is_far].min() / extent:.2g} times the scene's extent away. Such cameras do "
        "not count for the scene's scale, but their photos are trained on: remove them from the model if they "
        "were registered wrongly."
    ]


def some_names(names: Sequence[str]) -> str:
    """Return a few of these names, and how many there are beside them."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more
