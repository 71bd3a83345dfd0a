"""A run that draws nothing, or nothing better than black, says so; one that learns does not."""

import pytest
import torch

import simple_trainer
from rendering.losses import photometric_loss
from tests.interrupted_runs import run_script
from training import blank
from training.blank import blank_loss
from training.gaussians import initial_gaussians

QUIET = ("--save_every", 0, "--num_workers", 1, "--refine_start_iter", 10**6)
FROZEN = [word for name in ("position", "scaling", "quats", "opacities", "sh0", "shN") for word in (f"--{name}_lr", 0)]


@pytest.mark.parametrize("has_masks", [False, True])
@pytest.mark.parametrize("has_backgrounds", [False, True])
@pytest.mark.parametrize("height", [48, 53, 16])
def test_the_loss_of_an_empty_picture_is_summed_strip_by_strip(monkeypatch, has_masks, has_backgrounds, height):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((2, height, 30, 3), generator=generator)
    backgrounds = torch.rand((2, 3), generator=generator) if has_backgrounds else None
    masks = torch.rand((2, height, 30), generator=generator) > 0.3 if has_masks else None
    empty = torch.zeros_like(images) if backgrounds is None else backgrounds[:, None, None].expand_as(images)
    expected = photometric_loss(empty.contiguous(), images, ssim_lambda=0.2, masks=masks)
    monkeypatch.setattr(blank, "STRIP_ROWS", 16)
    torch.testing.assert_close(blank_loss(images, 0.2, backgrounds, masks), expected, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--random_background",), ("--batch_size", 2)], ids=["black", "random", "views"]
)
def test_a_run_that_draws_nothing_says_so(monkeypatch, city_block, tmp_path, capsys, options):
    def far_away(*arguments, **more):
        gaussians = initial_gaussians(*arguments, **more)
        gaussians["means"] += 1e6
        return gaussians

    monkeypatch.setattr("training.beginning.initial_gaussians", far_away)
    options = (*options, *QUIET, "--max_steps", 103)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: nothing")]
    assert len(warnings) == 1
    assert "in 101 steps" in warnings[0]
    assert "--near_plane" in warnings[0]


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_so(monkeypatch, city_block, tmp_path, capsys):
    def glaring(*arguments, **more):
        gaussians = initial_gaussians(*arguments, **more)
        gaussians["sh0"] += 20.0
        gaussians["opacities"] += 5.0
        return gaussians

    monkeypatch.setattr("training.beginning.initial_gaussians", glaring)
    options = (*QUIET, "--max_steps", 301, *FROZEN)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    printed = capsys.readouterr().out
    assert "Warning: after 301 steps the loss" in printed
    assert "learning rates" in printed


@pytest.mark.slow
def test_a_run_that_draws_hardly_anything_says_so(monkeypatch, city_block, tmp_path, capsys):
    options = (*QUIET, "--max_steps", 301, *FROZEN, "--init_opacity", 0.006)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    assert "is hardly below that of an empty picture" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--random_background",)], ids=str)
def test_a_run_that_learns_is_not_disturbed(monkeypatch, city_block, tmp_path, capsys, options):
    options = (*options, *QUIET, "--max_steps", 302)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    printed = capsys.readouterr().out
    assert "Warning: nothing" not in printed
    assert "Warning: after" not in printed
