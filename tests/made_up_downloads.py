"""Small downloads in the exact layout of each public dataset: tiny pictures, made-up poses and points.

Every picture is a file of its own, so that a test can tell where each of them went.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycolmap
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

SIZE = (24, 18)  # width, height of every picture


@dataclass(frozen=True)
class View:
    """What a picture should end up as."""

    file: Path  # of the download
    worldtocam: np.ndarray  # [3, 4]


def aerial_poses(num_images: int, seed: int = 0) -> np.ndarray:
    """[n, 3, 4] world-to-camera poses on a grid over [-10, 10]^2, 2 above the ground, looking down with a tilt."""
    rng = np.random.default_rng(seed)
    positions = np.c_[rng.uniform(-10, 10, (num_images, 2)), np.full(num_images, 2.0)]
    turns = Rotation.from_rotvec(rng.uniform(0, 6, (num_images, 1)) * [0, 0, 1])
    camtoworlds = (turns * Rotation.from_rotvec([2.6, 0, 0])).as_matrix()
    rotations = camtoworlds.transpose(0, 2, 1)
    return np.concatenate([rotations, -rotations @ positions[..., None]], axis=2)


def write_pictures(paths: list[Path], kind: str = "JPEG", size: tuple[int, int] = SIZE) -> None:
    """The same tiny picture under every name, each a file of its own size and time."""
    content = io.BytesIO()
    gradient = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    Image.fromarray(gradient).save(content, kind)
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(paths):
        path.write_bytes(content.getvalue())
        os.utime(path, ns=(0, 10**18 + index))


def write_model(
    folder: Path, poses: dict[str, np.ndarray], cameras: list[pycolmap.Camera], num_points: int = 30, seed: int = 0
) -> None:
    """A COLMAP model whose k-th image has camera k % len(cameras), and whose points are each seen by two images."""
    model = pycolmap.Reconstruction()
    for camera_id, camera in enumerate(cameras, 1):
        camera.camera_id = camera_id
        model.add_camera_with_trivial_rig(camera)
    rng = np.random.default_rng(seed)
    for index, (name, pose) in enumerate(poses.items()):
        keypoints = rng.uniform(0, SIZE[1], (3, 2))
        image = pycolmap.Image(name=name, keypoints=keypoints, camera_id=index % len(cameras) + 1, image_id=index + 1)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
    for index in range(num_points):
        track = pycolmap.Track()
        for image_id in (1 + index % len(poses), 1 + (index + 1) % len(poses)):
            free = [i for i, p in enumerate(model.images[image_id].points2D) if not p.has_point3D()]
            if free:
                track.add_element(image_id, free[0])
        model.add_point3D(rng.uniform(-10, 10, 3), track, rng.integers(0, 256, 3, dtype=np.uint8))
    folder.mkdir(parents=True)
    model.write_binary(str(folder))


def pinhole(focal_length: float = 20.0, size: tuple[int, int] = SIZE) -> pycolmap.Camera:
    params = (focal_length, focal_length, size[0] / 2, size[1] / 2)
    return pycolmap.Camera(model="PINHOLE", width=size[0], height=size[1], params=params)


def mega_nerf(
    download: Path, colmap: Path, num_images: int, test_every: int, photos: Path | None = None
) -> tuple[dict[str, View], dict[str, View]]:
    """The layout of Mega-NeRF: every `test_every`-th picture is in val. Without `photos` the pictures are in rgbs.

    Returns:
        Training and test views by the name that COLMAP knows.
    """
    poses = aerial_poses(num_images)
    halves: dict[str, dict[str, View]] = {"train": {}, "val": {}}
    mappings = []
    metadata = io.BytesIO()
    camera = {"W": SIZE[0], "H": SIZE[1], "intrinsics": torch.tensor([20.0, 20.0, SIZE[0] / 2, SIZE[1] / 2])}
    torch.save(camera | {"distortion": torch.tensor([0.05, -0.01, 0.0, 0.0]), "c2w": torch.zeros(3, 4)}, metadata)
    for part in halves:
        (download / part / "metadata").mkdir(parents=True)
    for index in range(num_images):
        part = "train" if index % test_every else "val"
        photo = f"{index // 1000 + 1}/DJI_{index % 1000:04d}.JPG"
        mappings.append(f"{photo},{index:06d}.pt\n")
        (download / part / "metadata" / f"{index:06d}.pt").write_bytes(metadata.getvalue())
        file = photos / photo if photos else download / part / "rgbs" / f"{index:06d}.jpg"
        halves[part][f"{index:06d}.jpg"] = View(file, poses[index])
    write_pictures([view.file for half in halves.values() for view in half.values()])
    (download / "mappings.txt").write_text("".join(mappings))
    torch.save({"origin_drb": torch.zeros(3), "pose_scale_factor": 1.0}, download / "coordinates.pt")
    for seed, (part, half) in enumerate(halves.items()):
        # One camera in common, and another in each half.
        cameras = [pinhole(), pinhole(21.0 + seed)] if part == "train" else [pinhole(21.0 + seed), pinhole()]
        write_model(colmap / part / "sparse/0", {n: v.worldtocam for n, v in half.items()}, cameras, seed=seed)
    return halves["train"], halves["val"]


def matrix_city(
    aerial: Path, num_train: int, num_test: int, point_cloud: Path | None = None, in_input: bool = False
) -> tuple[list[View], list[View]]:
    """The layout of MatrixCity's small_city/aerial with two blocks, and its point cloud."""
    halves = []
    for part, count, suffix in (("train", num_train, ""), ("test", num_test, "_test")):
        poses = aerial_poses(count, seed=len(part))
        frames, views = [], []
        for index, pose in enumerate(poses):
            block = f"block_{1 + 2 * index // count}{suffix}"
            name = f"{index % (count // 2 + 1):04d}.png"
            camtoworld = np.linalg.inv(np.r_[pose, [[0, 0, 0, 1]]])
            camtoworld[:3, 1:3] *= -1  # OpenGL's axes
            camtoworld[3, 3] = 0.01  # as published
            frames.append({"file_path": f"../../{part}/{block}/{name}", "transform_matrix": camtoworld.tolist()})
            folder = aerial / part / block / "input" if in_input else aerial / part / block
            views.append(View(folder / name, pose))
        camera = {
            "fl_x": 20.0,
            "fl_y": 20.0,
            "cx": 12.0,
            "cy": 9.0,
            "w": 24.0,
            "h": 18.0,
            "k1": 0,
            "camera_angle_x": 1.0,
        }
        path = aerial / "pose/block_all" / f"transforms_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(camera | {"frames": frames}))
        write_pictures([view.file for view in views], "PNG")
        halves.append(views)
    if point_cloud is not None:
        write_point_cloud(point_cloud)
    return halves[0], halves[1]


def write_point_cloud(path: Path, num_points: int = 500, scale: float = 1.0) -> None:
    """A binary PLY as Open3D writes it: doubles and bytes."""
    rng = np.random.default_rng(0)
    fields = [(n, "<f8") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")]
    rows = np.zeros(num_points, fields)
    for axis, extent in zip("xyz", (10, 10, 0.5), strict=True):
        rows[axis] = rng.uniform(-extent, extent, num_points) * scale
    properties = "".join(f"property {'uchar' if len(n) > 1 else 'double'} {n}\n" for n in rows.dtype.names)
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment Created by Open3D\nelement vertex {num_points}\n{properties}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.encode() + b"end_header\n" + rows.tobytes())


def gauu_scene(
    scene: Path, num_images: int = 30, model_dir: str = "sparse/0", points_in_ply: bool = False
) -> list[View]:
    """A scene of GauU-Scene; its points may come in points3D.ply alone."""
    poses = aerial_poses(num_images)
    views = {f"DJI_{i:04d}.JPG": View(scene / "images" / f"DJI_{i:04d}.JPG", pose) for i, pose in enumerate(poses)}
    write_pictures([view.file for view in views.values()])
    write_model(scene / model_dir, {n: v.worldtocam for n, v in views.items()}, [pinhole()])
    if points_in_ply:
        (scene / model_dir / "points3D.bin").unlink()
        write_point_cloud(scene / model_dir / "points3D.ply", 40)
    return list(views.values())
