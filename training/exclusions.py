"""Which options go together: one that would be ignored beside others, or without them, is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from configs import Config
from errors import InputError


def check_exclusions(cfg: Config) -> None:
    """Refuse options that exclude each other, and those that lack the one that they belong to.

    Args:
        cfg: As they were given; each has a value that it can have.

    Raises:
        InputError: Naming them.
    """
    for sentence in (*_excluded(cfg), *_not_evaluated(cfg), *_without_owner(cfg)):
        raise InputError(sentence)


def _excluded(cfg: Config) -> Iterator[str]:
    """Yield a sentence for each two options of which at most one can be followed."""
    state = getattr(cfg, "state", "float32")
    moments, budget = getattr(cfg, "moments", "float32"), getattr(cfg, "device_memory_budget", None)
    if cfg.random_background and cfg.background != "random":
        yield f"--random_background and --background {cfg.background} exclude each other: give one of them."
    if cfg.ckpt and cfg.resume:
        yield "--ckpt evaluates a checkpoint and --resume trains on: give one of them."
    if cfg.init_ckpt and (cfg.ckpt or cfg.resume):
        other = "--ckpt, which evaluates a model," if cfg.ckpt else "--resume, which goes on with one,"
        yield f"--init_ckpt begins from a model, and {other} excludes that: give one of them."
    if cfg.force and (cfg.ckpt or cfg.resume):
        yield f"--force begins anew and --{'ckpt' if cfg.ckpt else 'resume'} does not: give one of them."
    if state == "compact" and moments != "float32":
        yield f"--state compact has its own form of moments and --moments {moments} is another: give one of them."
    if state == "compact" and getattr(cfg, "adam", "deferred") == "dense":
        yield (
            "--state compact cannot be had with --adam dense, which visits every Gaussian at each step: "
            "give --adam deferred."
        )
    if cfg.target_gaussians > 0 and cfg.strategy == "mcmc":
        yield "--target_gaussians is of --strategy default: mcmc grows to --max_gaussians, give that in its place."
    if cfg.target_gaussians > 0 and cfg.max_gaussians > 0:
        yield (
            f"--target_gaussians {cfg.target_gaussians:,} and --max_gaussians {cfg.max_gaussians:,}, given or the "
            "scene's own, both say where growth ends: give --max_gaussians 0 too, or no target."
        )
    if cfg.strategy == "mcmc" and cfg.max_gaussians == 0:
        yield "--strategy mcmc grows to a bound: give --max_gaussians, such as 1000000."
    if budget is not None and getattr(cfg, "split_threshold", None) is not None:
        yield "--split_threshold and --device_memory_budget exclude each other: give one of them."


def _not_evaluated(cfg: Config) -> Iterator[str]:
    """Yield a sentence for each option that has no use where --ckpt is evaluated."""
    if not cfg.ckpt:
        return
    if cfg.viewer is not None:
        yield (
            "--viewer shows a training, and --ckpt evaluates a model: leave it out, and look at that with "
            f"python view.py {cfg.ckpt}."
        )
    for name in ("timelapse", "profile", "new_photos"):
        if getattr(cfg, name):
            yield f"--{name} is of a training, and --ckpt evaluates a model: leave it out."


def _without_owner(cfg: Config) -> Iterator[str]:
    """Yield a sentence for each option that has no use without another."""
    of_video = ("trajectory", "video_seconds", "video_size", "video_depth")
    table = (  # an option, what it belongs to, and whether that is given
        ("noise_lr", "--strategy mcmc", cfg.strategy == "mcmc"),
        ("depth_lambda", "--depth_loss", cfg.depth_loss),
        ("pose_opt_lr", "--pose_opt", cfg.pose_opt),
        ("pose_opt_reg", "--pose_opt", cfg.pose_opt),
        *((name, "--video", cfg.video) for name in of_video),
        ("viewer_host", "--viewer", cfg.viewer is not None),
        ("new_photos", "--resume", cfg.resume),
        ("resident_share", "--state compact", getattr(cfg, "state", "") == "compact"),
    )
    default = type(cfg)()
    there = {item.name for item in fields(cfg)}
    for name, owner, is_given in table:
        if name in there and not is_given and getattr(cfg, name) != getattr(default, name):
            yield f"--{name} is of {owner}: give that, too."
