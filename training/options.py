"""What values options may have: one table, looked at before anything is loaded."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

from imageio_ffmpeg import get_ffmpeg_version

from configs import Config
from datasets.trajectories import SHAPES
from datasets.trajectory_file import read_key_poses
from errors import InputError
from training.checkpoint_folder import SaveSchedule
from training.checkpoints import MAX_STEPS
from training.exclusions import check_exclusions
from training.memory import parse_bytes
from training.profiling import SKIPPED_STEPS, WARM_UP_STEPS

MOST = 10**12  # of what nothing else bounds


@dataclass(frozen=True)
class Range:
    """Hold the values that an option may have: finite ones from `low` to `high`."""

    low: float
    high: float = MOST
    above: bool = False  # `low` itself is too little
    below: bool = False  # `high` itself is too much
    meaning: str = ""  # of a value that is no amount

    def holds(self, value: float) -> bool:
        """Return whether a value lies in the range; nan and infinities never do."""
        if not math.isfinite(value):
            return False
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low, high = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in (self.low, self.high))
        low = f"{'above' if self.above else 'at least'} {low}"
        high = f"{'below' if self.below else 'at most'} {high}"
        return f"{low} and {high}" + (f" ({self.meaning})" if self.meaning else "")


def shown(value: object) -> str:
    """Return the value of an option as a part of a sentence."""
    return f"{value:,}" if type(value) is int else str(value)


COUNT, INTERVAL = Range(0), Range(1, MAX_STEPS)
RATE = Range(0, 10)  # of learning
SHARE = Range(0, 1e6)  # of a scene or a picture, which may be larger than it
THRESHOLD = Range(0, 1e6)
WEIGHT = Range(0, 1e6)  # in the loss

# Every option that is a number, of all scripts. tests/test_options.py says that none is missing.
RANGES: dict[str, Range] = {
    "data_factor": Range(0, 1000, above=True),
    "test_every": Range(-1, meaning="-1 where --test_after is used"),
    "test_after": Range(-1, meaning="-1 where --test_every is used"),
    "num_workers": Range(0, 256, meaning="0 takes one per core"),
    "keep": Range(0, meaning="0 keeps all"),
    "seed": Range(0, 2**63 - 1),
    "max_steps": INTERVAL,
    "eval_steps": COUNT,
    "save_steps": COUNT,
    "ply_steps": COUNT,
    "steps_scaler": Range(0, 1000, above=True),
    "log_every": Range(1),
    "profile": Range(0, meaning="0 traces nothing"),
    "video_seconds": Range(0, 3600, meaning="0 is as long as the path wants"),
    "video_size": Range(16, 8192),
    "viewer": Range(1, 65535),
    "timelapse": Range(0, meaning="0 draws none"),
    "batch_size": Range(1, 256),
    "shares": Range(1, 1000, meaning="every rank holds some; for one that would hold none start one process less"),
    "view_window": Range(1, 1_000_000),
    "position_lr": RATE,
    "scaling_lr": RATE,
    "quats_lr": RATE,
    "opacities_lr": RATE,
    "sh0_lr": RATE,
    "shN_lr": RATE,
    "ssim_lambda": Range(0, 1),
    "depth_lambda": Range(0, 1e6),
    "pose_opt_lr": RATE,
    "pose_opt_reg": WEIGHT,
    "grow_grad2d": THRESHOLD,
    "grow_scale3d": SHARE,
    "grow_scale2d": SHARE,
    "prune_opa": Range(0, 0.5, above=True, below=True),
    "prune_scale3d": SHARE,
    "prune_scale2d": SHARE,
    "refine_scale2d_stop_iter": COUNT,
    "refine_start_iter": COUNT,
    "refine_stop_iter": COUNT,
    "refine_every": Range(1),
    "reset_every": Range(1),
    "pause_refine_after_reset": COUNT,
    "max_gaussians": Range(0, meaning="0 sets no bound"),
    "target_gaussians": Range(0, meaning="0 sets none"),
    "noise_lr": Range(0, 1e12),
    "opacity_reg": WEIGHT,
    "scale_reg": WEIGHT,
    "sh_degree": Range(0, 3),
    "sh_degree_interval": Range(1),
    "init_opacity": Range(0, 1, above=True, below=True),
    "init_scale": Range(0, 1000, above=True),
    "near_plane": Range(0, 1e30, above=True),
    "far_plane": Range(0, 1e30, above=True),
    "split_threshold": Range(0, 1, above=True),
    "resident_share": Range(0, 1, meaning="0 keeps none on the GPU"),
}


def check_options(cfg: Config) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Args:
        cfg: As they were given, before `steps_scaler` is applied.

    Raises:
        InputError: Naming the option.
    """
    for item in fields(cfg):
        allowed, given = RANGES.get(item.name), getattr(cfg, item.name)
        if allowed is None or given is None:
            continue
        for value in given if isinstance(given, list) else [given]:
            if not allowed.holds(value):
                raise InputError(f"--{item.name} is {shown(value)}, but must be {allowed}.")
    if not cfg.data_dir:
        raise InputError("--data_dir is empty: name a dataset's folder, such as data/garden.")
    if cfg.near_plane >= cfg.far_plane:
        raise InputError(
            f"--near_plane is {cfg.near_plane} and --far_plane {cfg.far_plane}, so nothing would be drawn between "
            "them: give a larger --far_plane."
        )
    scaled = cfg.with_scaled_steps()
    if not INTERVAL.holds(scaled.max_steps):
        raise InputError(
            f"--steps_scaler {cfg.steps_scaler} makes {scaled.max_steps:,} of the {cfg.max_steps:,} steps of "
            f"--max_steps, but they must be {INTERVAL}."
        )
    if 0 < cfg.profile > scaled.max_steps - SKIPPED_STEPS - WARM_UP_STEPS:
        raise InputError(
            f"--profile is {cfg.profile}, but must leave {SKIPPED_STEPS + WARM_UP_STEPS} of the {scaled.max_steps} "
            "steps of --max_steps to warm up."
        )
    if len(cfg.viewer or []) > 1:
        raise InputError(f"--viewer has {len(cfg.viewer or [])} numbers, but must be one port, such as 8080.")
    if len(cfg.video_size) not in (0, 2):
        raise InputError(f"--video_size has {len(cfg.video_size)} numbers, but must be a width and a height.")
    if any(side % 2 for side in cfg.video_size):
        even = " ".join(str(side // 2 * 2) for side in cfg.video_size)
        raise InputError(
            f"--video_size {' '.join(map(str, cfg.video_size))} has an odd side, and videos have even ones: give "
            f"{even}."
        )
    check_exclusions(cfg)
    SaveSchedule(cfg.save_every)
    budget = getattr(cfg, "device_memory_budget", None)
    if budget is not None:
        parse_bytes(budget, "--device_memory_budget")
    if cfg.video or cfg.timelapse:
        _check_ffmpeg("--video" if cfg.video else "--timelapse")
    if cfg.trajectory not in SHAPES:
        read_key_poses(Path(cfg.trajectory))


def _check_ffmpeg(option: str) -> None:
    """Refuse an option that asks for a video where nothing can write one.

    Raises:
        InputError: Naming it.
    """
    try:
        get_ffmpeg_version()  # which starts it: nothing else tells that it can be
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        named = os.environ.get("IMAGEIO_FFMPEG_EXE")
        if named:
            lacking = f"IMAGEIO_FFMPEG_EXE names {named}, which cannot be run: let it name an ffmpeg, or nothing"
        else:
            lacking = (
                "there is none on this machine: pip install --force-reinstall imageio-ffmpeg brings one, "
                "IMAGEIO_FFMPEG_EXE names one that is elsewhere"
            )
        raise InputError(
            f"{option} asks for a video, which ffmpeg writes, and {lacking}; or leave the option out."
        ) from error
