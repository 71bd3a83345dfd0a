"""The normalized world: centred, scaled to the cameras and turned to the principal axes of the points.

The mathematics are those of gsplat's example data loader, so that learning rates and thresholds carry over, but for one
thing: distances are measured from the middle of the cameras, not from the origin of the input, which is anywhere. So
the same pictures give the same world, whatever similarity the input's world has, and georeferenced coordinates too.
"""

import numpy as np

NEGLIGIBLE = 1e-6  # of the scene's size: what is smaller may be the rounding of large coordinates
ROUNDING = 1e-12  # of the largest coordinate: cameras closer than this stand at one place
LEVER = 0.1  # of the extent: so far along a camera's axes are points that move with it, besides its centre
FEWEST_POINTS = 4  # fewer say nothing of the scene's axes


def normalizing_transform(camtoworlds: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the similarity that takes the input world to the normalized world.

    Args:
        camtoworlds: [n, 4, 4] poses in the OpenCV convention (x right, y down, z forward).
        points: [P, 3] points of the scene; where there are fewer than four, only the cameras count.

    Returns:
        [4, 4] float64 matrix; its upper left 3 x 3 is a rotation times a positive scale.
    """
    origin = np.median(camtoworlds[:, :3, 3], axis=0)  # differences to a point nearby are exact, however far it is
    positions, rotations = camtoworlds[:, :3, 3] - origin, camtoworlds[:, :3, :3]
    from_points = len(points) >= FEWEST_POINTS
    points = points - origin
    axes = point_axes(points, positions) if from_points else camera_axes(rotations)
    # Coordinates along the scene's own axes, so that a median of each is the same place in every input world.
    positions, points, forwards = positions @ axes.T, points @ axes.T, rotations[:, :, 2] @ axes.T
    middle = np.median(positions, axis=0)
    to_middle = middle - positions  # [n, 3]
    # Each viewing ray's nearest point to the middle; their median is taken for what the cameras look at.
    nearest = middle - (to_middle - (forwards * to_middle).sum(axis=1, keepdims=True) * forwards)
    focus = np.median(nearest, axis=0)
    centre = np.median(points, axis=0) if from_points else focus
    distance = np.median(np.linalg.norm(positions - focus, axis=1))
    scale = 1.0 / distance if distance > place_tolerance(camtoworlds) else 1.0  # a single camera is its own focus

    transform = np.eye(4)
    transform[:3, :3] = scale * axes
    transform[:3, 3] = -scale * (axes @ origin + centre)
    return transform


def point_axes(points: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the principal axes of a scene's points.

    Args:
        points: [P, 3], at least two of them.
        positions: [n, 3] of the cameras.

    Returns:
        [3, 3] rotation; its rows are the directions of the widest spread (x) to the least (z).
    """
    variances, vectors = np.linalg.eigh(np.cov(points, rowvar=False))  # columns, the widest last
    size = np.sqrt(variances[-1])
    x = _directed(vectors[:, 2], points, positions, size)
    z = _directed(vectors[:, 0], points, positions, size)
    return np.stack([x, np.cross(z, x), z])


def _directed(axis: np.ndarray, points: np.ndarray, positions: np.ndarray, size: float) -> np.ndarray:
    """Return one of the two directions of an axis [3], by what the scene itself says.

    The ground holds most points, so the tail of the points points up. Points without a tail may be seen from one side.
    """
    along = points @ axis
    middle = np.median(along)
    for lean in (along.mean() - middle, np.median(positions @ axis) - middle):
        if abs(lean) > NEGLIGIBLE * size:
            return axis if lean > 0 else -axis
    return axis


def camera_axes(rotations: np.ndarray) -> np.ndarray:
    """Return the axes of the mean camera, level: right, down and forward, from rotations [n, 3, 3], as rows [3, 3]."""
    down = _first_direction(rotations[:, :, 1].mean(axis=0), rotations[0, :, 1])
    candidates = (rotations[:, :, 2].mean(axis=0), rotations[0, :, 2], rotations[0, :, 0])
    forward = _first_direction(*(vector - (vector @ down) * down for vector in candidates))
    return np.stack([np.cross(down, forward), down, forward])


def _first_direction(*candidates: np.ndarray) -> np.ndarray:
    """Return the first of these vectors that has a length, as a unit vector."""
    vector = next(vector for vector in candidates if np.linalg.norm(vector) > NEGLIGIBLE)
    return vector / np.linalg.norm(vector)


def place_tolerance(camtoworlds: np.ndarray) -> float:
    """Return the distance up to which poses [n, 4, 4] may differ by rounding alone, in their own units."""
    return ROUNDING * float(np.abs(camtoworlds[:, :3, 3]).max())


def far_cameras(positions: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return which of the cameras stand far off the scene, as one does that was registered wrongly.

    Args:
        positions: [n, 3] in any world.
        points: [P, 3] in the same.

    Returns:
        [n] bool, true for those that are ten times as far from the cameras' middle as four fifths of the cameras are,
        and twice as far as four fifths of the points: from a tripod most pictures are taken at one place.
    """
    middle = np.median(positions, axis=0)
    distances, of_points = (np.linalg.norm(x - middle, axis=1) for x in (positions, points))
    usual = _four_fifths(distances)
    return (distances > max(10 * usual, 2 * _four_fifths(of_points))) & (usual > 0)


def _four_fifths(distances: np.ndarray) -> float:
    return float(np.quantile(distances, 0.8, method="lower")) if len(distances) else 0.0


def is_similarity(transform: np.ndarray) -> bool:
    """Return whether a matrix [4, 4] is a finite similarity that mirrors nothing."""
    linear = transform[:3, :3]
    if not np.isfinite(transform).all() or not np.array_equal(transform[3], [0, 0, 0, 1]) or np.linalg.det(linear) <= 0:
        return False
    turn = linear / np.cbrt(np.linalg.det(linear))
    return bool(np.abs(turn @ turn.T - np.eye(3)).max() < 1e-6)


def same_axes(transform: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two normalizing similarities [4, 4] are of one scene, as far as its axes say.

    Versions before this one measured distances from the input's origin, and left the direction of the axes to chance.
    So of the same cameras and points they give another scale and centre, but the same axes.
    """
    turn = (
        transform[:3, :3] @ other[:3, :3].T / np.cbrt(np.linalg.det(transform[:3, :3]) * np.linalg.det(other[:3, :3]))
    )
    return bool(np.abs(np.abs(turn) - np.eye(3)).max() < 1e-4)


def transform_points(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return points [P, 3] under a similarity [4, 4]."""
    return points @ transform[:3, :3].T + transform[:3, 3]


def transform_cameras(transform: np.ndarray, camtoworlds: np.ndarray) -> np.ndarray:
    """Return poses [n, 4, 4] in the world that a similarity [4, 4] leads to; their rotations stay rotations."""
    moved = transform @ camtoworlds
    moved[:, :3, :3] /= np.cbrt(np.linalg.det(transform[:3, :3]))
    return moved


def camera_alignment(camtoworlds: np.ndarray, wanted: np.ndarray, extent: float) -> np.ndarray:
    """Return the similarity [4, 4] that brings cameras nearest to others.

    A camera counts as its points (`camera_points`), which tell how cameras turned that stand in a line.

    Args:
        camtoworlds: [k, 4, 4].
        wanted: [k, 4, 4], which of them each is brought to.
        extent: Of the scene.
    """
    return alignment(*(camera_points(poses, extent).reshape(-1, 3) for poses in (camtoworlds, wanted)))


def camera_points(camtoworlds: np.ndarray, extent: float) -> np.ndarray:
    """Return the centre of each camera and a point on each of its axes, [k, 4, 3], which lie where it does.

    Args:
        camtoworlds: [k, 4, 4].
        extent: Of the scene.
    """
    own = LEVER * extent * np.eye(4, 3, -1)  # the centre, and along each axis
    return own @ camtoworlds[:, :3, :3].transpose(0, 2, 1) + camtoworlds[:, None, :3, 3]


def alignment(points: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the similarity [4, 4] that brings points nearest to others, by the sum of squares (Umeyama 1991).

    Args:
        points: [k, 3].
        wanted: [k, 3], which of them each is brought to.
    """
    centres = [positions.mean(axis=0) for positions in (points, wanted)]
    ours, theirs = points - centres[0], wanted - centres[1]
    u, sizes, vt = np.linalg.svd(theirs.T @ ours)  # [3, 3]
    signs = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    similarity = np.eye(4)
    similarity[:3, :3] = (sizes * signs).sum() / np.square(ours).sum() * (u * signs @ vt)
    similarity[:3, 3] = centres[1] - similarity[:3, :3] @ centres[0]
    return similarity
