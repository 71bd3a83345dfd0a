"""The .splat format of antimatter15's viewer: 32 bytes a Gaussian, nothing before or after, no harmonics.

    12 bytes   position, float32
    12 bytes   scales (not their logarithms), float32
    4 bytes    red, green, blue, opacity
    4 bytes    quaternion w x y z, each component q as q * 128 + 128

https://github.com/antimatter15/splat (convert.py there)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from exports.gaussians import Gaussians
from exports.quantization import rounded
from training.files import replacing
from training.gaussians import SH_C0

RECORD = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)])
NAMES = ("means", "scales", "quats", "opacities", "sh0")


def write_splat(path: Path, gaussians: Gaussians) -> None:
    """Write Gaussians, block by block."""
    with replacing(path) as partial, open(partial, "wb") as file:
        for _, rows in gaussians.blocks(NAMES):
            records = np.zeros(len(rows["means"]), RECORD)
            rgb = rows["sh0"][:, 0] * SH_C0 + 0.5  # [M, 3]
            rgba = torch.cat([rgb, torch.sigmoid(rows["opacities"])[:, None]], dim=1)
            quats = rows["quats"] / rows["quats"].norm(dim=1, keepdim=True).clamp(min=1e-30)
            records["means"] = rows["means"].numpy()
            records["scales"] = rows["scales"].exp().numpy()
            records["rgba"] = rounded(rgba * 255, 255).numpy()
            records["quats"] = rounded(quats * 128 + 128, 255).numpy()
            file.write(records.tobytes())


def splat_bytes(count: int, sh_degree: int) -> int:
    """Return how large the file will be."""
    return RECORD.itemsize * count
