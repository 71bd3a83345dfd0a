"""Several processes train the model that one trains alone: over gloo, on the CPU."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.overrides import TorchFunctionMode

from configs import Config
from datasets.synthetic import write_city_block
from distributed.dealing import BLOCK_ROWS, dealt_rows
from distributed.exchange import PairExchange
from distributed.levelling import HeldTwice, level, moves_between, shared_out
from distributed.mesh import Ranks, arrive
from distributed.selection import largest_within
from errors import InputError
from offload.adam.options import AdamOptions
from offload.models.contract import GaussianModel
from offload.models.device import DeviceGaussians
from offload.models.tiled import ViewTile
from offload.store.layout import GROUP_NAMES, group_shapes
from offload.tiles.boxes import Tile
from rendering.losses import photometric_loss
from rendering.projection import Projection
from rendering.rasterize import rasterize
from strategies.mcmc import MCMCStrategy
from strategies.noise import Noise
from strategies.ops import sample_by_weight
from tests.gaussian_scenes import PARAMETERS, GaussianScene, random_scene, weights_like
from tests.rank_groups import StayingRanks, run_in_group
from tests.test_same_model import LARGEST_SIZE_DIFFERENCE
from tests.training_scripts import ROUNDED, anisotropic_start, differences
from trainers import TRAINERS, trainer_of
from training.command_line import parse
from training.depth_loss import with_depth_loss
from training.gaussians import initial_gaussians
from training.joint_tiles import JointPart
from training.run import TrainingRun
from training.schedules import adam_options
from training.tiles import ScreenGradients, halo_of, part_loss
from training.views import View, posed_cameras, render

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------------------------- the exchange


def exchanged_scene(cameras: int, blind: int | None) -> GaussianScene:
    """Gaussians before cameras, of which one may look away from all of them."""
    scene = random_scene(90, seed=3, n_cameras=cameras, width=40, height=36)
    if blind is not None:
        scene.viewmats[blind, :3, 3] = torch.tensor([0.0, 0.0, -1000.0])
    return scene


def drawn(
    scene: GaussianScene, absgrad: bool, rows: slice, exchange: PairExchange | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Pictures of some rows and their gradients, of a loss that is a mean over pictures; on a CPU in float64."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    scene = replace(scene, **{name: getattr(scene, name)[rows] for name in PARAMETERS}).to(device, dtype)
    cameras, first = len(scene.viewmats), 0
    own = cameras if exchange is None else exchange.num_cameras
    if exchange is not None:
        first = exchange.ranks.rank * own
    backgrounds = torch.linspace(0.2, 0.9, 3 * cameras, dtype=dtype).view(cameras, 3)[first : first + own].to(device)
    colors, alphas, info = rasterize(
        scene.means, scene.quats, scene.scales, scene.opacities, (scene.sh0, scene.shN), scene.viewmats, scene.Ks,
        scene.width, scene.height, sh_degree=3, backgrounds=backgrounds, absgrad=absgrad, exchange=exchange,
    )  # fmt: skip
    info["means2d"].retain_grad()
    weights = weights_like(torch.empty(cameras, *colors.shape[1:], dtype=dtype))[first : first + own].to(device)
    ((colors * weights).mean() + (alphas * weights[..., :1]).mean()).backward()
    on_screen = info["means2d"].absgrad if absgrad else info["means2d"].grad
    return {
        "pictures": colors.detach().cpu(),
        "pairs": torch.stack([info["camera_ids"], info["gaussian_ids"] + rows.start]).cpu(),
        "radii": info["radii"].cpu(),
        "on_screen": on_screen.cpu(),
        "gradients": {name: getattr(scene, name).grad.cpu() for name in PARAMETERS},
        "n_cameras": info["n_cameras"],
    }


def part_of(rank: int, size: int) -> slice:
    """Rows of a rank: few, none, or many."""
    return slice(*{2: ([0, 30], [30, 90]), 3: ([0, 5], [5, 5], [5, 90])}[size][rank])


def exchange(ranks: Ranks, *, own: int, absgrad: bool, blind: int | None = None) -> dict[str, Any]:
    scene, device = exchanged_scene(ranks.size * own, blind), str(ranks.device)
    return drawn(scene, absgrad, part_of(ranks.rank, ranks.size), PairExchange(ranks, own, absgrad), device)


EXCHANGES: dict[str, dict[str, Any]] = {
    "one camera each": dict(own=1, absgrad=False),
    "two cameras each": dict(own=2, absgrad=False),
    "absolute gradients": dict(own=2, absgrad=True),
    "a view that nobody sees": dict(own=1, absgrad=True, blind=1),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", EXCHANGES)
def test_exchange_equals_one_process(group, size, case):
    assert_exchanged(case, group(size)[case], 1e-12)


def assert_exchanged(case: str, parts: list[dict[str, Any]], bound: float, device: str = "cpu") -> None:
    """Of the largest value of each kind, bound is how far they may be from those of one process."""
    options, size = EXCHANGES[case], len(parts)
    scene = exchanged_scene(size * options["own"], options.get("blind"))
    expected = drawn(scene, options["absgrad"], slice(0, 90), device=device)
    assert all(part["n_cameras"] == expected["n_cameras"] for part in parts)
    assert_close(torch.cat([part["pictures"] for part in parts]), expected["pictures"], bound)
    for name, value in expected["gradients"].items():
        assert_close(torch.cat([part["gradients"][name] for part in parts]), value, bound)
        assert value.abs().max() > 0
    pairs = torch.cat([part["pairs"] for part in parts], dim=1)
    order = (pairs[0] * 90 + pairs[1]).argsort()
    assert torch.equal(pairs[:, order], expected["pairs"])
    assert torch.equal(torch.cat([part["radii"] for part in parts])[order], expected["radii"])
    assert_close(torch.cat([part["on_screen"] for part in parts])[order], expected["on_screen"], bound)


class Waits(TorchFunctionMode):
    """Notes what the host asks of tensors, for which it would have to wait for a GPU."""

    ASKED = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__index__", "__float__", "nonzero", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, arguments=(), named=None):
        name, named = getattr(function, "__name__", ""), named or {}
        if name in self.ASKED or (name == "repeat_interleave" and "output_size" not in named):
            self.names.append(name)
        return function(*arguments, **named)


def waits(ranks: Ranks) -> list[str]:
    """What is waited for in an exchange of some pairs of each camera, there and back."""
    camera_ids = torch.arange(2 * ranks.size).repeat_interleave(3)  # of two cameras each
    columns = [torch.rand(len(camera_ids), *shape, requires_grad=True) for shape in ((2,), (3,), (), (3,))]
    means2d, conics, opacities, features = columns
    radii, depths = torch.ones(len(camera_ids), 2, dtype=torch.int32), torch.rand(len(camera_ids))
    pairs = Projection(camera_ids, torch.zeros_like(camera_ids), radii, means2d, depths, conics, opacities)
    with Waits() as noted:
        drawn, features = PairExchange(ranks, 2)(pairs, features)
        sum(values.sum() for values in (drawn.means2d, drawn.conics, drawn.opacities, features)).backward()
    assert all(torch.equal(column.grad, torch.full_like(column, 1 / ranks.size)) for column in columns)
    assert torch.equal(drawn.camera_ids, torch.arange(2).repeat_interleave(3 * ranks.size))
    return noted.names


def test_an_exchange_waits_for_the_device_once(group):
    """For the counts of what goes and what comes."""
    assert group(2)["waits"] == [["tolist"]] * 2


def assert_close(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


# ------------------------------------------------------------------------------------------------------- tiles of pairs


def cut_pictures(size: int, width: int, height: int) -> list[tuple[Tile, ...]]:
    """Rounds of tiles of two pictures of each rank, those of the first rank in more tiles."""
    generator, tiles = torch.Generator().manual_seed(0), []
    for rank in range(size):
        cut = [Tile(2 * rank + camera, 0, 0, width, height) for camera in range(2)]
        for _ in range(5 if rank == 0 else 2):
            tile = cut.pop(0)
            first = 1 + int(torch.randint(tile.width - 1, (1,), generator=generator))
            cut += [tile._replace(width=first), tile._replace(x=tile.x + first, width=tile.width - first)]
        tiles.append(cut)
    return [tuple(tile for tile in each if tile is not None) for each in zip_longest(*tiles)]


def tiles(ranks: Ranks) -> tuple[list[int], dict[str, float]]:
    """How many tiles each round has, and how far gradients differ from those of uncut pictures."""
    cameras, width, height = 2 * ranks.size, 144, 80
    scene = random_scene(600, seed=5, n_cameras=cameras, width=width, height=height)
    rows = slice(ranks.rank, None, ranks.size)
    given = {name: getattr(scene, name)[rows].float() for name in PARAMETERS}
    given |= {"scales": given["scales"].log(), "opacities": given["opacities"].logit()}
    cfg = Config(absgrad=True, depth_loss=True)
    all_cameras = posed_cameras(scene.viewmats.float(), scene.Ks.float(), width, height, cfg)
    generator = torch.Generator().manual_seed(ranks.rank)
    images, depths = torch.rand(2, height, width, 3, generator=generator), torch.rand(2, height, width)
    masks = torch.rand(2, height, width, generator=generator) < 0.9
    view, behind = View(images, all_cameras, masks, inverse_depths=depths), torch.rand(2, 3, generator=generator)

    def leaves() -> dict[str, Tensor]:
        return {name: value.clone().requires_grad_() for name, value in given.items()}

    def found(loss: Tensor, rows: dict[str, Tensor], info: dict) -> dict[str, Tensor]:
        on_screen = info["means2d"]
        gradients = {name: value.grad for name, value in rows.items()}
        return {"loss": loss.detach(), "on_screen": on_screen.grad, "absolute": on_screen.absgrad, **gradients}

    whole = leaves()
    colors, info = render(whole, all_cameras, cfg, sh_degree=3, backgrounds=behind, ranks=ranks)
    loss = photometric_loss(colors, images, ssim_lambda=0.2, masks=masks)
    loss = with_depth_loss(loss, info, view, 0.5)
    loss.backward()
    expected = found(loss, whole, info)

    cut, halo, screen = leaves(), halo_of(cfg), ScreenGradients(all_cameras)
    total, rounds = torch.zeros(()), cut_pictures(ranks.size, width, height)
    for together in rounds:
        part = ViewTile(together, cut, None)
        joint, share = JointPart(part, all_cameras, cfg, sh_degree=3, halo=halo, ranks=ranks), torch.zeros(())
        if joint.draws:
            colors, info = joint.render(behind)
            share = part_loss(colors, view, joint.tile, ssim_lambda=0.2, halo=halo)
            share = with_depth_loss(share, info, view, 0.5, joint.tile, halo)
            share.backward()
        joint.propagate(share.detach())
        screen.add(part, len(given["means"]), joint.info)
        total += share.detach()
    actual = found(total, cut, screen.info())
    return [len(together) for together in rounds], {
        name: float((actual[name] - value).norm() / value.norm()) for name, value in expected.items()
    }


def test_tiles_drawn_together_add_up_to_the_view(group):
    (in_rounds, differences), (_, its_differences) = group(2)["tiles"]
    assert in_rounds == [2, 2, 2, 2, 1, 1, 1]  # in the last of them one rank draws nothing
    assert max(*differences.values(), *its_differences.values()) < 1e-5


# ------------------------------------------------------------------------------------------------ choices of all ranks

SHAPES = {name: shape for group in GROUP_NAMES for name, shape in group_shapes(group, 0).items()}
ADAM = AdamOptions(dict.fromkeys(SHAPES, 1e-3), lambda step: 1e-3, (0.9, 0.999))
VALUES = torch.tensor([5.0, 1.0, 3.0, 3.0, 0.0, 3.0, 7.0, 1e-30, 3.0, 2.0])
WEIGHTS = torch.tensor([1, 1, 2, 1, 0, 1, 1, 1, 1, 1])


def choices(ranks: Ranks) -> list[Tensor]:
    """What is chosen of this rank's values at each room that there may be."""
    own = slice(*{2: ([0, 3], [3, 10]), 3: ([0, 0], [0, 4], [4, 10])}[ranks.size][ranks.rank])
    return [largest_within(VALUES[own], WEIGHTS[own], room, ranks) for room in range(12)]


@pytest.mark.parametrize("size", [2, 3])
def test_the_largest_values_of_all_ranks_are_chosen(group, size):
    order = VALUES.argsort(descending=True, stable=True)
    for room in range(12):
        expected = torch.empty(len(VALUES), dtype=torch.bool)
        expected[order] = WEIGHTS[order].cumsum(0) <= room
        assert torch.equal(largest_within(VALUES, WEIGHTS, room), expected)
        assert torch.equal(torch.cat([chosen[room] for chosen in group(size)["choices"]]), expected)


DRAWN_WEIGHTS = torch.tensor([0.0, 3.0, 0.0, 1.0, 1e-7, 0.0, 5.0, 2.0, 0.0, 0.0])


def draws(ranks: Ranks) -> Tensor:
    """The rows that ranks draw, of which some have none, or none that can be drawn."""
    own = slice(*{2: ([0, 4], [4, 10]), 3: ([0, 0], [0, 8], [8, 10])}[ranks.size][ranks.rank])
    return own.start + sample_by_weight(DRAWN_WEIGHTS[own], 500, torch.Generator().manual_seed(5), ranks)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_draw_the_rows_that_one_process_draws(group, size):
    """Each draw falls to one rank: to that whose row one process would draw, in which rows stand rank by rank."""
    drawn = sample_by_weight(DRAWN_WEIGHTS, 500, torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(group(size)["draws"]).sort().values, drawn.sort().values)


def test_blocks_are_dealt_in_turn():
    dealt = [dealt_rows(10 * BLOCK_ROWS + 7, rank, (2, 1, 1)) for rank in range(3)]
    assert torch.equal(torch.cat(dealt).sort().values, torch.arange(10 * BLOCK_ROWS + 7))
    blocks = [(rows // BLOCK_ROWS).unique().tolist() for rows in dealt]
    assert blocks == [[0, 3, 4, 7, 8], [1, 5, 9], [2, 6, 10]]
    assert [len(dealt_rows(100, rank, (1, 1))) for rank in range(2)] == [100, 0]


def test_as_few_rows_move_as_level_the_ranks():
    assert shared_out(11, [0.5, 0.25, 0.25]) == [6, 2, 3]
    counts, wanted = [10, 0, 3, 7], [5, 5, 5, 5]
    moves = moves_between(counts, wanted)
    assert sum(map(sum, moves)) == 7
    for rank, count in enumerate(counts):
        assert count - sum(moves[rank]) + sum(row[rank] for row in moves) == wanted[rank]


def out_of_memory(*arguments: object, **options: object) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


LACKS = {  # at which rank, and in what it does
    "what leaves": (0, "offload.models.device.DeviceGaussians.moving_rows"),
    "what comes": (1, "distributed.levelling._Parcel.of"),
    "what is added": (1, "offload.models.device.DeviceGaussians.append_rows"),
    "nothing": (0, ""),
    "what is removed": (1, "offload.models.device.DeviceGaussians.keep"),
}


def levelled(ranks: Ranks) -> dict[str, tuple[bool, str, bool, dict[str, Tensor]]]:
    """Whether rows have moved where memory is lacking, what is said, whether rows are as before, and the rows."""
    points = np.random.default_rng(ranks.rank).random((3000 if ranks.rank == 0 else 10, 3))
    gaussians = initial_gaussians(points, points, sh_degree=1, init_opacity=0.1, init_scale=1.0, seed=0)
    found = {}
    for lack, (rank, place) in LACKS.items():
        model, said = DeviceGaussians(gaussians, adam_options(Config(), 1.0), device=ranks.device), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distributed.levelling.MOVED_ROWS", 1000)
            patch.setattr("distributed.levelling.tqdm.write", said.append)
            if place and rank == ranks.rank:
                patch.setattr(place, out_of_memory)
            try:
                has_moved = level(model, ranks)
            except HeldTwice as error:
                has_moved, said = True, [str(error)]
        rows = model.rows(0, model.num_gaussians)
        is_same = all(torch.equal(rows[name], value) for name, value in gaussians.items())
        found[lack] = has_moved, "".join(said), is_same, rows
    return found


def test_rows_that_cannot_be_removed_end_all(group):
    """What came to one rank is at another, too."""
    for has_moved, said, *_ in (part["what is removed"] for part in group(2)["levelled"]):
        assert has_moved
        assert "could not be removed at rank 1 (CUDA out of memory), so what there is now is not saved" in said


@pytest.mark.parametrize("lack", [lack for lack in LACKS if lack != "what is removed"])
def test_rows_move_at_all_ranks_or_at_none(group, lack):
    parts = [part[lack] for part in group(2)["levelled"]]
    rank, place = LACKS[lack]
    for has_moved, said, is_same, _ in parts:
        assert has_moved == (not place)
        assert is_same == bool(place)
        assert (f"for lack of memory at rank {rank} (CUDA out of memory)" in said) == bool(place)
    counts = [len(rows["means"]) for *_, rows in parts]
    assert counts == ([3000, 10] if place else [1505, 1505])
    means = torch.cat([rows["means"] for *_, rows in parts])
    assert len(means.unique(dim=0)) == 3010


def followed(ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
    """Numbers of the rows that a rank holds after levelling, without harmonics, and what is kept beside them."""
    numbers = torch.arange(2000) if ranks.rank == 0 else torch.arange(2000, 2300)
    rows = {name: torch.zeros(len(numbers), *shape) for name, shape in SHAPES.items()}
    rows["means"] = numbers.float()[:, None].expand(-1, 3)
    model = DeviceGaussians(rows, ADAM, device=torch.device("cpu"))
    beside = {"owed": numbers.int(), "halves": numbers / 2}
    assert level(model, ranks, beside)
    return model.read("means")[:, 0], beside


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_beside_rows_goes_with_them(group, size):
    found = group(size)["followed"]
    assert {len(numbers) for numbers, _ in found} == ({1150} if size == 2 else {866, 867})
    for numbers, beside in found:
        assert torch.equal(beside["owed"], numbers.int())
        assert torch.equal(beside["halves"], numbers / 2)


def test_too_little_memory_for_what_comes_is_not_told_as_ranks_that_parted(monkeypatch):
    monkeypatch.setattr(Tensor, "new_empty", out_of_memory)
    ranks = Ranks(0, 2, torch.device("cpu"), (1, 1), None, [])
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ranks.all_to_all(torch.zeros(3, 2), [1, 2], [4, 0])


# ------------------------------------------------------------------------------------------------------ whole trainers

STEPS = (
    *(
        "--max_steps",
        60,
        "--refine_start_iter",
        10,
        "--refine_every",
        10,
        "--reset_every",
        25,
        "--refine_stop_iter",
        55,
    ),
    *("--grow_grad2d", 4e-4, "--max_gaussians", 900, "--sh_degree_interval", 15, "--background", "random"),
    *("--save_every", 0, "--num_workers", 1),
)
SHARES = (3, 1)
# Refined and reset once. More steps make more of rounding: after sixty, one process from starts one float off has
# moments of poses that are off by 1e-2 in two of twelve draws, since a pixel more passes the threshold of alpha.
MODULES = (
    *("--background", "sky", "--exposure", "bilateral_grid", "--depth_loss", "--depth_lambda", 0.1, "--pose_opt"),
    *("--max_steps", 30),
)
MODES = ("--batch_size", 2, "--absgrad", "--antialiased", "--max_gaussians", 0, "--grow_grad2d", 3e-3)
# With noise, which brings rows to where culling ahead would not find them; and most rows are dead at some time.
RELOCATING = ("--strategy", "mcmc", "--init_opacity", 0.05, "--prune_opa", 0.04, "--max_steps", 50)
STEERED = (
    *("--target_gaussians", 850, "--max_gaussians", 0, "--max_steps", 50),
    *("--opacity_reg", 0.05, "--scale_reg", 0.5),
)


EXACT_RUNS = ("gpu_only", "gpu_only_deferred", "optimized", "optimized_geometry_on_host", "streamed")
# One process differs from itself, from starts one float off, by up to 4e-5, and in shN, of which sixty steps have made
# little, by 3.4e-4: the largest of 3 draws of the 3 models below.
BOUNDS = {"all": 2e-4, "shN": 1.5e-3}
# With mcmc, where rows begin nearly transparent, by up to 3e-7, 8e-6, 1.3e-5, 1.2e-4, 3.5e-4 and 1.4e-2.
MCMC_BOUNDS = {"means": 2e-6, "scales": 4e-5, "quats": 6e-5, "opacities": 6e-4, "all": 1.5e-3, "shN": 0.06}
CUT = ("--split_threshold", 0.85)  # which brings most views into two rounds or more
NEARBY = (1, 2)  # draws of `start_nearby`
# By the number of processes, what is trained in them: a trainer, options that one process is given too, and its own.
RUNS: dict[int, dict[str, tuple[str, tuple, tuple]]] = {
    2: {
        **{trainer: (trainer, (), ()) for trainer in (*EXACT_RUNS, "streamed_geometry_on_host")},
        **{trainer: (trainer, (), ()) for trainer in ("streamed_compact", "optimized_compact")},
        "two views each": ("streamed", MODES, ("--shares", *SHARES)),
        "two views each, split": ("split_geometry_on_host", MODES, CUT),
        "modules": ("streamed", MODULES, ()),
        "modules, optimized": ("optimized", MODULES, ()),
        "modules, split": ("split", MODULES, CUT),
        "mcmc": ("streamed", RELOCATING, ()),
        "mcmc, split": ("split_geometry_on_host", RELOCATING, CUT),
        "a target": ("gpu_only_deferred", STEERED, ()),
    },
    3: {"streamed": ("streamed", (), ())},
}
AS_MANY_ROWS = ("--refine_start_iter", 1000)
WITH_NONE = ("gpu_only", "streamed_compact")  # trained from so few Gaussians that one of two ranks has none


def staying(ranks: Ranks | None, shares: list[int]) -> Ranks | None:
    """These ranks for the next run, instead of meeting anew."""
    if ranks is None:
        return None
    return StayingRanks(**{**vars(ranks), "proportions": tuple(shares) or ranks.proportions})


def smooth_noise(means: Tensor, generator: torch.Generator) -> Tensor:
    """Noise that follows from the rows, whoever holds them and in whichever order."""
    return torch.stack([torch.sin(30 * means), torch.cos(30 * means)])


def choose_by_rows(patch: pytest.MonkeyPatch) -> None:
    """Let what mcmc draws at random follow from the rows, too: which of them are copied, and their noise."""
    after_step, offsets, given = MCMCStrategy.after_step, Noise.offsets, {}

    def after(self: MCMCStrategy, step: int, info: Mapping[str, Any], model: GaussianModel, *ids: Tensor) -> bool:
        given["model"] = model
        return after_step(self, step, info, model, *ids)

    def sampled(weights: Tensor, count: int, generator: torch.Generator, ranks: Ranks | None) -> Tensor:
        """Rows without repetition, in proportion to their weights (Gumbel); each twice, but for the last."""
        uniform = 0.5 + 0.49 * torch.sin(40 * given["model"].read("means").sum(dim=1))
        values, ones = weights / -uniform.log(), torch.ones(len(weights), dtype=torch.int64)
        chosen = [largest_within(values, ones, room, ranks) for room in (count // 2, count - count // 2)]
        return torch.cat([each.nonzero().squeeze(1) for each in chosen])

    def moved(self: Noise, step: int, ids: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        given["numbers"] = 2 * torch.sin(20 * rows["quats"][:, :3] + step)
        return offsets(self, step, ids, rows)

    patch.setattr(MCMCStrategy, "after_step", after)
    patch.setattr("strategies.mcmc.sample_by_weight", sampled)
    patch.setattr(Noise, "offsets", moved)
    patch.setattr("strategies.noise.normal_numbers", lambda ids, word: given["numbers"])


def start_nearby(points: np.ndarray, *arguments: object, draw: int, **options: object) -> dict[str, Tensor]:
    """Return `anisotropic_start` with every number off by up to a millionth of it, which is 16 times its rounding.

    Args:
        draw: Which of many such starts.
    """
    generator, start = torch.Generator().manual_seed(draw), anisotropic_start(points, *arguments, **options)
    return {
        name: value * (1 + 1e-6 * (2 * torch.rand(value.shape, generator=generator) - 1))
        for name, value in start.items()
    }


def trained(
    trainer: str,
    ranks: Ranks | None,
    data_dir: Path,
    folder: Path,
    *options: object,
    device: str = "cpu",
    draw: int | None = None,
) -> dict[str, Tensor]:
    """The Gaussians that this process holds after training, and all rows of modules; of a start nearby if drawn."""
    start = anisotropic_start if draw is None else functools.partial(start_nearby, draw=draw)
    way = TRAINERS[trainer]
    script = way.load()
    arguments = ("default", "--data_dir", data_dir, "--result_dir", folder / trainer, "--device", device, *STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.joint_run.arrive", lambda device, shares: staying(ranks, shares))
        patch.setattr("training.beginning.initial_gaussians", start)
        patch.setattr("strategies.ops.noise_of_halves", smooth_noise)
        choose_by_rows(patch)
        patch.setattr("training.reporting.load_lpips", lambda net, device: None)
        patch.setattr("offload.tiles.boxes.SMALLEST", 16)  # pixels, so that these pictures can be cut
        scene, cfg = parse(script.CONFIGS, [*map(str, (*arguments, *options)), *way.arguments], "test")
        with TrainingRun(cfg, scene, trainer_of(way.script, cfg)) as run:
            script.train(run)
            state = {name: module.state_dict() for name, module in run.modules.parts.items()}
            modules = {f"{name}/{key}": state[name][key] for name in state for key in ("rows", "exp_avg")}
            return {**run.model.rows(0, run.model.num_gaussians), **modules}


CASES: dict[str, Callable[[Ranks], Any]] = {
    **{name: functools.partial(exchange, **options) for name, options in EXCHANGES.items()},
    "waits": waits,
    "choices": choices,
    "tiles": tiles,
    "draws": draws,
    "levelled": levelled,
    "followed": followed,
}


def part_trained(ranks: Ranks, trainer: str, data_dir: Path, folder: Path, options: tuple) -> dict[str, Tensor]:
    rows = trained(trainer, ranks, data_dir, folder, *options, device=ranks.device.type)
    return {name: value.cpu() for name, value in rows.items()}


@pytest.fixture(scope="module")
def tiny_block(tmp_path_factory) -> Path:
    """A city block of fewer Gaussians than are dealt at once."""
    data_dir = tmp_path_factory.mktemp("tiny") / "city_block"
    write_city_block(data_dir, num_views=10, width=40, height=30, num_points=BLOCK_ROWS // 2)
    return data_dir


@pytest.fixture(scope="module")
def group(city_block, tiny_block, tmp_path_factory) -> Callable[[int], dict[str, list[Any]]]:
    """What a group of so many processes finds in all cases, each of them at each rank; they run once."""

    @functools.cache
    def found(size: int) -> dict[str, list[Any]]:
        folder, cases = tmp_path_factory.mktemp("group"), dict(CASES)
        for name, (trainer, modes, options) in RUNS[size].items():
            cases[name] = functools.partial(
                part_trained, trainer=trainer, data_dir=city_block, folder=folder / name, options=(*modes, *options)
            )
        for trainer in WITH_NONE if size == 2 else ():
            cases[f"none, {trainer}"] = functools.partial(
                part_trained, trainer=trainer, data_dir=tiny_block, folder=folder / "none", options=AS_MANY_ROWS
            )
        return run_in_group(size, cases, folder)

    return found


@pytest.fixture(scope="module")
def reference(city_block, tmp_path_factory) -> Callable[..., dict[str, Tensor]]:
    """What one process trains with the views of so many ranks; each model once."""

    @functools.cache
    def alone(trainer: str, size: int, *options: object, draw: int | None = None) -> dict[str, Tensor]:
        views = ("--batch_size", 2 * size if options == MODES else size)
        return trained(trainer, None, city_block, tmp_path_factory.mktemp("alone"), *options, *views, draw=draw)

    return alone


def assert_same_modules(
    parts: list[dict[str, Tensor]], expected: dict[str, Tensor], nearby: list[dict[str, Tensor]]
) -> None:
    """All ranks have the same, and hardly others than one process has.

    A part of a gradient that is not summed is of the order of the whole: half of the poses' moments, by trial, and a
    twentieth where it is what the sky says of them. One process from starts nearby tells what rounding makes, and what
    it puts at the other side of a threshold. The bound lies between them and the whole, in the middle of the orders of
    magnitude.
    """
    for name in [name for name in expected if "/" in name]:
        value, (first, *others) = expected[name], [part[name] for part in parts]
        assert all(torch.equal(other, first) for other in others)
        spread = max((each[name] - value).norm() for each in nearby)
        assert 0 < spread < 0.05 * value.norm(), name  # so that half is seen
        assert (first - value).norm() < (spread * value.norm()).sqrt(), name


def assert_same_model(parts: list[dict[str, Tensor]], expected: dict[str, Tensor], bounds: dict[str, float]) -> None:
    """Rows may be anywhere, and some by chance at the other side of a threshold; see tests/test_same_model.py."""
    expected = {name: value for name, value in expected.items() if "/" not in name}  # without modules
    actual = {name: torch.cat([part[name] for part in parts]) for name in expected}
    count = len(expected["means"])
    assert abs(len(actual["means"]) - count) <= LARGEST_SIZE_DIFFERENCE * count
    ours, theirs = (
        torch.cat([v.flatten(1) for v in each.values() if v.ndim > 1], dim=1) for each in (actual, expected)
    )
    mine, its = map(torch.from_numpy, linear_sum_assignment(torch.cdist(ours, theirs)))
    paired = differences({n: v[mine] for n, v in actual.items()}, {n: v[its] for n, v in expected.items()})
    assert all(paired[name] < bounds.get(name, bounds["all"]) for name in paired), paired


@pytest.mark.parametrize(("size", "run"), [(size, run) for size, runs in RUNS.items() for run in runs])
def test_ranks_train_the_model_of_one_process(group, reference, size, run):
    trainer, modes, options = RUNS[size][run]
    is_rounded = trainer in ROUNDED
    parts = group(size)[run]
    shares = SHARES if "--shares" in options else (1,) * size
    counts = [len(part["means"]) for part in parts]
    assert max(c / share for c, share in zip(counts, shares, strict=True)) <= 1.1 * sum(counts) / sum(shares)
    expected = reference(trainer if is_rounded else "gpu_only", size, *modes)
    if modes == MODULES:
        assert_same_modules(parts, expected, [reference("gpu_only", size, *modes, draw=draw) for draw in NEARBY])
    assert len(expected["means"]) > (690 if "--max_steps" in modes else 800)
    bounds = MCMC_BOUNDS if modes == RELOCATING else BOUNDS
    assert_same_model(parts, expected, {"all": 0.05} if is_rounded else bounds)


@pytest.mark.parametrize("trainer", WITH_NONE)
def test_a_rank_without_gaussians_changes_nothing(group, tiny_block, tmp_path, trainer):
    some, none = group(2)[f"none, {trainer}"]
    assert len(none["means"]) == 0
    expected = trained(trainer, None, tiny_block, tmp_path, *AS_MANY_ROWS, "--batch_size", 2)
    assert all(torch.equal(some[name], value) for name, value in expected.items())


# ---------------------------------------------------------------------------------------------------------------- GPUs

ON_GPUS = ("gpu_only", "streamed")


@pytest.fixture(scope="module", params=["cuda:0", "cuda"], ids=["one GPU", "two GPUs"])
def group_on_gpu(request, city_block, tmp_path_factory) -> dict[str, list[Any]]:
    """What two processes find: with a GPU each, by NCCL; or by gloo, which lets them share one."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    folder, cases = tmp_path_factory.mktemp("gpu"), {name: CASES[name] for name in EXCHANGES}
    for trainer in ON_GPUS:
        cases[trainer] = functools.partial(
            part_trained, trainer=trainer, data_dir=city_block, folder=folder / trainer, options=()
        )
    cases["modules"] = functools.partial(
        part_trained, trainer="streamed", data_dir=city_block, folder=folder / "modules", options=MODULES
    )
    return run_in_group(2, cases, folder, request.param)


@pytest.mark.cuda
@pytest.mark.parametrize("case", EXCHANGES)
def test_exchange_on_a_gpu_equals_one_process(group_on_gpu, case):
    assert_exchanged(case, group_on_gpu[case], 1e-4, "cuda:0")  # float32, added up in any order


@pytest.mark.cuda
@pytest.mark.parametrize("trainer", ON_GPUS)
def test_ranks_on_a_gpu_train_the_model_of_one_process(group_on_gpu, city_block, tmp_path, trainer):
    expected = trained("gpu_only", None, city_block, tmp_path, "--batch_size", 2, device="cuda")
    assert len(expected["means"]) > 800
    assert_same_model(group_on_gpu[trainer], {name: value.cpu() for name, value in expected.items()}, BOUNDS)


@pytest.mark.cuda
def test_ranks_on_a_gpu_train_the_modules_of_one_process(group_on_gpu, city_block, tmp_path):
    """A GPU adds in any order, so that two runs of one process differ, too."""
    options, runs = (*MODULES, "--batch_size", 2), []
    for draw in (None, *NEARBY):
        found = trained("gpu_only", None, city_block, tmp_path / str(draw), *options, device="cuda", draw=draw)
        runs.append({name: value.cpu() for name, value in found.items()})
    assert_same_modules(group_on_gpu["modules"], runs[0], runs[1:])


@pytest.mark.parametrize(
    ("ranks", "said", "threads"),
    [("3", "1", "4"), ("16", "1", "1"), ("3", "2", "2"), ("3", "1,1", "1,1"), ("1", "1", "1"), ("", "1", "1")],
)
def test_ranks_of_a_machine_share_its_cores(ranks, said, threads):
    """Of 12 cores; torchrun sets 1 where nobody has said how many threads there are to be."""
    told = {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": said}
    code = "import os; os.sched_getaffinity = lambda _: range(12); import startup; print(os.environ['OMP_NUM_THREADS'])"
    done = subprocess.run((sys.executable, "-c", code), env=os.environ | told, capture_output=True, text=True)
    assert done.stdout.strip() == threads, done.stderr


@pytest.mark.parametrize(
    ("given", "machines", "expected"),
    [
        ("--nnodes 2 --nproc-per-node=1 --rdzv_endpoint here:29511 --max-restarts 3", "2", ""),
        ("--standalone --nproc_per_node 2 --", "1", ""),
        ("", "1", "--standalone --nproc_per_node 2"),
        ("", "2", "--nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint there:29500"),
    ],
)
def test_the_command_that_resumes_starts_torchrun_as_it_was(tmp_path, given, machines, expected):
    """By a process of that name; one that was given no options has them from elsewhere, or is something else."""
    child, starter = tmp_path / "train.py", tmp_path / "torchrun"
    child.write_text("from training.commands import resume_command; print(resume_command())")
    starter.write_text(f"import subprocess, sys; subprocess.run([sys.executable, {str(child)!r}, 'a b'])")
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": machines, "MASTER_ADDR": "there"}
    elsewhere = tmp_path / "elsewhere"  # below which no path lies that would be shortened
    elsewhere.mkdir()
    places = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/nowhere"}
    command = (sys.executable, starter, *given.split(), child, "a b")
    done = subprocess.run(command, cwd=elsewhere, env=os.environ | told | places, capture_output=True, text=True)
    launcher = f"{sys.executable} -m torch.distributed.run {given or expected}"
    assert done.stdout.strip() == f"{launcher} {child} 'a b' --resume", done.stderr


ENVIRONMENT = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "2x"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("RANK", "2"), ("LOCAL_RANK", "x"),
     ("MASTER_PORT", "x"), ("LOCAL_WORLD_SIZE", "x"), ("GROUP_WORLD_SIZE", "x")],
)  # fmt: skip
def test_what_torchrun_would_not_set_is_refused(monkeypatch, name, value):
    for known, number in (ENVIRONMENT | {name: value}).items():
        monkeypatch.setenv(known, number)
    with pytest.raises(InputError, match=rf"The environment has {name}={value}, which is n"):
        arrive(torch.device("cpu"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_torchrun_that_is_gone_is_waited_for_no_half_hour(monkeypatch, rank):
    with socket.socket() as taken:  # for a port where nobody listens
        taken.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "RANK": rank}
        for name, value in (ENVIRONMENT | there | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("distributed.mesh.REACHES_WITHIN", 1)
        monkeypatch.setattr("distributed.mesh.TELLS_WITHIN", 0)
        with pytest.raises(InputError, match=r"^torchrun cannot be reached at 127\.0\.0\.1:\d+ \(.*\): .*start all"):
            arrive(torch.device("cpu"))


def test_without_a_number_of_processes_there_is_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert arrive(torch.device("cpu")) is None


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match=r"at least 2 processes .* has 1 GPUs that can be seen: use "):
        arrive(torch.device("cuda"))
