"""Loads the dataset of a run; what goes on from a checkpoint stays in the world in which that was trained."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs import Config
from datasets.consistency import some_names
from datasets.model_choice import Say, is_named
from datasets.normalize import is_similarity, same_axes
from datasets.scene import Scene, load_scene
from datasets.sight import check_views
from errors import InputError, counted
from offload.adam.state import stored_values
from rendering.ssim import WINDOW_SIZE
from training.checkpoints import Checkpoint
from training.files import result_folder_of
from training.pose_files import FOLDER as POSES
from training.trained_photos import trained_photos, trained_photos_in, warn_of_trained

SAME_PLACE = 1e-4  # of the scene's extent: reading a model again moves no camera as far
SAME_WORLD = 1e-2  # of the same: another adjustment of the same cameras moves most of them less far


@dataclass(frozen=True)
class Dataset:
    """Hold a scene and how it differs from that of the checkpoint it goes on from."""

    scene: Scene
    has_changed: bool
    trained_before: Set[str] = frozenset()  # names of photos that the checkpoint, or what it began from, has seen


def load_dataset(cfg: Config, checkpoint: Checkpoint | None, say: Say, starting: Checkpoint | None = None) -> Dataset:
    """Load the scene that the options name and check that it can be trained on, or evaluated, as they say.

    Args:
        cfg: The options.
        checkpoint: What training goes on from, or what is evaluated; None where training begins anew.
        say: Takes sentences on what the user should know.
        starting: That of --init_ckpt, which may have been trained on other photos; None: none, or a PLY file.

    Raises:
        InputError: The dataset cannot be used, or is not that of the checkpoint.
    """
    if checkpoint is not None and not is_similarity(checkpoint.transform):
        raise InputError(
            f"The checkpoint of {counted(checkpoint.steps, 'step')} holds no usable transform: choose another."
        )
    scene = load_scene(
        cfg.data_dir,
        model_dir=cfg.model_dir,
        data_factor=cfg.data_factor,
        test_every=cfg.test_every,
        test_after=cfg.test_after,
        init_ply=cfg.init_ply,
        max_points=0 if checkpoint is not None or cfg.init_ckpt else cfg.max_gaussians,  # Gaussians begin from points
        num_workers=cfg.num_workers or None,
        say=say,
        transform=None if checkpoint is None else checkpoint.transform,
        depths=None if cfg.ckpt else cfg.depth_loss,
    )
    _check_sizes(scene, cfg.data_factor)
    has_changed = checkpoint is not None and _compare(cfg, checkpoint, scene, say)
    trained: set[str] = set()
    if checkpoint is not None:
        trained = trained_photos(checkpoint, scene.image_names)
    elif starting is not None and is_similarity(starting.transform):
        trained = trained_photos_in(starting, scene)
    elif starting is None and cfg.init_ckpt:
        say(
            "The PLY file of --init_ckpt does not say which photos it was trained on: figures of held-out photos that "
            "were among them would flatter the model."
        )
    if (model := checkpoint or starting) is not None:
        warn_of_trained(trained, scene, model, say)
    offset = np.linalg.inv(scene.transform)[:3, 3]
    if np.spacing(np.abs(offset).max().astype(np.float32)) > 1e-5 * np.cbrt(1 / np.linalg.det(scene.transform[:3, :3])):
        say(
            f"The scene lies around {', '.join(f'{x:.8g}' for x in offset)}, where float32 is too coarse for it: PLY "
            "files stay in normalized coordinates; their header and a .json beside each hold the offset and the way "
            "back."
        )
    means = scene.points if checkpoint is None else stored_values(checkpoint.state, "means").numpy()
    for warning in check_views(scene, means, cfg.near_plane, cfg.far_plane):
        say(f"Warning: {warning}")
    return Dataset(scene, has_changed, trained)


def _check_sizes(scene: Scene, data_factor: float) -> None:
    """Refuse pictures, to train on or to be compared with, that no window of SSIM fits into.

    Raises:
        InputError: Naming the smallest, and a factor that leaves enough of it.
    """
    sizes = [(camera.width, camera.height) for camera in scene.cameras]
    smallest = min(range(len(sizes)), key=lambda camera: min(sizes[camera]))
    width, height = sizes[smallest]
    if min(width, height) >= WINDOW_SIZE:
        return
    name = scene.image_names[int(np.flatnonzero(scene.camera_indices == smallest)[0])]
    # Half a pixel less, which may have been rounded up; two digits are read more easily.
    most = np.floor(10 * data_factor * (min(width, height) - 0.5) / WINDOW_SIZE) / 10
    remedy = f"give at most --data_factor {most:g}" if most >= 1 else "give larger photos, or leave it out of the model"
    raise InputError(
        f"{name} is {width}x{height} pixels with --data_factor {data_factor:g}, smaller than the "
        f"{WINDOW_SIZE}x{WINDOW_SIZE} window of SSIM: {remedy}."
    )


def photos_of(scene: Scene) -> dict[str, list[float]]:
    """Return the names of a scene's photos and the positions [3] of their cameras, for a checkpoint to keep."""
    positions = scene.camtoworlds[:, :3, 3].tolist()
    return dict(zip(scene.image_names, positions, strict=True))


def _compare(cfg: Config, checkpoint: Checkpoint, scene: Scene, say: Say) -> bool:
    """Say how the scene differs from that of the checkpoint; returns whether it does.

    Raises:
        InputError: It is another scene, or has other photos, and the options do not say to train on with those.
    """
    if not checkpoint.photos:
        _check_axes(cfg, checkpoint, scene, say)
        return cfg.new_photos
    _check_poses(cfg, checkpoint)
    shift = _check_world(cfg, checkpoint, scene)
    changes = _changes(checkpoint, scene, shift)
    if not changes:
        return False
    sentence = f"Since the checkpoint was written, {cfg.data_dir} has changed: {', '.join(changes)}."
    if not cfg.new_photos and not cfg.ckpt:
        raise InputError(
            f"{sentence} Give --new_photos to train on with what is there now, in the coordinates of the checkpoint, "
            "or another --result_dir to begin anew."
        )
    say(sentence)
    return True


def _another_dataset(cfg: Config) -> InputError:
    return InputError(
        f"The checkpoint to {_use(cfg)} was trained on another dataset than {cfg.data_dir}: give its --data_dir, or "
        f"another {_whose(cfg)}."
    )


def _use(cfg: Config) -> str:
    """Return what is done with the checkpoint, as a part of a sentence."""
    return "evaluate" if cfg.ckpt else "resume from"


def _whose(cfg: Config) -> str:
    """Return the option that names the checkpoint."""
    return "--ckpt" if cfg.ckpt else "--result_dir"


def _check_axes(cfg: Config, checkpoint: Checkpoint, scene: Scene, say: Say) -> None:
    """Refuse, of a checkpoint that does not name its photos, a scene of other axes."""
    say(
        f"The checkpoint to {_use(cfg)} was written by an earlier version, which did not keep the names of its photos: "
        "whether any were added or removed cannot be told."
    )
    if not same_axes(checkpoint.transform, scene.own_transform) and not cfg.new_photos:
        raise _another_dataset(cfg)


def _check_poses(cfg: Config, checkpoint: Checkpoint) -> None:
    """Refuse the model of the poses that the run itself has corrected: they would be corrected twice."""
    run = result_folder_of(Path(cfg.ckpt)) if cfg.ckpt else Path(cfg.result_dir)
    if "poses/rows" in checkpoint.state and is_named(run / POSES, Path(cfg.data_dir), cfg.model_dir):
        corrected, remedy = (
            ("the run of --ckpt", "leave --model_dir out")
            if cfg.ckpt
            else ("this run", "leave --model_dir out to go on, or begin a run on them with another --result_dir")
        )
        raise InputError(
            f"--model_dir {cfg.model_dir} holds the poses that {corrected} has corrected, and its checkpoint has the "
            f"corrections: {remedy}."
        )


def _check_world(cfg: Config, checkpoint: Checkpoint, scene: Scene) -> float:
    """Refuse a scene without a photo of the checkpoint's, or with their cameras elsewhere.

    Returns:
        How far the cameras have moved, in the median, as a share of the scene's extent.
    """
    photos = photos_of(scene)
    common = [name for name in photos if name in checkpoint.photos]
    if not common:
        raise _another_dataset(cfg)
    shifts = np.array([np.subtract(photos[name], checkpoint.photos[name]) for name in common])  # [c, 3]
    shift = float(np.median(np.linalg.norm(shifts, axis=1))) / scene.scene_scale
    if shift > SAME_WORLD:
        raise InputError(
            f"The cameras of {counted(len(common), 'photo')} that the checkpoint to {_use(cfg)} was trained on stand "
            f"elsewhere in {cfg.data_dir}, by {shift:.2g} of the scene's extent: give the model of the world in "
            "which it was trained (--model_dir; COLMAP's image_registrator adds photos to it), or another "
            f"{_whose(cfg)}."
        )
    return shift


def _changes(checkpoint: Checkpoint, scene: Scene, shift: float) -> list[str]:
    """Return what has changed since the checkpoint, as parts of a sentence."""
    added = [name for name in scene.image_names if name not in checkpoint.photos]
    there = set(scene.image_names)
    removed = [name for name in checkpoint.photos if name not in there]
    changes = [
        f"{counted(len(names), 'photo')} {how} ({some_names(names)})"
        for names, how in ((added, "added"), (removed, "removed"))
        if names
    ]
    if shift > SAME_PLACE:
        changes.append(f"cameras moved by {shift:.2g} of the scene's extent")
    return changes
