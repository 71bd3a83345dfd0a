"""Datasets from strangers: nothing is executed, no path leaves the dataset, and sizes are checked before allocation."""

import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest

from datasets.cache import read_npz
from datasets.image_files import decode_image
from datasets.model_choice import load_sparse_model
from datasets.ply import read_points
from datasets.scene import load_scene
from errors import InputError
from tests.fuzz_readers import run
from tests.small_scene import camera, write_scene


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_damaged_files_are_read_or_refused():
    """A short run of what `python -m tests.fuzz_readers` does at length."""
    counts, failures = run(0, 560)
    assert failures == []
    for target in {name for name, _ in counts} - {"cache of a model"}:  # a damaged cache is no reason to stop
        assert counts[target, "sentence"] > 10, target
        assert counts[target, "read"] > 1, target


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", ["../000.png", "/etc/passwd", "a/../../000.png", "..", "x" * 256 + ".png"])
def test_names_that_lead_out_of_the_dataset_are_refused(tmp_path, name, text):
    write_scene(tmp_path, [name, "000.png"], text=text, write_pictures=False)
    with pytest.raises(InputError, match="no path inside the folder") as error:
        load_sparse_model(tmp_path)
    assert str(error.value).isprintable()


def test_a_cache_cannot_lead_out_of_the_dataset_either(tmp_path):
    write_scene(tmp_path, ["000.png", "001.png"], write_pictures=False)
    load_sparse_model(tmp_path)
    cache = tmp_path / "sparse/0/parsed_scene.npz"
    arrays = read_npz(cache)
    arrays["image_names"] = np.frombuffer(b"../../secret.png\n001.png", np.uint8)
    np.savez(cache, **arrays)
    with pytest.raises(InputError, match="no path inside the folder"):
        load_sparse_model(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    write_scene(tmp_path, write_pictures=False)
    first = load_sparse_model(tmp_path)[0]
    cache = tmp_path / "sparse/0/parsed_scene.npz"
    arrays = read_npz(cache)
    np.savez(cache, **arrays | {"points": np.array([Payload()], object)}, allow_pickle=True)
    assert read_npz(cache) is None
    np.testing.assert_array_equal(load_sparse_model(tmp_path)[0].points, first.points)
    assert not (tmp_path / "executed").exists()


def npz_of_zeros(num_bytes: int, *, claimed: int, compression: int) -> bytes:
    """An .npz file with one array of zeros, whose header claims another size."""
    array, content = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (claimed,)})
    with zipfile.ZipFile(content, "w", compression) as archive:
        archive.writestr("points.npy", array.getvalue() + bytes(num_bytes))
    return content.getvalue()


def test_caches_allocate_no_more_than_their_files_hold(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(npz_of_zeros(1000, claimed=1000, compression=zipfile.ZIP_STORED))
    np.testing.assert_array_equal(read_npz(path)["points"], np.zeros(1000, np.uint8))
    path.write_bytes(npz_of_zeros(50_000_000, claimed=50_000_000, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 100_000
    assert read_npz(path) is None
    path.write_bytes(npz_of_zeros(1000, claimed=10**15, compression=zipfile.ZIP_STORED))
    assert read_npz(path) is None


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def huge_ply(kind: str) -> bytes:
    properties = "".join(f"property float {n}\n" for n in "xyz") + "".join(
        f"property uchar {n}\n" for n in ("red", "green", "blue")
    )
    return f"ply\nformat {kind} 1.0\nelement vertex {10**12}\n{properties}end_header\n0 0 0 0 0 0\n".encode()


def test_sizes_are_checked_before_allocation(tmp_path):
    """In a process that may allocate 200 MB."""
    files = {
        "huge.png": png_header(100_000, 100_000),
        "ascii.ply": huge_ply("ascii"),
        "binary.ply": huge_ply("binary_little_endian"),
        "empty rows.ply": b"ply\nformat ascii 1.0\nelement vertex 1000000000000\nend_header\n",
        "no line.ply": b"ply" + b"x" * 1_000_000,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    program = """
import resource, sys
from pathlib import Path
from datasets.image_files import decode_image
from datasets.ply import read_points
from errors import InputError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        (decode_image if path.suffix == ".png" else read_points)(path)
    except InputError as error:
        assert not isinstance(error.__cause__, MemoryError), error
        print(error)
"""
    command = [sys.executable, "-c", program, *(str(tmp_path / name) for name in files)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    sentences = result.stdout.splitlines()
    assert len(sentences) == len(files)
    assert all(name in sentence for name, sentence in zip(files, sentences, strict=True))


def test_formats_that_run_other_programs_are_not_opened(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n")
    with pytest.raises(InputError, match=r"a\.png cannot be decoded"):
        decode_image(path)


def test_coordinates_that_overflow_are_refused(tmp_path):
    content = huge_ply("ascii").replace(b"1000000000000", b"5").replace(b"float", b"double")
    rows = [f"{i} {i * i} {1e300 if i == 3 else -i} 0 0 0" for i in range(5)]
    write_scene(tmp_path)
    (tmp_path / "sparse/0/points.ply").write_bytes(content.replace(b"0 0 0 0 0 0", "\n".join(rows).encode()))
    assert len(read_points(tmp_path / "sparse/0/points.ply")[0]) == 5
    with pytest.raises(InputError, match=r"point of .* farther than"):
        load_scene(tmp_path, init_ply=True)


def test_cameras_that_cannot_be_computed_with_are_refused(tmp_path):
    write_scene(tmp_path / "a", 3, [camera("OPENCV", (80, 80, 48, 32, 1e200, -1e300, 0, 0))])
    with pytest.raises(InputError, match="cannot be undistorted"):
        load_scene(tmp_path / "a")
    item = camera()
    item.width = 2**63
    write_scene(tmp_path / "b", 3, [item], write_pictures=False)
    with pytest.raises(InputError, match=r"cameras\.bin is damaged"):
        load_scene(tmp_path / "b")


def test_repeated_names_and_points_that_are_not_finite_are_refused(tmp_path):
    write_scene(tmp_path / "a", ["a.png", "b.png", "c.png"], write_pictures=False)
    images = tmp_path / "a/sparse/0/images.bin"
    images.write_bytes(images.read_bytes().replace(b"b.png", b"a.png"))
    with pytest.raises(InputError, match=r"twice|cannot be read as a COLMAP model"):
        load_sparse_model(tmp_path / "a")
    write_scene(tmp_path / "b", 3, write_pictures=False)
    points = tmp_path / "b/sparse/0/points3D.bin"
    content = bytearray(points.read_bytes())
    content[16:24] = struct.pack("<d", float("nan"))
    points.write_bytes(content)
    with pytest.raises(InputError, match=r"points3D\.bin is damaged \(a point is not finite"):
        load_sparse_model(tmp_path / "b")
