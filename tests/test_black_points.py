"""Points that are black in a colour begin where harmonics are cut, and are trained all the same.

Their colour is zero but for rounding, to either side. gsplat and 3DGS give a colour of exactly zero its gradient. Were
it cut, it would get none, nor would what is copied of it: it would stay black.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.stored_harmonics import StoredHarmonics, StoredRows
from offload.store.layout import packed_rows, packed_words
from rendering.rasterize import rasterize
from tests.triton_places import NEEDS, ON_GPU, TRITON_DEVICE, WITHOUT_GPU
from training.gaussians import activate, initial_gaussians

COLORS = [(0, 0, 0), (0, 128, 255), (128, 128, 128), (255, 0, 1)]
PLACES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.cuda)]


def points(device: str) -> dict[str, Tensor]:
    """Gaussians beside each other before a camera that looks along z, of which none hides another."""
    at = np.array([(x, y, 4.0) for x in (-1, 1) for y in (-1, 1)], np.float32)
    made = initial_gaussians(at, np.array(COLORS, np.uint8), sh_degree=1, init_opacity=0.5, init_scale=0.05, seed=0)
    return {name: value.to(device).requires_grad_() for name, value in made.items()}


@pytest.mark.parametrize("device", PLACES)
def test_what_is_rendered_gives_them_the_gradient_of_any_other(device):
    rows = points(device)
    viewmats, Ks = torch.eye(4, device=device)[None], torch.tensor([[[40.0, 0, 32], [0, 40, 32], [0, 0, 1]]]).to(device)
    colors, _, _ = rasterize(**activate(rows), viewmats=viewmats, Ks=Ks, width=64, height=64, sh_degree=1)
    colors.sum().backward()
    gradient = rows["sh0"].grad[:, 0]
    # The loss is linear in colours, and all four lie alike, up to their turns.
    torch.testing.assert_close(gradient, gradient[2].expand(4, 3), rtol=0.02, atol=0.0)
    assert (gradient > 0).all()


@pytest.mark.parametrize("device", [pytest.param(TRITON_DEVICE, marks=NEEDS)])
def test_kernels_over_coefficients_do_so(device):
    pytest.importorskip("triton")
    from rendering.spherical_harmonics_triton import Harmonics

    rows = points(device)
    ids, camera = torch.arange(4, device=device), torch.zeros(1, 3, device=device)
    colors = Harmonics(1, (rows["sh0"], rows["shN"])).colors(rows["means"], camera, torch.zeros_like(ids), ids)
    colors.sum().backward()
    assert torch.equal(rows["sh0"].grad, rows["sh0"].grad[2:3].expand(4, 1, 3))
    assert (rows["sh0"].grad > 0).all()
    assert colors.detach().min().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
def test_rows_as_they_are_stored_do_so(kind, device, monkeypatch):
    place = torch.device(device)
    monkeypatch.setattr("offload.backends._takes_triton", lambda other: kind == "triton" and other.type == place.type)
    rows, tables = points(device), DeferralTables(torch.ones(1, 16), (0.9, 0.999), 1e-15, place)
    words = torch.zeros(4, packed_words("appearance", 1), dtype=torch.int32, device=device)
    last_step, ids = torch.zeros(4, dtype=torch.int32, device=device), torch.arange(4, device=device)
    stored = StoredRows(packed_rows(words, "appearance"), None, last_step, tables.skipped(), has_constant=False)
    harmonics = StoredHarmonics(rows["sh0"], stored, 1)
    colors = harmonics.colors(rows["means"], torch.zeros(1, 3, device=device), torch.zeros_like(ids), ids)
    colors.sum().backward()
    assert torch.equal(rows["sh0"].grad, rows["sh0"].grad[2:3].expand(4, 1, 3))
    assert (rows["sh0"].grad > 0).all()


def test_what_is_below_zero_by_more_than_rounding_is_cut():
    rows = points("cpu")
    with torch.no_grad():
        rows["sh0"] -= 1e-5
    viewmats, Ks = torch.eye(4)[None], torch.tensor([[[40.0, 0, 32], [0, 40, 32], [0, 0, 1]]])
    colors, _, _ = rasterize(**activate(rows), viewmats=viewmats, Ks=Ks, width=64, height=64, sh_degree=1)
    colors.sum().backward()
    assert torch.equal(rows["sh0"].grad[:, 0] == 0, torch.tensor(COLORS) == 0)
