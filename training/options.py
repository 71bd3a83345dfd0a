"""What values options may have: one table, looked at before anything is loaded."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from imageio_ffmpeg import get_ffmpeg_version

from configs import Config
from datasets.trajectories import SHAPES
from datasets.trajectory_file import read_key_poses
from errors import InputError
from strategies.mcmc import REGULARIZER
from training.checkpoint_folder import SaveSchedule
from training.checkpoints import MAX_STEPS
from training.memory import parse_bytes
from training.profiling import SKIPPED_STEPS, WARM_UP_STEPS

SPLIT_THRESHOLD = 0.3  # where neither that nor a budget is given
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
    "test_every": Range(-1, meaning="-1 where test_after is used"),
    "test_after": Range(-1, meaning="-1 where test_every is used"),
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


def in_effect(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by name, with what holds where nothing was given and that follows from others.

    Args:
        options: Of a run, or of a cfg.yml that an older version wrote, which holds None there.
    """
    regularizer = REGULARIZER if options.get("strategy") == "mcmc" else 0.0
    follows = {"opacity_reg": regularizer, "scale_reg": regularizer}
    if options.get("device_memory_budget") is None:  # which decides in its place
        follows["split_threshold"] = SPLIT_THRESHOLD
    return {**options, **{name: value for name, value in follows.items() if options.get(name, value) is None}}


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
    _check_watching(cfg)
    if cfg.random_background and cfg.background != "random":
        raise InputError(f"--random_background and --background {cfg.background} exclude each other: give one of them.")
    if cfg.ckpt and cfg.resume:
        raise InputError("--ckpt evaluates a checkpoint and --resume trains on: give one of them.")
    if cfg.init_ckpt and (cfg.ckpt or cfg.resume):
        other = "--ckpt, which evaluates a model," if cfg.ckpt else "--resume, which goes on with one,"
        raise InputError(f"--init_ckpt begins from a model, and {other} excludes that: give one of them.")
    if cfg.force and (cfg.ckpt or cfg.resume):
        raise InputError(f"--force begins anew and --{'ckpt' if cfg.ckpt else 'resume'} does not: give one of them.")
    if getattr(cfg, "state", "float32") == "compact" and getattr(cfg, "moments", "float32") != "float32":
        raise InputError(
            f"--state compact has its own form of moments and --moments {getattr(cfg, 'moments', '')} is another: give "
            "one of them."
        )
    if getattr(cfg, "resident_share", 0) > 0 and getattr(cfg, "state", "compact") != "compact":
        raise InputError("--resident_share is of --state compact: give that, too.")
    if getattr(cfg, "state", "float32") == "compact" and getattr(cfg, "adam", "deferred") == "dense":
        raise InputError(
            "--state compact cannot be had with --adam dense, which visits every Gaussian at each step: "
            "give --adam deferred."
        )
    if cfg.target_gaussians > 0 and cfg.strategy == "mcmc":
        raise InputError(
            "--target_gaussians is of --strategy default: mcmc grows to --max_gaussians, give that in its place."
        )
    if cfg.target_gaussians > 0 and cfg.max_gaussians > 0:
        raise InputError(
            f"--target_gaussians {cfg.target_gaussians:,} and --max_gaussians {cfg.max_gaussians:,}, given or the "
            "scene's own, both say where growth ends: give --max_gaussians 0 too, or no target."
        )
    default = Config()
    for name, belongs_to, is_used in (
        ("noise_lr", "--strategy mcmc", cfg.strategy == "mcmc"),
        ("depth_lambda", "--depth_loss", cfg.depth_loss),
        ("pose_opt_lr", "--pose_opt", cfg.pose_opt),
        ("pose_opt_reg", "--pose_opt", cfg.pose_opt),
    ):
        if not is_used and getattr(cfg, name) != getattr(default, name):
            raise InputError(f"--{name} is of {belongs_to}: give that, too.")
    if cfg.strategy == "mcmc" and cfg.max_gaussians == 0:
        raise InputError("--strategy mcmc grows to a bound: give --max_gaussians, such as 1000000.")
    SaveSchedule(cfg.save_every)
    budget = getattr(cfg, "device_memory_budget", None)
    if budget is not None:
        parse_bytes(budget, "--device_memory_budget")
        if getattr(cfg, "split_threshold", None) is not None:
            raise InputError("--split_threshold and --device_memory_budget exclude each other: give one of them.")


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


def _check_watching(cfg: Config) -> None:
    default = Config()
    if cfg.video or cfg.timelapse:
        _check_ffmpeg("--video" if cfg.video else "--timelapse")
    for name in ("trajectory", "video_seconds", "video_size", "video_depth"):
        if not cfg.video and getattr(cfg, name) != getattr(default, name):
            raise InputError(f"--{name} is of the video, which --video asks for: give that, too.")
    if cfg.viewer is None and cfg.viewer_host != default.viewer_host:
        raise InputError("--viewer_host is of --viewer: give that, too.")
    if len(cfg.viewer or []) > 1:
        raise InputError(f"--viewer has {len(cfg.viewer or [])} numbers, but must be one port.")
    if cfg.ckpt and cfg.viewer is not None:
        raise InputError(
            "--viewer shows a training, and --ckpt evaluates a model: leave it out, and look at that with "
            f"python view.py {cfg.ckpt}."
        )
    if cfg.ckpt and cfg.timelapse:
        raise InputError("--timelapse is of a training, and --ckpt evaluates a model: leave it out.")
    if len(cfg.video_size) not in (0, 2):
        raise InputError(f"--video_size has {len(cfg.video_size)} numbers, but must be a width and a height.")
    if any(side % 2 for side in cfg.video_size):
        even = " ".join(str(side // 2 * 2) for side in cfg.video_size)
        raise InputError(
            f"--video_size {' '.join(map(str, cfg.video_size))} has an odd side, and videos have even ones: give "
            f"{even}."
        )
    if cfg.trajectory not in SHAPES:
        read_key_poses(Path(cfg.trajectory))
