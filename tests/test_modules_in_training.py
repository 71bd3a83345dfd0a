"""Runs with modules: every trainer trains the same ones, resuming goes on bit for bit, and each does what it is for."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import simple_trainer
import simple_trainer_hybrid_optimized_split
import simple_trainer_hybrid_streamed
from benchmarks.troubled_city import flight_of, in_light, write_city
from configs import Config
from datasets.normalize import transform_cameras
from datasets.scene import Scene, load_scene
from datasets.splits import split_indices
from datasets.trajectory_file import read_key_poses
from errors import InputError
from offload.culling.cameras import Cameras
from tests.interrupted_runs import assert_same_state, interrupt_after, run_script, saved
from tests.training_scripts import DENSIFICATION, EXACT, NO_DENSIFICATION, anisotropic_start, differences
from trainers import TRAINERS
from training.checkpoints import Checkpoint, load_checkpoint
from training.modules import RunModules, sky_of, state_of
from training.opened import open_model
from training.pose_files import steps_of
from training.views import View, render

pytestmark = pytest.mark.usefixtures("anisotropic_gaussians")

STEPS = 12
QUIET = (*NO_DENSIFICATION, "--num_workers", 1, "--save_every", 0)


@pytest.fixture(scope="module")
def masked_block(city_block, tmp_path_factory) -> Path:
    """The city block with a mask for every photo, which hides a corner of it."""
    data_dir = tmp_path_factory.mktemp("masked") / "block"
    shutil.copytree(city_block, data_dir)
    (data_dir / "masks").mkdir()
    mask = np.full((48, 64), 255, np.uint8)
    mask[:20, :24] = 0
    for photo in (data_dir / "images").iterdir():
        assert cv2.imwrite(str(data_dir / "masks" / f"{photo.name}.png"), mask)
    return data_dir


@pytest.fixture
def fine_tiles(monkeypatch) -> list[bool]:
    """Let small pictures be cut too; receives of each part whether it is a tile."""
    script, seen = simple_trainer_hybrid_optimized_split, []
    render_part = script.render_part

    def watched(part, *arguments, **options):
        seen.append(part.tile is not None)
        return render_part(part, *arguments, **options)

    monkeypatch.setattr(script, "render_part", watched)
    monkeypatch.setattr("offload.tiles.boxes.SMALLEST", 16)
    return seen


POSES = ("--pose_opt", "--pose_opt_lr", 1e-3, "--pose_opt_reg", 0.1)
MODULES = {
    "sky and grids": (
        *("--depth_lambda", 0.1, "--background", "sky", "--exposure", "bilateral_grid", "--depth_loss", *POSES),
    ),
    # Of five photos, two a step: most steps move a camera of the next one.
    "white and affine": (
        *("--background", "white", "--exposure", "affine", "--depth_loss", "--batch_size", 2, *POSES),
        *("--test_every", -1, "--test_after", 4),
    ),
}


@pytest.fixture(scope="module")
def gpu_only(masked_block, tmp_path_factory) -> Callable[[str], Checkpoint]:
    """What GPU-only training makes of some modules, by their name above."""

    @functools.cache
    def trained(modules: str) -> Checkpoint:
        results = tmp_path_factory.mktemp("gpu_only")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("training.beginning.initial_gaussians", anisotropic_start)
            options = (*QUIET, *MODULES[modules], "--max_steps", STEPS)
            assert run_script(monkeypatch, simple_trainer, masked_block, results, *options) == 0
        return saved(results, STEPS)

    return trained


def module_rows(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: value for name, value in checkpoint.state.items() if name.endswith(("/rows", "/exp_avg"))}


CASES = [("sky and grids", name) for name in EXACT if name != "gpu_only"]
CASES += [("white and affine", name) for name in ("split", "streamed_geometry_on_host")]


@pytest.mark.slow
@pytest.mark.parametrize(("modules", "trainer"), CASES)
def test_every_trainer_trains_the_same_modules(
    monkeypatch, masked_block, tmp_path, gpu_only, modules, trainer, fine_tiles
):
    options, expected = (*QUIET, *MODULES[modules], "--max_steps", STEPS), gpu_only(modules)
    if trainer == "split":
        options = (*options, "--split_threshold", 0.2)
    way = TRAINERS[trainer]
    assert run_script(monkeypatch, way.load(), masked_block, tmp_path, *options, *way.arguments) == 0
    actual = saved(tmp_path, STEPS)
    assert trainer != "split" or sum(fine_tiles) > 0.5 * len(fine_tiles)
    found = differences(actual.gaussians, expected.gaussians)
    found |= differences(module_rows(actual), module_rows(expected))
    assert max(found.values()) < 1e-4, found


INTERRUPTED = [
    pytest.param(simple_trainer, ("--exposure", "affine", *POSES), id="gpu-only"),
    pytest.param(
        simple_trainer_hybrid_streamed,
        ("--geometry", "host", "--background", "sky", "--exposure", "bilateral_grid"),
        id="streamed",
    ),
    pytest.param(
        simple_trainer_hybrid_optimized_split,
        ("--split_threshold", 0.3, "--background", "sky", "--exposure", "affine", "--batch_size", 2, *POSES),
        id="split",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "modules"), INTERRUPTED)
def test_an_interrupted_run_is_bit_equal(monkeypatch, masked_block, tmp_path, script, modules):
    options = (*DENSIFICATION, "--num_workers", 1, *modules, "--max_steps", 30)
    assert run_script(monkeypatch, script, masked_block, tmp_path / "whole", *options) == 0
    interrupt_after(monkeypatch, 7, 21)
    for _ in range(3):
        assert run_script(monkeypatch, script, masked_block, tmp_path / "parts", *options, "--resume") == 0
    assert_same_state(saved(tmp_path / "parts", 30), saved(tmp_path / "whole", 30))
    assert any(name.endswith("/rows") for name in saved(tmp_path / "parts", 30).state)


@pytest.mark.slow  # nine commands
def test_a_module_can_be_switched_on_and_off_and_is_evaluated(monkeypatch, city_block, tmp_path, capsys):
    def run(*options: object, result_dir: str = "run") -> str:
        code = run_script(monkeypatch, simple_trainer, city_block, tmp_path / result_dir, *QUIET, *options)
        printed = capsys.readouterr()
        assert code == (2 if "Error: " in printed.err else 0), printed.err
        return printed.out + printed.err

    assert "which it does not hold" not in run("--max_steps", 6, "--save_steps", 6)
    printed = run("--max_steps", 12, "--resume", "--background", "sky", "--exposure", "affine")
    assert "--background is now sky; it was black." in printed
    assert "--exposure affine: 14 training photos have their own" in printed
    assert "holds nothing of affine: it is trained from step 6 on" in printed
    assert "with corrected colours" in printed
    (model,) = (line for line in printed.splitlines() if line.startswith("Model:"))
    assert "point_cloud_12.ply" in model
    assert "trained before a sky, which it does not hold" in model
    checkpoint = ("--ckpt", tmp_path / "run/ckpts/ckpt_12.pt")
    before = next(line for line in printed.splitlines() if "Step 12: PSNR" in line).split("Step 12: PSNR ")[1][:5]
    assert f"PSNR {before} dB" in run(*checkpoint, "--background", "sky", result_dir="evaluated")
    assert "holds a sky that its pictures need: give --background sky." in run(*checkpoint, result_dir="other")
    opened_with_its_sky(tmp_path / "run/ckpts/ckpt_12.pt")
    plain = ("--ckpt", tmp_path / "run/ckpts/ckpt_6.pt")
    told = "holds no sky: give the --background that it was trained with, black."
    assert told in run(*plain, "--background", "sky", result_dir="other")
    assert "was trained with --background black, not white" in run(*plain, "--background", "white", result_dir="other")
    printed = run("--max_steps", 14, "--resume")  # without any modules again
    assert all(f"holds of {name} is dropped" in printed for name in ("sky", "affine"))
    assert "sky/rows" not in saved(tmp_path / "run", 14).state
    assert "exclude each other" in run("--random_background", "--background", "white", result_dir="other")


@pytest.mark.slow
def test_a_finished_run_trains_no_module_and_says_so(monkeypatch, city_block, tmp_path, capsys):
    def run(*options: object) -> str:
        assert run_script(monkeypatch, simple_trainer, city_block, tmp_path / "run", *QUIET, *options) == 0
        return capsys.readouterr().out

    run("--max_steps", 6)
    modules = ("--pose_opt", "--exposure", "affine")
    printed = run("--max_steps", 6, "--resume", *modules)
    assert "All 6 steps are done" in printed
    for name in ("affine", "poses"):
        assert f"The checkpoint holds nothing of {name}: no step is left to train it." in printed
    assert not any(words in printed for words in ("is trained from step", "poses corrected", "have their own", "Poses"))
    assert not (tmp_path / "run/poses").exists()
    assert "which --pose_opt corrected" not in run("--max_steps", 6, "--resume")
    printed = run("--max_steps", 8, "--resume", *modules)
    assert "holds nothing of poses: it is trained from step 6 on" in printed
    assert steps_of(tmp_path / "run") == 8


@pytest.mark.slow
def test_modules_are_saved_at_the_step_of_the_gaussians_where_a_refinement_ends_training(
    monkeypatch, city_block, tmp_path
):
    """The Gaussians have taken their step then, and the modules take theirs last."""
    schedule = ("--refine_start_iter", 2, "--refine_every", 5, "--sh_degree_interval", 10, *QUIET[-4:])
    modules = ("--background", "sky", "--exposure", "affine")

    def run(result_dir: str, *options: object) -> int:
        return run_script(monkeypatch, simple_trainer, city_block, tmp_path / result_dir, *modules, *options)

    assert run("whole", *QUIET, "--max_steps", 12, "--save_steps", 6) == 0
    assert run("stopped", *schedule, "--max_steps", 12, "--prune_opa", 0.49) == 1
    stopped, whole = (module_rows(saved(tmp_path / folder, 6)) for folder in ("stopped", "whole"))
    assert stopped.keys() == whole.keys()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    assert run("stopped", *schedule, "--max_steps", 12, "--resume") == 0
    assert saved(tmp_path / "stopped", 12).state["sky/step_count"] == 12


@pytest.fixture(scope="module")
def block(city_block) -> Scene:
    return load_scene(city_block)


def some_view(block: Scene, *image_ids: int) -> View:
    ids = torch.tensor(image_ids)
    viewmats = torch.linalg.inv(torch.from_numpy(block.camtoworlds[ids].astype(np.float32)).double()).float()
    Ks = torch.eye(3).expand(len(ids), 3, 3)
    return View(torch.zeros(len(ids), 4, 6, 3), Cameras(viewmats, Ks, 6, 4), image_ids=ids)


def test_cameras_are_known_ahead_unless_the_step_moves_them(block):
    """As they will be, bit for bit: a run that is resumed there finds them so."""
    modules = RunModules(Config(pose_opt=True, pose_opt_lr=1e-2, max_steps=8), block, torch.device("cpu"))
    first, second = some_view(block, 1, 2), some_view(block, 3, 4)
    for step in range(6):  # of which poses rest in two
        present, upcoming = (first, second) if step % 2 == 0 else (second, first)
        assert modules.placed_ahead(some_view(block, 5, *present.image_ids.tolist()), present) is None
        ahead = modules.placed_ahead(upcoming, present)
        modules.begin_step(present)
        cameras = modules.cameras(present)
        assert torch.equal(cameras.viewmats, modules.placed(present).cameras.viewmats)
        (cameras.viewmats[:, :3] * torch.arange(12.0).view(3, 4).sin()).sum().backward()
        modules.update()
        assert torch.equal(modules.placed(upcoming).cameras.viewmats, ahead.cameras.viewmats)
    moved = (ahead.cameras.viewmats - second.cameras.viewmats).abs().amax(dim=(1, 2))
    assert (moved > 1e-3).all()


@pytest.mark.parametrize(
    ("cfg", "option"),
    [
        (Config(pose_opt=True), "--pose_opt"),
        (Config(exposure="affine"), "--exposure affine"),
        (Config(exposure="bilateral_grid"), "--exposure bilateral_grid"),
    ],
)
def test_a_single_photo_cannot_be_corrected(block, cfg, option):
    with pytest.raises(InputError, match=f"{option} wants two training photos or more"):
        RunModules(cfg, replace(block, train_ids=block.train_ids[:1]), torch.device("cpu"))


@pytest.mark.parametrize("cfg", [Config(), Config(test_every=3)])
def test_held_out_photos_stand_where_they_stood_by_a_checkpoint_too(block, cfg):
    """Of a run with other betas, that did not see all photos, whichever are held out now."""
    training = Config(pose_opt=True, pose_opt_lr=1e-2, max_steps=4, batch_size=2)
    modules = RunModules(training, block, torch.device("cpu"))
    for pair in block.train_ids[:8].reshape(4, 2).tolist():
        view = some_view(block, *pair)
        modules.begin_step(view)
        (modules.cameras(view).viewmats[:, :3] * torch.arange(12.0).view(3, 4).sin()).sum().backward()
        modules.update()
    test_view = some_view(block, *block.test_ids.tolist())
    wanted = modules.held_out()(test_view).cameras.viewmats
    assert not torch.equal(wanted, test_view.cameras.viewmats)

    state = {f"poses/{key}": value for key, value in modules.parts["poses"].state_dict().items()}
    train_ids, test_ids = split_indices(len(block.image_names), test_every=cfg.test_every, test_after=-1)
    scene = replace(block, train_ids=train_ids, test_ids=test_ids)
    evaluated = RunModules(cfg, scene, torch.device("cpu"))
    evaluated.load_evaluated(Checkpoint(4, np.eye(4), state), cfg, scene)
    torch.testing.assert_close(evaluated.held_out()(test_view).cameras.viewmats, wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_corrected_poses_are_a_model_to_train_on(monkeypatch, city_block, block, tmp_path, capsys):
    options = (*QUIET, *POSES, "--max_steps", 6)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    poses = json.loads((tmp_path / "poses/poses.json").read_text())
    found = read_key_poses(tmp_path / "poses/poses.json")
    assert poses["image_names"] == block.image_names
    assert poses["steps"] == 6
    back = np.linalg.inv(block.transform)
    given = transform_cameras(back, block.camtoworlds)
    moved = np.linalg.norm(found[:, :3, 3] - given[:, :3, 3], axis=1)
    assert 0 < moved[block.test_ids].max() < moved.max()  # by what the six that were seen have in common
    assert (moved[block.train_ids] > 1e-4 * moved.max()).sum() == 6  # one a step
    turned = np.einsum("nij,nij->n", given[:, :3, :3], found[:, :3, :3])[block.train_ids]  # 1 + 2 cos(angle)
    turns = np.degrees(np.arccos(np.clip((turned - 1) / 2, -1, 1)))
    statistics = json.loads((tmp_path / "stats/train_step6.json").read_text())
    assert statistics["pose_turn_largest"] == pytest.approx(turns.max(), rel=1e-4)
    assert statistics["pose_turn_median"] == pytest.approx(np.median(turns), abs=1e-5)
    assert statistics["pose_shift_largest"] == pytest.approx(moved.max())
    assert statistics["pose_shift_median"] == pytest.approx(np.median(moved[block.train_ids]))
    evaluation = (*QUIET, "--ckpt", tmp_path / "ckpts/ckpt_6.pt")
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path / "again", *evaluation) == 0
    figures = [json.loads((folder / "stats/val_step6.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert figures[0]["psnr"] == figures[1]["psnr"]  # held-out cameras stand where they stood
    twice = (*QUIET, *POSES, "--max_steps", 8, "--resume", "--new_photos", "--model_dir", tmp_path / "poses")
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *twice) == 2
    assert "leave --model_dir out" in capsys.readouterr().err
    elsewhere = ("--result_dir", tmp_path / "evaluated", "--model_dir", tmp_path / "poses")
    checkpoint = max((tmp_path / "ckpts").glob("ckpt_*.pt"))
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *QUIET, "--ckpt", checkpoint, *elsewhere) == 2
    assert "that the run of --ckpt has corrected" in capsys.readouterr().err
    again = load_scene(city_block, model_dir=str(tmp_path / "poses"))
    read = transform_cameras(np.linalg.inv(again.transform), again.camtoworlds)
    np.testing.assert_allclose(read, found, rtol=0, atol=1e-6)
    assert len(again.points) == len(block.points)
    for ours, theirs in zip(again.cameras, block.cameras, strict=True):
        np.testing.assert_allclose(ours.K, theirs.K)


def opened_with_its_sky(path: Path) -> None:
    """What view.py draws."""
    device, checkpoint = torch.device("cpu"), load_checkpoint(path)
    model, _, pose = open_model(path, device, antialiased=False)
    K = torch.tensor([[[30.0, 0, 15], [0, 30, 10], [0, 0, 1]]])
    cameras = model.make_cameras(torch.linalg.inv(torch.from_numpy(pose)).float()[None], K, 30, 20)
    sky = sky_of(state_of(checkpoint, "sky"), device)
    expected, _ = render(checkpoint.gaussians, cameras, Config(), sh_degree=3, backgrounds=sky)
    before_black, _ = render(checkpoint.gaussians, cameras, Config(), sh_degree=3)
    torch.testing.assert_close(model.draw(cameras), expected, rtol=0, atol=1e-5)
    assert (expected - before_black).abs().max() > 0.1


# ------------------------------------------------------------------------------- what they are for, at a small size

SIZE = dict(num_views=24, width=64, height=48, num_points=600)
SHORT = (*NO_DENSIFICATION, "--sh_degree_interval", 100, "--num_workers", 1, "--save_every", 0, "--max_steps", 250)


@pytest.mark.slow
def test_exposures_find_the_lights_of_photos(monkeypatch, tmp_path):
    """What they make of a grey, of photo to photo, beside what the lights made of it."""
    write_city(tmp_path / "city", **SIZE, lights="all")
    options = (*SHORT, "--exposure", "affine")
    assert run_script(monkeypatch, simple_trainer, tmp_path / "city", tmp_path / "run", *options) == 0
    grey, rng = np.full(3, 0.4), np.random.default_rng([0, 4])  # as `write_city` draws
    lights = np.stack([in_light(grey, flight_of(photo), rng) for photo in range(24)])  # [24, 3]
    trained = np.flatnonzero(np.arange(24) % 8)  # the others are test photos
    rows = saved(tmp_path / "run", 250).state["affine/rows"].double().view(-1, 3, 4).numpy()
    learnt = rows[:, :, :3] @ grey + rows[:, :, 3]  # [21, 3]
    # Red, in which the flights differ most; after 12 looks at each photo.
    assert np.corrcoef(learnt[:, 0], lights[trained, 0])[0, 1] > 0.8


@pytest.mark.slow
def test_a_sky_leaves_no_holes(monkeypatch, tmp_path):
    write_city(tmp_path / "city", **SIZE, sky=1.0)
    found = {}
    for kind in ("black", "sky"):
        options = (*SHORT, "--background", kind)
        assert run_script(monkeypatch, simple_trainer, tmp_path / "city", tmp_path / kind, *options) == 0
        found[kind] = json.loads((tmp_path / kind / "stats/val_step250.json").read_text())["psnr"]
    assert found["sky"] > found["black"] + 2.0, found
