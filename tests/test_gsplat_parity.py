"""The CPU rasterizer against the gsplat that install.sh installs: live on a GPU, and against what it wrote there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import simple_trainer
from errors import InputError
from modules.motions import corrections
from rendering import rasterize as rasterize_module
from tests.gaussian_scenes import gradients, random_scene, relative_error, render, weights_like
from tests.gsplat_comparison import GRADIENT_TOLERANCE, compare_renders, run
from tests.gsplat_golden import GOLDEN_CASES, GOLDEN_FILE, golden_gsplat_version, load_golden

LIVE_CASES = [
    {"sh_degree": 0},
    {"sh_degree": 1, "backgrounds": True},
    {"sh_degree": 2, "rasterize_mode": "antialiased"},
    {"sh_degree": 3, "absgrad": True},
    {"sh_degree": 3, "rasterize_mode": "antialiased", "absgrad": True, "backgrounds": True},
    {"sh_degree": 3, "render_mode": "RGB+ED"},
    {"sh_degree": 3, "radius_clip": 3.0, "near_plane": 2.0, "far_plane": 5.0, "eps2d": 0.1},
]


@pytest.mark.cuda
@pytest.mark.parametrize("options", LIVE_CASES, ids=str)
@pytest.mark.parametrize("n_cameras", [1, 2])
def test_equals_gsplat_on_the_gpu(options, n_cameras):
    scene = random_scene(20_000, seed=11, n_cameras=n_cameras, width=330, height=250, median_scale=0.02)
    comparison = compare_renders(run(scene, "cpu", **options), run(scene, "cuda", **options))
    print(comparison)
    comparison.check()


@pytest.mark.cuda
@pytest.mark.parametrize("options", [case for case in LIVE_CASES if "backgrounds" not in case], ids=str)
@pytest.mark.parametrize("n_cameras", [1, 2])
def test_gsplats_kernels_put_together_equal_its_own_rasterization(options, n_cameras):
    from gsplat import rasterization

    scene = random_scene(20_000, seed=11, n_cameras=n_cameras, width=330, height=250, median_scale=0.02)
    scene = scene.to("cuda", torch.float32)
    colors, alphas, info = render(rasterize_module.rasterize, scene, **options)
    expected_colors, expected_alphas, expected_info = render(rasterization, scene, packed=True, **options)
    assert torch.equal(info["gaussian_ids"], expected_info["gaussian_ids"])
    assert (colors - expected_colors).abs().max() < 1e-5
    assert torch.equal(alphas, expected_alphas)
    expected = gradients(scene, expected_colors, expected_alphas)
    for name, gradient in gradients(scene, colors, alphas).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.mark.cuda
@pytest.mark.parametrize("n_cameras", [1, 2])
def test_gradients_of_poses_equal_gsplats(n_cameras):
    """Of turns and shifts: cameras' positions are found otherwise than in gsplat, alike where poses are rigid."""
    from gsplat import rasterization

    scene = random_scene(20_000, seed=11, n_cameras=n_cameras, width=330, height=250, median_scale=0.02)
    found = []
    for function, device, options in (
        (rasterization, "cuda", {"packed": True}),
        (rasterize_module.rasterize, "cuda", {}),
        (rasterize_module.rasterize, "cpu", {}),
    ):
        moved, rows = scene.to(device), torch.zeros(n_cameras, 6, requires_grad=True)
        turned_about = torch.full((n_cameras,), 2.0).double()
        viewmats = torch.linalg.inv(corrections(rows, turned_about)) @ scene.viewmats.double()
        moved.viewmats = viewmats.float().to(device)
        colors, alphas, _ = render(function, moved, sh_degree=3, **options)
        ((colors * weights_like(colors)).sum() + (alphas * weights_like(alphas, 6)).sum()).backward()
        found.append(rows.grad)
    assert found[0].abs().min() > 0
    assert relative_error(found[1], found[0]) < 1e-4
    assert relative_error(found[2], found[0]) < GRADIENT_TOLERANCE


@pytest.mark.skipif(not GOLDEN_FILE.exists(), reason=f"{GOLDEN_FILE.name} has not been written on a GPU yet")
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_equals_what_gsplat_wrote(case):
    scene, runs = load_golden()
    compare_renders(run(scene, "cpu", **GOLDEN_CASES[case]), runs[case]).check()


def installed_gsplat_version() -> str:
    """Read which gsplat install.sh asks for."""
    (version,) = re.findall(r'GSPLAT_VERSION="(.+)"', (Path(simple_trainer.__file__).parent / "install.sh").read_text())
    return version


def test_gsplat_is_compared_in_the_version_that_is_installed():
    """After a change of version the file is to be written anew, on a GPU."""
    assert golden_gsplat_version() == installed_gsplat_version()


@pytest.mark.cuda
def test_gsplat_on_this_machine_is_the_version_that_is_installed():
    import gsplat

    assert gsplat.__version__ == installed_gsplat_version()


def test_a_comparison_notices_differences():
    scene = random_scene(150, seed=20, width=48, height=36, median_scale=0.12)
    ours, theirs = run(scene, "cpu", sh_degree=1, absgrad=True), run(scene, "cpu", sh_degree=1, absgrad=True)
    compare_renders(ours, theirs).check()
    for damage in ("colors", "alphas", "radii", "means2d_absgrad"):
        damaged = run(scene, "cpu", sh_degree=1, absgrad=True)
        getattr(damaged, damage).add_(1)
        with pytest.raises(AssertionError):
            compare_renders(ours, damaged).check()
    theirs.gradients["quats"] *= 1.01
    with pytest.raises(AssertionError):
        compare_renders(ours, theirs).check()


def test_check_gsplat_says_what_is_missing(monkeypatch):
    found = {"gsplat": None}
    monkeypatch.setattr(rasterize_module.importlib.util, "find_spec", lambda name: found[name])
    with pytest.raises(InputError, match="gsplat is not installed"):
        rasterize_module.check_gsplat()

    found["gsplat"] = "anything"
    for name in ("gsplat", "gsplat.cuda", "gsplat.cuda._backend"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["gsplat.cuda._backend"]._C = None
    with pytest.raises(InputError, match="not compiled"):
        rasterize_module.check_gsplat()

    del sys.modules["gsplat.cuda._backend"]._C  # the import fails
    with pytest.raises(InputError, match="cannot be loaded"):
        rasterize_module.check_gsplat()

    sys.modules["gsplat.cuda._backend"]._C = "compiled"
    rasterize_module.check_gsplat()
