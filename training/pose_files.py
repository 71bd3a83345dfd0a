"""The corrected poses of a run, for other programs and for runs to come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation
from torch import Tensor

from datasets.colmap_writer import text_model
from datasets.normalize import transform_cameras
from datasets.scene import Scene
from datasets.trajectory_file import KEY
from training.files import write_file
from training.schedules import is_due

if TYPE_CHECKING:
    from training.run import TrainingRun

FOLDER = "poses"
JSON_FILE = "poses.json"
FILES = ("cameras.txt", "images.txt", "points3D.txt", JSON_FILE)


class PoseFiles:
    """Write poses/ after the steps of `ply_steps` and the last, of a run that corrects poses: the newest ones."""

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Write the files where it is due."""
        self.make_missing(run, steps_done)

    def make_missing(self, run: TrainingRun, steps: int) -> None:
        """Write the files where it is due: they are those of the model then, whatever was there."""
        if not is_due(run.cfg, steps, run.cfg.ply_steps):
            return
        camtoworlds = run.modules.corrected_poses(run.scene)
        if camtoworlds is None or not run.speaks:
            return
        scene = run.scene
        in_input = transform_cameras(np.linalg.inv(scene.transform), camtoworlds)
        poses = {"steps": steps, "image_names": scene.image_names, KEY: in_input.tolist()}
        files = {**text_model(scene, camtoworlds), JSON_FILE: json.dumps(poses) + "\n"}
        with run.results.missed_if_unwritable(f"The poses of step {steps}"):
            for name, content in files.items():
                write_file(run.results.path / FOLDER / name, content.encode("utf-8", "surrogateescape"))


def pose_figures(scene: Scene, camtoworlds: np.ndarray | None) -> dict[str, float]:
    """Return how far poses were corrected, over the training photos; nothing of a run that corrects none.

    Args:
        scene: With the poses that were given.
        camtoworlds: [n, 4, 4] the corrected ones of all photos, as `RunModules.corrected_poses` returns them.

    Returns:
        Median and largest turn, in degrees, and shift, in units of the dataset's coordinates.
    """
    if camtoworlds is None:
        return {}
    given, found = scene.camtoworlds[scene.train_ids], camtoworlds[scene.train_ids]
    turned = given[:, :3, :3].transpose(0, 2, 1) @ found[:, :3, :3]
    turns = np.degrees(Rotation.from_matrix(turned).magnitude())
    scale = np.cbrt(np.linalg.det(scene.transform[:3, :3]))  # of the world, by the dataset's coordinates
    shifts = np.linalg.norm(found[:, :3, 3] - given[:, :3, 3], axis=1) / scale
    return {
        "pose_turn_median": float(np.median(turns)),
        "pose_turn_largest": float(turns.max()),
        "pose_shift_median": float(np.median(shifts)),
        "pose_shift_largest": float(shifts.max()),
    }


def steps_of(folder: Path) -> int | None:
    """Return after how many steps poses/ in a result folder was written; None where there is none that says so."""
    try:
        steps = json.loads((folder / FOLDER / JSON_FILE).read_text())["steps"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return steps if isinstance(steps, int) else None


def tell_of_old_poses(run: TrainingRun) -> None:
    """Say at the beginning of a run that corrects no poses that a part of it before did, whose files stay."""
    if run.cfg.pose_opt or not run.speaks:
        return
    steps = steps_of(run.results.path)
    if steps is not None:
        print(
            f"Warning: {run.results.path / FOLDER} holds the cameras of step {steps}, which --pose_opt corrected: it "
            "stays as it is. From now on photos have the poses of the dataset; give --pose_opt to go on with theirs."
        )
