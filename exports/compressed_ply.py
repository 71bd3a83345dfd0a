"""PlayCanvas's compressed PLY: 16 bytes a Gaussian, and one byte for each coefficient of the harmonics.

The elements of the PLY file are `chunk`, one for 256 Gaussians, with the smallest and largest value of each quantity;
`vertex`, four words a Gaussian, which say where between those its values lie:

    packed_position, packed_scale   11, 10, 11 bits; log scales
    packed_rotation                 2 bits: which component of w x y z is the largest; 10 bits for each other one
    packed_color                    8 bits each: red, green, blue between the chunk's bounds, opacity between 0 and 1

and `sh`, f_rest_* in the order of 3DGS, in 256 steps over -4 to 4.

https://github.com/playcanvas/splat-transform (src/lib/readers/decompress-ply.ts reads it)
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from exports.gaussians import BLOCK_ROWS, Gaussians, Rows
from exports.quantization import rounded, smallest_three
from training.files import replacing
from training.gaussians import SH_C0

CHUNK = 256  # Gaussians
LARGEST_LOG_SCALE = 20.0  # beyond, a Gaussian is a point or covers everything
HARMONICS_RANGE = 8.0  # from -4 to 4


def write_compressed_ply(path: Path, gaussians: Gaussians) -> None:
    """Write Gaussians in Morton order, so that those of a chunk are near to one another, block by block."""
    gaussians = gaussians.in_morton_order()
    header = _header(gaussians).encode("ascii")
    num_chunks, num_rest = -(-gaussians.count // CHUNK), 3 * ((gaussians.sh_degree + 1) ** 2 - 1)
    vertices = len(header) + num_chunks * 18 * 4
    harmonics = vertices + gaussians.count * 4 * 4
    with replacing(path) as partial, open(partial, "r+b") as file:
        file.write(header)
        for first, rows in gaussians.blocks(size=BLOCK_ROWS):  # a multiple of CHUNK
            bounds, packed = _pack(rows)
            _write_at(file, len(header) + first // CHUNK * 18 * 4, bounds)
            _write_at(file, vertices + first * 4 * 4, packed)
            if num_rest:
                shN = rows["shN"].transpose(1, 2).flatten(1)  # [M, num_rest], all of red first
                codes = ((shN / HARMONICS_RANGE + 0.5) * 256).floor().clamp(0, 255)
                _write_at(file, harmonics + first * num_rest, codes.to(torch.uint8).numpy())


def compressed_ply_bytes(count: int, sh_degree: int) -> int:
    """Return how large the file will be at most."""
    return 4096 + (count // CHUNK + 1) * 18 * 4 + count * (16 + 3 * ((sh_degree + 1) ** 2 - 1))


def _header(gaussians: Gaussians) -> str:
    quantities = (("x", "y", "z"), ("scale_x", "scale_y", "scale_z"), ("r", "g", "b"))
    properties = [f"{end}_{name}" for names in quantities for end in ("min", "max") for name in names]
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"element chunk {-(-gaussians.count // CHUNK)}",
        *(f"property float {name}" for name in properties),
        f"element vertex {gaussians.count}",
        *(f"property uint packed_{name}" for name in ("position", "rotation", "scale", "color")),
    ]
    num_rest = 3 * ((gaussians.sh_degree + 1) ** 2 - 1)
    if num_rest:
        lines += [f"element sh {gaussians.count}", *(f"property uchar f_rest_{i}" for i in range(num_rest))]
    return "\n".join([*lines, "end_header", ""])


def _pack(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of each chunk [M / 256, 18] float32 and the words of each Gaussian [M, 4] uint32."""
    count = len(rows["means"])
    bounds, parts = [], []
    rgb = rows["sh0"][:, 0] * SH_C0 + 0.5
    for values in (rows["means"], rows["scales"].clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE), rgb):
        filled = torch.cat([values, values[-1:].expand(-count % CHUNK, 3)]).view(-1, CHUNK, 3)
        low, high = filled.amin(dim=1), filled.amax(dim=1)  # [chunks, 3]
        bounds += [low, high]
        span = (high - low)[:, None]
        parts.append(((filled - low[:, None]) / torch.where(span > 0, span, 1.0)).view(-1, 3)[:count])
    means, scales, rgb = parts
    largest, others = smallest_three(rows["quats"])
    others = others * 0.5**0.5 + 0.5
    words = [
        _words(means, (11, 10, 11)),
        largest << 30 | _words(others, (10, 10, 10)),
        _words(scales, (11, 10, 11)),
        _words(torch.cat([rgb, torch.sigmoid(rows["opacities"])[:, None]], dim=1), (8, 8, 8, 8)),
    ]
    return torch.cat(bounds, dim=1).numpy().astype("<f4"), torch.stack(words, dim=1).numpy().astype("<u4")


def _words(values: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Return values [M, n] between 0 and 1 side by side in words [M], the first in the highest bits."""
    word = torch.zeros(len(values), dtype=torch.int64)
    for column, width in zip(values.unbind(dim=1), bits, strict=True):
        most = (1 << width) - 1
        word = word << width | rounded(column * most, most)
    return word


def _write_at(file: BinaryIO, place: int, content: np.ndarray) -> None:
    file.seek(place)
    file.write(content.tobytes())
