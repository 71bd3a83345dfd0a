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
from training.trained_photos import trained_photos, with_photos_before

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


@pytest.mark.parametrize(
    ("rule", "held_out", "trained"),
    [
        ({"test_every": 3}, 3, ["003.png", "006.png"]),  # of 000 .. 008, where 000 and 008 were held out
        ({"test_every": -1, "test_after": 6}, 2, ["007.png"]),
        ({"test_every": 8}, 2, []),
    ],
)
@pytest.mark.parametrize("how", ["resume", "ckpt", "init_ckpt"])
def test_another_rule_of_what_is_held_out_says_what_had_been_trained_on(tmp_path, how, rule, held_out, trained):
    scene = load_scene(dataset(tmp_path / "a", list(range(9))))
    given = {"resume": {"resume": True}, "ckpt": {"ckpt": "x.pt"}, "init_ckpt": {"init_ckpt": "x.pt"}}[how]
    cfg = Config(data_dir=str(scene.data_dir), **given, **rule)
    said: list[str] = []
    before = checkpoint_of(scene)
    which = {"checkpoint": None, "starting": before} if how == "init_ckpt" else {"checkpoint": before}
    loaded = load_dataset(cfg, say=said.append, **which)
    assert loaded.trained_before == {f"{number:03d}.png" for number in range(1, 8)}
    warnings = [line for line in said if "had been trained on before" in line]
    assert warnings == (
        [
            f"Warning: of {held_out} held-out photos {len(trained)} had been trained on before ({', '.join(trained)}), "
            "so that their figures flatter the model; --test_every 8 holds out photos that were not."
        ]
        if trained
        else []
    )


def test_what_was_trained_on_before_the_rule_changed_is_kept(tmp_path):
    """Twice resumed, or evaluated, a run still tells: its own options say only what it holds out at last."""
    scene = load_scene(dataset(tmp_path / "a", list(range(9))), test_every=3)
    before = checkpoint_of(scene)
    whole = Checkpoint(6, before.transform, before.state, {"test_every": 3, "test_after": -1}, photos=before.photos)
    kept = with_photos_before(whole, trained_photos(before))
    assert list(kept.also_trained_on) == ["003.png", "006.png"]
    assert not with_photos_before(whole, trained_photos(whole)).also_trained_on
    said: list[str] = []
    cfg = Config(data_dir=str(scene.data_dir), ckpt="x.pt", test_every=3)
    load_dataset(cfg, kept, said.append)
    (warning,) = [line for line in said if "had been trained on" in line]
    assert "(003.png, 006.png), so that their figures flatter the model." in warning  # this rule holds them out itself


def test_photos_of_another_scene_with_the_same_names_are_others(tmp_path):
    scene = load_scene(dataset(tmp_path / "a", list(range(9))))
    turn = Rotation.from_rotvec([0.0, 0.4, 0.0]).as_matrix()
    poses = POSES.copy()
    poses[:, :, :3] = POSES[:, :, :3] @ turn
    said: list[str] = []
    cfg = Config(data_dir=str(dataset(tmp_path / "b", list(range(9)), poses)), init_ckpt="x.pt", test_every=3)
    loaded = load_dataset(cfg, None, said.append, starting=checkpoint_of(scene))
    assert not loaded.trained_before
    assert not any("trained on" in line for line in said)


def test_a_ply_file_is_told_not_to_say_what_it_was_trained_on(tmp_path):
    """Where training begins from it; a run that is resumed has it from its checkpoint."""
    cfg = Config(data_dir=str(dataset(tmp_path, list(range(9)))), init_ckpt="x.ply")
    for begins, checkpoint in ((True, None), (False, checkpoint_of(load_scene(cfg.data_dir)))):
        said: list[str] = []
        load_dataset(cfg, checkpoint, said.append)
        assert any("does not say which photos" in line for line in said) == begins


@pytest.mark.slow
def test_a_resumed_run_and_its_evaluation_tell_of_another_rule(monkeypatch, tmp_path, capsys):
    data_dir = dataset(tmp_path / "data", list(range(9)))

    def run(*options: object, result_dir: str = "run") -> str:
        assert run_script(monkeypatch, script, data_dir, tmp_path / result_dir, *STEPS, *options) == 0
        return capsys.readouterr().out

    told = "of 3 held-out photos 2 had been trained on before (003.png, 006.png)"
    assert "trained on before" not in run("--max_steps", 4)
    assert "trained on before" not in run("--max_steps", 6, "--resume")
    assert told in run("--max_steps", 8, "--resume", "--test_every", 3)
    assert told in run("--max_steps", 10, "--resume", "--test_every", 3)
    assert told in run("--ckpt", tmp_path / "run/ckpts/ckpt_10.pt", "--test_every", 3, result_dir="evaluated")
    begun = ("--init_ckpt", tmp_path / "run/ckpts/ckpt_10.pt", "--test_every", 3, "--max_steps", 2)
    assert told in run(*begun, result_dir="begun")
    assert told in run("--ckpt", tmp_path / "begun/ckpts/ckpt_2.pt", "--test_every", 3, result_dir="evaluated")


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
