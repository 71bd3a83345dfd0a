"""Checkpoints: the Gaussians as they stand after some number of steps."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from errors import InputError
from training.gaussians import PARAMETER_NAMES

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    steps: int  # training steps done
    gaussians: dict[str, Tensor]  # as `training.gaussians.initial_gaussians`, on the CPU
    transform: np.ndarray  # [4, 4] similarity from the dataset's coordinates to the model's


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file appears under its name only when it is complete and on disk.

    Raises:
        OSError: The file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(
                {
                    "version": FORMAT_VERSION,
                    "step": checkpoint.steps,
                    "splats": {name: _compact(value.cpu()) for name, value in checkpoint.gaussians.items()},
                    "transform": torch.from_numpy(np.asarray(checkpoint.transform, np.float64)),
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _compact(value: Tensor) -> Tensor:
    """The tensor in memory of its own size: torch saves all that a view is a view of."""
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code in it.

    Raises:
        InputError: There is no such file, it is damaged, or it was written by a newer version.
    """
    if not path.is_file():
        raise InputError(f"Checkpoint {path} does not exist: give --ckpt a file such as ckpts/ckpt_30000.pt.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        version = content["version"]
        if version <= FORMAT_VERSION:
            return Checkpoint(
                steps=content["step"],
                gaussians={name: content["splats"][name] for name in PARAMETER_NAMES},
                transform=content["transform"].numpy(),
            )
    except (
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        EOFError,
        OSError,
        pickle.UnpicklingError,
    ) as error:
        raise InputError(f"{path} is not a complete checkpoint of this suite: choose another.") from error
    raise InputError(
        f"{path} was written by a newer version of this suite (format {version}, known: {FORMAT_VERSION}): "
        "update this one."
    )
