"""What gsplat's projection is given: cameras, and in the backward pass gradients; a stand-in for it runs on the CPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from rendering import gsplat_rasterizer


@pytest.fixture
def given(monkeypatch):
    """Put a stand-in in the place of gsplat's function; returns the list of gradients that it is given."""
    gradients: list[torch.Tensor | None] = []

    class Packed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, means, covars, quats, scales, *others):
            ids, radii = torch.arange(len(means)), torch.ones(len(means), 2, dtype=torch.int32)
            of_batches, of_cameras, conics = torch.zeros_like(ids), torch.zeros_like(ids), 5 * scales
            saved = (of_batches, of_cameras, ids, means, covars, quats, scales, None, None, conics, None)
            ctx.save_for_backward(*saved)
            return of_batches, of_cameras, ids, radii, 2 * means[:, :2], 3 * means[:, 2], conics, None

        @staticmethod
        def backward(ctx, *v):
            gradients[:] = v
            v_means = torch.cat([2 * v[4], 3 * v[5][:, None]], dim=1)
            return v_means, None, None, 5 * v[6], *[None] * 12

    wrapper = ModuleType("gsplat.cuda._wrapper")
    wrapper._FullyFusedProjectionPacked = Packed  # type: ignore[attr-defined]
    for name, module in (("gsplat", ModuleType("gsplat")), ("gsplat.cuda", ModuleType("gsplat.cuda"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, wrapper.__name__, wrapper)
    gsplat_rasterizer._projection.cache_clear()
    yield gradients
    gsplat_rasterizer._projection.cache_clear()


def project(means, scales, opacities, num_cameras):
    viewmats = torch.eye(4).repeat(num_cameras, 1, 1)
    return gsplat_rasterizer._projection().apply(means, None, None, scales, viewmats, *[None] * 10, opacities)


USES = [("means2d",), ("depths",), ("conics",), ("opacities",), ("means2d", "depths", "conics", "opacities")]


@pytest.mark.parametrize("used", USES)
def test_what_has_no_gradient_is_given_none_but_where_zeros_are_needed(given, used):
    means, scales = (torch.rand(7, 3, requires_grad=True) for _ in range(2))
    opacities = torch.rand(7, requires_grad=True)
    results = project(means, scales, opacities, num_cameras=1)
    assert torch.equal(results[7], opacities)
    named = dict(zip(("means2d", "depths", "conics"), results[3:6], strict=True))
    sum({**named, "opacities": results[7]}[name].sum() for name in used).backward()
    assert given[:4] == [None] * 4
    assert given[7] is None
    for gradient, (name, values) in zip(given[4:7], named.items(), strict=True):
        assert torch.equal(gradient, torch.full_like(values, float(name in used)))
    on_screen, deep = 2.0 * ("means2d" in used), 3.0 * ("depths" in used)
    assert torch.equal(means.grad, torch.tensor([on_screen, on_screen, deep]).expand(7, 3))
    assert torch.equal(scales.grad, torch.full((7, 3), 5.0 * ("conics" in used)))
    assert torch.equal(opacities.grad, torch.full((7,), float("opacities" in used)))


def test_a_row_that_several_cameras_see_has_the_sum_of_their_gradients(given, monkeypatch):
    packed = sys.modules["gsplat.cuda._wrapper"]._FullyFusedProjectionPacked
    forward = packed.forward

    def forward_with_ids(ctx, *arguments):
        results = forward(ctx, *arguments)
        _, _, _, *others = ctx.to_save
        ctx.save_for_backward(*results[:2], ids, *others)
        return *results[:2], ids, *results[3:]

    ids = torch.tensor([5, 2, 5, 0])
    monkeypatch.setattr(packed, "forward", staticmethod(forward_with_ids))
    means, scales = (torch.rand(4, 3, requires_grad=True) for _ in range(2))  # the stand-in has as many pairs
    opacities, weights = torch.rand(6, requires_grad=True), torch.tensor([1.0, 2, 3, 4])
    drawn = project(means, scales, opacities, num_cameras=2)[7]
    assert torch.equal(drawn, opacities[ids])
    (drawn * weights).sum().backward()
    assert torch.equal(opacities.grad, torch.tensor([4.0, 0, 2, 0, 0, 4]))


@pytest.mark.parametrize("num_cameras", [1, 2])
def test_ids_of_batches_are_those_of_a_single_camera(given, num_cameras):
    """All are zeros; of several cameras they are not."""
    means, scales = (torch.rand(4, 3, requires_grad=True) for _ in range(2))
    camera_ids, *others = project(means, scales, torch.rand(4), num_cameras)
    batches, cameras, *_ = others[2].grad_fn.saved_tensors
    assert cameras.data_ptr() == camera_ids.data_ptr()
    assert (batches.data_ptr() == cameras.data_ptr()) == (num_cameras == 1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("is_trained", [False, True])
def test_cameras_travel_at_once_unless_they_have_a_gradient(monkeypatch, count, is_trained):
    sent = []

    def pin_memory(numbers):  # for which there must be a GPU
        sent.append(numbers)
        return numbers

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    turns = torch.linalg.qr(torch.randn(count, 3, 3, dtype=torch.float64))[0]
    viewmats = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    viewmats[:, :3, :3], viewmats[:, :3, 3] = turns, torch.randn(count, 3, dtype=torch.float64)
    places = torch.linalg.inv(viewmats)[:, :3, 3]
    viewmats, Ks = viewmats.float().requires_grad_(is_trained), torch.rand(count, 3, 3).mT  # not contiguous
    there = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)  # another than "cpu"
    cameras, intrinsics, positions = gsplat_rasterizer._on_device(viewmats, Ks, there)
    assert torch.equal(cameras.cpu(), viewmats)
    assert torch.equal(intrinsics.cpu(), Ks)
    assert intrinsics.is_contiguous()
    torch.testing.assert_close(positions.cpu().double(), places, rtol=1e-6, atol=1e-6)  # of a few rounded products
    assert cameras.requires_grad == positions.requires_grad == is_trained
    assert [numbers.numel() for numbers in sent] == ([] if is_trained else [28 * count])
