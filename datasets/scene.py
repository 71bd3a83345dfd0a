"""Load a dataset into one normalized scene."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datasets.camera import Camera, check_shape, make_camera
from datasets.colmap import SparseModel, has_model, read_tracks
from datasets.consistency import check_points, far_camera_warnings
from datasets.depths import Depths, find_depths, say_unused_depths
from datasets.image_files import decode_alpha
from datasets.images import prepare_images
from datasets.inventory import say_what_is_used, seen_ids, subset_of_points
from datasets.masks import seen_pixels
from datasets.model_choice import Say, load_sparse_model, points_ply, quiet
from datasets.normalize import (
    far_cameras,
    normalizing_transform,
    place_tolerance,
    transform_cameras,
    transform_points,
)
from datasets.ply import read_points
from datasets.splits import split_indices
from datasets.undistortion import undistortion_warnings
from errors import InputError

# Survey coordinates stay below 1e8 m. Squares and sums of what is below this bound stay finite, and float64 is fine
# enough for them.
LARGEST_COORDINATE = 1e12
LOOKED_AT = 10_000  # points at most, of which the distances that cameras see are usual


@dataclass(frozen=True)
class Scene:
    """Hold pictures, cameras and initial points of a dataset, in the normalized world.

    n images ordered by name, P points. A point x of the input world is at `transform @ [x, 1]`; the inverse takes
    an export back to the input's coordinates. A scene that is trained further stays where it was trained, so
    `transform` is then the checkpoint's and `own_transform` that which the dataset as it is now would have.
    """

    data_dir: Path
    image_names: list[str]  # n, relative to the folder of pictures
    image_paths: list[Path]  # n, at the chosen scale
    mask_paths: list[Path | None]  # n, files that hide parts of pictures
    camtoworlds: np.ndarray  # [n, 4, 4] float64, OpenCV convention
    cameras: list[Camera]
    camera_indices: np.ndarray  # [n] int64, into cameras
    train_ids: np.ndarray  # int64, ascending
    test_ids: np.ndarray  # int64, ascending
    points: np.ndarray  # [P, 3] float32
    points_rgb: np.ndarray  # [P, 3] uint8
    transform: np.ndarray  # [4, 4] float64, input world -> normalized world
    own_transform: np.ndarray  # [4, 4] float64, as `normalizing_transform` makes it of these cameras and points
    far_ids: np.ndarray  # int64, pictures whose cameras stand far off the scene
    scene_scale: float  # largest distance of a camera from the cameras' mean position, without those far off
    depths: Depths | None = None  # where depths of training photos come from; None where nobody asked for them


def load_scene(
    data_dir: Path | str,
    *,
    model_dir: str = "",
    data_factor: float = 1.0,
    test_every: int = 8,
    test_after: int = -1,
    init_ply: bool = False,
    max_points: int = 0,
    num_workers: int | None = None,
    transform: np.ndarray | None = None,
    depths: bool | None = None,
    say: Say = quiet,
) -> Scene:
    """Read a dataset: its model, its pictures (scaled where that has not been done) and initial points.

    Args:
        data_dir: folder that holds `images` and a COLMAP model in `sparse/0`, elsewhere in `sparse`, or `sparse`, or
            a file of another program that `datasets.formats` reads.
        model_dir: folder of the COLMAP model, or another program's file; empty for the one of most photos in `sparse`,
            or the first of `datasets.formats`.
        data_factor: how many times smaller than the originals the pictures should be, at least 1.
        test_every, test_after: which images are held out; see `datasets.splits.split_indices`.
        init_ply: take the initial points from `points.ply` in the model's folder, in place of points3D.
        max_points: take a random subset of so many initial points where there are more; 0 takes all.
        num_workers: threads that check and scale pictures; all processors where None.
        transform: [4, 4] similarity from the input world to that in which the scene has been trained; None to
            normalize it.
        depths: find depths of the training photos, too; False says that those there are not used, None nothing.
        say: is told what is used of what is there, and what looks wrong.

    Raises:
        InputError: the dataset cannot be used.
    """
    data_dir = Path(data_dir)
    model, model_path = load_sparse_model(data_dir, model_dir, say)
    train_ids, test_ids = split_indices(len(model.image_names), test_every=test_every, test_after=test_after)
    points, points_rgb = _starting_points(model, model_path, init_ply=init_ply)
    _refuse_far_off(data_dir, point=points, camera=model.worldtocams[:, :3, 3])
    warnings = check_points(points_ply(model_path), points, model.points) if init_ply else []
    pictures = prepare_images(
        data_dir,
        model.image_names,
        camera_sizes=model.camera_sizes[model.camera_indices],
        masks=model.masks,
        data_factor=data_factor,
        num_workers=num_workers,
        say=say,
    )
    cameras, camera_indices = _cameras_of(model, pictures.paths, pictures.sizes)
    warnings += undistortion_warnings(model.image_names, cameras, camera_indices)
    train_ids, test_ids = seen_ids(train_ids, test_ids, model.image_names, pictures, say)

    camtoworlds = np.linalg.inv(model.worldtocams)
    own_transform = normalizing_transform(camtoworlds, points)
    if np.ptp(camtoworlds[:, :3, 3], axis=0).max() <= place_tolerance(camtoworlds):
        raise InputError(f"All cameras of {data_dir} stand at one place: take pictures from several places.")
    say_what_is_used(data_dir, model_path, model, pictures, len(points), init_ply=init_ply, say=say)
    transform = own_transform if transform is None else transform
    camtoworlds = transform_cameras(transform, camtoworlds)
    points = transform_points(transform, points)
    positions = camtoworlds[:, :3, 3]
    is_far = far_cameras(positions, points)
    near_positions = positions[~is_far]
    scene_scale = float(np.linalg.norm(near_positions - near_positions.mean(axis=0), axis=1).max())
    warnings += far_camera_warnings(model.image_names, positions, is_far, scene_scale)
    for warning in warnings:
        say(f"Warning: {warning}")
    points, points_rgb = subset_of_points(points, _not_all_black(points_rgb, say), max_points, say)
    scene = Scene(
        data_dir=data_dir,
        image_names=model.image_names,
        image_paths=pictures.paths,
        mask_paths=pictures.masks,
        camtoworlds=camtoworlds,
        cameras=cameras,
        camera_indices=camera_indices,
        train_ids=train_ids,
        test_ids=test_ids,
        points=points.astype(np.float32),
        points_rgb=points_rgb,
        transform=transform,
        own_transform=own_transform,
        far_ids=np.flatnonzero(is_far),
        scene_scale=scene_scale,
    )
    if depths:
        return replace(scene, depths=_depths_of(scene, model, model_path, say))
    if depths is False:
        say_unused_depths(data_dir, model.distances, say)
    return scene


def _starting_points(model: SparseModel, model_path: Path, *, init_ply: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the points [P, 3] that training starts from, and their colours [P, 3].

    Raises:
        InputError: There are none, or points.ply cannot be used.
    """
    if init_ply:
        return read_points(points_ply(model_path))
    if len(model.points) == 0:
        raise InputError(
            f"points3D in {model_path} holds no points to start from: put a points.ply beside it and give --init_ply."
        )
    return model.points, model.points_rgb


def _refuse_far_off(data_dir: Path, **places: np.ndarray) -> None:
    """Refuse places [n, 3] that lie so far off that the scene would shrink to a point, each kind by its name.

    Raises:
        InputError: There is such a place.
    """
    for what, values in places.items():
        if np.abs(values).max(initial=0.0) > LARGEST_COORDINATE:
            raise InputError(
                f"A {what} of {data_dir} is farther than {LARGEST_COORDINATE:g} from the origin: remove it."
            )


def _not_all_black(points_rgb: np.ndarray, say: Say) -> np.ndarray:
    """Return the points' colours [P, 3]; gray ones, where nobody has extracted any.

    A channel that begins at 0 is clamped there and learns of half of its pixels at best.
    """
    if points_rgb.any():
        return points_rgb
    say(
        "Warning: all points are black, as those of a model are whose colours were never extracted: training "
        "starts from gray ones (colmap color_extractor finds their colours)."
    )
    return np.full_like(points_rgb, 128)


def seen_distances(scene: Scene, image_ids: np.ndarray) -> np.ndarray:
    """Return how far in front of cameras, along their axes, are the points that they see: the middle one of each.

    Args:
        scene: Of whose points at most `LOOKED_AT` are looked at, evenly from all.
        image_ids: [k] int64, of pictures.

    Returns:
        [k] float64 in the normalized world; of a camera that sees none of them what is usual among the others, or 0.
    """
    points = scene.points[:: -(-len(scene.points) // LOOKED_AT) or 1].astype(np.float64)
    found = np.full(len(image_ids), np.nan)
    for place, image in enumerate(image_ids):
        camera, pose = scene.cameras[scene.camera_indices[image]], scene.camtoworlds[image]
        in_camera = (points - pose[:3, 3]) @ pose[:3, :3]
        in_camera = in_camera[in_camera[:, 2] > 0]
        columns, rows = ((in_camera / in_camera[:, 2:]) @ camera.K[:2].T).T
        is_seen = (columns >= 0) & (columns < camera.width) & (rows >= 0) & (rows < camera.height)
        if is_seen.any():
            found[place] = np.median(in_camera[is_seen, 2])
    usual = 0.0 if np.isnan(found).all() else float(np.nanmedian(found))
    return np.where(np.isnan(found), usual, found)


def _depths_of(scene: Scene, model: SparseModel, model_path: Path, say: Say) -> Depths:
    def camera_of(image: int) -> Camera:
        return scene.cameras[scene.camera_indices[image]]

    def seen_in(image: int) -> np.ndarray | None:
        alpha = decode_alpha(scene.image_paths[image])
        return seen_pixels(alpha, scene.mask_paths[image], camera_of(image))

    return find_depths(
        scene.data_dir,
        scene.image_names,
        scene.train_ids,
        camera_of,
        seen_in,
        scene.camtoworlds,
        read_tracks(model_path) if has_model(model_path) else {},
        model.distances,
        scene.transform,
        say,
    )


def _cameras_of(model: SparseModel, paths: list[Path], sizes: list[tuple[int, int]]) -> tuple[list[Camera], np.ndarray]:
    """Make one camera for each COLMAP camera and true size of its pictures, and each picture's index among them."""
    cameras: dict[tuple[int, tuple[int, int]], Camera] = {}
    for index, path, size in zip(model.camera_indices.tolist(), paths, sizes, strict=True):
        if (index, size) in cameras:
            continue
        model_size = model.camera_sizes[index]
        check_shape(path, size, (int(model_size[0]), int(model_size[1])))
        cameras[index, size] = make_camera(model.camera_models[index], model.camera_params[index], model_size, size)
    order = {key: position for position, key in enumerate(cameras)}
    indices = [order[key] for key in zip(model.camera_indices.tolist(), sizes, strict=True)]
    return list(cameras.values()), np.array(indices, np.int64)
