"""The model that --init_ckpt begins from, a checkpoint or a 3DGS PLY file, brought into the world of a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import Config
from datasets.model_choice import Say, is_named
from datasets.normalize import is_similarity
from errors import InputError
from offload.store.morton import morton_order
from training.checkpoints import Checkpoint, load_checkpoint
from training.files import result_folder_of
from training.gaussians import PARAMETER_NAMES
from training.model_files import check_model_file
from training.modules import state_of
from training.ply import Up, frame_of_ply, load_ply
from training.pose_files import FOLDER as POSES
from training.pose_files import steps_of
from training.similarity import moved, with_degree

_SAME = 1e-9  # of the transforms of one dataset: nothing is moved, so that the model draws what it drew


@dataclass(frozen=True)
class StartingModel:
    """Hold the Gaussians of a file, in the world in which they were trained."""

    path: Path
    gaussians: dict[str, Tensor]  # as `training.gaussians.initial_gaussians`
    transform: np.ndarray | None  # [4, 4] from the dataset's coordinates to theirs; None where the file says none
    up: Up | None = None  # which of their axes is vertical; None where the file does not say
    antialiased: bool = False  # trained with the compensation of Mip-Splatting
    background: str = "black"  # that it was trained before, as the option
    sky: Mapping[str, Tensor] = field(default_factory=dict)  # state of the sky that was trained with them; or nothing
    has_own_poses: bool = False  # trained with poses that were corrected (--pose_opt)
    checkpoint: Checkpoint | None = None  # whose Gaussians they are, without its state; None: of a PLY file

    @classmethod
    def load(cls, path: Path, what: str = "--init_ckpt") -> StartingModel:
        """Read a checkpoint or PLY file.

        Args:
            path: The file.
            what: It is called in sentences.

        Raises:
            InputError: It cannot be read, or holds no Gaussians that can be drawn.
        """
        check_model_file(path, what)
        with open(path, "rb") as file:
            is_ply = file.read(3) == b"ply"
        if is_ply:
            transform, up = frame_of_ply(path)
            found = cls(path, load_ply(path), transform, up, has_own_poses=steps_of(result_folder_of(path)) is not None)
        else:
            checkpoint = load_checkpoint(path)
            found = cls(
                path,
                checkpoint.gaussians,
                checkpoint.transform,
                "z",
                checkpoint.options.get("antialiased") is True,
                str(checkpoint.options.get("background", "black")),
                state_of(checkpoint, "sky"),
                bool(state_of(checkpoint, "poses")),
                replace(checkpoint, state={}, parts=()),
            )
        gaussians, transform = found.gaussians, found.transform
        if len(gaussians["means"]) == 0:
            raise InputError(f"{what} {path} holds no Gaussians: choose another file.")
        broken = [name for name in PARAMETER_NAMES if not bool(torch.isfinite(gaussians[name]).all())]
        if broken:
            raise InputError(f"{what} {path} holds {broken[0]} that are not finite: remove these Gaussians.")
        num_harmonics = gaussians["shN"].shape[1] + 1
        if round(num_harmonics**0.5) ** 2 != num_harmonics:
            raise InputError(
                f"{what} {path} holds {num_harmonics} harmonics of each colour, which no degree has: choose a "
                "3DGS PLY file of degree 0 to 3."
            )
        if transform is not None and not is_similarity(transform):
            raise InputError(f"{what} {path} holds no usable transform: choose another file.")
        return found

    def placed(self, transform: np.ndarray, cfg: Config, say: Say) -> dict[str, Tensor]:
        """Return the Gaussians in the world of a run, in Morton order, with harmonics of the run's degree.

        Args:
            transform: [4, 4] from the dataset's coordinates to the run's.
            cfg: The options.
            say: Is told what was done.

        Raises:
            InputError: There are more than --max_gaussians.
        """
        gaussians = dict(self.gaussians)
        count = len(gaussians["means"])
        if 0 < cfg.max_gaussians < count:
            raise InputError(
                f"--init_ckpt {self.path} holds {count:,} Gaussians, and --max_gaussians allows {cfg.max_gaussians:,}: "
                "raise it."
            )
        degree = round((gaussians["shN"].shape[1] + 1) ** 0.5) - 1
        gaussians["shN"] = with_degree(gaussians["shN"], cfg.sh_degree)
        own = np.eye(4) if self.transform is None else self.transform
        move = transform @ np.linalg.inv(own)
        if np.abs(move - np.eye(4)).max() > _SAME:
            gaussians = moved(gaussians, move)
        where = "in the dataset's coordinates" if self.transform is None else "in the coordinates of its training"
        say(
            f"Training begins from the {count:,} Gaussians of {self.path}, {where}, without Adam's moments: step 0, "
            f"learning rates and all schedules as for a new model (--sh_degree_interval {cfg.sh_degree_interval})."
        )
        if degree != cfg.sh_degree:
            done = "higher ones begin at 0" if degree < cfg.sh_degree else "higher ones are cut off"
            say(f"Its harmonics have degree {degree}, and --sh_degree is {cfg.sh_degree}: {done}.")
        if self.sky:
            follows = "a grey one is trained anew" if cfg.background == "sky" else f"--background is {cfg.background}"
            say(f"Its sky is not taken: {follows}.")
        elif self.background == "white" != cfg.background:
            say(f"It was trained before white, and --background is {cfg.background}.")
        self._tell_of_poses(cfg, say)
        order = morton_order(gaussians["means"])
        return {name: gaussians[name][order] for name in PARAMETER_NAMES}

    def _tell_of_poses(self, cfg: Config, say: Say) -> None:
        """Say where photos do not have the poses that the Gaussians fit."""
        run = result_folder_of(self.path)
        poses = run / POSES
        if not self.has_own_poses or is_named(poses, Path(cfg.data_dir), cfg.model_dir):
            return
        remedy = "" if cfg.pose_opt else "; give --pose_opt to correct them anew"
        if steps_of(run) is not None:
            remedy = f"; give --model_dir {shlex.quote(str(poses))} to have the corrected ones"
        say(f"Its poses were corrected: the Gaussians do not fit those of the dataset, which photos have here{remedy}.")
