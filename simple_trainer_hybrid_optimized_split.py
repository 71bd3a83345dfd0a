"""Host offloading with all optimizations, in bounded device memory: views that see too much are rendered in tiles.

    python simple_trainer_hybrid_optimized_split.py SCENE --data_dir D --result_dir R [--split_threshold 0.3]
    python simple_trainer_hybrid_optimized_split.py SCENE --data_dir D --result_dir R --device_memory_budget 6GiB

As simple_trainer_hybrid_optimized.py, but a view that sees more than a share of all Gaussians, or more than fits into
the budget, is rendered and propagated back tile by tile. Each tile brings only its own rows to the device, while the
one before is rendered, and a halo that makes SSIM exact, so the gradients add up to those of the whole view. The model
is that of the other trainers up to float rounding.

The training loop is `train`; the options of each scene stand at the end of this file, to be edited.
"""

import startup  # noqa: F401, before torch is imported

# isort: split

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from configs import Config, ForwardedOptions, in_effect, scenes
from distributed.mesh import Ranks
from errors import InputError, format_bytes
from offload.culling.cameras import Cameras
from offload.device_memory import bound_memory
from offload.models.tiled import TiledGaussians, TileResult, ViewTile
from offload.tiles.boxes import Tile
from offload.tiles.budget import MemoryBudget, RowBytes, RowLimit
from offload.tiles.rounds import lacking_together
from training.command_line import main
from training.depth_loss import with_depth_loss
from training.joint_tiles import JointPart, draw_rounds
from training.memory import available_bytes, parse_bytes
from training.run import TrainingRun
from training.tiles import ScreenGradients, halo_of, part_loss, render_in_parts, render_part
from training.views import View, drawn_together


@dataclass
class SplitOptions(ForwardedOptions):
    """Choose what lies in host memory, and when a view is rendered in tiles."""

    split_threshold: float | None = None
    """Share of all Gaussians that a view may see before it is rendered in tiles; 0.3 where nothing is given."""
    device_memory_budget: str | None = None
    """Device memory that torch may take of each GPU, such as 6GiB; views are split so that it suffices. Excludes a
    threshold."""


@dataclass
class SplitConfig(SplitOptions, Config):
    """Train a 3D Gaussian Splatting model of a COLMAP scene, offloaded, in bounded device memory."""

    @property
    def largest_part(self) -> float:
        """Return the share of all Gaussians above which a view is rendered in tiles; 0 where a budget decides."""
        return in_effect(vars(self))["split_threshold"] or 0.0


def part_limit(run: TrainingRun[SplitConfig]) -> RowLimit | MemoryBudget:
    """Return how large the parts of a view may be; a budget bounds what torch takes from now on.

    Raises:
        InputError: The budget is more than there is, or too small for the geometry alone.
    """
    cfg = run.cfg
    if cfg.device_memory_budget is None:
        return RowLimit(cfg.largest_part)
    budget = parse_bytes(cfg.device_memory_budget, "--device_memory_budget")
    if run.device.type == "cuda" and budget > available_bytes(run.device):
        raise InputError(
            f"--device_memory_budget is {format_bytes(budget)}, but the GPU has only "
            f"{format_bytes(available_bytes(run.device))} free: give at most that."
        )
    # Of the largest share, so that all ranks refuse a budget alike.
    together, share = (0, 1.0) if run.ranks is None else (run.views_per_step, max(run.ranks.shares))
    row_bytes = RowBytes.of(cfg.geometry, cfg.sh_degree, cfg.state, together=together)
    limit = MemoryBudget(budget, row_bytes, math.ceil(share * run.num_initial_gaussians))
    bound_memory(budget, run.device)
    if run.device.type != "cuda":
        print("Without a GPU --device_memory_budget bounds no memory: views are split for it, and that is all.")
    return limit


def train(run: TrainingRun[SplitConfig]) -> None:
    """Train on the scene of a run, or evaluate its --ckpt.

    Raises:
        InputError: The input cannot be used; nothing has been trained.
        TrainingStopped: Training cannot go on; a checkpoint has been saved.
    """
    cfg, halo = run.cfg, halo_of(run.cfg)
    limit = part_limit(run)
    gaussians = TiledGaussians(
        run.initial_gaussians(),
        run.adam,
        device=run.device,
        geometry=cfg.geometry,
        state=cfg.state,
        max_gaussians=cfg.most_gaussians,
        limit=limit,
        halo=halo,
        others=None if run.ranks is None else run.ranks.aside(),
    )
    strategy = run.new_strategy()

    def draw(cameras: Cameras, depth: bool) -> Tensor:
        shown = run.drawing.shown_backgrounds(cameras)
        if run.ranks is None:
            return render_in_parts(gaussians.view_tiles(cameras), cameras, cfg, backgrounds=shown, depth=depth)
        drawn = partial(draw_rounds, cfg=cfg, ranks=run.ranks, backgrounds=shown, depth=depth)
        return drawn_together(cameras, run.ranks, lambda everyone: drawn(gaussians.view_tiles(everyone), everyone))

    def share_of_loss(colors: Tensor, info: dict, view: View, tile: Tile | None) -> Tensor:
        """Return what a rendered tile, or all of the view, has of the view's loss."""
        colors = run.modules.exposed(colors, view, tile, halo)
        run.mark("render")
        loss = part_loss(colors, view, tile, ssim_lambda=cfg.ssim_lambda, halo=halo)
        return with_depth_loss(loss, info, view, run.depth_weight, tile, halo)

    def train_part(part: ViewTile, view: View, screen: ScreenGradients) -> TileResult:
        """Render one tile with its halo, or all of the view, and propagate its share of the loss back."""
        run.mark("fetch")
        cameras = run.modules.cameras(view)
        colors, info = render_part(
            part, cameras, cfg, sh_degree=run.sh_degree, backgrounds=run.backgrounds(view), halo=halo
        )
        loss = share_of_loss(colors, info, view, part.tile)
        loss = strategy.regularized(loss, part.rows, screen.newly_drawn(part, info))
        num_pixels = colors.shape[:3].numel()
        del colors  # whose memory the gradients need
        loss.backward()
        screen.add(part, len(gaussians.ids), info)
        run.modules.gather()
        run.mark("backward")
        return TileResult(loss.detach(), info["n_intersections"], num_pixels)

    def train_together(part: ViewTile, view: View, screen: ScreenGradients, ranks: Ranks) -> TileResult:
        """Render this rank's tile, or its pictures, of the Gaussians of all ranks; all propagate their losses at once.

        Where memory is lacking at one rank, all leave this, and cut their tiles.
        """
        run.mark("fetch")
        cameras = run.modules.cameras(view)
        joint = JointPart(part, cameras, cfg, sh_degree=run.sh_degree, halo=halo, ranks=ranks)
        loss, num_intersections, num_pixels = torch.zeros((), device=run.device), 0, 0
        with lacking_together(ranks):
            if joint.draws:
                colors, info = joint.render(run.backgrounds(view))
                num_intersections, num_pixels = info["n_intersections"], colors.shape[:3].numel()
                loss = share_of_loss(colors, info, view, joint.tile)
                del colors
                loss.backward()
            loss = strategy.regularized(loss.detach(), part.rows, screen.newly_drawn(part, joint.info))
            joint.take_for_return()
        with lacking_together(ranks):
            joint.propagate(loss)
        screen.add(part, len(gaussians.ids), joint.info)
        run.modules.gather()
        run.mark("backward")
        exchanged = joint.num_sent + joint.num_drawn
        return TileResult(loss.detach(), num_intersections, num_pixels, joint.num_made, exchanged)

    train_tile = train_part if run.ranks is None else partial(train_together, ranks=run.ranks)
    for step, view in run.steps(gaussians, strategy, draw):
        # Behind the rendering of each part the CPU commits gradients of the part before and sends the rows of the next
        # part, or of the next view's first one. A part that runs out of memory is rendered in finer tiles.
        screen = ScreenGradients(view.cameras, needed=strategy.looks_at(step), with_rows=strategy.moves_rows)
        upcoming = None if run.upcoming is None else run.upcoming.cameras
        strays = partial(strategy.strays, step, gaussians)
        loss = gaussians.train_view(view.cameras, upcoming, partial(train_tile, view=view, screen=screen), strays)
        rows, info = screen.rows(), screen.info()

        # Every Gaussian has one gradient, whatever the number of tiles, and is updated once.
        ids = gaussians.ids
        strategy.before_update(step, rows, info, gaussians, ids)
        gaussians.update()
        run.mark("update")

        strategy.after_step(step, info, gaussians, ids)
        run.mark("densify")

        run.after_step(step, loss)
        del screen, rows, info, loss  # each keeps what the next view needs memory for


# ----------------------------------------------------------------------------------------------------------------------
# Options of each scene; edit them here. What is not named has the default of configs.py.
#
# Larger models come from lower thresholds. The ladder (grow_grad2d, grow_scale3d):
#   (2e-4, 0.01)  (1.5e-4, 0.005)  (1.3e-4, 0.003)  (1e-4, 0.002)  (8e-5, 0.0016)
# ----------------------------------------------------------------------------------------------------------------------
DEMO = dict(sh_degree_interval=500, refine_start_iter=200, refine_stop_iter=1200, max_gaussians=40_000)
LARGE = dict(max_steps=200_000, grow_grad2d=2e-4, grow_scale3d=0.01, refine_stop_iter=15_000)

CONFIGS = scenes(
    SplitConfig,
    demo=dict(DEMO, max_steps=2000, eval_steps=[500, 2000]),
    rubble=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    building=dict(LARGE, position_lr=8e-6, scaling_lr=2.5e-3),
    sztu=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    lfls=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    sziit=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    aerial=dict(LARGE, position_lr=8e-6, scaling_lr=2.5e-3),
    residence=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    sciart=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    default={},
)

if __name__ == "__main__":
    main(CONFIGS, train, __doc__)
