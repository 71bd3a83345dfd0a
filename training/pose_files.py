"""The corrected poses of a run, for other programs and for runs to come."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from datasets.colmap_writer import text_model
from datasets.normalize import transform_cameras
from datasets.trajectory_file import KEY
from training.files import write_file

if TYPE_CHECKING:
    from training.run import TrainingRun

FOLDER = "poses"
JSON_FILE = "poses.json"
FILES = ("cameras.txt", "images.txt", "points3D.txt", JSON_FILE)


class PoseFiles:
    """Write poses/ after the steps of `ply_steps` and the last, of a run that corrects poses: the newest ones."""

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Write the files where it is due."""
        if steps_done in run.cfg.ply_steps or steps_done == run.cfg.max_steps:
            self.make_missing(run, steps_done)

    def make_missing(self, run: TrainingRun, steps: int) -> None:
        """Write the files: after the last step they are those of the model, whatever was there."""
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
