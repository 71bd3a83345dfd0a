"""The CPU rasterizer against a dense torch oracle and finite differences, and at its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rendering.rasterize import rasterize
from tests.gaussian_scenes import (
    PARAMETERS,
    GaussianScene,
    gradients,
    random_scene,
    relative_error,
    render,
    weights_like,
)
from tests.oracles.dense_rasterizer import dense_rasterize

SETTINGS = {
    "classic": {"sh_degree": 3},
    "antialiased": {"sh_degree": 2, "rasterize_mode": "antialiased"},
    "background": {"sh_degree": 1, "backgrounds": True},
    "expected depth": {"sh_degree": 0, "render_mode": "RGB+ED", "backgrounds": True},
    "depth only": {"sh_degree": 0, "render_mode": "D"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_image_and_gradients_equal_the_dense_oracle(name):
    names = (*PARAMETERS, "viewmats")
    scene = random_scene(400, seed=1, n_cameras=2)
    exact = scene.to("cpu", torch.float64)
    exact.viewmats.requires_grad_()
    expected_colors, expected_alphas, visible = render(dense_rasterize, exact, **SETTINGS[name])
    assert 0.05 < expected_alphas.mean() < 0.95
    expected = gradients(exact, expected_colors, expected_alphas, names)
    expected["viewmats"] = expected["viewmats"][:, :3]  # whose last row is constant

    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        ours = scene.to("cpu", dtype)
        ours.viewmats.requires_grad_()
        colors, alphas, info = render(rasterize, ours, **SETTINGS[name])
        assert relative_error(colors, expected_colors) < tolerance
        assert relative_error(alphas, expected_alphas) < tolerance
        assert info["gaussian_ids"].tolist() == torch.cat(visible).tolist()
        found = gradients(ours, colors, alphas, names)
        found["viewmats"] = found["viewmats"][:, :3]
        for parameter, gradient in found.items():
            # The guard of gsplat's compensation gradient (1e-6) is no part of the oracle.
            loose = 1e-4 if SETTINGS[name].get("rasterize_mode") else tolerance
            assert relative_error(gradient, expected[parameter]) < loose, (dtype, parameter)


@pytest.mark.slow
def test_opaque_pixels_stop_as_in_the_oracle():
    scene = random_scene(1500, seed=2, median_scale=0.15)
    scene.opacities.clamp_(min=0.7)
    # In front of the others, so that alpha is cut at 0.999 in pixels that are still open: no gradient passes there.
    scene.opacities[:4], scene.scales[:4] = 1.0, 0.2
    scene.means[:4] = torch.tensor([[-0.4, 0.0, 0.8], [0.4, 0.0, 0.8], [0.0, -0.3, 0.8], [0.0, 0.3, 0.8]])
    ours, exact = scene.to("cpu", torch.float64), scene.to("cpu", torch.float64)
    colors, alphas, _ = render(rasterize, ours, sh_degree=3)
    expected_colors, expected_alphas, _ = render(dense_rasterize, exact, sh_degree=3)
    assert (expected_alphas > 0.9995).double().mean() > 0.5
    assert relative_error(colors, expected_colors) < 1e-9
    expected = gradients(exact, expected_colors, expected_alphas)
    for parameter, gradient in gradients(ours, colors, alphas).items():
        assert relative_error(gradient, expected[parameter]) < 1e-7, parameter


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"rasterize_mode": "antialiased"}, {"render_mode": "RGB+ED"}], ids=str)
def test_gradients_equal_finite_differences(options):
    scene = random_scene(12, seed=3, width=20, height=18, median_scale=0.4).to("cpu", torch.float64)
    backgrounds = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64, requires_grad=True)
    viewmats = scene.viewmats.requires_grad_()

    def images(means, quats, scales, opacities, coeffs, backgrounds, viewmats):
        colors, alphas, info = rasterize(
            means, quats, scales, opacities, coeffs, viewmats, scene.Ks, 20, 18, sh_degree=1,
            backgrounds=backgrounds, **options,
        )  # fmt: skip
        assert len(info["gaussian_ids"]) >= 5
        return colors, alphas

    coeffs = torch.cat([scene.sh0, scene.shN[:, :3]], 1).detach().requires_grad_()
    inputs = (scene.means, scene.quats, scene.scales, scene.opacities, coeffs, backgrounds, viewmats)
    # 1e-5: gsplat's guard in the compensation's gradient.
    assert torch.autograd.gradcheck(images, inputs, eps=1e-6, atol=2e-5, rtol=1e-4)


def test_a_batch_of_cameras_equals_single_renders():
    scene = random_scene(500, seed=4, n_cameras=3).to("cpu")
    colors, alphas, info = render(rasterize, scene, sh_degree=3, backgrounds=True)
    batch = gradients(scene, colors, torch.zeros_like(alphas))
    summed = {name: torch.zeros_like(g) for name, g in batch.items()}
    weights = weights_like(colors)
    backgrounds = torch.linspace(0.2, 0.9, 9).reshape(3, 3)
    for camera in range(3):
        single, single_alphas, single_info = rasterize(
            scene.means, scene.quats, scene.scales, scene.opacities, torch.cat([scene.sh0, scene.shN], 1),
            scene.viewmats[camera : camera + 1], scene.Ks[camera : camera + 1], scene.width, scene.height,
            sh_degree=3, backgrounds=backgrounds[camera : camera + 1],
        )  # fmt: skip
        assert torch.equal(single[0], colors[camera])
        assert torch.equal(single_alphas[0], alphas[camera])
        assert torch.equal(single_info["gaussian_ids"], info["gaussian_ids"][info["camera_ids"] == camera])
        parts = torch.autograd.grad((single * weights[camera]).sum(), [getattr(scene, n) for n in PARAMETERS])
        for name, part in zip(PARAMETERS, parts, strict=True):
            summed[name] += part
    for name in PARAMETERS:
        assert relative_error(batch[name], summed[name]) < 1e-5, name


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_any_number_of_color_channels(channels):
    scene = random_scene(300, seed=5)
    features = weights_like(torch.empty(300, channels), 7)
    backgrounds = torch.linspace(-1, 1, channels)[None]
    results = []
    for function, dtype in ((rasterize, torch.float32), (dense_rasterize, torch.float64)):
        s, f = scene.to("cpu", dtype), features.to(dtype).requires_grad_()
        image, _, _ = function(
            s.means, s.quats, s.scales, s.opacities, f, s.viewmats, s.Ks, s.width, s.height,
            backgrounds=backgrounds.to(dtype),
        )  # fmt: skip
        assert image.shape == (1, s.height, s.width, channels)
        results.append((image, *torch.autograd.grad((image * weights_like(image)).sum(), [f, s.means, s.opacities])))
    for ours, expected in zip(*results, strict=True):
        assert relative_error(ours, expected) < 1e-4


def test_info_means2d_gradient_and_absgrad():
    scene = random_scene(30, seed=6, width=22, height=18, median_scale=0.3).to("cpu", torch.float64)
    colors, _, info = render(rasterize, scene, sh_degree=0, absgrad=True)
    info["means2d"].retain_grad()
    weights = weights_like(colors)
    (colors * weights).sum().backward()
    total = info["means2d"].grad
    # The sum of per-pixel gradients, and of their absolute values: one backward pass for each pixel.
    expected, expected_abs = torch.zeros_like(total), torch.zeros_like(total)
    colors, _, again = render(rasterize, scene, sh_degree=0)
    for row in range(scene.height):
        for column in range(scene.width):
            pixel = (colors[0, row, column] * weights[0, row, column]).sum()
            (gradient,) = torch.autograd.grad(pixel, again["means2d"], retain_graph=True)
            expected += gradient
            expected_abs += gradient.abs()
    assert relative_error(total, expected) < 1e-9
    assert relative_error(info["means2d"].absgrad, expected_abs) < 1e-9
    assert (expected_abs > expected.abs() * 1.1).any()


def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            scene = random_scene(5000, seed=7, n_cameras=2, width=150, height=110).to("cpu")
            colors, alphas, info = render(rasterize, scene, sh_degree=3, absgrad=True)
            info["means2d"].retain_grad()
            loss = (colors * weights_like(colors)).sum() + alphas.sum()
            loss.backward()
            results.append(
                [colors, alphas, info["means2d"].grad, info["means2d"].absgrad]
                + [getattr(scene, name).grad for name in PARAMETERS]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.equal(value, expected)


def assert_finite(scene: GaussianScene, **options) -> tuple[Tensor, Tensor, dict]:
    colors, alphas, info = render(rasterize, scene, **options)
    assert torch.isfinite(colors).all()
    assert ((alphas >= 0) & (alphas <= 1)).all()
    for name, gradient in gradients(scene, colors, alphas).items():
        assert torch.isfinite(gradient).all(), name
    return colors, alphas, info


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_no_gaussians_at_all(device):
    colors, alphas, info = assert_finite(random_scene(0, seed=0).to(device), sh_degree=3, backgrounds=True)
    assert torch.allclose(colors.cpu(), torch.linspace(0.2, 0.9, 3))
    assert alphas.abs().max() == 0
    assert info["radii"].shape == (0, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_nothing_visible(device):
    scene = random_scene(50, seed=0)
    scene.means[:, 2] = -5.0
    _, alphas, info = assert_finite(scene.to(device), sh_degree=3)
    assert alphas.abs().max() == 0
    assert len(info["gaussian_ids"]) == 0


def _enormous(s):
    s.scales[::2] *= 1e6 / s.scales[::2].mean()


def _vanishing(s):
    s.scales[::2] = 1e-10


def _needles(s):
    s.scales[:] = torch.tensor([1e-10, 1e-10, 1e4])


def _zero_quaternions(s):
    s.quats[::2] = 0


def _at_the_camera(s):
    s.means[::2] = torch.inverse(s.viewmats)[0, :3, 3]


def _barely_in_front(s):
    s.means[::2] = torch.inverse(s.viewmats)[0, :3, 3] + torch.tensor([0.0, 0.0, 0.0101])


def _far_away(s):
    s.means[::2] *= 1e30


def _extreme_opacities(s):
    s.opacities[::2], s.opacities[1::2] = 0.0, 1.0


def _huge_everywhere(s):
    s.means[:] = s.means.sign() * 1e20
    s.scales[:] = 1e25


@pytest.mark.parametrize("rasterize_mode", ["classic", "antialiased"])
@pytest.mark.parametrize(
    "extreme",
    [_enormous, _vanishing, _needles, _zero_quaternions, _at_the_camera, _barely_in_front, _far_away,
     _extreme_opacities, _huge_everywhere],
)  # fmt: skip
def test_extreme_gaussians_give_finite_images_and_gradients(extreme, rasterize_mode):
    scene = random_scene(120, seed=8)
    extreme(scene)
    assert_finite(scene.to("cpu"), sh_degree=3, rasterize_mode=rasterize_mode, render_mode="RGB+ED")


def test_a_zero_quaternion_counts_as_the_identity():
    scene = random_scene(100, seed=9)
    scene.quats[:] = 0
    zero = scene.to("cpu")
    scene.quats[:, 0] = 1
    image, alphas, _ = render(rasterize, zero, sh_degree=0)
    assert torch.equal(image, render(rasterize, scene.to("cpu"), sh_degree=0)[0])
    assert gradients(zero, image, alphas)["quats"].abs().max() == 0


def test_tensors_of_the_wrong_shape_or_type_are_refused():
    s = random_scene(10, seed=0).to("cpu")
    arguments = [s.means, s.quats, s.scales, s.opacities, s.sh0, s.viewmats, s.Ks, 70, 52]
    with pytest.raises(ValueError, match="sh_degree 1 needs 4"):
        rasterize(*arguments, sh_degree=1)
    with pytest.raises(ValueError, match="quats has shape"):
        rasterize(s.means, s.quats[:, :3], *arguments[2:], sh_degree=0)
    with pytest.raises(TypeError, match="scales must be"):
        rasterize(s.means, s.quats, s.scales.double(), *arguments[3:], sh_degree=0)
    with pytest.raises(ValueError, match="render_mode"):
        rasterize(*arguments, sh_degree=0, render_mode="rgb")
