import os
import shutil
import struct
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from datasets import colmap
from datasets.cache import is_writable, user_cache_dir
from datasets.model_choice import load_sparse_model
from errors import InputError
from tests.small_scene import camera, camera_poses, write_scene


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def assert_same(left: colmap.SparseModel, right: colmap.SparseModel) -> None:
    for name, value in vars(left).items():
        np.testing.assert_array_equal(value, getattr(right, name), err_msg=name)


def test_pycolmap_leaves_sigterm_alone():
    """When it is imported it has its stack printed, and the process ended, by SIGTERM."""
    program = """
import os, signal
from datasets.colmap import _keeping_sigterm
signal.signal(signal.SIGTERM, lambda *_: print("heard"))
with _keeping_sigterm():
    import pycolmap
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "heard\n", "")


def test_pycolmap_leaves_zlib_usable():
    """pycolmap 4.1 and later export a zlib of their own, and Python's then frees what it did not allocate."""
    program = """
import io, os, zlib
import pycolmap
import numpy as np
data = os.urandom(5_000_000) + bytes(5_000_000)
assert zlib.decompress(zlib.compress(data)) == data
file = io.BytesIO()
np.savez_compressed(file, data=np.frombuffer(data, np.uint8))
file.seek(0)
assert np.load(file)["data"].tobytes() == data
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    pin = next(line for line in Path("pyproject.toml").read_text().splitlines() if "pycolmap==" in line)
    assert f'"pycolmap=={version("pycolmap")}"' in pin


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("model_dir", ["sparse/0", "sparse"])
def test_what_was_written_is_read(tmp_path, text, model_dir):
    names = ["b/2.png", "a.png", "b/10.png", "a/z.png", "Äö.png"]
    cameras = [camera(), camera("SIMPLE_RADIAL", (70, 48, 32, 0.01))]
    write_scene(tmp_path, names, cameras, text=text, model_dir=model_dir, write_pictures=False)
    model, found = load_sparse_model(tmp_path)
    assert found == tmp_path / model_dir
    assert model.image_names == sorted(names)
    order = [names.index(name) for name in model.image_names]
    np.testing.assert_allclose(model.worldtocams[:, :3], camera_poses(5)[order], atol=1e-9)
    assert [model.camera_models[i] for i in model.camera_indices] == [
        ("PINHOLE", "SIMPLE_RADIAL")[i % 2] for i in order
    ]
    np.testing.assert_array_equal(model.camera_params[0], [80, 82, 48, 32, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(model.camera_params[1], [70, 70, 48, 32, 0.01, 0, 0, 0, 0])
    assert model.points.shape == (60, 3)
    assert np.abs(model.points.mean(axis=0) - [3, -2, 5]).max() < 1
    assert model.points_rgb.std() > 50


def test_images_without_a_pose_are_left_out(tmp_path):
    import pycolmap

    write_scene(tmp_path, 5, write_pictures=False)
    reconstruction = pycolmap.Reconstruction(str(tmp_path / "sparse/0"))
    reconstruction.deregister_frame(reconstruction.images[2].frame_id)
    reconstruction.write_binary(str(tmp_path / "sparse/0"))
    assert load_sparse_model(tmp_path)[0].image_names == ["000.png", "002.png", "003.png", "004.png"]


def test_cache_serves_until_a_file_changes(tmp_path, monkeypatch):
    write_scene(tmp_path, ["z/ü.png", "a.png"], write_pictures=False)
    first = load_sparse_model(tmp_path)[0]
    assert (tmp_path / "sparse/0/parsed_scene.npz").is_file()

    def no_parsing(model_dir):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(colmap, "read_sparse_model", no_parsing)
        assert_same(load_sparse_model(tmp_path)[0], first)
        for name in ("cameras.bin", "images.bin", "points3D.bin"):
            path = tmp_path / "sparse/0" / name
            before = path.stat()
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
            with pytest.raises(AssertionError):
                load_sparse_model(tmp_path)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        load_sparse_model(tmp_path)
        monkeypatch.setattr(colmap, "CACHE_FORMAT", colmap.CACHE_FORMAT + 1)
        with pytest.raises(AssertionError):
            load_sparse_model(tmp_path)

    shutil.rmtree(tmp_path / "sparse")
    write_scene(tmp_path, 3, write_pictures=False)
    assert len(load_sparse_model(tmp_path)[0].image_names) == 3


def test_nothing_is_left_beside_a_model_that_is_not_in_the_dataset(tmp_path, monkeypatch):
    """As poses/ of a run."""
    data_dir, model_dir = tmp_path / "data", tmp_path / "run/poses"
    write_scene(data_dir, write_pictures=False)
    shutil.copytree(data_dir / "sparse/0", model_dir)
    before = sorted(model_dir.iterdir())
    first, used = load_sparse_model(data_dir, str(model_dir))
    assert used == model_dir
    assert sorted(model_dir.iterdir()) == before
    monkeypatch.setattr(colmap, "read_sparse_model", None)  # as the cache serves
    assert_same(load_sparse_model(data_dir, str(model_dir))[0], first)


@pytest.mark.parametrize("damage", [b"", b"garbage", "truncated"])
def test_damaged_cache_is_made_again(tmp_path, damage):
    write_scene(tmp_path, write_pictures=False)
    first = load_sparse_model(tmp_path)[0]
    cache = tmp_path / "sparse/0/parsed_scene.npz"
    cache.write_bytes(cache.read_bytes()[:-40] if damage == "truncated" else damage)
    assert_same(load_sparse_model(tmp_path)[0], first)
    assert len(cache.read_bytes()) > 1000
    assert [path.name for path in cache.parent.glob(".*")] == []


def test_read_only_model_is_cached_for_the_user(tmp_path, monkeypatch):
    write_scene(tmp_path, write_pictures=False)
    model_dir = tmp_path / "sparse/0"
    model_dir.chmod(0o555)
    assert not is_writable(model_dir)  # for root too
    first = load_sparse_model(tmp_path)[0]
    assert not (model_dir / "parsed_scene.npz").exists()
    assert (user_cache_dir(tmp_path) / "sparse/0/parsed_scene.npz").is_file()
    monkeypatch.setattr(colmap, "read_sparse_model", None)
    assert_same(load_sparse_model(tmp_path)[0], first)


@pytest.mark.slow
def test_valid_cache_needs_no_pycolmap(tmp_path):
    write_scene(tmp_path, write_pictures=False)
    program = (
        "import sys; sys.modules['pycolmap'] = None; from pathlib import Path; "
        "from datasets.model_choice import load_sparse_model; "
        "print(len(load_sparse_model(Path(sys.argv[1]))[0].image_names))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    without_cache = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "InputError: pycolmap is needed" in without_cache.stderr
    load_sparse_model(tmp_path)
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "5\n"


@pytest.mark.parametrize("damage", ["empty", "half", "one byte short", "one byte more", "count", "noise"])
@pytest.mark.parametrize("name", ["cameras", "images", "points3D", "rigs", "frames"])
def test_damaged_binary_file_is_named(tmp_path, name, damage):
    write_scene(tmp_path, write_pictures=False)
    path = tmp_path / "sparse/0" / f"{name}.bin"
    whole = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, len(whole), dtype=np.uint8).tobytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "one byte short": whole[:-1],
            "one byte more": whole + b"\0",
            "count": struct.pack("<Q", 10**15) + whole[8:],
            "noise": noise,
        }[damage]
    )
    with pytest.raises(InputError, match="damaged") as error:
        load_sparse_model(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_damaged_text_file_is_one_sentence(tmp_path, name, capfd):
    write_scene(tmp_path, text=True, write_pictures=False)
    (tmp_path / "sparse/0" / f"{name}.txt").write_text("7 hello\n\n")
    with pytest.raises(InputError, match=rf"{name}\.txt, line 1 \('7 hello'\) is not") as error:
        load_sparse_model(tmp_path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # nothing beside the sentence


def test_contradicting_files_are_one_sentence(tmp_path):
    write_scene(tmp_path, write_pictures=False)
    write_scene(tmp_path / "other", 5, [camera(), camera()], write_pictures=False)
    shutil.copy(tmp_path / "other/sparse/0/images.bin", tmp_path / "sparse/0/images.bin")
    with pytest.raises(InputError, match=str(tmp_path / "sparse/0")):
        load_sparse_model(tmp_path)


def test_unsupported_camera_model_is_named(tmp_path):
    write_scene(tmp_path, 3, [camera("FOV", (80, 80, 48, 32, 0.1))], write_pictures=False)
    with pytest.raises(InputError, match="camera model FOV"):
        load_sparse_model(tmp_path)


@pytest.mark.parametrize("missing", ["cameras", "images", "points3D"])
def test_missing_file_is_named(tmp_path, missing):
    write_scene(tmp_path, write_pictures=False)
    (tmp_path / "sparse/0" / f"{missing}.bin").unlink()
    with pytest.raises(InputError, match="no COLMAP model" if missing == "cameras" else f"{missing}.bin is missing"):
        load_sparse_model(tmp_path)
