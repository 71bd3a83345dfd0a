"""The synthetic city as real captures are: other lights, white skies, few photos with depth maps, or poses off."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from datasets.normalize import camera_alignment, transform_cameras
from datasets.synthetic import (
    Camera,
    City,
    Floats,
    View,
    build_city,
    cast,
    look_at,
    plan_flight,
    points_in_view,
    render,
    sample_points,
    screen_windows,
    write_colmap,
)
from modules.poses import turns_upwards

SIZE = 72.0  # metres, of the block
POINT_NOISE = 0.15  # metres
TURNED = 0.3  # degrees, by which poses are off
MOVED = 0.003 * SIZE  # metres, the same


def write_city(
    data_dir: Path,
    *,
    num_views: int,
    width: int,
    height: int,
    num_points: int,
    lights: Literal["none", "held out", "all"] = "none",
    sky: float | None = None,
    depths: bool = False,
    poses: bool = False,
    first: int = 0,
    seed: int = 0,
) -> list[View]:
    """Write a city block as a COLMAP dataset, with trouble.

    Args:
        data_dir: A folder that is not there.
        num_views: Photos.
        width: Of a photo, in pixels.
        height: The same.
        num_points: Of the sparse cloud.
        lights: Which photos are lit: two flights in turns, each in its own light; gain and offset of each channel
            differ between their photos too. "held out": only every eighth, which a run holds out.
        sky: The flight is low and looks to the horizon, above which all is as bright as this, from 0 to 1; None: the
            flight looks down.
        depths: Write depths/NAME.npy, in a unit and from a zero of its own for each photo, as networks give them.
        poses: The model has the cameras of all photos but every eighth, which a run holds out, turned by 0.3 degrees
            and moved by 0.3 % of the block's size, each its own way (`poses_off`).
        first: So many photos, evenly out of the flight, come before the others.
        seed: Of the city, views, points, lights and what poses are off by.

    Returns:
        The views that the photos show.
    """
    city = build_city(SIZE, np.random.default_rng([seed, 0]))
    camera = Camera(width, height)
    rng = np.random.default_rng([seed, 1])
    views = low_flight(num_views, rng) if sky is not None else plan_flight(num_views, city.half_size, rng)
    if first:
        every = -(-num_views // first)
        views = views[::every] + [view for index, view in enumerate(views) if index % every]
    points, colors = points_on_surfaces(city, camera, views, num_points, np.random.default_rng([seed, 2]))
    noisy = points + np.random.default_rng([seed, 3]).normal(0, POINT_NOISE, points.shape)
    names = [f"{number:03d}.png" for number in range(num_views)]
    rng = np.random.default_rng([seed, 4])
    with tempfile.TemporaryDirectory(dir=data_dir.parent) as workspace:
        partial = Path(workspace) / "city"
        for folder in ("images", "sparse/0", *(["depths"] if depths else [])):
            (partial / folder).mkdir(parents=True)
        for number, (view, name) in enumerate(zip(views, names, strict=True)):
            picture = render(city, camera, view) / 255.0
            depth = depths_of(city, camera, view)
            if sky is not None:
                picture[depth <= 0] = sky
            lit = in_light(picture, flight_of(number), rng)  # always, so that all draw the same
            if lights == "all" or (lights == "held out" and number % 8 == 0):
                picture = lit
            cv2.imwrite(str(partial / "images" / name), np.round(255 * picture.clip(0, 1))[..., ::-1].astype(np.uint8))
            if depths:
                unit, zero = rng.uniform(0.01, 10), rng.uniform(0, 0.01)
                np.save(partial / "depths" / f"{Path(name).stem}.npy", ((1 / depth + zero) * unit).astype(np.float32))
        seen = [points_in_view(city, camera, view, points) for view in views]
        rng = np.random.default_rng([seed, 5])
        given = poses_off(views, rng) if poses else views
        write_colmap(partial / "sparse" / "0", camera, given, names, points, noisy, colors, seen)
        partial.rename(data_dir)
    return views


def poses_off(views: list[View], rng: np.random.Generator) -> list[View]:
    """Return views of which all but every eighth are `off`, and as near to the truth together as they can be.

    What they have in common, a similarity of the whole world, no photo tells: corrected, they could not find the truth.
    Nor do they look too high or too low together, which `--pose_opt` leaves alone (`modules/poses.py`): of errors of
    their own n cameras have 1 / sqrt(n) of that.
    """
    trained = np.flatnonzero(np.arange(len(views)) % 8)
    truth = camtoworlds_of(views)[trained]
    axes, directions = directions_of(rng, 2, len(trained))
    upwards = turns_upwards(torch.linalg.inv(torch.from_numpy(truth))).numpy()
    axes -= (axes * upwards).sum() / np.square(upwards).sum() * upwards
    found = camtoworlds_of([off(views[number], *both) for number, *both in zip(trained, axes, directions, strict=True)])
    given = list(views)
    for number, pose in zip(trained, aligned(found, truth), strict=True):
        given[number] = View(pose[:3, :3].T, pose[:3, 3])
    return given


def directions_of(rng: np.random.Generator, *shape: int) -> Floats:
    """Return random unit vectors [*shape, 3]."""
    vectors = rng.normal(size=(*shape, 3))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def off(view: View, axis: Floats, direction: Floats) -> View:
    """Return a view turned by `TURNED` times an axis [3], in its axes, and moved by `MOVED` times a direction [3]."""
    turn = Rotation.from_rotvec(np.radians(TURNED) * axis).as_matrix()
    return View(turn @ view.rotation, view.position + MOVED * direction)


def pose_errors(found: Floats, truth: Floats) -> tuple[float, float]:
    """Return the mean degrees by which cameras are turned, and the mean distance by which they stand, off the truth.

    Args:
        found: [n, 4, 4], camera to world; they are compared as they are `aligned`.
        truth: [n, 4, 4], the same in truth; distances are in its units.
    """
    poses = aligned(found, truth)
    distances = np.linalg.norm(poses[:, :3, 3] - truth[:, :3, 3], axis=1)
    between = Rotation.from_matrix(poses[:, :3, :3].transpose(0, 2, 1) @ truth[:, :3, :3])
    return float(np.degrees(between.magnitude()).mean()), float(distances.mean())


def aligned(found: Floats, truth: Floats) -> Floats:
    """Return poses [n, 4, 4] after the similarity that brings the cameras nearest to the true ones.

    Photos alone cannot tell where the world's origin is, how it is turned, and how long its unit is.
    """
    extent = np.linalg.norm(truth[:, :3, 3] - truth[:, :3, 3].mean(axis=0), axis=1).max()
    return transform_cameras(camera_alignment(found, truth, float(extent)), found)


def camtoworlds_of(views: list[View]) -> Floats:
    """Return the poses [n, 4, 4] of views, camera to world."""
    poses = np.tile(np.eye(4), (len(views), 1, 1))
    poses[:, :3, :3] = [view.rotation.T for view in views]
    poses[:, :3, 3] = [view.position for view in views]
    return poses


def flight_of(number: int) -> int:
    """Return on which of two flights, 0 or 1, a photo was taken: in turns, and so are those that a run holds out."""
    return (number + number // 8) % 2


def in_light(picture: Floats, flight: int, rng: np.random.Generator) -> Floats:
    """Return a picture [H, W, 3] as one of two flights takes it: with its gains and offsets, and some of its own.

    Of pictures with a gamma of 2.2 a stop of light is a factor of 1.37. Low sun and cloud are two stops apart, where
    exposure and white balance stay as they were set for the sun: so cloud is darker by 1.9, bluer, and has some haze.
    What a camera chooses by itself differs from photo to photo by thirds of a stop, here two of them up or down. Of a
    photo in the sun 3 % of all values are clipped, under cloud none.
    """
    own = 2 ** rng.uniform(-1 / 3, 1 / 3) * rng.uniform(0.95, 1.05, 3)
    gains = np.array([[1.2, 1.05, 0.9], [0.5, 0.55, 0.65]])[flight] * own
    offsets = np.array([0.0, 0.05])[flight] + rng.uniform(0, 0.05, 3)
    return picture * gains + offsets


def low_flight(num_views: int, rng: np.random.Generator) -> list[View]:
    """Return views on a circle around the block, just above its roofs; a third of each is above the horizon."""
    angles = 2 * np.pi * np.arange(num_views) / num_views
    outward = np.stack([np.cos(angles), np.sin(angles), np.zeros(num_views)], axis=1)
    up = np.array([0.0, 0.0, 1.0])
    return [look_at(75 * to + 45 * up, 35 * up, up, rng) for to in outward]


def points_on_surfaces(
    city: City, camera: Camera, views: list[View], count: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return points [P, 3] that views see, none of them in the sky, and their colours [P, 3]; at most `count`."""
    points, colors = sample_points(city, camera, views, count, rng)
    near = (np.abs(points[:, :2]) < 1.5 * SIZE).all(1) & (points[:, 2] > -1)
    return points[near], colors[near]


def depths_of(city: City, camera: Camera, view: View) -> Floats:
    """Return the depth [H, W] of each pixel along the camera's axis, in metres; below 0 above the horizon."""
    columns, rows = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    rays = np.tensordot(view.rotation.T, camera.rays(columns, rows), 1)
    return cast(city, view.position, rays, screen_windows(city, camera, view))[0]
