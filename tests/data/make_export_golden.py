"""Writes small exports and what another program's reader makes of them: tests/data/exports.

    python -m tests.data.make_export_golden "npx --yes @playcanvas/splat-transform@3.7.0"

Needs Node.js 20 or later. The suite's tests read the same files with tests/oracles/splat_formats.py.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exports import streamed
from exports.formats import FORMATS
from exports.gaussians import Gaussians
from tests.oracles.splat_formats import read_ply

FOLDER = Path(__file__).parent / "exports"
READ = FOLDER / "read_by_splat_transform.npz"
FILES = ("model.compressed.ply", "model.spz", "model.sog", "model.splat", "streamed/lod-meta.json")
COUNT = 40


def random_model(count: int, seed: int, sh_degree: int = 3) -> dict[str, Tensor]:
    """Six stored parameters, of longish Gaussians of all colours and opacities."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "means": normal(count, 3) * torch.tensor([2.0, 1.0, 0.5]),
        "scales": normal(count, 3) * 0.7 - 2.5,
        "quats": normal(count, 4) * 1.7,
        "opacities": normal(count) * 2 + 1,
        "sh0": normal(count, 1, 3) * 0.5,
        "shN": normal(count, (sh_degree + 1) ** 2 - 1, 3) * 0.1,
    }


def main(reader: str) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    streamed.LEAF_ROWS, streamed.CHUNK_ROWS = 10, 20  # several leaves and chunks, of one level
    read = {}
    for name in FILES:
        (form,) = (form for form in FORMATS if name.endswith(form.ending) and form.ending != ".ply")
        form.write(FOLDER / name, Gaussians.of(random_model(COUNT, seed=0)))
        with tempfile.TemporaryDirectory() as folder:
            ply = Path(folder) / "read.ply"
            subprocess.run([*shlex.split(reader), str(FOLDER / name), str(ply)], check=True)
            read.update({f"{name}/{key}": value.astype(np.float32) for key, value in read_ply(ply).items()})
    np.savez_compressed(READ, **read)


if __name__ == "__main__":
    main(*sys.argv[1:])
