"""Niantic's .spz, version 3: a header of 16 bytes and six streams one after the other, all of it in one gzip stream.

    positions   3 x 24 bits, fixed point     opacities   8 bits       colours     3 x 8 bits
    log scales  3 x 8 bits, (x + 10) * 16    rotations   32 bits      harmonics   8 bits each, those of a colour apart

Axes are x right, y up, z back; programs turn them to those of PLY files when they read. Version 3 is what most
programs read; version 4 wants zstd. Coefficients of harmonics keep 5 bits (degree 1) and 4, as Niantic's own writer
has it.

https://github.com/nianticlabs/spz (README.md, src/cc/load-spz.cc)
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from exports.gaussians import Gaussians
from exports.quantization import rounded, smallest_three
from training.files import replacing
from training.similarity import moved

HEADER = struct.Struct("<IIIBBBB")  # magic, version, number, degree of harmonics, fraction bits, flags, reserved
MAGIC, VERSION, ANTIALIASED = 0x5053474E, 3, 1
LARGEST = (1 << 23) - 1  # of a position, in fixed point
MOST_FRACTION_BITS = 20
USUAL_FRACTION_BITS = 12  # of other writers; with fewer, what is lost is worth a word
COLOR_SCALE = 0.15
SH_BITS = (5, 4, 4)  # that coefficients of each degree keep
TURN = np.diag([1.0, -1.0, -1.0, 1.0])  # to those axes
LEVEL = 6  # of gzip


def write_spz(path: Path, gaussians: Gaussians) -> None:
    """Write Gaussians, block by block, one pass over them for each stream."""
    with replacing(path) as partial, open(partial, "wb") as file:
        encode_spz(file, gaussians.in_morton_order())


def encode_spz(file: BinaryIO, gaussians: Gaussians) -> None:
    """Write the content of an .spz file."""
    farthest = max(float(rows["means"].abs().max()) for _, rows in gaussians.blocks(["means"]))
    fraction_bits = MOST_FRACTION_BITS
    while fraction_bits > 0 and farthest * (1 << fraction_bits) >= LARGEST:
        fraction_bits -= 1
    if fraction_bits < USUAL_FRACTION_BITS:
        print(
            f"Warning: this format keeps positions to {0.5**fraction_bits:g} units here, since a Gaussian lies "
            f"{farthest:,.0f} from the origin: --crop leaves out what is far, and .sog and .ply keep more."
        )
    flags = ANTIALIASED if gaussians.antialiased else 0
    with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=LEVEL, mtime=0) as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, gaussians.count, gaussians.sh_degree, fraction_bits, flags, 0))
        for _, rows in gaussians.blocks(["means"]):
            stream.write(_positions(moved(rows, TURN)["means"], fraction_bits))
        for _, rows in gaussians.blocks(["opacities"]):
            stream.write(_bytes(torch.sigmoid(rows["opacities"]) * 255))
        for _, rows in gaussians.blocks(["sh0"]):
            stream.write(_bytes((rows["sh0"] * COLOR_SCALE + 0.5) * 255))
        for _, rows in gaussians.blocks(["scales"]):
            stream.write(_bytes((rows["scales"] + 10) * 16))
        for _, rows in gaussians.blocks(["quats"]):
            stream.write(_rotations(rows["quats"]))
        if gaussians.sh_degree:
            for _, rows in gaussians.blocks(["shN"]):
                stream.write(_harmonics(moved(rows, TURN)["shN"]))


def spz_bytes(count: int, sh_degree: int) -> int:
    """Return how large the file can become: as if nothing could be compressed."""
    return 4096 + count * (20 + 3 * ((sh_degree + 1) ** 2 - 1))


def _bytes(values: Tensor) -> bytes:
    return rounded(values, 255).to(torch.uint8).numpy().tobytes()


def _positions(means: Tensor, fraction_bits: int) -> bytes:
    fixed = (means.double() * (1 << fraction_bits)).round().clamp(-LARGEST, LARGEST)
    return fixed.numpy().astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()  # the lower three bytes


def _rotations(quats: Tensor) -> bytes:
    """Return words: 2 bits say which of x y z w is the largest; of each other one a sign and 9 bits of its size.

    An ellipsoid is the same where its own axes are turned over too: that leaves a rotation that needs two signs alone.
    """
    largest, others = smallest_three(quats[:, [1, 2, 3, 0]] * torch.tensor([1.0, -1.0, -1.0, 1.0]))
    sizes = rounded(others.abs() * 2**0.5 * 511, 511)
    words = largest
    for sign, size in zip((others < 0).long().unbind(dim=1), sizes.unbind(dim=1), strict=True):
        words = words << 10 | sign << 9 | size
    return words.numpy().astype("<u4").tobytes()


def _harmonics(shN: Tensor) -> bytes:
    """Return coefficients [M, K - 1, 3] in 128ths from -1 to 1, to the bits that are kept; 0 stays 0."""
    degree_of = torch.tensor([degree for degree in range(3) for _ in range(2 * degree + 3)])[: shN.shape[1]]
    step = torch.tensor([1 << (8 - bits) for bits in SH_BITS])[degree_of][:, None]  # [K - 1, 1]
    codes = (shN * 128).round().clamp(-256, 256).long() + 128
    codes = (codes + step // 2).div(step, rounding_mode="floor") * step
    return codes.clamp(0, 255).to(torch.uint8).numpy().tobytes()
