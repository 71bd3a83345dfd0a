import numpy as np
import pytest

from datasets.normalize import normalizing_transform, transform_cameras, transform_points
from tests.small_scene import camera_poses


def ring_of_cameras() -> np.ndarray:
    poses = np.tile(np.eye(4), (7, 1, 1))
    poses[:, :3] = camera_poses(7)
    return np.linalg.inv(poses)


def curve(side: float) -> np.ndarray:
    i = np.arange(40)
    return np.stack([3 + 3 * np.sin(1.3 * i), 2 * np.cos(2.1 * i) - 2, 5 + 0.5 * side * np.sin(0.7 * i) ** 2], axis=1)


# What gsplat 1.5.3's example data loader makes of the same cameras and points.
GSPLAT = {
    1.0: [
        [0.20087815, 0.00223223, 0.00744557, -0.65284492],
        [0.00218368, -0.20101209, 0.00134995, -0.39360671],
        [0.00745995, -0.00126807, -0.20088602, 1.01791267],
    ],
    -1.0: [
        [0.20087815, 0.00223223, -0.00744557, -0.59103421],
        [-0.00218368, 0.20101209, 0.00134995, 0.37796221],
        [0.00745995, -0.00126807, 0.20088602, -0.92572597],
    ],
}


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_same_world_as_gsplat(side):
    transform = normalizing_transform(ring_of_cameras(), curve(side))
    expected = np.array(GSPLAT[side])
    signs = np.sign((transform[:3, :3] * expected[:, :3]).sum(axis=1))  # eigenvectors have no sign of their own
    assert signs[2] == 1  # but up is up
    np.testing.assert_allclose(transform[:3] * signs[:, None], expected, atol=1e-7)
    assert np.linalg.det(transform) > 0


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
        np.testing.assert_allclose(moved[:, :3, 1].mean(axis=0)[[0, 2]], 0, atol=1e-12)  # level


@pytest.mark.parametrize("turn", [np.eye(3), np.diag([1.0, -1.0, -1.0]), np.diag([-1.0, -1.0, 1.0])])
def test_one_camera_at_the_origin_gives_finite_numbers(turn):
    pose = np.eye(4)[None].copy()
    pose[0, :3, :3] = turn
    transform = normalizing_transform(pose, np.zeros((0, 3)))
    assert np.isfinite(transform).all()
    assert np.linalg.det(transform) == pytest.approx(1)
