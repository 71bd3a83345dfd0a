import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from datasets.normalize import far_cameras, normalizing_transform, transform_cameras, transform_points
from tests.small_scene import camera_poses


def ring_of_cameras() -> np.ndarray:
    poses = np.tile(np.eye(4), (7, 1, 1))
    poses[:, :3] = camera_poses(7)
    return np.linalg.inv(poses)


def curve(side: float) -> np.ndarray:
    i = np.arange(40)
    return np.stack([3 + 3 * np.sin(1.3 * i), 2 * np.cos(2.1 * i) - 2, 5 + 0.5 * side * np.sin(0.7 * i) ** 2], axis=1)


# The axes that gsplat 1.5.3's example data loader gives the same cameras and points, as rows of any length.
GSPLAT = {
    1.0: [
        [0.20087815, 0.00223223, 0.00744557],
        [0.00218368, -0.20101209, 0.00134995],
        [0.00745995, -0.00126807, -0.20088602],
    ],
    -1.0: [
        [0.20087815, 0.00223223, -0.00744557],
        [-0.00218368, 0.20101209, 0.00134995],
        [0.00745995, -0.00126807, 0.20088602],
    ],
}


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_same_axes_as_gsplat(side):
    transform = normalizing_transform(ring_of_cameras(), curve(side))
    axes, expected = transform[:3, :3], np.array(GSPLAT[side])
    axes /= np.cbrt(np.linalg.det(axes))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    signs = np.sign((axes * expected).sum(axis=1))  # eigenvectors have no sign of their own
    assert signs[2] == 1  # but up is up
    np.testing.assert_allclose(axes * signs[:, None], expected, atol=1e-7)
    assert np.linalg.det(axes) == pytest.approx(1)


def test_centred_on_the_points_and_scaled_to_the_cameras():
    """As gsplat does where the origin lies in the middle of the cameras."""
    cameras, points = ring_of_cameras(), curve(1.0)
    transform = normalizing_transform(cameras, points)
    np.testing.assert_allclose(np.median(transform_points(transform, points), axis=0), 0, atol=1e-12)
    moved = transform_cameras(transform, cameras)
    middle = np.median(moved[:, :3, 3], axis=0)
    nearest = []
    for pose in moved:  # the foot of the perpendicular from the middle to the viewing ray
        position, forward = pose[:3, 3], pose[:3, 2]
        nearest.append(position + forward * (forward @ (middle - position)))
    distances = [np.linalg.norm(pose[:3, 3] - np.median(nearest, axis=0)) for pose in moved]
    assert np.median(distances) == pytest.approx(1)


def similarity(seed: int, scale: float, offset: float) -> np.ndarray:
    transform = np.eye(4)
    transform[:3, :3] = scale * Rotation.random(random_state=seed).as_matrix()
    transform[:3, 3] = offset * np.array([0.4, -1.0, 0.3])
    return transform


PLACES = [(1, 1.0, 0.0), (2, 1.0, 1000.0), (3, 10.0, 5.4e6), (4, 1e-3, 6.4e3), (5, 1e4, 1e9), (6, 1e-6, 0.0)]


@pytest.mark.parametrize(("seed", "scale", "offset"), PLACES)
@pytest.mark.parametrize("num_points", [40, 3, 0])
def test_the_input_world_makes_no_difference(seed, scale, offset, num_points):
    """Whatever shift, turn and scale it has; up to the rounding of its coordinates."""
    cameras, points = ring_of_cameras(), curve(1.0)[:num_points]
    transform = normalizing_transform(cameras, points)
    world = similarity(seed, scale, offset)
    other_cameras, other_points = transform_cameras(world, cameras), transform_points(world, points)
    other = normalizing_transform(other_cameras, other_points)
    atol = 1e-9 + 1e-14 * offset / scale
    for expected, actual in (
        (transform_cameras(transform, cameras), transform_cameras(other, other_cameras)),
        (transform_points(transform, points), transform_points(other, other_points)),
    ):
        np.testing.assert_allclose(actual, expected, atol=atol)
    # The way back ends in the input's coordinates.
    back = transform_points(np.linalg.inv(other), transform_points(other, other_points))
    np.testing.assert_allclose(back, other_points, rtol=0, atol=1e-14 * (scale + offset) * 100)


@pytest.mark.parametrize(("seed", "scale", "offset"), PLACES)
def test_points_without_a_tail_point_to_the_cameras(seed, scale, offset):
    """A symmetric, flat cloud says nothing of up and down, and rounding must not."""
    grid = np.stack(np.meshgrid([-3.0, -1, 1, 3], [-2.0, 0, 2], [0.0]), axis=-1).reshape(-1, 3)
    cameras = ring_of_cameras()
    cameras[:, :3, 3] += [5.0, 4.0, 3.0]
    world = similarity(seed, scale, offset)
    expected = transform_points(normalizing_transform(cameras, grid), grid)
    other_cameras, other_grid = transform_cameras(world, cameras), transform_points(world, grid)
    transform = normalizing_transform(other_cameras, other_grid)
    np.testing.assert_allclose(transform_points(transform, other_grid), expected, atol=1e-8 + 1e-13 * offset / scale)
    assert np.median(transform_cameras(transform, other_cameras)[:, 2, 3]) > 0


def test_one_far_camera_is_found_and_moves_nothing():
    cameras, points = ring_of_cameras(), curve(1.0)
    transform = normalizing_transform(cameras, points)
    assert not far_cameras(cameras[:, :3, 3], points).any()
    for distance in (100.0, 3e5):
        moved = cameras.copy()
        moved[2, :3, 3] -= distance * moved[2, :3, 2]
        assert np.flatnonzero(far_cameras(moved[:, :3, 3], points)).tolist() == [2]
        changed = normalizing_transform(moved, points)
        assert np.cbrt(np.linalg.det(changed[:3, :3]) / np.linalg.det(transform[:3, :3])) == pytest.approx(1, abs=0.3)


def test_most_cameras_at_one_place_do_not_make_the_others_far():
    """Eight pictures from a tripod, two from a metre beside it, of a room of ten metres."""
    positions = 0.01 * np.random.default_rng(0).normal(size=(10, 3))
    positions[8:] += [1.0, 0.0, 0.0]
    assert not far_cameras(positions, 5 * np.random.default_rng(1).normal(size=(100, 3))).any()


def test_poses_stay_rigid_and_see_the_same():
    cameras, points = ring_of_cameras(), curve(1.0)
    transform = normalizing_transform(cameras, points)
    moved, moved_points = transform_cameras(transform, cameras), transform_points(transform, points)
    identity = np.tile(np.eye(3), (7, 1, 1))
    np.testing.assert_allclose(moved[:, :3, :3] @ moved[:, :3, :3].transpose(0, 2, 1), identity, atol=1e-12)
    scale = np.cbrt(np.linalg.det(transform[:3, :3]))
    for before, after in zip(cameras, moved, strict=True):
        np.testing.assert_allclose(
            scale * (points - before[:3, 3]) @ before[:3, :3], (moved_points - after[:3, 3]) @ after[:3, :3], atol=1e-12
        )


def test_cameras_alone_are_enough():
    cameras = ring_of_cameras()
    for few in (0, 3):
        moved = transform_cameras(normalizing_transform(cameras, curve(1.0)[:few]), cameras)
        assert np.median(np.linalg.norm(moved[:, :3, 3], axis=1)) == pytest.approx(1)
        np.testing.assert_allclose(moved[:, :3, 1].mean(axis=0)[[0, 2]], 0, atol=1e-12)  # level, and y is down
        assert moved[:, 1, 1].mean() > 0


@pytest.mark.parametrize("turn", [np.eye(3), np.diag([1.0, -1.0, -1.0]), np.diag([-1.0, -1.0, 1.0])])
def test_one_camera_at_the_origin_gives_finite_numbers(turn):
    pose = np.eye(4)[None].copy()
    pose[0, :3, :3] = turn
    transform = normalizing_transform(pose, np.zeros((0, 3)))
    assert np.isfinite(transform).all()
    assert np.linalg.det(transform) == pytest.approx(1)
