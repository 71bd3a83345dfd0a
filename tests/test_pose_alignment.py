"""Held-out photos against the model from where it fits best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.motions import corrections
from offload.culling.cameras import Cameras
from rendering.rasterize import rasterize
from tests.gaussian_scenes import random_scene
from training import pose_alignment
from training.evaluation import evaluate
from training.pose_alignment import ROUNDS, best_aligned, fitting_motion
from training.views import View

CPU = torch.device("cpu")
OFF = torch.tensor([[0.004, -0.003, 0.006, 0.01, -0.012, 0.02]])  # a pixel or two of 96


@pytest.fixture(scope="module")
def captured() -> tuple[View, Callable[[Cameras], Tensor], Tensor]:
    """Return a photo with a pose that is off, what draws its Gaussians with depths, and the right pose [1, 4, 4]."""
    scene = random_scene(400, seed=1, width=96, height=72, median_scale=0.15)

    def draw(cameras: Cameras) -> Tensor:
        gaussians = (scene.means, scene.quats, scene.scales, scene.opacities, torch.cat([scene.sh0, scene.shN], dim=1))
        size = cameras.width, cameras.height
        return rasterize(*gaussians, cameras.viewmats, cameras.Ks, *size, sh_degree=1, render_mode="RGB+ED")[0]

    right = scene.viewmats.double()
    given = torch.linalg.inv(corrections(OFF, torch.zeros(1).double())) @ right
    cameras = Cameras(viewmats=given.float(), Ks=scene.Ks, width=scene.width, height=scene.height)
    photo = draw(replace(cameras, viewmats=scene.viewmats))[..., :3].clamp(0, 1)
    return View(photo, cameras), draw, right


def psnr(picture: Tensor, photo: Tensor) -> float:
    return -10 * math.log10((picture - photo).square().mean())


def test_a_picture_tells_how_its_camera_is_off(captured):
    view, draw, right = captured
    drawn = draw(view.cameras)
    motion = fitting_motion(drawn[0, ..., :3].clamp(0, 1), drawn[0, ..., 3], view)
    found = torch.linalg.inv(corrections(motion[None], torch.zeros(1).double())) @ view.cameras.viewmats.double()
    middle = torch.tensor([0.0, 0, 4, 1]).double()  # of the scene: a turn about it and a shift look alike
    before, after = (
        (viewmats @ middle - right @ middle)[0, :2].norm() for viewmats in (view.cameras.viewmats.double(), found)
    )
    assert after < before / 3  # one step


def test_an_aligned_photo_is_what_is_drawn(captured):
    view, draw, _ = captured
    assert psnr(draw(view.cameras)[..., :3].clamp(0, 1), view.images) < 35
    assert psnr(best_aligned(view, draw), view.images) > 48


def test_hidden_pixels_do_not_move_a_camera(captured):
    view, draw, _ = captured
    masks = torch.ones(view.images.shape[:3], dtype=torch.bool)
    masks[:, :, :40] = False
    photo = torch.where(masks[..., None], view.images, torch.rand(view.images.shape))
    aligned = best_aligned(replace(view, photos=photo, masks=masks), draw)
    assert psnr(aligned[masks], view.images[masks]) > 45


def test_a_motion_is_found_strip_by_strip(captured, monkeypatch):
    view, draw, _ = captured
    drawn = draw(view.cameras)[0]
    whole = fitting_motion(drawn[..., :3], drawn[..., 3], view)
    monkeypatch.setattr(pose_alignment, "STRIP", 96 * 7)
    torch.testing.assert_close(fitting_motion(drawn[..., :3], drawn[..., 3], view), whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["nothing drawn", "hidden", "not a number"])
def test_what_tells_nothing_is_left_where_it_is_and_drawn_as_often(captured, kind):
    """Ranks draw together, so each draws as often as the others."""
    view, draw, _ = captured
    if kind == "hidden":
        view = replace(view, masks=torch.zeros(view.images.shape[:3], dtype=torch.bool))
    asked = []

    def drawn(cameras: Cameras) -> Tensor:
        asked.append(cameras.viewmats)
        return {"nothing drawn": 0.0, "hidden": 1.0, "not a number": torch.nan}[kind] * draw(cameras)

    picture = best_aligned(view, drawn, color_correct=kind == "hidden")
    assert len(asked) == ROUNDS + 1
    if kind != "nothing drawn":  # against black the photo's own slopes pull a little
        torch.testing.assert_close(torch.cat(asked), view.cameras.viewmats.repeat(ROUNDS + 1, 1, 1))
    assert picture.shape == view.images.shape


def test_metrics_of_aligned_poses_stand_beside_the_others(captured):
    view, draw, _ = captured
    darker = replace(view, photos=0.8 * view.images)
    pictures: list[int] = []

    def metrics(view: View, color_correct: bool) -> dict:
        return evaluate(
            [("a", view)],
            lambda cameras: draw(cameras)[..., :3],
            None,
            lambda index, canvas: pictures.append(index),
            CPU,
            color_correct=color_correct,
            draw_with_depth=draw,
        )

    plain, corrected = metrics(view, False), metrics(darker, True)
    assert plain["aligned_psnr"] > plain["psnr"] + 12
    assert plain["aligned_ssim"] > plain["ssim"]
    assert plain["aligned_lpips"] is None
    assert plain["images"][0]["aligned_psnr"] == plain["aligned_psnr"]
    assert corrected["aligned_psnr"] > corrected["cc_psnr"] + 5  # with its colours corrected, too
    assert pictures == [0, 0]  # which show the given pose
