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

# Options that may differ from machine to machine.
OWN_OPTIONS = ("data_dir", "model_dir", "result_dir", "device", "num_workers", "ckpt", "init_ckpt")
PACKAGES = ("gaussian-offload", "torch", "numpy", "gsplat")


def check_same_options(ranks: Ranks, cfg: Config) -> None:
    """Refuse ranks that were started with different options, or run different versions.

    Raises:
        InputError: At every rank, naming the first difference.
    """
    options = {f"--{name}": value for name, value in asdict(cfg).items() if name not in OWN_OPTIONS}
    versions = {package: _version(package) for package in PACKAGES}
    _check_same(ranks, {**options, **versions}, "start all ranks with one command, from one version of the suite")


def check_same_dataset(ranks: Ranks, scene: Scene) -> None:
    """Refuse ranks whose dataset folders differ.

    Raises:
        InputError: At every rank, naming what differs first.
    """
    facts = {
        f"the names of the photos in {scene.data_dir}": _hash("\n".join(scene.image_names).encode()),
        f"the sizes of the files of photos in {scene.data_dir}": _hash(str(_sizes(scene)).encode()),
        f"the number of points of {scene.data_dir}": len(scene.points),
        # Processors may round differently, by far less than another model of the same photos differs.
        f"the cameras of {scene.data_dir}": scene.camtoworlds.astype(np.float32),
        f"the points of {scene.data_dir}": np.stack([scene.points.mean(axis=0), scene.points.std(axis=0)]),
    }
    _check_same(ranks, facts, "give all machines the same dataset", says_values=False)


def _check_same(ranks: Ranks, facts: Mapping[str, object], remedy: str, *, says_values: bool = True) -> None:
    hosts, all_facts = zip(*ranks.gather((socket.gethostname(), list(facts.items()))), strict=True)
    for rank, found in enumerate(all_facts):
        for (name, value), (_, first) in zip(found, all_facts[0], strict=True):
            if not _is_same(value, first):
                told = f" ({value} instead of {first})" if says_values else ""
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
