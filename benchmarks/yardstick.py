"""Quality of gsplat's own strategies and of its example trainer's formulas on a dataset; needs a GPU.

    python -m benchmarks.yardstick --data_dir D --strategy mcmc --max_gaussians 1000000 --result_dir R
        [--regularized drawn] [--pose_opt] [--exposure bilateral_grid] [--depth_loss]

A small loop over gsplat's rasterization, its strategies and dense Adam, with the options and defaults of our scripts.
Photos, first Gaussians, order of views and metrics are ours, so that a difference to a script is one of training. Its
figures go to stats/val_step{N}.json in the result folder, as a script's do. Runs side by side tell nothing of times.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, normalize
from tqdm import tqdm

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count
from configs import MCMC_REGULARIZER, Config
from datasets.loader import evaluation_loader, training_loader
from datasets.scene import Scene, load_scene
from errors import InputError
from offload.culling.cameras import Cameras
from rendering.losses import photometric_loss
from strategies.regularizers import Regularizers
from training.evaluation import evaluate, load_lpips
from training.gaussians import activate, initial_gaussians
from training.schedules import SCALE_MARGIN, learning_rates
from training.views import View

ADAM_EPS = 1e-15
POSE_LR, POSE_WEIGHT_DECAY = 1e-5, 1e-6
GRID, GRID_LR, GRID_WARM_UP, GRID_VARIATION = (8, 16, 16), 2e-3, 1000, 10.0
BRIGHTNESS = (0.299, 0.587, 0.114)


@dataclass
class Options(BenchmarkOptions):
    data_dir: str = "data/city_block"
    """Dataset folder, as the trainers take it."""
    model_dir: str = ""
    """COLMAP model, such as sparse/1."""
    data_factor: float = 1.0
    """Pictures are scaled down by this factor."""
    test_every: int = 8
    """Every photo whose index is a multiple of this is held out."""
    result_dir: Path = Path("results/yardstick")
    """Gets stats/val_step{N}.json."""
    seed: int = 42
    """Of the order of views and the first Gaussians' rotations."""
    max_steps: int = 30_000
    """How many steps to train."""
    eval_steps: tuple[int, ...] = (7_000, 30_000)
    """Evaluate after these numbers of steps, and after the last."""
    strategy: Literal["default", "mcmc"] = "default"
    """DefaultStrategy or MCMCStrategy of gsplat."""
    max_gaussians: int = 1_000_000
    """What MCMCStrategy grows to."""
    regularized: Literal["all", "drawn"] = "all"
    """Which Gaussians it regularizes at a step: all, as gsplat's example trainer does, or those in view, as we do."""
    refine_start_iter: int = 500
    """Gaussians are refined after steps whose number, from 0, is above this."""
    refine_every: int = 100
    """Gaussians are refined every so many steps."""
    refine_stop_iter: int = 15_000
    """From this step on nothing is refined or reset."""
    init_opacity: float = 0.1
    """Opacity of the first Gaussians."""
    init_scale: float = 1.0
    """The first Gaussians are larger than their neighbourhood by this factor."""
    pose_opt: bool = False
    """Correct poses as gsplat's example trainer does."""
    exposure: Literal["none", "bilateral_grid"] = "none"
    """Transform colours of training photos as it does with a bilateral grid."""
    depth_loss: bool = False
    """Compare depths at the points that each photo saw, as it does."""
    depth_lambda: float = 1.0
    """Weight of that."""

    def config(self) -> Config:
        """Return these options as the trainers' own, whose other defaults hold."""
        own = {field.name for field in fields(Config)} & {field.name for field in fields(self)}
        return Config(**{name: value for name, value in asdict(self).items() if name in own and name != "result_dir"})


class PoseCorrections(nn.Module):
    """A shift and the first two columns of a turn for each photo, in its camera's axes; none at first."""

    def __init__(self, num_photos: int, device: torch.device) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(num_photos, 9, device=device))
        self.optimizer = torch.optim.Adam([self.rows], lr=POSE_LR, weight_decay=POSE_WEIGHT_DECAY)

    def forward(self, camtoworlds: Tensor, ids: Tensor) -> Tensor:
        """Return corrected poses [C, 4, 4] of photos [C]."""
        rows = self.rows[ids]
        first = normalize(rows[:, 3:6] + rows.new_tensor([1.0, 0, 0]), dim=-1)
        second = rows[:, 6:9] + rows.new_tensor([0.0, 1, 0])
        second = normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
        turn = torch.stack([first, second, torch.linalg.cross(first, second)], dim=1)  # [C, 3, 3]
        change = torch.eye(4, device=rows.device).repeat(len(rows), 1, 1)
        change = torch.cat([torch.cat([turn, rows[:, :3, None]], dim=2), change[:, 3:]], dim=1)
        return camtoworlds @ change


class Grids(nn.Module):
    """A grid of colour matrices for each photo, by place and brightness; the identity at first."""

    def __init__(self, num_photos: int, device: torch.device) -> None:
        super().__init__()
        identity = torch.eye(3, 4, device=device).reshape(1, 12, 1, 1, 1)
        self.rows = nn.Parameter(identity.repeat(num_photos, 1, *GRID))  # [n, 12, 8, 16, 16]
        self.optimizer = torch.optim.Adam([self.rows], lr=GRID_LR, eps=ADAM_EPS)

    def forward(self, colors: Tensor, ids: Tensor) -> Tensor:
        """Return colours [C, H, W, 3] as photos [C] show them."""
        _, height, width, _ = colors.shape
        x = (torch.arange(width, device=colors.device) + 0.5) / width
        y = (torch.arange(height, device=colors.device) + 0.5) / height
        brightness = colors @ colors.new_tensor(BRIGHTNESS)  # [C, H, W]
        places = torch.stack([*torch.broadcast_tensors(x, y[:, None], brightness)], dim=-1)
        sampled = grid_sample(self.rows[ids], (2 * places - 1)[:, None], padding_mode="border", align_corners=True)[
            :, :, 0
        ]  # [C, 12, H, W]
        matrices = sampled.permute(0, 2, 3, 1).unflatten(-1, (3, 4))
        return (matrices[..., :3] @ colors[..., None])[..., 0] + matrices[..., 3]

    def variation(self) -> Tensor:
        """Return the total variation of all grids."""
        return sum((self.rows.diff(dim=axis).square().mean() for axis in (2, 3, 4)), start=self.rows.new_zeros(()))


def means_rate(cfg: Config, step: int) -> float:
    """Return the share of the first rate of means at a step: 1 % at the last."""
    return 0.01 ** (step / cfg.max_steps)


def optimizers_of(parameters: nn.ParameterDict, cfg: Config, scene_scale: float) -> dict[str, torch.optim.Optimizer]:
    """Return an Adam for each tensor, as gsplat's strategies want them."""
    rates = learning_rates(cfg, scene_scale)
    return {
        name: torch.optim.Adam([{"params": [parameters[name]], "lr": rates[name], "name": name}], eps=ADAM_EPS)
        for name in parameters
    }


def strategy_of(options: Options, cfg: Config, scene_scale: float) -> tuple[Any, dict[str, Any]]:
    """Return gsplat's strategy with our options, and its state."""
    from gsplat.strategy import DefaultStrategy, MCMCStrategy  # here, since gsplat needs CUDA

    shared = dict(
        refine_start_iter=cfg.refine_start_iter, refine_stop_iter=cfg.refine_stop_iter, refine_every=cfg.refine_every
    )
    if options.strategy == "mcmc":
        mcmc = MCMCStrategy(cap_max=options.max_gaussians, noise_lr=cfg.noise_lr, min_opacity=cfg.prune_opa, **shared)
        return mcmc, mcmc.initialize_state()
    names = ("prune_opa", "grow_grad2d", "grow_scale3d", "grow_scale2d", "prune_scale3d", "prune_scale2d")
    default = DefaultStrategy(**{name: getattr(cfg, name) for name in names}, reset_every=cfg.reset_every, **shared)
    return default, default.initialize_state(scene_scale)


def depth_loss(depths: Tensor, points: np.ndarray, camtoworld: Tensor, K: Tensor) -> Tensor:
    """Return the mean difference of inverse depths at the points [k, 3] that a photo saw.

    Args:
        depths: [H, W] that were drawn.
        points: In world units.
        camtoworld: [4, 4] of the photo.
        K: [3, 3], pixels.
    """
    seen = torch.as_tensor(points, dtype=torch.float32, device=depths.device)
    seen = (seen - camtoworld[:3, 3]) @ camtoworld[:3, :3]  # [k, 3] in the camera's axes
    seen = seen[seen[:, 2] > 1e-6]
    places = (seen @ K.T)[:, :2] / seen[:, 2:]
    sides = places.new_tensor([depths.shape[1], depths.shape[0]])
    at = (places / sides * 2 - 1)[None, None]
    inside = (at.abs() <= 1).all(dim=-1)[0, 0]
    if not inside.any():
        return depths.new_zeros(())
    drawn = grid_sample(depths[None, None], at, align_corners=False)[0, 0, 0]  # [k]
    # Of nothing the inverse has a gradient that is not a number, in gsplat's trainer too: on seneca it ended there.
    inverse = torch.where(drawn > 0, 1 / torch.where(drawn > 0, drawn, 1.0), 0.0)
    return (inverse - 1 / seen[:, 2])[inside].abs().mean()


class Trainer:
    """Train by gsplat's parts, and evaluate by ours."""

    def __init__(self, options: Options, scene: Scene, device: torch.device) -> None:
        """
        Args:
            options: Of the run.
            scene: What it is trained on.
            device: A GPU.
        """
        self.options, self.cfg, self.scene, self.device = options, options.config(), scene, device
        self._scene_scale = SCALE_MARGIN * scene.scene_scale
        first = initial_gaussians(
            scene.points,
            scene.points_rgb,
            sh_degree=self.cfg.sh_degree,
            init_opacity=self.cfg.init_opacity,
            init_scale=self.cfg.init_scale,
            seed=self.cfg.seed,
        )
        self.parameters = nn.ParameterDict({name: nn.Parameter(value.to(device)) for name, value in first.items()})
        self._optimizers = optimizers_of(self.parameters, self.cfg, self._scene_scale)
        self._strategy, self._state = strategy_of(options, self.cfg, self._scene_scale)
        self._strategy.check_sanity(self.parameters, self._optimizers)
        self._regularizers = Regularizers(MCMC_REGULARIZER, MCMC_REGULARIZER)  # of --regularized drawn
        num_photos = len(scene.image_names)
        self._poses = PoseCorrections(num_photos, device) if options.pose_opt else None
        self._grids = Grids(num_photos, device) if options.exposure != "none" else None

    def draw(self, cameras: Cameras, viewmats: Tensor, degree: int, mode: str) -> tuple[Tensor, dict[str, Any]]:
        """Return pictures [C, H, W, 3 or 4] and gsplat's info."""
        from gsplat import rasterization

        arguments = activate(dict(self.parameters.items()))
        arguments["colors"] = torch.cat(arguments["colors"], dim=1)
        colors, _, info = rasterization(
            **arguments,
            viewmats=viewmats,
            Ks=cameras.Ks.to(self.device),
            width=cameras.width,
            height=cameras.height,
            near_plane=self.cfg.near_plane,
            far_plane=self.cfg.far_plane,
            sh_degree=degree,
            packed=False,
            render_mode=mode,
        )
        return colors, info

    def step(self, step: int, view: View) -> Tensor:
        """Take one step; returns the loss."""
        cfg, options = self.cfg, self.options
        if view.image_ids is None:
            raise RuntimeError("a photo of no scene")
        ids = view.image_ids.to(self.device)
        camtoworlds = torch.linalg.inv(view.cameras.viewmats.to(self.device))
        if self._poses is not None:
            camtoworlds = self._poses(camtoworlds, ids)
        degree = min(step // cfg.sh_degree_interval, cfg.sh_degree)
        mode = "RGB+ED" if options.depth_loss else "RGB"
        colors, info = self.draw(view.cameras, torch.linalg.inv(camtoworlds), degree, mode)
        depths, colors = colors[..., 3:], colors[..., :3]
        if self._grids is not None:
            colors = self._grids(colors, ids)
        if options.strategy == "default":
            self._strategy.step_pre_backward(self.parameters, self._optimizers, self._state, step, info)
        loss = photometric_loss(colors, view.photos, ssim_lambda=cfg.ssim_lambda, masks=view.masks)
        if options.depth_loss and self.scene.depths is not None:
            points = self.scene.depths.points.get(int(ids[0]), np.zeros((0, 3)))
            known = depth_loss(depths[0, ..., 0], points, camtoworlds[0].detach(), view.cameras.Ks[0].to(self.device))
            loss = loss + cfg.depth_lambda * self._scene_scale * known
        if self._grids is not None:
            loss = loss + GRID_VARIATION * self._grids.variation()
        if options.strategy == "mcmc":
            loss = loss + self._regularization(info["radii"])
        loss.backward()
        self._update(step, info)
        return loss.detach()

    def _regularization(self, radii: Tensor) -> Tensor:
        """Return what MCMCStrategy's trainer adds to the loss, or what ours does; radii [1, N, 2] are of the view."""
        if self.options.regularized == "drawn":
            drawn = (radii[0] > 0).all(dim=-1).nonzero()[:, 0]
            loss = self._regularizers.of(dict(self.parameters.items()), drawn)
            self._regularizers.count(len(drawn))
            return loss
        opacities, scales = (self.parameters[name] for name in ("opacities", "scales"))
        return MCMC_REGULARIZER * (torch.sigmoid(opacities).mean() + torch.exp(scales).mean())

    def _update(self, step: int, info: dict[str, Any]) -> None:
        """Let Adam and the strategy have the gradients."""
        rate = learning_rates(self.cfg, self._scene_scale)["means"] * means_rate(self.cfg, step)
        self._optimizers["means"].param_groups[0]["lr"] = rate
        for optimizer in self._optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for module, first, warm_up in ((self._poses, POSE_LR, 0), (self._grids, GRID_LR, GRID_WARM_UP)):
            if module is not None:
                module.optimizer.param_groups[0]["lr"] = (
                    first * means_rate(self.cfg, step) * (min(0.01 + 0.99 * step / warm_up, 1.0) if warm_up else 1.0)
                )
                module.optimizer.step()
                module.optimizer.zero_grad(set_to_none=True)
        more = {"lr": rate} if self.options.strategy == "mcmc" else {"packed": False}
        self._strategy.step_post_backward(self.parameters, self._optimizers, self._state, step, info, **more)

    def evaluate(self, steps: int, lpips: Callable[[Tensor, Tensor], Tensor] | None) -> dict[str, object]:
        """Return the number of Gaussians and the metrics of the held-out views, as `training.evaluation` has them."""

        def picture(cameras: Cameras, mode: str = "RGB") -> Tensor:
            return self.draw(cameras, cameras.viewmats.to(self.device), self.cfg.sh_degree, mode)[0]

        scene = self.scene
        with evaluation_loader(scene, scene.test_ids) as loader:
            views = (
                (scene.image_names[image], View.from_batch(batch, self.cfg, self.device))
                for image, batch in zip(scene.test_ids, loader, strict=True)
            )
            found = evaluate(
                views,
                picture,
                lpips,
                lambda index, canvas: None,
                self.device,
                color_correct=self._grids is not None,
                draw_with_depth=None if self._poses is None else partial(picture, mode="RGB+ED"),
            )
        return {"steps": steps, "num_GS": len(self.parameters["means"]), **found}


def main(options: Options) -> None:
    if not torch.cuda.is_available():
        raise InputError("benchmarks.yardstick runs gsplat's own kernels, which need a CUDA GPU.")
    if options.quick:
        options.max_steps, options.refine_start_iter, options.refine_stop_iter = 60, 20, 50
        options.refine_every, options.max_gaussians = 10, 20_000
    device, cfg = torch.device("cuda"), options.config()
    torch.manual_seed(options.seed)
    scene = load_scene(
        options.data_dir,
        model_dir=options.model_dir,
        data_factor=options.data_factor,
        test_every=options.test_every,
        say=print,
        depths=options.depth_loss,
    )
    trainer, lpips = Trainer(options, scene, device), load_lpips(cfg.lpips_net, device)
    begin = time.perf_counter()
    with training_loader(scene, scene.train_ids, seed=options.seed, pin_memory=True) as loader:
        bar = tqdm(range(options.max_steps), desc="gsplat", unit="step")
        for step in bar:
            loss = trainer.step(step, View.from_batch(next(loader), cfg, device))
            if step % 100 == 0:
                num_gaussians = len(trainer.parameters["means"])
                bar.set_postfix_str(f"loss={loss.item():.3f}, {count(num_gaussians)} Gaussians")
                if not math.isfinite(loss.item()):
                    raise InputError(f"The loss of step {step} is not finite.")
            if step + 1 in {*options.eval_steps, options.max_steps}:
                found = trainer.evaluate(step + 1, lpips)
                found["seconds"] = time.perf_counter() - begin  # evaluations included
                path = options.result_dir / "stats" / f"val_step{step + 1}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=2))
                tqdm.write(f"Step {step + 1}: PSNR {found['psnr']:.2f} dB, {num_gaussians:,} Gaussians; {path}")


if __name__ == "__main__":
    run(main, Options, __doc__)
