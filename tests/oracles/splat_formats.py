"""Readers of the formats that export.py writes, after their specifications and with none of its code: one Gaussian at a
time where that is plainer. What they read of the files in tests/data/exports is what splat-transform reads
(tests/data/make_export_golden.py)."""

from __future__ import annotations

import gzip
import io
import json
import math
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

C0 = 0.28209479177387814
Gaussians = dict[
    str, np.ndarray
]  # means, scales (logarithms), quats (w x y z), opacities (0 to 1), sh0, shN [N, K-1, 3]


def gaussians(means, scales, quats, opacities, sh0, shN) -> Gaussians:
    quats = np.asarray(quats, np.float64)
    return {
        "means": np.asarray(means, np.float64),
        "scales": np.asarray(scales, np.float64),
        "quats": quats / np.linalg.norm(quats, axis=1, keepdims=True),
        "opacities": np.asarray(opacities, np.float64),
        "sh0": np.asarray(sh0, np.float64),
        "shN": np.asarray(shN, np.float64),
    }


def read_elements(path: Path) -> dict[str, np.ndarray]:
    """Elements of a binary little-endian PLY file, as structured arrays."""
    content = path.read_bytes()
    end = content.index(b"end_header\n") + len(b"end_header\n")
    elements: list[tuple[str, int, list]] = []
    for line in content[:end].decode("ascii").splitlines():
        words = line.split()
        if words[0] == "element":
            elements.append((words[1], int(words[2]), []))
        elif words[0] == "property":
            elements[-1][2].append((words[2], {"float": "<f4", "uint": "<u4", "uchar": "u1"}[words[1]]))
    result = {}
    for name, count, properties in elements:
        result[name] = np.frombuffer(content, np.dtype(properties), count, end)
        end += result[name].nbytes
    assert end == len(content)
    return result


def read_ply(path: Path) -> Gaussians:
    v = read_elements(path)["vertex"]
    rest = sum(name.startswith("f_rest_") for name in v.dtype.names)

    def columns(*names: str) -> np.ndarray:
        return np.stack([v[name].astype(np.float64) for name in names], axis=1)

    shN = columns(*(f"f_rest_{i}" for i in range(rest))) if rest else np.zeros((len(v), 0))
    return gaussians(
        columns("x", "y", "z"),
        columns("scale_0", "scale_1", "scale_2"),
        columns("rot_0", "rot_1", "rot_2", "rot_3"),
        1 / (1 + np.exp(-v["opacity"].astype(np.float64))),
        columns("f_dc_0", "f_dc_1", "f_dc_2"),
        shN.reshape(len(v), 3, rest // 3).transpose(0, 2, 1),
    )


def read_compressed_ply(path: Path) -> Gaussians:
    elements = read_elements(path)
    chunks, packed = elements["chunk"], elements["vertex"]
    rows: dict[str, list] = {name: [] for name in ("means", "scales", "quats", "opacities", "sh0")}
    for i, (position, rotation, scale, color) in enumerate(packed.tolist()):
        chunk = chunks[i // 256]

        def between(names: str, units: tuple[float, ...], prefix: str = "", chunk=chunk) -> list[float]:
            low = [float(chunk[f"min_{prefix}{name}"]) for name in names]
            high = [float(chunk[f"max_{prefix}{name}"]) for name in names]
            return [a + (b - a) * unit for a, b, unit in zip(low, high, units, strict=True)]

        def unit(word: int, shift: int, bits: int) -> float:
            return (word >> shift & (1 << bits) - 1) / ((1 << bits) - 1)

        rows["means"].append(between("xyz", (unit(position, 21, 11), unit(position, 11, 10), unit(position, 0, 11))))
        rows["scales"].append(between("xyz", (unit(scale, 21, 11), unit(scale, 11, 10), unit(scale, 0, 11)), "scale_"))
        colors = between("rgb", tuple(unit(color, shift, 8) for shift in (24, 16, 8)))
        rows["sh0"].append([(c - 0.5) / C0 for c in colors])
        rows["opacities"].append(unit(color, 0, 8))
        three = [(unit(rotation, shift, 10) - 0.5) * math.sqrt(2) for shift in (20, 10, 0)]
        rows["quats"].append(with_largest(rotation >> 30, three))
    sh = elements.get("sh")
    shN = np.zeros((len(packed), 0, 3))
    if sh is not None:
        codes = np.stack([sh[name] for name in sh.dtype.names], axis=1).astype(np.float64)
        units = np.where(codes == 0, 0, np.where(codes == 255, 1, (codes + 0.5) / 256))
        shN = ((units - 0.5) * 8).reshape(len(packed), 3, -1).transpose(0, 2, 1)
    return gaussians(**rows, shN=shN)


def with_largest(index: int, three: list[float]) -> list[float]:
    return [*three[:index], math.sqrt(max(1 - sum(x * x for x in three), 0)), *three[index:]]


def read_spz(path: Path | bytes) -> Gaussians:
    """With axes as they are in the file: right, up, back."""
    content = gzip.decompress(path if isinstance(path, bytes) else path.read_bytes())
    magic, version, count, degree, fraction_bits, _, _ = struct.unpack_from("<IIIBBBB", content)
    assert (magic.to_bytes(4, "little"), version) == (b"NGSP", 3)
    stream = io.BytesIO(content[16:])

    def take(*shape: int) -> np.ndarray:
        return np.frombuffer(stream.read(math.prod(shape)), np.uint8).reshape(shape)

    bytes3 = take(count, 3, 3).astype(np.int64)
    fixed = bytes3[..., 0] | bytes3[..., 1] << 8 | bytes3[..., 2] << 16
    means = np.where(fixed >= 1 << 23, fixed - (1 << 24), fixed) / (1 << fraction_bits)
    opacities = take(count) / 255
    sh0 = (take(count, 3) / 255 - 0.5) / 0.15
    scales = take(count, 3) / 16 - 10
    quats = []
    for word in np.frombuffer(stream.read(4 * count), "<u4").tolist():
        parts = [word >> shift & 1023 for shift in (20, 10, 0)]
        three = [(-1 if part & 512 else 1) * (part & 511) / 511 * math.sqrt(0.5) for part in parts]
        x, y, z, w = with_largest(word >> 30, three)
        quats.append([w, x, y, z])
    shN = (take(count, (degree + 1) ** 2 - 1, 3).astype(np.float64) - 128) / 128
    assert not stream.read()
    return gaussians(means, scales, quats, opacities, sh0, shN)


def turned_over(rows: Gaussians) -> Gaussians:
    """Gaussians after half a turn about x: from right, up, back to right, down, forward."""
    degree = round((rows["shN"].shape[1] + 1) ** 0.5) - 1
    # A harmonic of order m changes its sign with (-1)^(degree - |m|), and one of negative order once more.
    orders = [(n, m) for n in range(1, degree + 1) for m in range(-n, n + 1)]
    signs = np.array([(-1) ** (n - abs(m)) * (-1 if m < 0 else 1) for n, m in orders])
    return {
        **rows,
        "means": rows["means"] * [1, -1, -1],
        "quats": rows["quats"] * [1, 1, -1, -1],
        "shN": rows["shN"] * signs.reshape(1, -1, 1),
    }


def read_splat(path: Path) -> Gaussians:
    rows: dict[str, list] = {name: [] for name in ("means", "scales", "quats", "opacities", "sh0")}
    for x, y, z, a, b, c, *codes in struct.iter_unpack("<6f8B", path.read_bytes()):
        rows["means"].append([x, y, z])
        rows["scales"].append([math.log(a), math.log(b), math.log(c)])
        rows["sh0"].append([(code / 255 - 0.5) / C0 for code in codes[:3]])
        rows["opacities"].append(codes[3] / 255)
        rows["quats"].append([(code - 128) / 128 for code in codes[4:]])
    return gaussians(**rows, shN=np.zeros((len(rows["means"]), 0, 3)))


def read_sog(path: Path) -> Gaussians:
    """A .sog file, or a folder with its files."""
    if path.is_dir():
        files = {file.name: file.read_bytes() for file in path.iterdir()}
    else:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    meta = json.loads(files["meta.json"])
    assert meta["version"] == 2
    count = meta["count"]

    def picture(name: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(files[name])).convert("RGBA")).astype(np.int64)

    def pixels(key: str, which: int = 0) -> np.ndarray:
        return picture(meta[key]["files"][which]).reshape(-1, 4)[:count]

    words = (pixels("means", 0) | pixels("means", 1) << 8)[:, :3] / 65535
    low, high = np.array(meta["means"]["mins"]), np.array(meta["means"]["maxs"])
    logs = low + (high - low) * words
    quats = []
    for r, g, b, a in pixels("quats").tolist():
        assert 252 <= a <= 255
        quats.append(with_largest(a - 252, [(c / 255 - 0.5) * math.sqrt(2) for c in (r, g, b)]))
    sh0 = pixels("sh0")
    shN = np.zeros((count, 0, 3))
    if "shN" in meta:
        coefficients = (meta["shN"]["bands"] + 1) ** 2 - 1
        centroids = picture(meta["shN"]["files"][0])
        labels = pixels("shN", 1)
        label = labels[:, 0] | labels[:, 1] << 8
        assert label.max() < meta["shN"]["count"]
        assert centroids.shape[1] == 64 * coefficients
        columns = (label % 64 * coefficients)[:, None] + np.arange(coefficients)
        shN = np.array(meta["shN"]["codebook"])[centroids[(label // 64)[:, None], columns][..., :3]]
    return gaussians(
        np.sign(logs) * (np.exp(np.abs(logs)) - 1),
        np.array(meta["scales"]["codebook"])[pixels("scales")[:, :3]],
        quats,
        sh0[:, 3] / 255,
        np.array(meta["sh0"]["codebook"])[sh0[:, :3]],
        shN,
    )
