"""Camera paths are calm: level, and never faster than 20 degrees a second, whatever cameras they follow."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from datasets.synthetic import build_city, plan_flight
from datasets.trajectories import SHAPES, through, trajectory
from datasets.trajectory_file import read_key_poses
from datasets.upright import up_direction
from errors import InputError

FPS = 30
TILTED = Rotation.from_rotvec([0.7, -0.4, 1.1]).as_matrix()  # of the world: nothing may depend on its axes


def looking(position: object, forward: object, above: object) -> np.ndarray:
    """A pose [4, 4] that looks along `forward`, the picture's upper edge towards `above`."""
    z = np.array(forward, float) / np.linalg.norm(forward)
    x = np.cross(z, above)
    x /= np.linalg.norm(x)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.stack([x, np.cross(z, x), z], axis=1), position
    return pose


def city() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    block = build_city(72.0, rng)
    poses = []
    for view in plan_flight(80, block.half_size, rng):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = view.rotation.T, view.position
        poses.append(pose)
    return np.stack(poses), rng.uniform([-36, -36, 0], [36, 36, 12], (500, 3))


def nadir_grid(to_and_fro: bool) -> tuple[np.ndarray, np.ndarray]:
    """A survey that looks straight down; the drone turns round at the end of each line, or flies sideways."""
    headings = [(0, -1 if to_and_fro and row % 2 else 1, 0) for row in range(8)]
    poses = [looking((10 * i - 40, 10 * row - 40, 40), (0, 0, -1), headings[row]) for row in range(8) for i in range(9)]
    return np.stack(poses), np.random.default_rng(0).uniform([-50, -50, 0], [50, 50, 8], (500, 3))


def room() -> tuple[np.ndarray, np.ndarray]:
    """Cameras in the middle of a room that look at its walls, up and down and all around."""
    rng = np.random.default_rng(0)
    poses = [
        looking(0.3 * rng.normal(size=3), (np.cos(a), np.sin(a), 0.4 * np.sin(5 * a)), (0, 0, 1))
        for a in np.linspace(0, 4 * np.pi, 70)
    ]
    return np.stack(poses), 4 * rng.normal(size=(500, 3))


def two() -> tuple[np.ndarray, np.ndarray]:
    """Two cameras that face each other, so that their right-hand sides lie on one line."""
    return np.stack([looking((-2, 0, 0), (1, 0, 0), (0, 0, 1)), looking((2, 0, 0), (-1, 0, 0), (0, 0, 1))]), np.zeros(
        (1, 3)
    )


SCENES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "city": city,
    "nadir grid, to and fro": lambda: nadir_grid(True),
    "nadir grid, one heading": lambda: nadir_grid(False),
    "room": room,
    "two cameras": two,
    "one camera": lambda: (two()[0][:1], np.zeros((1, 3))),
}


def tilted(poses: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moved = poses.copy()
    moved[:, :3, :3] = TILTED @ poses[:, :3, :3]
    moved[:, :3, 3] = poses[:, :3, 3] @ TILTED.T + [3, -2, 5]
    return moved, points @ TILTED.T + [3, -2, 5]


def degrees_a_second(poses: np.ndarray) -> np.ndarray:
    turns = np.einsum("fji,fjk->fik", poses[:-1, :3, :3], poses[1:, :3, :3])
    return FPS * np.rad2deg(np.arccos(np.clip((np.trace(turns, axis1=1, axis2=2) - 1) / 2, -1, 1)))


def degrees_off_level(poses: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.rad2deg(np.abs(np.arcsin(np.clip(poses[:, :3, 0] @ up, -1, 1))))


@pytest.mark.parametrize("name", SCENES)
def test_up_is_found_whatever_axes_the_world_has(name):
    up = up_direction(*tilted(*SCENES[name]()))
    assert np.linalg.norm(up - TILTED[:, 2]) < np.deg2rad(1.5)  # the city's photos are held up to 2 degrees off level


def test_up_does_not_follow_the_few_that_are_tilted():
    poses, points = room()
    for index in range(0, len(poses), 4):  # portraits, and some that are held anyhow
        poses[index, :3, :3] = (
            poses[index, :3, :3] @ Rotation.from_euler("z", 90 if index % 8 else 35, degrees=True).as_matrix()
        )
    assert up_direction(poses, points)[2] > np.cos(np.deg2rad(2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCENES)
def test_a_path_turns_calmly_and_never_rolls(name, shape):
    cameras, points = tilted(*SCENES[name]())
    poses = trajectory(shape, cameras, points, frames_per_second=FPS)
    assert np.isfinite(poses).all()
    np.testing.assert_allclose(
        poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1), np.tile(np.eye(3), (len(poses), 1, 1)), atol=1e-9
    )
    assert (np.linalg.det(poses[:, :3, :3]) > 0).all()
    assert degrees_a_second(poses).max() <= 20
    up = up_direction(cameras, points)
    assert degrees_off_level(poses, up).max() < 1e-5
    assert (-poses[:, :3, 1] @ up >= -1e-9).all(), "upside down"
    assert 10 <= len(poses) / FPS <= 60
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    assert np.abs(np.diff(steps)).max() <= 0.1 * steps.max() + 1e-12, "it jerks"


@pytest.mark.parametrize("seconds", [0.4, 5.0, 90.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_length_of_a_path_can_be_chosen_and_stays_calm(shape, seconds):
    poses = trajectory(shape, *city(), frames_per_second=FPS, seconds=seconds)
    assert len(poses) == seconds * FPS
    assert degrees_a_second(poses).max() <= 20


def test_a_flight_goes_where_cameras_are_and_sees_most_of_the_scene():
    cameras, points = city()
    poses = trajectory("flight", cameras, points, frames_per_second=FPS)
    to_camera = np.linalg.norm(poses[:, None, :3, 3] - cameras[None, :, :3, 3], axis=2).min(axis=1)
    assert to_camera.max() < 15  # metres; they stand 15 to 40 apart on their circles and grid
    seen = np.zeros(len(points), bool)
    for pose in poses[::30]:
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        seen |= (local[:, 2] > 0) & (np.abs(local[:, :2]) < 0.55 * local[:, 2:]).all(axis=1)
    assert seen.mean() > 0.9


@pytest.mark.parametrize("shape", ["orbit", "ellipse", "spiral"])
def test_what_cameras_look_at_stays_in_the_middle(shape):
    cameras = np.stack([looking((4 * np.cos(a), 4 * np.sin(a), 2), (-np.cos(a), -np.sin(a), -0.5), (0, 0, 1))
                        for a in np.linspace(0, 6, 40)])  # fmt: skip
    cameras, _ = tilted(cameras, np.zeros((1, 3)))
    poses = trajectory(shape, cameras, np.zeros((0, 3)), frames_per_second=FPS)
    local = np.einsum("fji,fj->fi", poses[:, :3, :3], [3, -2, 5] - poses[:, :3, 3])
    assert np.abs(local[:, :2] / local[:, 2:]).max() < 0.02
    distances = np.linalg.norm(local, axis=1)
    assert ((distances > 3) & (distances < 6)).all()  # cameras are sqrt(20) away


def test_in_a_room_one_looks_at_the_walls():
    cameras, points = room()
    for shape in SHAPES:
        poses = trajectory(shape, cameras, points, frames_per_second=FPS)
        assert np.linalg.norm(poses[:, :3, 3], axis=1).max() < 1.5


# ------------------------------------------------------------------------------------------------- given poses


def random_poses(count: int) -> np.ndarray:
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, random_state=1).as_matrix()
    poses[:, :3, 3] = np.random.default_rng(1).normal(size=(count, 3)) * 5
    return poses


def test_a_given_path_is_smooth_rigid_and_meets_its_poses():
    keys = random_poses(7)
    frames = through(keys, frames_per_second=FPS, seconds=60)
    np.testing.assert_allclose(frames[[0, -1]], keys[[0, -1]], atol=1e-9)
    for key in keys:
        nearest = np.linalg.norm(frames[:, :3, 3] - key[:3, 3], axis=1).argmin()
        np.testing.assert_allclose(frames[nearest], key, atol=0.1)
    steps = np.linalg.norm(np.diff(frames[:, :3, 3], axis=0), axis=1)
    assert np.abs(np.diff(steps)).max() < 0.02 * steps.max()
    assert degrees_a_second(through(keys, frames_per_second=FPS)).max() <= 20


@pytest.mark.parametrize("poses", [random_poses(1), np.repeat(random_poses(1), 3, axis=0), random_poses(2)])
def test_few_poses_and_poses_at_one_place(poses):
    frames = through(poses, frames_per_second=10, seconds=1)
    assert np.isfinite(frames).all()
    np.testing.assert_allclose(frames[-1], poses[-1], atol=1e-9)


def test_a_file_of_poses_is_read(tmp_path):
    file, poses = tmp_path / "path.json", random_poses(3)
    file.write_text(json.dumps({"camtoworlds": poses.round(5).tolist()}))
    read = read_key_poses(file)
    np.testing.assert_allclose(read, poses, atol=1e-4)
    np.testing.assert_allclose(read[:, :3, :3] @ read[:, :3, :3].transpose(0, 2, 1), [np.eye(3)] * 3, atol=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither flight, orbit, ellipse or spiral nor a file"),
        ("{", "is no JSON"),
        ("[]", "has no list"),
        ('{"camtoworlds": []}', "has no list"),
        ('{"camtoworlds": [[1, 2]]}', "Pose 0 .* 4 x 4"),
        ('{"camtoworlds": [[["a"]]]}', "Pose 0 .* 4 x 4"),
        (json.dumps({"camtoworlds": [np.eye(4).tolist(), np.diag([2.0, 1, 1, 1]).tolist()]}), "Pose 1 .* not rigid"),
        (json.dumps({"camtoworlds": [np.diag([1.0, 1, -1, 1]).tolist()]}), "Pose 0 .* not rigid"),
        ('{"camtoworlds": [[[NaN,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]]]}', "Pose 0 .* finite"),
    ],
)
def test_a_file_that_holds_no_poses_is_named(tmp_path, content, message):
    file = tmp_path / "path.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_key_poses(file)
