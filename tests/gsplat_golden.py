"""What gsplat rendered once on a GPU, for tests on machines without one: reading and writing of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.gaussian_scenes import PARAMETERS, GaussianScene, random_scene
from tests.gsplat_comparison import Run

GOLDEN_FILE = Path(__file__).parent / "data" / "gsplat_golden.npz"
GOLDEN_CASES = {
    "classic": {"sh_degree": 3, "backgrounds": True},
    "antialiased": {"sh_degree": 2, "rasterize_mode": "antialiased"},
    "expected_depth": {"sh_degree": 1, "render_mode": "RGB+ED", "absgrad": True},
}


def golden_scene() -> GaussianScene:
    """The scene of a newly written file; tests read the scene from the file."""
    return random_scene(150, seed=20, width=48, height=36, median_scale=0.12)


def save_golden(scene: GaussianScene, runs: dict[str, Run], gsplat_version: str) -> None:
    """Write a scene and gsplat's renderings of it, one for each of GOLDEN_CASES."""
    arrays = {f"scene/{name}": value for name, value in vars(scene).items()}
    arrays["written_by/gsplat"] = [int(number) for number in gsplat_version.split(".")]
    for case, result in runs.items():
        values = {**vars(result), **{f"grad_{name}": g for name, g in result.gradients.items()}}
        del values["gradients"]
        arrays.update({f"{case}/{name}": value for name, value in values.items() if value is not None})
    np.savez_compressed(GOLDEN_FILE, **{name: np.asarray(value) for name, value in arrays.items()})


def load_golden() -> tuple[GaussianScene, dict[str, Run]]:
    """The scene and gsplat's renderings."""
    with np.load(GOLDEN_FILE) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}

    def part(prefix: str) -> dict:
        return {name.split("/")[1]: value for name, value in arrays.items() if name.startswith(prefix + "/")}

    scene = part("scene")
    scene.update({name: int(scene[name]) for name in ("width", "height")})
    runs = {}
    for case in GOLDEN_CASES:
        values = part(case)
        gradients = {name: values.pop(f"grad_{name}") for name in PARAMETERS}
        runs[case] = Run(**{"means2d_absgrad": None, **values, "gradients": gradients})
    return GaussianScene(**scene), runs


def golden_gsplat_version() -> str:
    """Read which gsplat wrote the file."""
    with np.load(GOLDEN_FILE) as file:
        return ".".join(map(str, file["written_by/gsplat"]))
