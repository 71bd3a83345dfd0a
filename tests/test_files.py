"""Checkpoints and PLY files: what is read is what was written, and damaged files are refused in a sentence."""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData
from scipy.spatial.transform import Rotation

from datasets.normalize import transform_points
from errors import InputError
from offload.adam.state import ARRAYS
from tests.aerial_training import rows_of
from tests.resident_memory import resident_bytes
from training import ply
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint, load_checkpoint
from training.gaussians import PARAMETER_NAMES, initial_gaussians
from training.ply import load_ply, save_ply

TRANSFORM = np.diag([2.0, 2.0, 2.0, 1.0]) + 0.125


def with_parameters(steps: int, gaussians: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint(steps, TRANSFORM, {f"parameters/{name}": value for name, value in gaussians.items()})


def some_gaussians(num_gaussians: int = 50, sh_degree: int = 3) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    gaussians = initial_gaussians(
        rng.normal(size=(num_gaussians, 3)).astype(np.float32),
        rng.integers(0, 256, (num_gaussians, 3), np.uint8),
        sh_degree=sh_degree,
        init_opacity=0.1,
        init_scale=1.0,
        seed=0,
    )
    gaussians["shN"] = torch.from_numpy(rng.normal(size=gaussians["shN"].shape).astype(np.float32))
    return gaussians


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(PARAMETER_NAMES)
    for name in PARAMETER_NAMES:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("num_gaussians", [50, 1])
@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
def test_ply_round_trip(tmp_path, monkeypatch, num_gaussians, sh_degree):
    monkeypatch.setattr(ply, "MOST_ROWS", 7)
    gaussians = some_gaussians(num_gaussians, sh_degree)
    save_ply(tmp_path / "a.ply", rows_of(gaussians), num_gaussians, TRANSFORM)
    assert_same(load_ply(tmp_path / "a.ply"), gaussians)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.json", tmp_path / "a.ply"]


def test_a_ply_file_says_how_to_come_back_to_coordinates_that_float32_cannot_hold(tmp_path):
    """Georeferenced ones: what the file and its JSON give is within a tenth of a millimetre of the input's points."""
    offset = np.array([476123.25, 5429876.5, 187.125])
    points = np.random.default_rng(0).normal(size=(50, 3)) * 100 + offset  # metres
    turn = Rotation.from_rotvec([0.3, -0.2, 0.5]).as_matrix()
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = 0.01 * turn, -0.01 * turn @ (offset + 50)
    gaussians = some_gaussians() | {"means": torch.from_numpy(transform_points(transform, points)).float()}
    save_ply(tmp_path / "a.ply", rows_of(gaussians), 50, transform)
    means = load_ply(tmp_path / "a.ply")["means"].double().numpy()
    way_back = json.loads((tmp_path / "a.json").read_text())
    found = way_back["offset"] + way_back["scale"] * means @ np.array(way_back["rotation"]).T
    assert np.abs(found - points).max() < 1e-4
    assert np.abs(points.astype(np.float32) - points).max() > 0.1
    comments = PlyData.read(tmp_path / "a.ply").comments
    assert any("a.json" in line for line in comments)
    numbers = next(line for line in comments if line.startswith("offset_of_input")).split()[1:]
    assert [float(number) for number in numbers] == way_back["offset"]


def test_ply_has_the_layout_of_the_3dgs_viewers(tmp_path):
    gaussians = some_gaussians()
    save_ply(tmp_path / "a.ply", rows_of(gaussians), 50, TRANSFORM)
    file = PlyData.read(tmp_path / "a.ply")
    vertex = file["vertex"]
    names = [property.name for property in vertex.properties]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[9:54] == [f"f_rest_{i}" for i in range(45)]
    assert names[54:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    # f_rest holds 15 coefficients of red, then of green, then of blue.
    assert vertex["f_rest_17"][3] == gaussians["shN"][3, 2, 1].item()
    assert vertex["scale_1"][3] == gaussians["scales"][3, 1].item()
    words = next(line for line in file.comments if line.startswith("transform_from_input")).split()
    assert np.array(words[1:], float).reshape(4, 4).tolist() == TRANSFORM.tolist()


@pytest.mark.parametrize("num_gaussians", [50, 1])
@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
def test_checkpoint_round_trip(tmp_path, num_gaussians, sh_degree):
    """Without harmonics shN has no bytes, and rows all the same."""
    gaussians = some_gaussians(num_gaussians, sh_degree)
    save_checkpoint(tmp_path / "a.pt", with_parameters(7, gaussians))
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert_same(loaded.gaussians, gaussians)
    assert loaded.steps == 7
    assert np.array_equal(loaded.transform, TRANSFORM)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]


def test_views_are_saved_alone(tmp_path):
    gaussians = some_gaussians(50)
    rows = torch.randn(100_000, 48)
    views = {**gaussians, "sh0": rows[:50, :3].view(50, 1, 3), "shN": rows[:50, 3:].view(50, 15, 3)}
    save_checkpoint(tmp_path / "a.pt", with_parameters(7, views))
    assert (tmp_path / "a.pt").stat().st_size < 50_000
    assert_same(load_checkpoint(tmp_path / "a.pt").gaussians, views)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / "a.pt"
    save_checkpoint(path, with_parameters(7, some_gaussians()))

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, with_parameters(8, some_gaussians()))
    assert load_checkpoint(path).steps == 7
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_writing_a_checkpoint_takes_little_memory(tmp_path):
    """At most 5 % of the model, wherever its rows lie in wider ones."""
    rows = torch.rand(3, 400_000, 48)
    state = {f"{array}/shN": rows[index, :, 3:].view(-1, 15, 3) for index, array in enumerate(ARRAYS)}
    save_checkpoint(tmp_path / "a.pt", Checkpoint(1, TRANSFORM, state))  # threads have their stacks from now on
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    save_checkpoint(tmp_path / "a.pt", Checkpoint(1, TRANSFORM, state))
    assert resident_bytes("VmHWM") - before < 0.05 * sum(value.nbytes for value in state.values())


def damaged_checkpoints(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "text": b"not a checkpoint",
        "pickle": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
        "header only": content[:30],
    }


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "pickle", "header only"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    path = tmp_path / "a.pt"
    save_checkpoint(path, with_parameters(7, some_gaussians()))
    path.write_bytes(damaged_checkpoints(path.read_bytes())[damage])
    with pytest.raises(InputError, match=r"a\.pt"):
        load_checkpoint(path)


def test_other_dictionaries_and_newer_checkpoints_are_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "list.pt")
    torch.save({"version": 99}, tmp_path / "newer.pt")
    with pytest.raises(InputError, match="newer version"):
        load_checkpoint(tmp_path / "newer.pt")
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_damaged_ply_files_are_refused(tmp_path):
    path = tmp_path / "a.ply"
    save_ply(path, rows_of(some_gaussians()), 50, TRANSFORM)
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-5], b"ply\n" + struct.pack("8f", *range(8))):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.ply"):
            load_ply(path)
    with pytest.raises(InputError, match="none"):
        load_ply(tmp_path / "none.ply")
