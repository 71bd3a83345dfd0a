"""PlayCanvas's SOG, version 2: lossless WebP pictures, a pixel for each Gaussian, and meta.json, in a ZIP archive.

    means_l, means_u    low and high byte of 16 bits between bounds, of sign(x) * log(1 + |x|)
    quats               the three smallest of w x y z, 8 bits over +- sqrt(1/2); 252 + which is the largest
    scales              log scales, by a codebook of 256 numbers
    sh0                 coefficients, by a codebook; opacity in 8 bits
    shN_labels          16 bits: which row of shN_centroids, a palette of at most 65,536 sets of coefficients, which
                        share a codebook

https://developer.playcanvas.com/user-manual/gaussian-splatting/formats/sog
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from exports.gaussians import Gaussians, Rows
from exports.quantization import Codebook, Palette, rounded, smallest_three
from training.files import replacing

SAMPLE = 1 << 20  # Gaussians that codebooks and palette are fitted to
SMALLEST_PALETTE, LARGEST_PALETTE, ROWS_PER_COLOR = 1 << 10, 1 << 16, 8
PALETTE_COLUMNS = 64  # sets of coefficients in a row of shN_centroids
EFFORT = 2  # of WebP, 0 to 6: above it takes several times as long, for a few per cent
BYTES_PER_GAUSSIAN = 3 + 3 + 4 + 3 + 4 + 3  # of the pictures, uncompressed


def write_sog(path: Path, gaussians: Gaussians) -> None:
    """Write Gaussians in Morton order; all the pictures, 20 bytes a Gaussian, are in memory at once."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sog_files(gaussians.in_morton_order()):
            archive.writestr(zipfile.ZipInfo(name), content)  # no time: the same model gives the same file


def sog_bytes(count: int, sh_degree: int) -> int:
    """Return how large the file can become: as if nothing could be compressed."""
    return (1 << 20) + count * BYTES_PER_GAUSSIAN + 3 * _palette_size(count) * ((sh_degree + 1) ** 2 - 1)


def sog_files(gaussians: Gaussians) -> Iterator[tuple[str, bytes]]:
    """Give names and contents of the files of a SOG, with the Gaussians in the order in which they are."""
    coder = _Coder.fitted(gaussians)
    width = -(-int(np.ceil(gaussians.count**0.5)) // 4) * 4  # pixels, about as many as there are rows
    height = -(-gaussians.count // width)
    pictures = {name: np.zeros((height * width, channels), np.uint8) for name, channels in coder.channels.items()}
    for first, rows in gaussians.blocks():
        for name, pixels in coder.pixels(rows).items():
            pictures[name][first : first + len(pixels)] = pixels
    for name in list(pictures):
        yield f"{name}.webp", _webp(pictures.pop(name).reshape(height, width, -1))
    if coder.palette is not None:
        yield "shN_centroids.webp", _webp(coder.centroids())
    yield "meta.json", json.dumps(coder.meta(gaussians)).encode()


@dataclass(frozen=True)
class _Coder:
    """Hold what pixels mean."""

    low: np.ndarray  # [3] bounds of the logarithms of positions
    high: np.ndarray
    scales: Codebook
    sh0: Codebook
    palette: Palette | None  # without harmonics there is none
    shN: Codebook

    @classmethod
    def fitted(cls, gaussians: Gaussians) -> _Coder:
        low, high = np.full(3, np.inf), np.full(3, -np.inf)
        for _, rows in gaussians.blocks(["means"]):
            logs = _log_means(rows["means"])
            low, high = np.minimum(low, logs.min(axis=0)), np.maximum(high, logs.max(axis=0))
        sample = _sample(gaussians)
        palette = None
        if gaussians.sh_degree:
            shN = sample["shN"].flatten(1)  # [S, 3 (K - 1)]
            palette = Palette(shN, min(_palette_size(gaussians.count), len(shN)))
        return cls(
            low,
            high,
            Codebook.fitted(sample["scales"].numpy().ravel()),
            Codebook.fitted(sample["sh0"].numpy().ravel()),
            palette,
            Codebook.fitted(np.zeros(1) if palette is None else palette.vectors.numpy().ravel()),
        )

    @property
    def channels(self) -> dict[str, int]:
        """Return the pictures with a pixel for each Gaussian, and their channels."""
        labels = {} if self.palette is None else {"shN_labels": 3}
        return {"means_l": 3, "means_u": 3, "quats": 4, "scales": 3, "sh0": 4, **labels}

    def pixels(self, rows: Rows) -> dict[str, np.ndarray]:
        """Return the pixels [M, channels] of some Gaussians, by picture."""
        span = np.where(self.high > self.low, self.high - self.low, 1)
        means = ((_log_means(rows["means"]) - self.low) / span * 65535 + 0.5).astype(np.uint16)
        largest, others = smallest_three(rows["quats"])
        quats = rounded((others * 0.5**0.5 + 0.5) * 255, 255)
        opacities = rounded(torch.sigmoid(rows["opacities"]) * 255, 255)
        result = {
            "means_l": (means & 255).astype(np.uint8),
            "means_u": (means >> 8).astype(np.uint8),
            "quats": torch.cat([quats, 252 + largest[:, None]], dim=1).numpy().astype(np.uint8),
            "scales": self.scales.codes(rows["scales"].numpy()),
            "sh0": np.column_stack([self.sh0.codes(rows["sh0"][:, 0].numpy()), opacities.numpy().astype(np.uint8)]),
        }
        if self.palette is not None:
            labels = self.palette.codes(rows["shN"].flatten(1)).numpy()
            result["shN_labels"] = np.column_stack([labels & 255, labels >> 8, 0 * labels]).astype(np.uint8)
        return result

    def centroids(self) -> np.ndarray:
        """Return the picture of the palette [rows, 64 (K - 1), 3]: one pixel for each coefficient."""
        if self.palette is None:
            raise ValueError("there are no harmonics")
        vectors = self.palette.vectors.numpy()  # [P, (K - 1) 3]
        height = -(-len(vectors) // PALETTE_COLUMNS)
        picture = np.zeros((height * PALETTE_COLUMNS, vectors.shape[1]), np.uint8)
        picture[: len(vectors)] = self.shN.codes(vectors)
        return picture.reshape(height, -1, 3)

    def meta(self, gaussians: Gaussians) -> dict[str, object]:
        """Return the content of meta.json."""
        meta: dict[str, object] = {
            "version": 2,
            "count": gaussians.count,
            "antialias": gaussians.antialiased,
            "means": {
                "mins": self.low.tolist(),
                "maxs": self.high.tolist(),
                "files": ["means_l.webp", "means_u.webp"],
            },
            "scales": {"codebook": self.scales.entries.tolist(), "files": ["scales.webp"]},
            "quats": {"files": ["quats.webp"]},
            "sh0": {"codebook": self.sh0.entries.tolist(), "files": ["sh0.webp"]},
        }
        if self.palette is not None:
            meta["shN"] = {
                "count": len(self.palette.vectors),
                "bands": gaussians.sh_degree,
                "codebook": self.shN.entries.tolist(),
                "files": ["shN_centroids.webp", "shN_labels.webp"],
            }
        return meta


def _palette_size(count: int) -> int:
    return min(max(count // ROWS_PER_COLOR, SMALLEST_PALETTE), LARGEST_PALETTE)


def _log_means(means: Tensor) -> np.ndarray:
    values = means.double().numpy()
    return np.sign(values) * np.log1p(np.abs(values))


def _sample(gaussians: Gaussians) -> Rows:
    """Return rows spread evenly over all."""
    step = -(-gaussians.count // SAMPLE)
    return gaussians.at(torch.arange(0, gaussians.count, step), ["scales", "sh0", "shN"])


def _webp(picture: np.ndarray) -> bytes:
    """Return a picture [H, W, 3 or 4] as lossless WebP; colours stay where it is transparent."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "WEBP", lossless=True, exact=True, method=EFFORT, quality=50)
    return content.getvalue()
