"""A view that is trained in tiles has the loss, the gradients and the statistics of the whole view."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from configs import Config
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.models import geometry_packed
from offload.models.geometry_device import DeviceGeometry
from offload.models.geometry_packed import PackedGeometry
from offload.models.tiled import TiledGaussians, TileResult, ViewTile
from offload.tiles.budget import MemoryBudget, RowBytes, RowLimit
from rendering.losses import photometric_loss
from strategies.default import DefaultStrategy, Statistics
from training import tiles
from training.tiles import ScreenGradients, halo_of, part_loss, render_in_parts, render_part
from training.views import View, render

CPU = torch.device("cpu")
N = 900
WIDTH, HEIGHT = 283, 202  # no multiples of anything
RATES = {"means": 1e-3, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 1.25e-4}
NAMES = tuple(RATES)
ADAM = AdamOptions(RATES, lambda step: RATES["means"], (0.9, 0.999))


def random_parameters(seed: int, device: str = "cpu") -> dict[str, Tensor]:
    """Gaussians in front of the cameras, some beside the picture, most of them small, a few as large as it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    means = torch.rand(N, 3, generator=generator) * torch.tensor([6.0, 4.0, 3.0]) + torch.tensor([-3.0, -2.0, 3.0])
    scales = math.log(0.04) + 0.7 * normal(N, 3)
    scales[::97] += 3
    parameters = {
        "means": means,
        "scales": scales,
        "quats": normal(N, 4),
        "opacities": 2 * normal(N),
        "sh0": normal(N, 1, 3),
        "shN": 0.2 * normal(N, 15, 3),
    }
    return {name: value.to(device) for name, value in parameters.items()}


def random_view(
    seed: int, *, cameras: int = 1, masked: bool = False, antialiased: bool = False, device: str = "cpu"
) -> View:
    generator = torch.Generator().manual_seed(100 + seed)
    viewmats = torch.eye(4).repeat(cameras, 1, 1)
    viewmats[:, :2, 3] = torch.linspace(-0.3, 0.4, 2 * cameras).view(cameras, 2)
    K = torch.tensor([[0.8 * WIDTH, 0, 0.52 * WIDTH], [0, 0.85 * WIDTH, 0.46 * HEIGHT], [0, 0, 1]])
    Ks = K.repeat(cameras, 1, 1)
    shape = (cameras, HEIGHT, WIDTH)
    images = torch.rand(*shape, 3, generator=generator)
    masks = (torch.rand(*shape, generator=generator) < 0.8) if masked else None
    seen_by = Cameras(viewmats, Ks, WIDTH, HEIGHT, antialiased=antialiased)
    return View(images.to(device), seen_by, None if masks is None else masks.to(device))


def random_backgrounds(view: View) -> Tensor:
    return torch.linspace(0.1, 0.9, 3 * len(view.images), device=view.images.device).view(-1, 3)


class Step:
    """Loss, gradients and statistics of a step on one view."""

    def __init__(self, loss: Tensor, gradients: dict[str, Tensor], statistics: Statistics) -> None:
        self.loss, self.gradients, self.statistics = loss.item(), gradients, vars(statistics)


def rules(cfg: Config) -> DefaultStrategy:
    densification = DefaultStrategy(cfg, 1.0, 0)
    densification.statistics = Statistics.zeros(N, CPU)
    return densification


def whole_step(parameters: dict[str, Tensor], view: View, cfg: Config, backgrounds: Tensor | None) -> Step:
    """Without any of the machinery."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    colors, info = render(leaves, view.cameras, cfg, sh_degree=3, backgrounds=backgrounds)
    loss = photometric_loss(colors, view.images, ssim_lambda=cfg.ssim_lambda, masks=view.masks)
    loss.backward()
    densification = rules(cfg)
    densification.observe(info)
    return Step(loss, {name: leaf.grad.cpu() for name, leaf in leaves.items()}, densification.statistics)


def split_gaussians(parameters: dict[str, Tensor], limit: object, geometry: str, cfg: Config) -> TiledGaussians:
    return TiledGaussians(
        parameters,
        ADAM,
        device=parameters["means"].device,
        geometry=geometry.removesuffix(", compact"),
        state="compact" if geometry.endswith("compact") else "float32",
        limit=limit,
        halo=halo_of(cfg),
    )


def train_part(
    part: ViewTile,
    gaussians: TiledGaussians,
    view: View,
    cfg: Config,
    backgrounds: Tensor | None,
    screen,
    seen: list,
) -> TileResult:
    """As in simple_trainer_hybrid_optimized_split.py."""
    halo = halo_of(cfg)
    colors, info = render_part(part, view.cameras, cfg, sh_degree=3, backgrounds=backgrounds, halo=halo)
    loss = part_loss(colors, view, part.tile, ssim_lambda=cfg.ssim_lambda, halo=halo)
    loss.backward()
    screen.add(part, len(gaussians.ids), info)
    seen.append(part.tile)
    return TileResult(loss.detach(), info["n_intersections"], colors.shape[:3].numel())


def split_step(
    parameters: dict[str, Tensor],
    view: View,
    cfg: Config,
    backgrounds: Tensor | None,
    limit: object,
    geometry: str,
    wrap=lambda train_part: train_part,
) -> tuple[Step, list]:
    gaussians = split_gaussians(parameters, limit, geometry, cfg)
    screen, seen = ScreenGradients(view.cameras), []
    work = partial(
        train_part, gaussians=gaussians, view=view, cfg=cfg, backgrounds=backgrounds, screen=screen, seen=seen
    )
    loss = gaussians.train_view(view.cameras, None, wrap(work))
    ids = gaussians.ids
    gaussians.update()
    densification = rules(cfg)
    densification.observe(screen.info(), ids)
    # After the first step Adam's moments are (1 - b1) g and (1 - b2) g^2: each row was updated with one gradient.
    state = gaussians.state()
    gradients = {name: state[f"exp_avg/{name}"].cpu() / (1 - 0.9) for name in NAMES}
    for name, gradient in gradients.items():
        squares = state[f"exp_avg_sq/{name}"].cpu() / (1 - 0.999)
        assert torch.allclose(squares, gradient.square(), rtol=1e-3, atol=1e-30)
    return Step(loss, gradients, densification.statistics), seen


def check(actual: Step, expected: Step) -> None:
    assert abs(actual.loss - expected.loss) < 1e-6
    for name, gradient in expected.gradients.items():
        error = (actual.gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, name
    assert torch.equal(actual.statistics["count"], expected.statistics["count"])
    assert torch.equal(actual.statistics["radii"], expected.statistics["radii"])
    found, wanted = actual.statistics["grad2d"], expected.statistics["grad2d"]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


VARIANTS = {
    "plain": {},
    "masks and background": {"masked": True, "background": True},
    "antialiased batch of 2": {"antialiased": True, "cameras": 2, "background": True, "masked": True},
    "absolute gradients": {"absgrad": True, "masked": True},
}


def scene(variant: str, device: str = "cpu") -> tuple[dict[str, Tensor], View, Config, Tensor | None]:
    options = VARIANTS[variant]
    cfg = Config(
        antialiased=options.get("antialiased", False),
        absgrad=options.get("absgrad", False),
        refine_scale2d_stop_iter=10,
    )
    view = random_view(
        1,
        cameras=options.get("cameras", 1),
        masked=options.get("masked", False),
        antialiased=cfg.antialiased,
        device=device,
    )
    backgrounds = random_backgrounds(view) if options.get("background") else None
    return random_parameters(2, device), view, cfg, backgrounds


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
PLACES = pytest.mark.parametrize("geometry", ["device", "host"])


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@PLACES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.1, 0.02])
def test_a_step_in_tiles_equals_the_whole(device, geometry, variant, threshold):
    arguments = scene(variant, device)
    step, seen = split_step(*arguments, RowLimit(threshold), geometry)
    num_cameras = len(arguments[1].images)
    assert len(seen) >= num_cameras * (6 if threshold < 0.1 else 4 if threshold < 0.5 else 2)
    check(step, whole_step(*arguments))


@PLACES
def test_a_view_below_the_threshold_stays_whole(geometry):
    arguments = scene("antialiased batch of 2")
    step, seen = split_step(*arguments, RowLimit(1.0), geometry)
    assert seen == [None]
    check(step, whole_step(*arguments))


@pytest.mark.parametrize("variant", ["plain", "absolute gradients"])
def test_a_missing_halo_is_noticed(monkeypatch, variant):
    arguments = scene(variant)
    expected = whole_step(*arguments)
    monkeypatch.setattr(tiles.Tile, "with_halo", lambda self, *arguments: self)
    step, _ = split_step(*arguments, RowLimit(0.3), "device")
    with pytest.raises(AssertionError):
        check(step, expected)


def test_absolute_gradients_need_the_larger_halo(monkeypatch):
    arguments = scene("absolute gradients")
    expected = whole_step(*arguments)
    monkeypatch.setitem(globals(), "halo_of", lambda cfg: 5)
    step, _ = split_step(*arguments, RowLimit(0.3), "device")
    with pytest.raises(AssertionError):
        check(step, expected)


def test_rows_missing_from_the_halo_are_noticed(monkeypatch):
    """Tiles get the rows that draw in them, but not those that draw in their halo only."""
    arguments = scene("plain")
    expected = whole_step(*arguments)
    covered_cells = DeviceGeometry.covered_cells

    def without_halo(self, *arguments, halo: int, cell: int):
        return covered_cells(self, *arguments, halo=0, cell=cell)

    monkeypatch.setattr(DeviceGeometry, "covered_cells", without_halo)
    step, _ = split_step(*arguments, RowLimit(0.3), "device")
    with pytest.raises(AssertionError):
        check(step, expected)


@pytest.mark.slow
@PLACES
@pytest.mark.parametrize("variant", ["plain", "antialiased batch of 2"])
@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_what_runs_out_of_memory_is_rendered_in_finer_tiles(geometry, variant, threshold):
    arguments = scene(variant)
    failed = []

    def failing(train_part):
        def fail_now_and_then(part: ViewTile) -> TileResult:
            tile = part.tile
            if len(failed) < 2 and (tile is None or max(tile.width, tile.height) >= 128):
                failed.append(tile)
                with torch.enable_grad():
                    part.rows["colors"].sum().backward()  # a backward pass that has come to this point
                raise torch.cuda.OutOfMemoryError("out of memory")
            return train_part(part)

        return fail_now_and_then

    step, seen = split_step(*arguments, RowLimit(threshold), geometry, failing)
    assert len(failed) == 2
    assert not set(failed) & set(seen)
    check(step, whole_step(*arguments))


def test_a_tile_that_cannot_be_split_ends_training():
    arguments = scene("plain")

    def failing(train_part):
        def fail(part: ViewTile) -> TileResult:
            raise torch.cuda.OutOfMemoryError("out of memory")

        return fail

    with pytest.raises(torch.cuda.OutOfMemoryError, match="smallest tile"):
        split_step(*arguments, RowLimit(0.5), "device", failing)


@PLACES
@pytest.mark.parametrize("variant", ["plain", "antialiased batch of 2"])
def test_pictures_in_tiles(geometry, variant):
    parameters, view, cfg, _ = scene(variant)
    gaussians = split_gaussians(parameters, RowLimit(0.2), geometry, cfg)
    parts = list(gaussians.view_tiles(view.cameras))
    assert len(parts) > 3
    assert max(len(part.rows["means"]) for part in parts) < 0.6 * N
    expected, _ = render(parameters, view.cameras, cfg, sh_degree=3)
    assert (render_in_parts(parts, view.cameras, cfg) - expected).abs().max() < 1e-5


def test_compact_geometry_is_looked_at_in_blocks(monkeypatch):
    """When tiles are planned: a view may see far more than a budget has memory for. The last block is not full."""
    parameters, view, _, _ = scene("antialiased batch of 2")
    place = PackedGeometry(parameters, ADAM, device=CPU)
    ids = place.visible_ids(view.cameras)
    expected, gather, gathered = place.covered_cells(ids, view.cameras, halo=5, cell=16), place.gather, []

    def noted(some: Tensor) -> dict[str, Tensor]:
        gathered.append(len(some))
        return gather(some)

    monkeypatch.setattr(geometry_packed, "BLOCK_ROWS", 100)
    monkeypatch.setattr(place, "gather", noted)
    found = place.covered_cells(ids, view.cameras, halo=5, cell=16)
    assert max(gathered) == 100
    assert len(found) == 2
    for here, there in zip(found, expected, strict=True):
        assert torch.equal(here.cells, there.cells)
        assert (here.corners == there.corners).all()
    assert len(place.covered_cells(ids[:0], view.cameras, halo=5, cell=16)[0].cells[0]) == 0


@pytest.mark.parametrize("geometry", ["device, compact", "host, compact"])
def test_a_compact_step_in_tiles_is_that_of_the_whole(geometry):
    """Sums over tiles differ in last bits; where a gradient is no more than these, Adam's first step may turn round."""
    parameters, view, cfg, backgrounds = scene("masks and background")
    values, counts = [], []
    for threshold in (1.0, 0.1):
        gaussians = split_gaussians(parameters, RowLimit(threshold), geometry, cfg)
        arguments = {"gaussians": gaussians, "view": view, "cfg": cfg, "backgrounds": backgrounds}
        work = partial(train_part, **arguments, screen=ScreenGradients(view.cameras), seen=[])
        gaussians.train_view(view.cameras, None, work)
        gaussians.update()
        values.append(gaussians.rows(0, N))
        counts.append(len(work.keywords["seen"]))
    assert counts[0] == 1
    assert counts[1] > 4
    for name, rate in RATES.items():
        whole, in_tiles = (each[name] for each in values)
        differ = (in_tiles - whole).abs() > 0.01 * rate + 2**-10 * whole.abs() * (name == "shN")
        assert ((whole - parameters[name]).abs() > 0.5 * rate).float().mean() > 0.2, name
        assert differ.float().mean() < 0.002, name


def test_shares_of_the_loss_add_up_for_any_tiles():
    """Also where tiles are narrower than the halo, and for pictures that hold no window beside the border."""
    view = random_view(3, masked=True)
    rendered = torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(4)).requires_grad_()
    expected = photometric_loss(rendered, view.images, ssim_lambda=0.2, masks=view.masks)
    (expected_gradient,) = torch.autograd.grad(expected, rendered)
    total = 0.0
    for x, width in ((0, 6), (6, 1), (7, 100), (107, 176)):
        for y, height in ((0, 80), (80, 122)):
            tile = tiles.Tile(0, x, y, width, height)
            padded = tile.with_halo(5, WIDTH, HEIGHT)
            part = rendered[:, padded.y : padded.y + padded.height, padded.x : padded.x + padded.width]
            total = total + part_loss(part, view, tile, ssim_lambda=0.2)
    (gradient,) = torch.autograd.grad(total, rendered)
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_a_budget_splits_what_exceeds_it():
    arguments = scene("plain")
    row_bytes = RowBytes.of("device", 3)
    generous = MemoryBudget(10**9, row_bytes, N)
    _, seen = split_step(*arguments, generous, "device")
    assert seen == [None]
    tight = MemoryBudget(4_500_000, row_bytes, N)
    step, seen = split_step(*arguments, tight, "device")
    assert len(seen) > 1
    check(step, whole_step(*arguments))
