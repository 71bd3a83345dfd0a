"""What is known of the depths in photos: of the points that each photo saw, and of depth maps in `depths/`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from datasets.camera import Camera
from datasets.colmap import DistanceMap
from datasets.model_choice import Say
from datasets.normalize import transform_points
from errors import InputError, counted

FOLDER = "depths"
SUFFIXES = (".npy", ".png")
ROUNDS = 20  # of a fit
FEWEST = 8  # points with a value in the map, of which scale and shift are fitted
SHAPE_SLACK = 0.02  # by which a map's ratio of sides may be another than its photo's: networks round them
MOST_NAMED = 3


@dataclass(frozen=True)
class Depths:
    """Hold where depths of photos come from.

    A map holds a x + b, where x is one over the depth and a > 0 and b are its own: what networks write, and any
    disparity. They are fitted to the photo's points, as Hierarchical 3DGS does (Kerbl et al. 2024). A map of distances,
    which another program's file names, holds the depth itself in a known unit.
    """

    points: Mapping[int, np.ndarray]  # by image, [k, 3] float64, what it saw, in the normalized world
    maps: Mapping[int, Path]  # by image, a map that is used
    fits: Mapping[int, tuple[float, float]]  # by image, what takes the map's values to one over the depth
    of_distances: Collection[int] = ()  # images whose maps hold distances, one over which counts

    def inverse(self, image: int, camera: Camera, camtoworld: np.ndarray) -> np.ndarray:
        """Return one over the depth of an undistorted picture's pixels, [H, W] float32; 0 where it is not known.

        Args:
            image: Its number.
            camera: Its camera.
            camtoworld: [4, 4].

        Raises:
            InputError: Its map cannot be read any more.
        """
        if image not in self.maps:
            return of_points(self.points.get(image, np.zeros((0, 3))), camera, camtoworld)
        values = read_map(self.maps[image])
        if image in self.of_distances:
            values = np.divide(1, values, out=np.zeros_like(values), where=values > 0)
        values, known = _undistorted(values, camera)
        scale, shift = self.fits[image]
        inverse = scale * values + shift
        return np.where(known & (inverse > 0), inverse, 0).astype(np.float32)


def find_depths(
    data_dir: Path,
    names: list[str],
    train_ids: np.ndarray,
    cameras_of: Callable[[int], Camera],
    seen_in: Callable[[int], np.ndarray | None],
    camtoworlds: np.ndarray,
    tracks: Mapping[str, np.ndarray],
    distances: Mapping[str, DistanceMap],
    transform: np.ndarray,
    say: Say,
) -> Depths:
    """Find the depths of training photos, look at each map once, and fit it.

    Args:
        data_dir: The dataset, with or without `depths/`, in which maps bear their photos' names.
        names: Of the n photos.
        train_ids: Those that are trained on.
        cameras_of: Returns the camera of a photo by its number.
        seen_in: Returns which pixels [H, W] of an undistorted photo masks do not hide; None: they hide none.
        camtoworlds: [n, 4, 4] in the normalized world.
        tracks: By name, the points [k, 3] that a photo saw, in the model's world.
        distances: By name, maps of distances; where a photo has one, it goes before a map in `depths/`.
        transform: [4, 4] from the model's world to the normalized one.
        say: Is told what is used.

    Raises:
        InputError: A map cannot be read or is not of its photo; or nothing is known of any depth.
    """
    points = {
        image: transform_points(transform, tracks[names[image]])
        for image in train_ids.tolist()
        if len(tracks.get(names[image], ()))
    }
    named = {image: distances[names[image]] for image in train_ids.tolist() if names[image] in distances}
    files = {
        image: file
        for image in train_ids.tolist()
        if image not in named and (file := _map_of(data_dir / FOLDER, names[image]))
    }

    def check(image: int) -> None:
        _check_shape(named[image].path, read_map(named[image].path), cameras_of(image))

    def fitted(image: int) -> tuple[float, float] | None:
        camera, pose = cameras_of(image), camtoworlds[image]
        values = read_map(files[image])
        _check_shape(files[image], values, camera)
        values, known = _undistorted(values, camera)
        seen = seen_in(image)
        known = known if seen is None else known & seen
        return fit(values, known, of_points(points.get(image, np.zeros((0, 3))), camera, pose))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        found = dict(zip(files, pool.map(fitted, files), strict=True))
        list(pool.map(check, named))
    fits = {image: both for image, both in found.items() if both is not None}
    if not points and not fits and not named:
        raise InputError(
            f"--depth_loss finds no depths in {data_dir}: its model, or that of --model_dir, does not say which "
            f"points each photo saw, without which {FOLDER}/ cannot be used either. Give a COLMAP model "
            "with its observations."
        )
    by_points = len(points.keys() - fits.keys() - named.keys())
    of_named = f"from the depth images that the model names for {len(named):,}, " if named else ""
    say(
        f"--depth_loss: depths come {of_named}from maps in {FOLDER}/ for {counted(len(fits), 'training photo')}, and "
        f"from the points that it saw for {by_points:,}."
    )
    missing = [names[image] for image in train_ids.tolist() if image not in files and image not in named]
    if missing and any(file.is_file() for file in (data_dir / FOLDER).rglob("*")):
        wanted = " or ".join(f"{PurePosixPath(FOLDER, missing[0]).with_suffix(suffix)}" for suffix in SUFFIXES)
        say(
            f"Warning: {FOLDER}/ has no map of {_listed(missing)}: the points that were seen are used there. That of "
            f"{missing[0]} would be {wanted}."
        )
    useless = [str(files[image].relative_to(data_dir)) for image in files if image not in fits]
    if useless:
        say(
            f"Warning: {_listed(useless)} cannot be fitted to the points that the photo saw, and the points are "
            f"used: a map needs values other than 0 at {FEWEST} of them, which rise with one over the depth."
        )
    world = float(np.cbrt(np.linalg.det(transform[:3, :3])))  # the model's unit in the normalized world
    maps = {image: files[image] for image in fits} | {image: known.path for image, known in named.items()}
    fits |= {image: (1 / (known.unit * world), 0.0) for image, known in named.items()}
    return Depths(points, maps, fits, frozenset(named))


def say_unused_depths(data_dir: Path, distances: Mapping[str, DistanceMap], say: Say) -> None:
    """Say that a dataset has depth maps, where it has, and what would use them; for a training without.

    Args:
        data_dir: The dataset, with or without `depths/`.
        distances: By name, maps of distances that its model names.
        say: Takes the sentence.
    """
    there = ["images that the model names"] if distances else []
    if any(file.suffix in SUFFIXES for file in (data_dir / FOLDER).rglob("*")):
        there.append(f"maps in {FOLDER}/")
    if there:
        say(f"Depth {' and '.join(there)} are not used; --depth_loss trains with them.")


def of_points(points: np.ndarray, camera: Camera, camtoworld: np.ndarray) -> np.ndarray:
    """Return one over the depth of points [k, 3] at their pixels, [H, W] float32; 0 elsewhere, the nearest counts."""
    inverse = np.zeros((camera.height, camera.width), np.float32)
    in_camera = (points - camtoworld[:3, 3]) @ camtoworld[:3, :3]
    in_camera = in_camera[in_camera[:, 2] > 0]
    columns, rows = np.floor((in_camera / in_camera[:, 2:]) @ camera.K[:2].T).T
    inside = (columns >= 0) & (columns < camera.width) & (rows >= 0) & (rows < camera.height)
    places = rows[inside].astype(np.int64), columns[inside].astype(np.int64)
    np.maximum.at(inverse, places, (1 / in_camera[inside, 2]).astype(np.float32))
    return inverse


def fit(values: np.ndarray, known: np.ndarray, inverse: np.ndarray) -> tuple[float, float] | None:
    """Return scale and shift that take a map's values to one over the depth, so that outliers weigh little.

    Args:
        values: [H, W] of the map.
        known: [H, W] bool.
        inverse: [H, W], of points; 0 where there is none.

    Returns:
        None where there are too few points, or values do not rise and fall with one over the depth.
    """
    at = known & (inverse > 0)
    if at.sum() < FEWEST:
        return None
    x, y = values[at].astype(np.float64), inverse[at].astype(np.float64)
    x, y, weights = np.stack([x, np.ones_like(x)], axis=1), y, np.ones_like(y)
    spread = np.median(np.abs(y - np.median(y)))
    for _ in range(ROUNDS):  # the least sum of absolute differences, by least squares
        (scale, shift), *_ = np.linalg.lstsq(x * weights[:, None], y * weights, rcond=None)
        differences = np.abs(x @ (scale, shift) - y)
        weights = 1 / np.sqrt(np.maximum(differences, 1e-3 * spread + 1e-12))
    if scale <= 0 or np.median(differences) > 0.5 * spread:
        return None
    return float(scale), float(shift)


def read_map(path: Path) -> np.ndarray:
    """Read a depth map: [h, w] float32, 0 where it holds nothing.

    Raises:
        InputError: It is none.
    """
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except PermissionError:
        raise
    except (OSError, ValueError, EOFError, cv2.error) as error:
        raise InputError(f"{path} cannot be read as a depth map: write it again, or remove it.") from error
    if values is None or values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fui":
        raise InputError(f"{path} is no depth map, which has one channel of numbers: write it so, or remove it.")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return np.where(np.isfinite(values), values, 0)


def _map_of(folder: Path, name: str) -> Path | None:
    candidates = (
        folder / f"{stem}{suffix}" for stem in (PurePosixPath(name).with_suffix(""), name) for suffix in SUFFIXES
    )
    return next((path for path in candidates if path.is_file()), None)


def _check_shape(path: Path, values: np.ndarray, camera: Camera) -> None:
    height, width = values.shape
    ratio = (width * camera.source_height) / (height * camera.source_width)
    if abs(ratio - 1) > SHAPE_SLACK:
        raise InputError(
            f"{path} is {width}x{height}, which is not the shape of its photo ({camera.source_width}x"
            f"{camera.source_height}): make it of the whole photo, at any size, or remove it."
        )


def _undistorted(values: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Return a map as the undistorted picture shows it, [H, W], and where all that makes a pixel is known."""
    size = camera.source_width, camera.source_height
    known = (values != 0).astype(np.float32)
    if values.shape != size[::-1]:
        values, known = (cv2.resize(t, size, interpolation=cv2.INTER_LINEAR) for t in (values, known))
    undistorted = camera.undistort(np.where(known > 0.999, np.uint8(255), np.uint8(0))) == 255
    if camera.valid_mask is not None:
        undistorted &= camera.valid_mask
    return camera.undistort(values), undistorted


def _listed(names: list[str]) -> str:
    if len(names) <= MOST_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:MOST_NAMED])} and {len(names) - MOST_NAMED:,} more"
