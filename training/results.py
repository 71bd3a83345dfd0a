"""The result folder of a run, laid out as gsplat's example trainer does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from configs import Config
from errors import InputError
from training.checkpoint_folder import CheckpointFolder
from training.ply import save_ply


class ResultFolder:
    """Hold ckpts/ stats/ renders/ videos/ ply/ tb/ cfg.yml of one run.

    N in file names counts the training steps done.
    """

    def __init__(self, cfg: Config) -> None:
        """Make the folders, and write cfg.yml.

        Raises:
            InputError: The folder cannot be made or written.
        """
        self.path = Path(cfg.result_dir)
        try:
            for name in ("ckpts", "stats", "renders", "ply", "tb"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            if not cfg.ckpt:  # evaluating a checkpoint leaves the options it was trained with
                (self.path / "cfg.yml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
        except OSError as error:
            raise InputError(
                f"result_dir {self.path} cannot be written ({error.strerror}): choose another --result_dir."
            ) from error
        self.checkpoints = CheckpointFolder(self.path / "ckpts", keep=cfg.keep)
        self.tensorboard = SummaryWriter(str(self.path / "tb"))

    def purge_log(self, first_step: int) -> None:
        """Let TensorBoard forget what was logged from this step on, by a run that is resumed before it."""
        self.tensorboard.close()
        self.tensorboard = SummaryWriter(str(self.path / "tb"), purge_step=first_step)

    def close(self) -> None:
        self.checkpoints.close()
        with contextlib.suppress(OSError):  # the log is not worth an error at the very end
            self.tensorboard.close()

    def save_ply(
        self,
        steps: int,
        rows: Callable[[int, int], Mapping[str, Tensor]],
        num_gaussians: int,
        transform: np.ndarray,
    ) -> None:
        """Write ply/point_cloud_{steps}.ply; as `training.ply.save_ply`."""
        save_ply(self.path / "ply" / f"point_cloud_{steps}.ply", rows, num_gaussians, transform)

    def save_statistics(self, kind: str, steps: int, statistics: Mapping[str, object]) -> None:
        """Write stats/{kind}_step{steps}.json."""
        path = self.path / "stats" / f"{kind}_step{steps}.json"
        path.write_text(json.dumps(statistics, indent=2) + "\n")

    def save_rendering(self, steps: int, index: int, canvas: np.ndarray) -> None:
        """Write one picture [H, W, 3] uint8 as renders/val_step{steps}_{index}.png."""
        path = self.path / "renders" / f"val_step{steps}_{index:04d}.png"
        imageio.imwrite(path, canvas, compress_level=1)
