"""Culling by geometry against what the rasterizer draws."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from inspect import signature
from itertools import accumulate, chain
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.geometry import GeometryState
from offload.backends import native as compiled
from offload.culling import kernels
from offload.culling.cameras import Cameras, Margin, pack
from offload.culling.cells import covered_cells
from offload.culling.native import BlockBounds, visible_ids
from offload.store.morton import morton_order
from rendering.rasterize import rasterize
from tests.oracles import culling as oracle
from tests.triton_places import INTERPRETED, NEEDS, TRITON_DEVICE
from training import views

COLUMNS = {"means": slice(0, 3), "scales": slice(3, 6), "quats": slice(6, 10), "opacities": 10}
MAX_EXCESS = 0.02


def uniform(generator: torch.Generator, *shape: int, low: float = 0, high: float = 1) -> Tensor:
    return torch.rand(*shape, generator=generator) * (high - low) + low


def rotations(generator: torch.Generator, count: int) -> Tensor:
    """Random rotation matrices [count, 3, 3]."""
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    q[:, :, 0] *= torch.linalg.det(q)[:, None]
    return q.float()


def quaternions_to(directions: Tensor) -> Tensor:
    """Quaternions w x y z that turn the z axis to the given directions [n, 3]."""
    unit = torch.nn.functional.normalize(directions, dim=1)
    return torch.stack([1 + unit[:, 2], -unit[:, 1], unit[:, 0], torch.zeros(len(unit))], 1)


def random_geometry(n: int, seed: int, *, median_scale: float = 0.05, spread: float = 0.6, offset: float = 0) -> Tensor:
    """Rows [n, 12] around a point `offset` from the origin, in Morton order; some of them transparent, some
    opaque, some with a quaternion of length zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(n, 12)
    rows[:, COLUMNS["means"]] = uniform(generator, n, 3, low=-4, high=4) + offset
    rows[:, COLUMNS["scales"]] = math.log(median_scale) + spread * torch.randn(n, 3, generator=generator)
    rows[:, COLUMNS["quats"]] = torch.randn(n, 4, generator=generator) * uniform(generator, n, 1, low=0.1, high=3)
    rows[:, COLUMNS["opacities"]] = 4 * torch.randn(n, generator=generator)
    rows[:: max(n // 7, 1), COLUMNS["quats"]] = 0
    return rows[morton_order(rows[:, COLUMNS["means"]])].contiguous()


def named_geometry(rows: Tensor) -> dict[str, Tensor]:
    """The parameters in such rows, as stores take them."""
    return {"means": rows[:, :3], "scales": rows[:, 3:6], "quats": rows[:, 6:10], "opacities": rows[:, 10]}


def random_cameras(
    seed: int, *, count: int = 2, fov: float = 60, offset: float = 0, inside: bool = True, **options
) -> Cameras:
    """Cameras that look anywhere, among the Gaussians; or, when not `inside`, from outside to their middle."""
    generator = torch.Generator().manual_seed(seed)
    width, height = 90, 64
    focal = 0.5 * width / math.tan(math.radians(fov) / 2)
    viewmats = torch.eye(4).repeat(count, 1, 1)
    viewmats[:, :3, :3] = rotations(generator, count)
    positions = uniform(generator, count, 3, low=-2, high=2)
    if not inside:
        positions = -9 * viewmats[:, 2, :3]  # backwards along the axis
    positions += offset
    viewmats[:, :3, 3] = -(viewmats[:, :3, :3] @ positions[:, :, None])[:, :, 0]
    K = torch.tensor([[focal, 0, 0.45 * width], [0, 1.1 * focal, 0.6 * height], [0, 0, 1]])
    return Cameras(viewmats, K.repeat(count, 1, 1), width, height, **options)


def activated(rows: Tensor) -> dict[str, Tensor]:
    return {
        "means": rows[:, COLUMNS["means"]],
        "quats": rows[:, COLUMNS["quats"]],
        "scales": rows[:, COLUMNS["scales"]].exp(),
        "opacities": rows[:, COLUMNS["opacities"]].sigmoid(),
    }


def drawn_ids(rows: Tensor, cameras: Cameras, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the rasterizer draws in any of the cameras."""
    rows = rows.to(dtype)
    info = rasterize(
        **activated(rows), colors=torch.zeros(len(rows), 1, dtype=dtype), viewmats=cameras.viewmats.to(dtype),
        Ks=cameras.Ks.to(dtype), width=cameras.width, height=cameras.height, near_plane=cameras.near_plane,
        far_plane=cameras.far_plane, eps2d=cameras.eps2d,
        rasterize_mode="antialiased" if cameras.antialiased else "classic",
    )[2]  # fmt: skip
    return info["gaussian_ids"].unique()


def drawn_ids_of_gsplat(rows: Tensor, cameras: Cameras) -> Tensor:
    """The rule in gsplat's order of operations in float32, with its larger rounding: covariances in world space,
    camera space and the image, one after another. One camera."""
    W, t = cameras.viewmats[0, :3, :3], cameras.viewmats[0, :3, 3]
    focal, centre = cameras.Ks[0, [0, 1], [0, 1]], cameras.Ks[0, :2, 2]
    size = torch.tensor([cameras.width, cameras.height])
    gaussians = activated(rows)
    w, x, y, z = torch.nn.functional.normalize(gaussians["quats"], dim=1).unbind(1)
    rotation = torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ], 1).reshape(-1, 3, 3)  # fmt: skip
    axes = rotation * gaussians["scales"][:, None, :]
    covariance = W @ (axes @ axes.mT) @ W.T
    position = gaussians["means"] @ W.T + t
    depth = position[:, 2:]
    limit = 0.15 * size / focal
    slope = (position[:, :2] / depth).clamp(-(centre / focal + limit), (size - centre) / focal + limit)
    J = torch.zeros(len(rows), 2, 3)
    J[:, 0, 0], J[:, 1, 1] = (focal / depth).unbind(1)
    J[:, :, 2] = -focal * slope * depth / depth.square()
    image = J @ covariance @ J.mT
    blurred = image + cameras.eps2d * torch.eye(2)
    opacity = gaussians["opacities"]
    if cameras.antialiased:
        det, det_blurred = (m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0] for m in (image, blurred))
        opacity = opacity * (det / det_blurred).clamp(min=0).sqrt()
    extent = (2 * (255 * opacity).log()).sqrt().clamp(max=3.33)
    radius = (extent[:, None] * blurred.diagonal(dim1=1, dim2=2).sqrt()).ceil()
    mean2d = focal * position[:, :2] / depth + centre
    drawn = (opacity >= 1 / 255) & (depth[:, 0] >= cameras.near_plane) & (depth[:, 0] <= cameras.far_plane)
    return (drawn & ((mean2d + radius > 0) & (mean2d - radius < size)).all(1)).nonzero().squeeze(1)


def native(rows: Tensor, cameras: Cameras, margin: Margin | None = None) -> Tensor:
    return visible_ids(rows, BlockBounds(rows), cameras, margin)


def with_torch(rows: Tensor, cameras: Cameras, margin: Margin | None = None) -> Tensor:
    return oracle.visible_ids(*(rows[:, columns] for columns in COLUMNS.values()), cameras, margin)


def on_device(kernels, rows: Tensor, cameras: Cameras, margin: Margin | None, device: str) -> Tensor:
    """As geometry on a device is culled, of which no row lags behind."""
    parameters = {name: rows[:, columns].to(device) for name, columns in COLUMNS.items()}
    moments = [{name: torch.zeros_like(value) for name, value in parameters.items()} for _ in range(2)]
    state = GeometryState(parameters, *moments, torch.zeros(len(rows), dtype=torch.int32, device=device))
    tables = DeferralTables(torch.ones(1, 12), (0.9, 0.999), 1e-15, torch.device(device))
    return kernels.visible_ids(state, tables, cameras, margin or Margin(), margin or Margin()).cpu()


def on_the_cpu(rows: Tensor, cameras: Cameras, margin: Margin | None = None) -> Tensor:
    return on_device(kernels, rows, cameras, margin, "cpu")


def missing(drawn: Tensor, found: Tensor) -> Tensor:
    return drawn[~torch.isin(drawn, found)]


def check(rows: Tensor, cameras: Cameras, cull, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Nothing drawn is left out, at most 2 % is in excess; returns what is drawn, if not known, and what was found."""
    drawn, found = drawn_ids(rows, cameras) if drawn is None else drawn, cull(rows, cameras)
    assert found.dtype == torch.int64
    assert torch.equal(found, found.unique())  # sorted, each once
    assert len(missing(drawn, found)) == 0
    assert len(found) - len(drawn) <= MAX_EXCESS * len(found)
    return drawn, found


def interpreted_block(num_rows: int) -> int:
    """Return the rows of a block: two of few rows, and many of many, since each block costs the interpreter 0.2 s."""
    return 1 << 16 if num_rows > 4096 else max(64, 1 << (max(num_rows - 1, 1).bit_length() - 1))


def with_triton(rows: Tensor, cameras: Cameras, margin: Margin | None = None) -> Tensor:
    from offload.culling import kernels_triton as culling_triton

    if INTERPRETED:
        culling_triton.BLOCK = interpreted_block(len(rows))
    return on_device(culling_triton, rows, cameras, margin, TRITON_DEVICE)


INTERPRETED_SLOWLY = pytest.param(with_triton, marks=[*NEEDS, pytest.mark.slow])
ALL = pytest.mark.parametrize("cull", [native, on_the_cpu, with_torch, INTERPRETED_SLOWLY])
MODES = pytest.mark.parametrize("antialiased", [False, True], ids=["classic", "antialiased"])


@functools.cache  # for each way of culling
def drawn_of(fov: float, median_scale: float, antialiased: bool) -> tuple[Tensor, Cameras, Tensor]:
    """Rows, cameras, and the ids of the rows that are drawn."""
    rows = random_geometry(50_000, seed=1, median_scale=median_scale)
    cameras = random_cameras(2, fov=fov, antialiased=antialiased)
    return rows, cameras, drawn_ids(rows, cameras)


@pytest.mark.slow
@ALL
@MODES
@pytest.mark.parametrize("fov", [15, 60, 140])
@pytest.mark.parametrize("median_scale", [3e-4, 0.01, 0.05, 0.5, 5])
def test_everything_drawn_is_found(cull, antialiased, fov, median_scale):
    rows, cameras, drawn = drawn_of(fov, median_scale, antialiased)
    check(rows, cameras, cull, drawn)
    assert len(drawn) > (20 if not antialiased else 0)  # the smallest fade when antialiased


@pytest.mark.slow
@ALL
@MODES
def test_needles_discs_and_all_sizes_at_once(cull, antialiased):
    rows = random_geometry(30_000, seed=3, median_scale=0.02, spread=2.5)
    check(rows, random_cameras(4, antialiased=antialiased), cull)
    check(rows, random_cameras(5, antialiased=antialiased, inside=False), cull)


@functools.cache  # for each way of culling
def drawn_in_both_precisions(offset: float, antialiased: bool) -> tuple[Tensor, Cameras, Tensor, Tensor]:
    """Rows, cameras, and the ids of the rows that are drawn in float32 and in float64."""
    rows = random_geometry(200_000, seed=6, median_scale=0.01, offset=offset)
    cameras = random_cameras(7, count=4, offset=offset, antialiased=antialiased, near_plane=0.1, far_plane=5.0)
    return rows, cameras, drawn_ids(rows, cameras), drawn_ids(rows, cameras, torch.float64)


@pytest.mark.slow
@ALL
@MODES
@pytest.mark.parametrize("offset", [0, 20_000])
def test_rounding_of_the_rasterizer_never_matters(cull, antialiased, offset):
    """Far from the origin float32 positions are coarse, and the rasterizer in float32 and in float64 draws different
    Gaussians at the border; both must be found."""
    rows, cameras, single, double = drawn_in_both_precisions(offset, antialiased)
    assert not offset or not torch.equal(single, double)
    found = cull(rows, cameras)
    assert len(missing(single, found)) == len(missing(double, found)) == 0


@ALL
@MODES
def test_needles_seen_along_their_length(cull, antialiased):
    """Their image is tiny, but computed from large numbers."""
    cameras = random_cameras(50, count=1, fov=120, antialiased=antialiased)
    Ks = cameras.Ks.clone()
    Ks[:, :2] *= 16
    cameras = replace(cameras, Ks=Ks, width=16 * cameras.width, height=16 * cameras.height)
    generator = torch.Generator().manual_seed(51)
    n = 20_000
    # Centres around the borders of the picture, in camera space; the needle's z axis points at the camera.
    pixels = torch.stack([uniform(generator, n, low=-5, high=5), uniform(generator, n, high=cameras.height)], 1)
    slopes = (pixels - Ks[0, :2, 2]) / Ks[0, [0, 1], [0, 1]]
    rays = torch.cat([slopes, torch.ones(n, 1)], 1) @ cameras.viewmats[0, :3, :3]
    position = -cameras.viewmats[0, :3, :3].T @ cameras.viewmats[0, :3, 3]
    rows = torch.zeros(n, 12)
    rows[:, COLUMNS["means"]] = position + rays * uniform(generator, n, 1, low=0.5, high=2)
    rows[:, COLUMNS["scales"]] = torch.tensor([-9.0, -9.0, 1.5])
    rows[:, COLUMNS["quats"]] = quaternions_to(rays)
    rows[:, COLUMNS["opacities"]] = uniform(generator, n, low=-5, high=5)
    drawn, as_gsplat, found = drawn_ids(rows, cameras), drawn_ids_of_gsplat(rows, cameras), cull(rows, cameras)
    assert len(missing(as_gsplat, drawn)) > 0  # the rounding shows
    assert len(missing(drawn, found)) == len(missing(as_gsplat, found)) == 0
    assert len(drawn) < 0.9 * n


@ALL
@MODES
def test_order_of_operations_hardly_matters_elsewhere(cull, antialiased):
    rows = random_geometry(20_000, seed=52, median_scale=0.05)
    rows[:, COLUMNS["quats"]] = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(53))
    cameras = random_cameras(54, count=1, antialiased=antialiased)
    as_gsplat, found = drawn_ids_of_gsplat(rows, cameras), cull(rows, cameras)
    assert len(missing(as_gsplat, found)) == 0
    assert len(missing(found, as_gsplat)) <= 0.001 * len(found)


@ALL
def test_depth_limits(cull):
    rows = random_geometry(20_000, seed=8, median_scale=0.02)
    cameras = random_cameras(9, near_plane=1.0, far_plane=3.0)
    drawn, _ = check(rows, cameras, cull)
    assert len(drawn) < 0.7 * len(drawn_ids(rows, random_cameras(9)))


@functools.cache  # for each way of culling
def trained_scene() -> tuple[Tensor, Cameras]:
    """Rows after some steps of Adam, which make Gaussians long, flat, faint and large, and the cameras of these."""
    rows = random_geometry(1500, seed=10, median_scale=0.15)
    cameras = random_cameras(11, count=4, inside=False)
    leaves = {name: rows[:, columns].clone().requires_grad_() for name, columns in COLUMNS.items()}
    colors = torch.rand(len(rows), 3, generator=torch.Generator().manual_seed(12)).requires_grad_()
    targets = torch.rand(4, cameras.height, cameras.width, 3, generator=torch.Generator().manual_seed(13))
    adam = torch.optim.Adam([*leaves.values(), colors], lr=0.05)
    for step in range(40):
        view = [step % 4]
        image = rasterize(
            leaves["means"], leaves["quats"], leaves["scales"].exp(), leaves["opacities"].sigmoid(), colors,
            cameras.viewmats[view], cameras.Ks[view], cameras.width, cameras.height,
        )[0]  # fmt: skip
        adam.zero_grad()
        (image - targets[view]).abs().mean().backward()
        adam.step()
    trained = rows.clone()
    for name, columns in COLUMNS.items():
        trained[:, columns] = leaves[name].detach()
    assert (trained - rows).abs().max() > 0.5
    return trained, cameras


@pytest.mark.slow
@ALL
@MODES
def test_a_trained_scene(cull, antialiased):
    trained, cameras = trained_scene()
    check(trained, replace(cameras, antialiased=antialiased), cull)
    for seed in range(14, 24):
        check(trained, random_cameras(seed, antialiased=antialiased), cull)


def test_blocks_out_of_sight_are_not_read():
    rows = random_geometry(100_000, seed=15)
    cameras = random_cameras(16, count=1, fov=20)
    bounds = BlockBounds(rows)
    found = visible_ids(rows, bounds, cameras)
    visible_blocks = (found // 256).unique()
    hidden = torch.isin(torch.arange(len(rows)) // 256, visible_blocks, invert=True).nonzero().squeeze(1)
    rows[hidden] = rows[found[0]].clone()  # would be visible, were it read
    found_again = visible_ids(rows, bounds, cameras)
    read = torch.isin(hidden, found_again).double().mean()
    assert torch.isin(found, found_again).all()
    assert read < 0.2
    assert len(hidden) > 0.2 * len(rows)


@MODES
def test_bounds_leave_nothing_out(antialiased):
    rows = random_geometry(50_000, seed=17, median_scale=0.02, spread=1.5)
    bounds = BlockBounds(rows)
    every_row = BlockBounds(rows)
    every_row.bounds.fill_(float("nan"))  # a block without valid bounds is never skipped
    for seed in range(20):
        cameras = random_cameras(seed, count=1, fov=40, antialiased=antialiased, far_plane=6.0)
        assert torch.equal(visible_ids(rows, bounds, cameras), visible_ids(rows, every_row, cameras))


def test_bounds_follow_rows_that_move():
    rows = random_geometry(30_000, seed=18)
    cameras = random_cameras(19, count=1, fov=40)
    bounds = BlockBounds(rows)
    ids = torch.randperm(len(rows), generator=torch.Generator().manual_seed(20))[:50].sort().values
    target = rows[visible_ids(rows, bounds, cameras)[0]].clone()
    rows[ids] = target
    assert len(missing(ids, visible_ids(rows, bounds, cameras))) > 10  # the bounds are out of date
    bounds.update(rows, ids)
    assert torch.equal(bounds.bounds, BlockBounds(rows).bounds)
    assert torch.equal(visible_ids(rows, bounds, cameras), native(rows, cameras))
    bounds.rebuild(rows[:700])
    assert torch.equal(visible_ids(rows[:700], bounds, cameras), native(rows[:700], cameras))


def test_rows_may_be_columns_of_wider_ones():
    rows, cameras = random_geometry(30_000, seed=37), random_cameras(38)
    wide = torch.full((len(rows), 16), float("nan"))
    wide[:, :12] = rows
    bounds, wide_bounds = BlockBounds(rows), BlockBounds(wide[:, :12])
    ids = torch.arange(0, len(rows), 100)
    for geometry, its_bounds in ((rows, bounds), (wide[:, :12], wide_bounds)):
        geometry[ids, :3] += 0.5
        its_bounds.update(geometry, ids)
    assert torch.equal(wide_bounds.bounds, bounds.bounds)
    expected = visible_ids(rows, bounds, cameras)
    assert torch.equal(visible_ids(wide[:, :12], wide_bounds, cameras), expected)
    cells = [covered_cells(geometry, expected, cameras, Margin(), 16) for geometry in (rows, wide[:, :12])]
    assert all(torch.equal(one.cells, other.cells) for one, other in zip(*cells, strict=True))
    with pytest.raises(ValueError, match="side by side"):
        BlockBounds(rows.T.contiguous().T)


@pytest.mark.slow
@ALL
@MODES
@pytest.mark.parametrize(
    "margin",
    [
        Margin(means=0.1), Margin(scales=0.2), Margin(quats=0.1), Margin(opacities=0.3),
        Margin(means=0.01, scales=0.05, quats=0.02, opacities=0.1),
    ],
    ids=["means", "scales", "quats", "opacities", "all"],
)  # fmt: skip
def test_whatever_moves_within_the_margin_is_found(cull, antialiased, margin):
    rows = random_geometry(40_000, seed=21, median_scale=0.04, spread=1.2)
    cameras = random_cameras(22, count=3, antialiased=antialiased, near_plane=0.2)
    before, found = cull(rows, cameras), cull(rows, cameras, margin)
    generator = torch.Generator().manual_seed(23)
    newly_drawn = 0
    for _ in range(5):
        moved = rows.clone()
        for name, columns in COLUMNS.items():
            signs = torch.randint(0, 2, moved[:, columns].shape, generator=generator) * 2 - 1
            moved[:, columns] += getattr(margin, name) * signs
        drawn = drawn_ids(moved, cameras)
        assert len(missing(drawn, found)) == 0
        newly_drawn += len(missing(drawn, before))
    assert newly_drawn > 0  # the margin was needed
    assert len(found) < 1.7 * len(before)


@ALL
def test_pixels_of_margin(cull):
    """A picture with a wider border holds what the smaller one may get."""
    rows = random_geometry(20_000, seed=24, median_scale=0.01)
    cameras = random_cameras(25, count=1)
    border = 5
    Ks = cameras.Ks.clone()
    Ks[:, :2, 2] += border
    wide = replace(cameras, Ks=Ks, width=cameras.width + 2 * border, height=cameras.height + 2 * border)
    found = cull(rows, cameras, Margin(pixels=border))
    # The Jacobian is cut a little farther out in the wider picture, which only the largest Gaussians feel.
    expected = drawn_ids(rows, wide)
    differing = len(missing(expected, found)) + len(missing(found, expected))
    assert differing < 0.005 * len(found)
    assert len(found) > 1.02 * len(cull(rows, cameras))


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 255, 257, 700])
def test_any_number_of_rows(cull, n, monkeypatch):
    rows = random_geometry(1000, seed=26, median_scale=0.5)[300 : 300 + n]
    cameras = random_cameras(27, fov=140)
    check(rows, cameras, cull)
    expected = cull(rows, cameras)
    for threads in ("1", "3", "64"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert torch.equal(cull(rows, cameras), expected)


@ALL
def test_all_and_none_visible(cull):
    rows = random_geometry(5000, seed=28)
    rows[:, COLUMNS["opacities"]] = 3
    far_away = random_cameras(29, count=1, inside=False, fov=120)
    assert len(cull(rows, far_away)) == len(rows)
    behind = far_away.viewmats.clone()
    behind[:, :3, 3] -= torch.tensor([0.0, 0.0, 40.0])
    assert len(cull(rows, replace(far_away, viewmats=behind))) == 0
    rows[:, COLUMNS["opacities"]] = -6
    assert len(cull(rows, far_away)) == 0


@ALL
@MODES
def test_extreme_scales_and_positions(cull, antialiased):
    rows = random_geometry(4000, seed=30)
    rows[:1000, COLUMNS["scales"]] = -60
    rows[1000:2000, COLUMNS["scales"]] = torch.tensor([8.0, -8.0, 0.0])
    rows[2000:2500, COLUMNS["scales"]] = 100  # beyond float32
    rows[2500:3000, COLUMNS["means"]] *= 1e6
    cameras = random_cameras(31, antialiased=antialiased)
    rows[3000:3300, COLUMNS["means"]] = -(cameras.viewmats[0, :3, :3].T @ cameras.viewmats[0, :3, 3])  # at the camera
    drawn, found = drawn_ids(rows, cameras), cull(rows, cameras)
    assert len(missing(drawn, found)) == 0


def test_ids_go_into_the_given_memory():
    rows, cameras = random_geometry(3000, seed=32), random_cameras(33)
    expected = native(rows, cameras)
    out = torch.full((3000,), -1)
    ids = visible_ids(rows, BlockBounds(rows), cameras, out=out)
    assert ids.data_ptr() == out.data_ptr()
    assert torch.equal(ids, expected)
    assert (out[len(ids) :] == -1).all()
    with pytest.raises(ValueError, match="visible"):
        visible_ids(rows, BlockBounds(rows), cameras, out=out[: len(expected) - 1])


def test_what_does_not_fit_is_refused():
    rows, cameras = random_geometry(600, seed=34), random_cameras(35)
    bounds = BlockBounds(rows)
    with pytest.raises(ValueError, match="rebuild"):
        visible_ids(rows[:500], bounds, cameras)
    with pytest.raises(ValueError, match="rows"):
        bounds.update(rows, torch.tensor([5, 600]))
    with pytest.raises(ValueError, match="near"):
        random_cameras(36, near_plane=0.0)


def test_packed_cameras_are_the_numbers_of_the_oracle():
    """Under the names that torch and Triton know them by."""
    cameras = random_cameras(60, count=3, near_plane=0.3, far_plane=70.0, eps2d=0.4, antialiased=True)
    margin = Margin(means=0.1, scales=0.2, quats=0.3, opacities=0.4, pixels=5)
    packed = torch.from_numpy(pack(cameras, margin))
    half_spaces = torch.empty(3, 6, 6, dtype=torch.float64)
    compiled.half_spaces(packed.numpy(), half_spaces.numpy())
    for camera, half_space, view in zip(packed, half_spaces, oracle.views_of(cameras, margin), strict=True):
        largest = max(map(abs, view.translation))
        slope_low, slope_high = zip(*view.slopes, strict=True)
        reach, error_reach = ([plane[column] for plane in view.planes[:4:2]] for column in (2, 3))
        expected = {
            "rotation": list(chain(*view.rotation)), "translation": view.translation, "largest_translation": [largest],
            "focal": view.focal, "centre": view.centre, "size": view.size, "slope_low": slope_low,
            "slope_high": slope_high, "near_plane": [0.3], "far_plane": [70.0], "reach": reach,
            "error_reach": error_reach, "blur_reach": [view.blur_reach], "eps2d": [0.4], "move": [view.move],
            "turn": [view.turn], "growth": [view.growth], "logit_gain": [0.4], "extra_pixels": [5], "antialiased": [1],
            "unused": [0, 0, 0],
        }  # fmt: skip
        assert list(expected) == list(compiled.CAMERA_FIELDS)
        assert [compiled.CAMERA_FIELDS[name] for name in expected] == [0, *accumulate(map(len, expected.values()))][:-1]
        torch.testing.assert_close(camera, torch.tensor(list(chain(*expected.values()))), rtol=1e-6, atol=1e-6)
        planes = torch.tensor([[*normal, *rest] for normal, *rest in view.planes], dtype=torch.float64)
        torch.testing.assert_close(half_space, planes, rtol=1e-5, atol=1e-5)


def test_culling_and_the_rasterizer_have_the_same_defaults():
    """Or what is culled for one blur or one near plane would be drawn with another."""
    fields = {name: field.default for name, field in Cameras.__dataclass_fields__.items()}
    defaults = {name: parameter.default for name, parameter in signature(rasterize).parameters.items()}
    for name in ("near_plane", "far_plane", "eps2d"):
        assert fields[name] == defaults[name]
    assert (defaults["rasterize_mode"] == "antialiased") is fields["antialiased"]


def test_training_draws_what_its_cameras_say(monkeypatch):
    """Nothing that culling relies on is left to the rasterizer's defaults."""
    asked = {}

    def record(**options):
        asked.update(options)
        return torch.zeros(0), torch.zeros(0), {"means2d": torch.zeros(0)}

    monkeypatch.setattr(views, "rasterize", record)
    parameters = {"means": torch.zeros(1, 3), "scales": torch.zeros(1, 3), "quats": torch.ones(1, 4)}
    parameters |= {"opacities": torch.zeros(1), "colors": torch.zeros(1, 1, 3)}
    cameras = random_cameras(63, near_plane=0.3, far_plane=70.0, eps2d=0.4, antialiased=True)
    views.render(parameters, cameras, SimpleNamespace(absgrad=False, depth_loss=False), sh_degree=0)
    assert (asked["near_plane"], asked["far_plane"], asked["eps2d"]) == (0.3, 70.0, 0.4)
    assert asked["rasterize_mode"] == "antialiased"


def test_the_oracle_has_the_constants_of_the_kernels():
    for name, value in (
        ("OPAQUE_EXTENT", oracle.OPAQUE_EXTENT), ("POSITION_ERROR", oracle.POSITION_ERROR),
        ("COVARIANCE_ERROR", oracle.COVARIANCE_ERROR), ("RELATIVE_ERROR", oracle.RELATIVE),
    ):  # fmt: skip
        assert getattr(compiled, name) == pytest.approx(value, rel=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="compiles once for either, on a GPU")
@pytest.mark.parametrize("antialiased", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cameras_that_are_tensors_are_those_that_are_tuples(monkeypatch, antialiased):
    """As Triton 3.2 needs them."""
    from offload.culling import kernels_triton as culling_triton

    rows, cameras = random_geometry(300, seed=61), random_cameras(62, antialiased=antialiased)
    expected = with_triton(rows, cameras)
    monkeypatch.setattr(culling_triton, "_TAKES_TUPLES", False)
    monkeypatch.setattr(culling_triton, "number", culling_triton._of_tensor)
    assert torch.equal(with_triton(rows, cameras), expected)


@pytest.mark.cuda
@MODES
def test_gsplat_draws_nothing_else(antialiased):
    from gsplat import rasterization

    for seed, median_scale in ((40, 0.002), (41, 0.03), (42, 0.5)):
        rows = random_geometry(200_000, seed=seed, median_scale=median_scale, spread=1.0)
        rows = rows[rows[:, COLUMNS["quats"]].norm(dim=1) > 0].contiguous()  # gsplat makes NaN of such quaternions
        cameras = random_cameras(seed, antialiased=antialiased)
        info = rasterization(
            **{name: value.cuda() for name, value in activated(rows).items()},
            colors=torch.zeros(len(rows), 3, device="cuda"), viewmats=cameras.viewmats.cuda(), Ks=cameras.Ks.cuda(),
            width=cameras.width, height=cameras.height, near_plane=cameras.near_plane, packed=True,
            rasterize_mode="antialiased" if antialiased else "classic",
        )[2]  # fmt: skip
        drawn = info["gaussian_ids"].long().unique().cpu()
        for found in (native(rows, cameras), with_triton(rows, cameras), with_torch(rows.cuda(), cameras).cpu()):
            assert len(missing(drawn, found)) == 0
            assert len(found) - len(drawn) <= MAX_EXCESS * len(found)
