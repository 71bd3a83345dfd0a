"""Several processes train the model that one trains alone: over gloo, on the CPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.exchange import PairExchange
from distributed.mesh import Ranks
from rendering.rasterize import rasterize
from tests.gaussian_scenes import PARAMETERS, GaussianScene, random_scene, weights_like
from tests.rank_groups import run_in_group

# ------------------------------------------------------------------------------------------------------- the exchange


def exchanged_scene(cameras: int, blind: int | None) -> GaussianScene:
    """Gaussians before cameras, of which one may look away from all of them."""
    scene = random_scene(90, seed=3, n_cameras=cameras, width=40, height=36)
    if blind is not None:
        scene.viewmats[blind, :3, 3] = torch.tensor([0.0, 0.0, -1000.0])
    return scene


def drawn(scene: GaussianScene, absgrad: bool, rows: slice, exchange: PairExchange | None = None) -> dict[str, Any]:
    """Pictures of some rows, and in double precision their gradients, of a loss that is a mean over pictures."""
    scene = replace(scene, **{name: getattr(scene, name)[rows] for name in PARAMETERS}).to("cpu", torch.float64)
    cameras, first = len(scene.viewmats), 0
    own = cameras if exchange is None else exchange.num_cameras
    if exchange is not None:
        first = exchange.ranks.rank * own
    backgrounds = torch.linspace(0.2, 0.9, 3 * cameras, dtype=torch.float64).view(cameras, 3)[first : first + own]
    colors, alphas, info = rasterize(
        scene.means, scene.quats, scene.scales, scene.opacities, (scene.sh0, scene.shN), scene.viewmats, scene.Ks,
        scene.width, scene.height, sh_degree=3, backgrounds=backgrounds, absgrad=absgrad, exchange=exchange,
    )  # fmt: skip
    info["means2d"].retain_grad()
    weights = weights_like(torch.empty(cameras, *colors.shape[1:], dtype=torch.float64))[first : first + own]
    ((colors * weights).mean() + (alphas * weights[..., :1]).mean()).backward()
    on_screen = info["means2d"].absgrad if absgrad else info["means2d"].grad
    return {
        "pictures": colors.detach(),
        "pairs": torch.stack([info["camera_ids"], info["gaussian_ids"] + rows.start]),
        "radii": info["radii"],
        "on_screen": on_screen,
        "gradients": {name: getattr(scene, name).grad for name in PARAMETERS},
        "n_cameras": info["n_cameras"],
    }


def part_of(rank: int, size: int) -> slice:
    """Rows of a rank: few, none, or many."""
    return slice(*{2: ([0, 30], [30, 90]), 3: ([0, 5], [5, 5], [5, 90])}[size][rank])


def exchange(ranks: Ranks, *, own: int, absgrad: bool, blind: int | None = None) -> dict[str, Any]:
    scene = exchanged_scene(ranks.size * own, blind)
    return drawn(scene, absgrad, part_of(ranks.rank, ranks.size), PairExchange(ranks, own, absgrad))


EXCHANGES: dict[str, dict[str, Any]] = {
    "one camera each": dict(own=1, absgrad=False),
    "two cameras each": dict(own=2, absgrad=False),
    "absolute gradients": dict(own=2, absgrad=True),
    "a view that nobody sees": dict(own=1, absgrad=True, blind=1),
}
CASES = {name: functools.partial(exchange, **options) for name, options in EXCHANGES.items()}


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def group(request, tmp_path_factory) -> tuple[int, dict[str, list[Any]]]:
    return request.param, run_in_group(request.param, CASES, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("case", EXCHANGES)
def test_exchange_equals_one_process(group, case):
    size, found = group
    options = EXCHANGES[case]
    expected = drawn(exchanged_scene(size * options["own"], options.get("blind")), options["absgrad"], slice(0, 90))
    parts = found[case]
    assert all(part["n_cameras"] == expected["n_cameras"] for part in parts)
    assert_close(torch.cat([part["pictures"] for part in parts]), expected["pictures"])
    for name, value in expected["gradients"].items():
        assert_close(torch.cat([part["gradients"][name] for part in parts]), value)
        assert value.abs().max() > 0
    pairs = torch.cat([part["pairs"] for part in parts], dim=1)
    order = (pairs[0] * 90 + pairs[1]).argsort()
    assert torch.equal(pairs[:, order], expected["pairs"])
    assert torch.equal(torch.cat([part["radii"] for part in parts])[order], expected["radii"])
    assert_close(torch.cat([part["on_screen"] for part in parts])[order], expected["on_screen"])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()
