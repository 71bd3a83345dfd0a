"""What ranks must have alike before they train one model: options, versions, the dataset."""

from __future__ import annotations

import hashlib
import importlib.metadata
import socket
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from configs import Config
from datasets.scene import Scene
from distributed.mesh import Ranks
from errors import InputError
from training.roles import OF_A_MACHINE

PACKAGES = ("gaussian-offload", "torch", "numpy", "gsplat")


def check_same_options(ranks: Ranks, script: str, cfg: Config) -> None:
    """Refuse ranks that run different scripts or versions, or were started with different options.

    Raises:
        InputError: At every rank, naming the first difference.
    """
    options = {f"--{name}": value for name, value in asdict(cfg).items() if name not in OF_A_MACHINE}
    versions = {package: _version(package) for package in PACKAGES}
    facts = {"the script that they run": script, **versions, **options}
    _check_same(ranks, facts, "start all ranks with one command, from one version of the suite")


def check_same_dataset(ranks: Ranks, scene: Scene) -> None:
    """Refuse ranks whose dataset folders differ.

    Raises:
        InputError: At every rank, naming what differs first.
    """
    facts = {
        "the names of the photos": _hash("\n".join(scene.image_names).encode()),
        "the sizes of the files of photos": _hash(str(_sizes(scene)).encode()),
        "the number of points": len(scene.points),
        # Processors may round differently, by far less than another model of the same photos differs.
        "the cameras": scene.camtoworlds.astype(np.float32),
        "the points": np.stack([scene.points.mean(axis=0), scene.points.std(axis=0)]),
    }
    _check_same(ranks, facts, "give all machines the same dataset", where=f" in {scene.data_dir}")


def _check_same(ranks: Ranks, facts: Mapping[str, object], remedy: str, *, where: str = "") -> None:
    """Refuse facts that differ, by their names; where these are, is said in place of what they are."""
    hosts, all_facts = zip(*ranks.gather((socket.gethostname(), dict(facts))), strict=True)
    for rank, found in enumerate(all_facts):
        for name in {**all_facts[0], **found}:  # other versions may have other options
            value, first = found.get(name, "missing"), all_facts[0].get(name, "missing")
            if not _is_same(value, first):
                told = where or f" ({value} instead of {first})"
                raise InputError(
                    f"rank {rank} ({hosts[rank]}) and rank 0 ({hosts[0]}) differ in {name}{told}: {remedy}."
                )


def _is_same(value: object, first: object) -> bool:
    if isinstance(value, np.ndarray) and isinstance(first, np.ndarray):
        return value.shape == first.shape and np.allclose(value, first, rtol=1e-4, atol=1e-4)
    return value == first


def _sizes(scene: Scene) -> list[int]:
    paths = [Path(path) for path in (*scene.image_paths, *scene.mask_paths) if path is not None]
    return [path.stat().st_size if path.is_file() else -1 for path in paths]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
