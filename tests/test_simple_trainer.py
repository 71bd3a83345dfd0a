"""The GPU-only trainer from the command line, without a GPU: what it writes, repeats, and refuses."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import yaml

import simple_trainer
from strategies import ops
from training import command_line
from training.checkpoints import load_checkpoint
from training.event_log import EventLog
from training.ply import load_ply


def run_script(monkeypatch, *arguments: object) -> int:
    """Run simple_trainer.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["simple_trainer.py", *map(str, arguments)])
    try:
        command_line.main(simple_trainer.CONFIGS, simple_trainer.train, "test")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def train(monkeypatch, data_dir: Path, result_dir: Path, *options: object) -> int:
    common = ("--data_dir", data_dir, "--result_dir", result_dir, "--device", "cpu")
    return run_script(monkeypatch, "default", *common, *options)


SHORT_DENSIFYING = (
    *("--max_steps", 60, "--refine_start_iter", 10, "--refine_every", 10, "--reset_every", 25),
    *("--sh_degree_interval", 15, "--grow_grad2d", 1e-4),
)


def test_training_writes_everything_and_improves(monkeypatch, city_block, tmp_path, capsys):
    options = ("--max_steps", 200, "--eval_steps", 20, "--sh_degree_interval", 50)
    assert train(monkeypatch, city_block, tmp_path, *options, "--save_steps", 100) == 0
    printed = capsys.readouterr().out
    val = {step: json.loads((tmp_path / f"stats/val_step{step}.json").read_text()) for step in (20, 200)}
    stats = json.loads((tmp_path / "stats/train_step200.json").read_text())
    assert val[200]["psnr"] > val[20]["psnr"] + 1
    assert f"PSNR {val[200]['psnr']:.2f} dB" in printed
    assert len(val[200]["images"]) == 2
    assert [image["name"] for image in val[200]["images"]] == ["00.png", "08.png"]
    assert val[200]["psnr"] == pytest.approx(np.mean([image["psnr"] for image in val[200]["images"]]))
    if val[200]["lpips"] is None:
        assert printed.count("LPIPS will be reported as missing") == 1
    assert stats["num_GS"] == val[200]["num_GS"]
    assert stats["steps_per_second"] == pytest.approx(200 / stats["elapsed_seconds"])
    assert stats["peak_host_bytes"] > 1e8
    assert stats["device_bytes_allocated"] == 0
    assert list(stats["stages_ms"]) == ["load", "fetch", "render", "backward", "update", "densify"]
    assert "staging_allocations" not in stats
    assert {file.name for file in (tmp_path / "ckpts").iterdir()} == {"ckpt_100.pt", "ckpt_200.pt"}
    assert imageio.imread(tmp_path / "renders/val_step200_0000.png").shape == (48, 128, 3)
    cfg = yaml.safe_load((tmp_path / "cfg.yml").read_text())
    assert cfg["max_steps"] == 200
    assert list((tmp_path / "tb").iterdir())

    # The picture on disk is the one that was measured.
    pair = imageio.imread(tmp_path / "renders/val_step200_0000.png").astype(float) / 255
    psnr = -10 * np.log10(((pair[:, :64] - pair[:, 64:]) ** 2).mean())
    assert psnr == pytest.approx(val[200]["images"][0]["psnr"], abs=0.05)

    checkpoint = load_checkpoint(tmp_path / "ckpts/ckpt_200.pt")
    exported = load_ply(tmp_path / "ply/point_cloud_200.ply")
    assert all(torch.equal(exported[name], value) for name, value in checkpoint.gaussians.items())

    # Evaluating the checkpoint gives what training gave at its end.
    again = tmp_path / "again"
    assert train(monkeypatch, city_block, again, "--ckpt", tmp_path / "ckpts/ckpt_200.pt") == 0
    evaluated = json.loads((again / "stats/val_step200.json").read_text())
    assert evaluated["psnr"] == pytest.approx(val[200]["psnr"], abs=1e-6)
    assert not list((again / "ckpts").iterdir())
    for degree in (1, 2):  # also of less than it has: that would be another model
        options = ("--ckpt", tmp_path / "ckpts/ckpt_200.pt", "--sh_degree", degree)
        assert train(monkeypatch, city_block, tmp_path / "less", *options) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            "Error: The checkpoint of --ckpt has harmonics of degree 3: give --sh_degree 3, or another --ckpt."
        )
    assert not (tmp_path / "less").exists()


@pytest.mark.slow
def test_a_trace_of_some_steps_is_written(monkeypatch, city_block, tmp_path):
    assert train(monkeypatch, city_block, tmp_path, "--max_steps", 30, "--profile", 3) == 0
    events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3
    assert sum(name == "_SphericalHarmonics" for name in names) == 3
    assert any("Backward" in name for name in names)


@pytest.mark.cuda
def test_a_trace_on_a_gpu_holds_its_kernels(monkeypatch, city_block, tmp_path):
    assert train(monkeypatch, city_block, tmp_path, "--max_steps", 30, "--profile", 3, "--device", "cuda") == 0
    events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    kernels = [event["name"] for event in events if event.get("cat") == "kernel"]
    assert sum("rasterize_to_pixels" in name and "bwd" in name for name in kernels) == 3


@pytest.mark.slow
def test_two_runs_with_one_seed_are_bit_equal(monkeypatch, city_block, tmp_path):
    models = []
    for name, seed, workers in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        options = (*SHORT_DENSIFYING, "--seed", seed, "--num_workers", workers, "--random_background")
        assert train(monkeypatch, city_block, tmp_path / name, *options) == 0
        models.append(load_checkpoint(tmp_path / name / "ckpts/ckpt_60.pt").gaussians)
    assert len(models[0]["means"]) != 600
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["quats"][:100], models[2]["quats"][:100])


@pytest.mark.slow
def test_batches_masks_and_other_modes_train(monkeypatch, city_block, tmp_path):
    options = ("--batch_size", 3, "--antialiased", "--absgrad", "--sh_degree", 1, *SHORT_DENSIFYING)
    assert train(monkeypatch, city_block, tmp_path, *options) == 0
    assert load_checkpoint(tmp_path / "ckpts/ckpt_60.pt").gaussians["shN"].shape[1] == 3


def test_ctrl_c_stops_after_the_step_with_a_checkpoint(monkeypatch, city_block, tmp_path, capsys):
    def press_ctrl_c(self, tag: str, value: float, step: int) -> None:
        if tag == "train/loss" and step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(EventLog, "add_scalar", press_ctrl_c)
    before = signal.getsignal(signal.SIGINT)
    options = ("--max_steps", 1000, "--log_every", 10)
    assert train(monkeypatch, city_block, tmp_path, *options) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(tmp_path / "ckpts/ckpt_20.pt").steps == 20
    assert "ckpt_20.pt" in capsys.readouterr().out


def test_growth_past_memory_is_skipped_with_one_warning(monkeypatch, city_block, tmp_path, capsys):
    monkeypatch.setattr(ops, "free_bytes", lambda: 1000)
    assert train(monkeypatch, city_block, tmp_path, *SHORT_DENSIFYING) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "Growing from 600" in line]
    assert len(warnings) == 1
    assert "--max_gaussians" in warnings[0]
    assert len(load_checkpoint(tmp_path / "ckpts/ckpt_60.pt").gaussians["means"]) <= 600


def test_refinement_that_removes_everything_saves_a_checkpoint(monkeypatch, city_block, tmp_path, capsys):
    assert train(monkeypatch, city_block, tmp_path, *SHORT_DENSIFYING, "--prune_opa", 0.49) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "would remove all" in said
    assert said.endswith(" --prune_opa 0.005 --resume")  # and not that which the next refinement would fail with
    assert "0.49" not in said
    assert load_checkpoint(tmp_path / "ckpts/ckpt_21.pt").steps == 21


def test_a_picture_that_vanishes_during_training_costs_nothing(monkeypatch, city_block, tmp_path, capsys):
    data_dir = shutil.copytree(city_block, tmp_path / "data")

    def remove_pictures(self, tag: str, value: float, step: int) -> None:
        shutil.rmtree(data_dir / "images", ignore_errors=True)

    monkeypatch.setattr(EventLog, "add_scalar", remove_pictures)
    monkeypatch.setattr(
        "training.beginning.bytes_to_spare", lambda *arguments: 0
    )  # nobody would miss those that are kept
    options = ("--max_steps", 1000, "--log_every", 10)
    assert train(monkeypatch, data_dir, tmp_path / "results", *options) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "images/" in message
    (saved,) = (tmp_path / "results/ckpts").iterdir()
    assert str(saved) in message
    steps = load_checkpoint(saved).steps
    assert steps >= 10
    monkeypatch.undo()
    shutil.copytree(city_block / "images", data_dir / "images", dirs_exist_ok=True)
    assert train(monkeypatch, data_dir, tmp_path / "results", "--max_steps", steps + 5, "--resume") == 0
    assert load_checkpoint(tmp_path / f"results/ckpts/ckpt_{steps + 5}.pt").steps == steps + 5


def test_views_that_see_nothing_are_refused(monkeypatch, city_block, tmp_path, capsys):
    assert train(monkeypatch, city_block, tmp_path, "--max_steps", 3, "--near_plane", 1e6) == 2
    assert "--near_plane 1e+06" in capsys.readouterr().err


def remove_model(data_dir: Path) -> None:
    shutil.rmtree(data_dir / "sparse")


def break_cameras(data_dir: Path) -> None:
    (data_dir / "sparse/0/cameras.bin").write_bytes(b"\x01\x02\x03")


def remove_images(data_dir: Path) -> None:
    for number in range(13):
        (data_dir / f"images/{number:02d}.png").unlink()


def truncate_image(data_dir: Path) -> None:
    path = data_dir / "images/05.png"
    path.write_bytes(path.read_bytes()[:1000])


def none(data_dir: Path) -> None:
    """A copy all the same, into which scaled pictures go."""


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (shutil.rmtree, [], ["data_dir"]),
        (remove_model, [], ["sparse"]),
        (break_cameras, [], ["cameras.bin"]),
        (remove_images, [], ["00.png", "09.png", "3 more"]),
        (truncate_image, [], ["05.png"]),
        (none, ["--data_factor", 8], ["00.png is 8x6 pixels", "11x11", "at most --data_factor 4."]),
        (None, ["--test_every", -1], ["test_every", "test_after"]),
        (None, ["--test_after", 3], ["test_every", "test_after"]),
        (None, ["--test_every", -1, "--test_after", 15], ["test_after", "test"]),
        (None, ["--test_every", 1], ["test_every", "train"]),
        (None, ["--init_ply"], ["points.ply"]),
        (None, ["--max_steps", 0], ["--max_steps"]),
        (None, ["--max_steps", 10, "--profile", 5], ["--profile", "--max_steps"]),
        (None, ["--view_window", 0], ["--view_window"]),
        (None, ["--ssim_lambda", 2], ["--ssim_lambda"]),
        (None, ["--sh_degree", 4], ["--sh_degree"]),
        (None, ["--ckpt", "nowhere.pt"], ["nowhere.pt", "--ckpt"]),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (" ".join(map(str, value)) if value else None),
)
def test_bad_input_is_one_sentence(monkeypatch, city_block, tmp_path, capsys, damage, options, words):
    data_dir = city_block
    if damage:
        data_dir = tmp_path / "data"
        shutil.copytree(city_block, data_dir)
        damage(data_dir)
    assert train(monkeypatch, data_dir, tmp_path / "results", *options) == 2
    assert_one_sentence(capsys.readouterr().err, words)
    assert not list(tmp_path.glob("results/ckpts/*"))


def assert_one_sentence(message: str, words: list[str]) -> None:
    assert message.startswith("Error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_unknown_scene(monkeypatch, capsys):
    assert run_script(monkeypatch, "nowhere") == 2
    assert_one_sentence(capsys.readouterr().err, ["nowhere", "demo", "sciart", "default"])


def test_result_dir_that_cannot_be_written(monkeypatch, city_block, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train(monkeypatch, city_block, tmp_path / "file" / "results") == 2
    assert_one_sentence(capsys.readouterr().err, ["result_dir", "--result_dir"])


def test_cuda_without_cuda(monkeypatch, city_block, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ("--data_dir", city_block, "--result_dir", tmp_path, "--device", "cuda")
    assert run_script(monkeypatch, "default", *options) == 2
    assert_one_sentence(capsys.readouterr().err, ["--device"])


def test_cuda_without_gsplat(monkeypatch, city_block, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "gsplat", None)  # as if it were not installed
    options = ("--data_dir", city_block, "--result_dir", tmp_path)
    assert run_script(monkeypatch, "default", *options) == 2
    assert_one_sentence(capsys.readouterr().err, ["gsplat", "install.sh"])


def test_runs_without_cuda_never_import_gsplat(monkeypatch, city_block, tmp_path):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    assert train(monkeypatch, city_block, tmp_path, "--max_steps", 2) == 0
