"""What a run goes on from: the checkpoint's own world, with the photos it was trained on or, where asked, others."""

from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from scipy.spatial.transform import Rotation

import simple_trainer_hybrid_optimized as script
from configs import Config
from datasets.normalize import transform_cameras
from datasets.scene import Scene, load_scene
from errors import InputError
from tests.interrupted_runs import assert_same_state, run_script, saved
from tests.small_scene import camera_poses, write_scene
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint, load_checkpoint
from training.dataset import load_dataset, photos_of

STEPS = ("--save_steps", 4, "--refine_start_iter", 1000, "--num_workers", 1)
POSES = camera_poses(12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def dataset(folder: Path, numbers: list[int], poses: np.ndarray = POSES) -> Path:
    return write_scene(folder, [f"{number:03d}.png" for number in numbers], poses=poses[numbers])


def checkpoint_of(scene: Scene, *, photos: bool = True) -> Checkpoint:
    state = {"parameters/means": torch.from_numpy(scene.points)}
    options = {"test_every": 8, "test_after": -1}
    return Checkpoint(4, scene.transform, state, options, photos=photos_of(scene) if photos else {})


@pytest.mark.slow
def test_photos_added_and_removed_end_no_scene(monkeypatch, tmp_path, capsys):
    before, after = dataset(tmp_path / "before", list(range(9))), dataset(tmp_path / "after", [0, *range(2, 12)])
    assert run_script(monkeypatch, script, before, tmp_path / "run", *STEPS, "--max_steps", 4) == 0
    trained = saved(tmp_path / "run", 4)
    assert list(trained.photos) == [f"{number:03d}.png" for number in range(9)]

    assert run_script(monkeypatch, script, after, tmp_path / "run", *STEPS, "--max_steps", 8, "--resume") == 2
    refusal = capsys.readouterr().err
    assert "3 photos added (009.png, 010.png, 011.png), 1 photo removed (001.png)" in refusal
    assert "--new_photos" in refusal
    assert [path.name for path in (tmp_path / "run/ckpts").iterdir()] == ["ckpt_4.pt"]

    options = (*STEPS, "--max_steps", 8, "--resume", "--new_photos")
    assert run_script(monkeypatch, script, after, tmp_path / "run", *options) == 0
    printed = capsys.readouterr().out
    assert "3 photos added" in printed
    assert "Resuming after 4 steps" in printed
    went_on = saved(tmp_path / "run", 8)
    assert np.array_equal(went_on.transform, trained.transform)
    assert list(went_on.photos) == [f"{number:03d}.png" for number in [0, *range(2, 12)]]
    shift = (went_on.gaussians["means"] - trained.gaussians["means"]).norm(dim=1).median()
    assert 0 < shift < 0.05  # four steps further in the same world

    # From now on these are its photos, and nothing needs to be asked for.
    options = (*STEPS, "--max_steps", 10, "--resume")
    assert run_script(monkeypatch, script, after, tmp_path / "run", *options) == 0
    assert "photos added" not in capsys.readouterr().out


def test_held_out_photos_that_were_trained_on_are_named(tmp_path):
    before, after = (load_scene(dataset(tmp_path / str(count), list(range(12 - count, 12)))) for count in (10, 12))
    said = []
    cfg = Config(data_dir=str(after.data_dir), resume=True, new_photos=True)
    assert load_dataset(cfg, checkpoint_of(before), said.append).has_changed
    # 002 and 010 were held out of 002 .. 011, and 000 and 008 are of 000 .. 011.
    assert any("of 2 held-out photos 1 had been trained on before (008.png)" in line for line in said)


def test_a_dataset_that_has_not_changed_is_silent(tmp_path):
    scene = load_scene(dataset(tmp_path / "a", list(range(9))))
    said = []
    loaded = load_dataset(Config(data_dir=str(scene.data_dir), resume=True), checkpoint_of(scene), said.append)
    assert not loaded.has_changed
    assert [line for line in said if not line.startswith("Dataset: ")] == []
    assert np.array_equal(loaded.scene.camtoworlds, scene.camtoworlds)
    assert np.array_equal(loaded.scene.points, scene.points)
    assert loaded.scene.scene_scale == scene.scene_scale


@pytest.mark.parametrize("new_photos", [False, True])
@pytest.mark.parametrize("kind", ["other names", "other world"])
def test_another_dataset_is_refused_whatever_is_asked_for(tmp_path, kind, new_photos):
    scene = load_scene(dataset(tmp_path / "a", list(range(9))))
    if kind == "other names":
        other = dataset(tmp_path / "b", list(range(9, 12)))
    else:  # the same photos, reconstructed anew
        turn = Rotation.from_rotvec([0.0, 0.4, 0.0]).as_matrix()
        poses = POSES.copy()
        poses[:, :, :3] = POSES[:, :, :3] @ turn
        other = dataset(tmp_path / "b", list(range(9)), poses)
    cfg = Config(data_dir=str(other), resume=True, new_photos=new_photos)
    with pytest.raises(InputError, match="another dataset" if kind == "other names" else "stand elsewhere"):
        load_dataset(cfg, checkpoint_of(scene), print)


# ------------------------------------------------------------------------------- checkpoints of earlier versions


def transform_of_earlier_versions(scene: Scene) -> np.ndarray:
    """A similarity with the same axes, but with a scale, a centre and directions of its own."""
    other = np.diag([-1.1, 1.1, -1.1, 1.0])
    other[:3, 3] = [0.05, -0.02, 0.03]
    return other @ scene.transform


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_keeps_its_world(monkeypatch, tmp_path, capsys):
    """It does not name its photos, and its normalization was another one."""
    data_dir = dataset(tmp_path / "a", list(range(9)))
    transform = transform_of_earlier_versions(load_scene(data_dir))
    with monkeypatch.context() as patch:
        patch.setattr("datasets.scene.normalizing_transform", lambda *arguments: transform)
        assert run_script(patch, script, data_dir, tmp_path / "whole", *STEPS, "--max_steps", 8) == 0
        assert run_script(patch, script, data_dir, tmp_path / "run", *STEPS, "--max_steps", 8) == 0
    (tmp_path / "run/ckpts/ckpt_8.pt").unlink()
    path = tmp_path / "run/ckpts/ckpt_4.pt"
    written = load_checkpoint(path)
    state = {name: value.clone() for name, value in written.state.items()}
    save_checkpoint(path, Checkpoint(4, written.transform, state, written.options, written.sequence))
    capsys.readouterr()
    assert run_script(monkeypatch, script, data_dir, tmp_path / "run", *STEPS, "--max_steps", 8, "--resume") == 0
    assert "did not keep the names of its photos" in capsys.readouterr().out
    assert np.array_equal(saved(tmp_path / "run", 8).transform, transform)
    assert_same_state(saved(tmp_path / "run", 8), saved(tmp_path / "whole", 8))

    evaluate = ("--ckpt", path, "--num_workers", 1)
    assert run_script(monkeypatch, script, data_dir, tmp_path / "evaluated", *evaluate) == 0
    (tmp_path / "run/ckpts/ckpt_8.pt").unlink()  # which names the photos
    other = write_scene(tmp_path / "b", 9, poses=POSES[:9], seed=5)
    for options in (("--resume", "--max_steps", 9), evaluate):
        assert run_script(monkeypatch, script, other, tmp_path / "run", *options) == 2
        assert "another dataset" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ a moved world


@pytest.mark.slow
def test_a_georeferenced_dataset_trains_and_resumes_as_the_local_one(monkeypatch, tmp_path, capsys):
    """Easting and northing, z up, ten times the scale: the same model, up to the rounding of the input."""
    local = dataset(tmp_path / "local", list(range(9)))
    world = np.eye(4)
    world[:3, :3] = 10 * Rotation.from_rotvec([-1.6, 0.1, 0.2]).as_matrix()
    world[:3, 3] = [476123.0, 5429876.0, 187.0]
    model = pycolmap.Reconstruction(str(local / "sparse/0"))
    model.transform(pycolmap.Sim3d(world[:3]))
    utm = dataset(tmp_path / "utm", list(range(9)))
    model.write_binary(str(utm / "sparse/0"))
    for name, data_dir in (("local", local), ("utm", utm)):
        options = (*STEPS, "--max_steps", 4)
        assert run_script(monkeypatch, script, data_dir, tmp_path / f"of {name}", *options) == 0
        options = (*STEPS, "--max_steps", 8, "--resume")
        assert run_script(monkeypatch, script, data_dir, tmp_path / f"of {name}", *options) == 0
        assert ("PLY files stay in normalized coordinates" in capsys.readouterr().out) == (name == "utm")
    expected, actual = (saved(tmp_path / f"of {name}", 8) for name in ("local", "utm"))
    for name, value in expected.gaussians.items():
        assert (actual.gaussians[name] - value).abs().median() <= 1e-5 * value.abs().max(), name
    # The transform leads from each input's own coordinates to the same ones.
    np.testing.assert_allclose((actual.transform @ world)[:3], expected.transform[:3], atol=1e-7)


def test_cameras_of_a_scene_that_goes_on_stand_where_the_checkpoint_says(tmp_path):
    scene = load_scene(dataset(tmp_path / "a", list(range(9))))
    transform = transform_of_earlier_versions(scene)
    placed = load_scene(scene.data_dir, transform=transform)
    inputs = transform_cameras(np.linalg.inv(scene.transform), scene.camtoworlds)
    np.testing.assert_allclose(placed.camtoworlds, transform_cameras(transform, inputs), atol=1e-9)
    assert np.array_equal(placed.transform, transform)
    np.testing.assert_allclose(placed.own_transform, scene.transform, atol=0)
