"""Camera paths through a scene."""

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation, RotationSpline


def flight(camtoworlds: np.ndarray, num_frames: int, num_keys: int = 12) -> np.ndarray:
    """Lay a smooth path past some of the cameras, in their order, at about even speed.

    Args:
        camtoworlds: [M, 4, 4] rigid poses.
        num_frames: Length of the path.
        num_keys: How many of the cameras it meets, spread evenly over their order, the first and the last among them.

    Returns:
        [num_frames, 4, 4] float64 rigid poses.
    """
    keys = camtoworlds[np.unique(np.linspace(0, len(camtoworlds) - 1, num_keys).round().astype(int))]
    frames = np.tile(np.eye(4), (num_frames, 1, 1))
    if len(keys) == 1:
        return frames @ keys[0]
    positions = keys[:, :3, 3]
    distances = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    # Time goes with the distance between keys, and passes where two stand at one place too.
    pace = distances + 0.1 * distances.mean() + 1e-9
    times = np.concatenate([[0.0], np.cumsum(pace) / pace.sum()])
    moments = np.linspace(0.0, 1.0, num_frames)
    frames[:, :3, 3] = CubicSpline(times, positions)(moments)
    frames[:, :3, :3] = RotationSpline(times, Rotation.from_matrix(keys[:, :3, :3]))(moments).as_matrix()
    return frames
