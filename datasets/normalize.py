"""The normalized world: centred, scaled to the cameras and turned to the principal axes of the points.

The same mathematics as gsplat's example data loader, so that learning rates and thresholds carry over.
"""

import numpy as np


def normalizing_transform(camtoworlds: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the similarity that takes the input world to the normalized world.

    Args:
        camtoworlds: [n, 4, 4] poses in the OpenCV convention (x right, y down, z forward).
        points: [P, 3] points of the scene; fewer than four say nothing of its axes, and only the cameras count.

    Returns:
        [4, 4] float64 matrix; its upper left 3 x 3 is a rotation times a positive scale.
    """
    transform = similarity_from_cameras(camtoworlds)
    if len(points) < 4:
        return transform
    transform = principal_axes(transform_points(transform, points)) @ transform
    z = transform_points(transform, points)[:, 2]
    if np.median(z) > np.mean(z):  # the ground holds most points, so the tail of z should point up
        transform = np.diag([1.0, -1.0, -1.0, 1.0]) @ transform
    return transform


def similarity_from_cameras(camtoworlds: np.ndarray) -> np.ndarray:
    """Return the [4, 4] similarity that levels cameras, centres what they look at and scales their distance to 1."""
    rotations, positions = camtoworlds[:, :3, :3], camtoworlds[:, :3, 3]
    level = _rotation_between(-rotations[:, :, 1].mean(axis=0), np.array([0.0, -1.0, 0.0]))
    positions = positions @ level.T  # [n, 3]
    forwards = rotations[:, :, 2] @ level.T  # [n, 3]
    # Each viewing ray's nearest point to the origin; their median is taken for the centre of the scene.
    nearest = positions - (forwards * positions).sum(axis=1, keepdims=True) * forwards
    centre = np.median(nearest, axis=0)
    distance = np.median(np.linalg.norm(positions - centre, axis=1))
    scale = 1.0 / distance if distance > 1e-12 else 1.0  # a single camera may stand at the centre itself

    transform = np.eye(4)
    transform[:3, :3] = scale * level
    transform[:3, 3] = -scale * centre
    return transform


def principal_axes(points: np.ndarray) -> np.ndarray:
    """Return the [4, 4] rigid motion that takes the points' median to 0, their widest spread to x, least to z."""
    centre = np.median(points, axis=0)
    _, axes = np.linalg.eigh(np.cov(points, rowvar=False))  # columns, the widest last
    axes = axes[:, ::-1].copy()
    if np.linalg.det(axes) < 0:
        axes[:, 0] *= -1
    transform = np.eye(4)
    transform[:3, :3] = axes.T
    transform[:3, 3] = -axes.T @ centre
    return transform


def transform_points(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Move points [P, 3] by a [4, 4] similarity  # [P, 3]."""
    return points @ transform[:3, :3].T + transform[:3, 3]


def transform_cameras(transform: np.ndarray, camtoworlds: np.ndarray) -> np.ndarray:
    """Move poses [n, 4, 4] to the world that a [4, 4] similarity leads to; their rotations stay rotations."""
    moved = transform @ camtoworlds
    moved[:, :3, :3] /= np.cbrt(np.linalg.det(transform[:3, :3]))
    return moved


def _rotation_between(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the smallest rotation [3, 3] from the direction `source` to the unit vector `target` (Rodrigues)."""
    length = np.linalg.norm(source)
    if length < 1e-12:  # cameras in all orientations: no up direction is better than another
        return np.eye(3)
    source = source / length
    cosine = source @ target
    if cosine < -1 + 1e-12:
        return np.diag([1.0, -1.0, -1.0])  # half a turn about x, which `target` is perpendicular to
    x, y, z = np.cross(source, target)
    skew = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + skew + skew @ skew / (1 + cosine)
