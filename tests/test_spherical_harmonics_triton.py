"""The harmonics' Triton kernels against the native ones, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from rendering.projection import project
from rendering.spherical_harmonics import spherical_harmonics as native
from tests.gaussian_scenes import random_scene, relative_error, weights_like
from tests.triton_places import NEEDS, TRITON_DEVICE

pytestmark = NEEDS


@pytest.mark.slow
@pytest.mark.parametrize("num_cameras", [1, 2])
@pytest.mark.parametrize("sh_degree", range(4))
@pytest.mark.parametrize("tensors", [1, 2])
def test_colors_and_gradients_equal_the_native_ones(num_cameras, sh_degree, tensors):
    from rendering.spherical_harmonics_triton import Harmonics

    scene = random_scene(1001, seed=5, n_cameras=num_cameras)
    projection = project(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.viewmats, scene.Ks, scene.width, scene.height,
        near_plane=0.01, far_plane=1e10, radius_clip=0.0, eps2d=0.3, antialiased=False,
    )  # fmt: skip
    means, coeffs = scene.means.requires_grad_(), torch.cat([scene.sh0, scene.shN], 1).requires_grad_()
    viewmats = scene.viewmats.requires_grad_()
    expected = native(sh_degree, means, viewmats, coeffs, projection)
    assert 0.02 < (expected == 0).double().mean() < 0.95
    (expected * weights_like(expected)).sum().backward()

    ours = [t.detach().to(TRITON_DEVICE).requires_grad_() for t in (means, coeffs[:, :1], coeffs[:, 1:])]
    if tensors == 1:
        ours = [ours[0], coeffs.detach().to(TRITON_DEVICE).requires_grad_()]
    harmonics = Harmonics(sh_degree, ours[1] if tensors == 1 else tuple(ours[1:]))
    placed = viewmats.detach().to(TRITON_DEVICE).requires_grad_()
    positions = torch.inverse(placed)[:, :3, 3]
    colors = harmonics.colors(
        ours[0], positions, projection.camera_ids.to(TRITON_DEVICE), projection.gaussian_ids.to(TRITON_DEVICE)
    )
    (colors * weights_like(expected).to(TRITON_DEVICE)).sum().backward()
    assert relative_error(colors.cpu(), expected) < 1e-6
    assert relative_error(ours[0].grad.cpu(), means.grad) < 1e-5
    assert relative_error(torch.cat([t.grad.cpu() for t in ours[1:]], 1), coeffs.grad) < 1e-6
    assert relative_error(placed.grad.cpu(), viewmats.grad) < 1e-5


@pytest.mark.parametrize("num_cameras", [1, 2])
def test_band_0_has_its_gradient_where_others_want_none(num_cameras):
    from rendering.spherical_harmonics_triton import Harmonics

    torch.manual_seed(num_cameras)
    camera_ids = torch.arange(20 * num_cameras, device=TRITON_DEVICE) // 20
    gaussian_ids = (torch.arange(20 * num_cameras, device=TRITON_DEVICE) % 20) + 5 * camera_ids
    positions = torch.randn(num_cameras, 3, device=TRITON_DEVICE)
    means, sh0, shN = (torch.randn(30, *shape, device=TRITON_DEVICE) for shape in ((3,), (1, 3), (15, 3)))
    gradients = []
    for wants_others in (True, False):
        leaves = [x.detach().clone().requires_grad_() for x in (means, sh0)]
        others = shN.clone().requires_grad_(wants_others)
        colors = Harmonics(3, (leaves[1], others)).colors(leaves[0], positions, camera_ids, gaussian_ids)
        (colors * weights_like(colors)).sum().backward()
        assert (others.grad is not None) == wants_others
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert gradients[0][1][:20].any()


def test_the_gradient_of_coefficients_comes_last():
    """After those of all that was computed since they were handed over, whose memory is free by then."""
    from rendering.spherical_harmonics_triton import Harmonics

    centres, coeffs = (torch.rand(4, *shape, device=TRITON_DEVICE, requires_grad=True) for shape in ((3,), (16, 3)))
    ids, order = torch.arange(4, device=TRITON_DEVICE), []
    coeffs.register_hook(lambda gradient: order.append("coefficients"))
    harmonics = Harmonics(3, coeffs)
    means = 2 * centres
    means.grad_fn.register_hook(lambda *gradients: order.append("projection"))
    harmonics.colors(means, torch.zeros(1, 3, device=TRITON_DEVICE), torch.zeros_like(ids), ids).sum().backward()
    assert order == ["projection", "coefficients"]
    assert coeffs.grad.any()


def test_no_pairs():
    from rendering.spherical_harmonics_triton import Harmonics

    means, coeffs = (torch.zeros(4, *shape, device=TRITON_DEVICE, requires_grad=True) for shape in ((3,), (16, 3)))
    none = torch.zeros(0, dtype=torch.int64, device=TRITON_DEVICE)
    colors = Harmonics(3, coeffs).colors(means, torch.zeros(1, 3, device=TRITON_DEVICE), none, none)
    assert colors.shape == (0, 3)
    colors.sum().backward()
    assert coeffs.grad.abs().max() == 0
