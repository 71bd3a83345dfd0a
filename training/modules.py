"""What the options train beside the Gaussians, and where it enters a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from configs import Config
from datasets.scene import Scene, seen_distances
from distributed.mesh import Ranks
from errors import InputError, format_bytes
from modules.contract import TrainedModule, Training
from modules.exposure import AffineExposure, BilateralGrid, Exposure, Place
from modules.poses import Poses
from modules.sky import Sky
from offload.culling.cameras import Cameras
from offload.tiles.boxes import Tile
from rendering.region import Region
from training import schedules
from training.checkpoints import Checkpoint
from training.color_correction import clipped_as
from training.views import Backdrop, View, own_views

EXPOSURES: dict[str, type[AffineExposure] | type[BilateralGrid]] = {
    "affine": AffineExposure,
    "bilateral_grid": BilateralGrid,
}

FARTHEST_PLACE = 3.0  # extents: a camera that looks farther does not swing about what it sees there
UNTRAINED = Training(lambda step: 0.0, (0.9, 0.999), torch.device("cpu"))  # for modules that are evaluated alone


class RunModules:
    """Hold the modules of a run; of a run without any, every method does nothing and costs nothing.

    Attributes:
        parts: The modules by the names that their state has in checkpoints.
        corrects_colors: Whether held-out photos are compared with corrected colours as well: where photos' colours are
            their own, or that is asked for.
        aligns_poses: Whether they are compared from the pose nearby that fits best as well: where poses are corrected.
    """

    def __init__(
        self,
        cfg: Config,
        scene: Scene | None,
        device: torch.device,
        ranks: Ranks | None = None,
        *,
        are_trained: bool = True,
    ) -> None:
        """
        Args:
            cfg: Says which there are.
            scene: Its training photos have those that are theirs; None: there are no photos.
            device: Where pictures are rendered.
            ranks: That train together, each with the same modules; None: there is this process only.
            are_trained: Whether a step is left to do.

        Raises:
            InputError: The scene has too few photos.
        """
        views_per_step = cfg.batch_size * (1 if ranks is None else ranks.size)
        training = Training(lambda step: schedules.decay(cfg, step), schedules.adam_betas(views_per_step), device)
        self.corrects_colors = cfg.color_correct or cfg.exposure != "none"
        self.aligns_poses = cfg.pose_opt
        self._ranks = ranks
        self._are_averaged = False  # the gradients of the present step, over the ranks
        self._background = cfg.background
        self._are_trained = are_trained
        self.parts: dict[str, TrainedModule] = {}
        self._sky: Sky | None = None
        self._exposure: Exposure | None = None
        self._poses: Poses | None = None  # that this run corrects
        self._known_poses: Poses | None = None  # these, or those of the run whose checkpoint is evaluated
        self._device = device
        if cfg.background == "sky":
            self._sky = self.parts["sky"] = Sky(training)
        if scene is None or cfg.ckpt:  # an evaluation shows no training photos
            return
        names = [scene.image_names[index] for index in scene.train_ids]
        self._rows = torch.full((len(scene.image_names),), -1)  # of photos in the modules that are theirs
        self._rows[torch.from_numpy(scene.train_ids)] = torch.arange(len(names))
        of_photos = [(f"--exposure {cfg.exposure}", cfg.exposure != "none"), ("--pose_opt", cfg.pose_opt)]
        options = [option for option, is_on in of_photos if is_on]
        if options and len(names) < 2:
            raise InputError(
                f"{options[0]} wants two training photos or more, since each is corrected by what others show, and "
                "there is one: leave it out, or train on more (--test_every -1 and --test_after hold out fewer)."
            )
        if cfg.exposure != "none":
            self._exposure = self.parts[cfg.exposure] = EXPOSURES[cfg.exposure](names, training)
            taken = format_bytes(self.nbytes)
            if are_trained:
                print(f"--exposure {cfg.exposure}: {len(names)} training photos have their own, which takes {taken}.")
        if cfg.pose_opt:
            poses = _poses_of(cfg, scene, scene.train_ids, views_per_step, training)
            self._poses = self._known_poses = self.parts["poses"] = poses
            if are_trained:
                print(
                    f"--pose_opt: {len(names)} training photos have their poses corrected, held-out ones go with them."
                )

    @property
    def nbytes(self) -> int:
        """Return the bytes that the modules take of the device."""
        buffers = (value for module in self.parts.values() for value in module.buffers())
        return sum(value.nbytes for value in buffers if value.device == self._device)

    def load_evaluated(self, checkpoint: Checkpoint, cfg: Config, scene: Scene) -> None:
        """Take from the checkpoint that is evaluated what pictures show beside the Gaussians, and how they compare.

        Args:
            checkpoint: Of `cfg.ckpt`.
            cfg: The run's.
            scene: The run's.

        Raises:
            InputError: It was trained before another background, or holds what cannot be used.
        """
        self.corrects_colors |= checkpoint.options.get("exposure", "none") != "none"
        before = checkpoint.options.get("background", self._background)
        has_sky = "sky/rows" in checkpoint.state
        if has_sky != (self._sky is not None):
            raise InputError(
                "The checkpoint of --ckpt holds a sky that its pictures need: give --background sky."
                if has_sky
                else "The checkpoint of --ckpt holds no sky: give the --background that it was trained with"
                + (f", {before}." if before != self._background else ".")
            )
        if {before, self._background} not in ({self._background}, {"black", "random"}):
            print(f"Warning: the checkpoint was trained with --background {before}, not {self._background}.")
        if self._sky is not None:
            _load("sky", self._sky, state_of(checkpoint, "sky"))
        if "poses/rows" in checkpoint.state:
            self.aligns_poses = True
            every = np.arange(len(scene.image_names))  # which of them are held out may be another choice now
            self._known_poses = _poses_of(cfg, scene, every, 1, UNTRAINED)
            _load("poses", self._known_poses, state_of(checkpoint, "poses"))

    def begin_at(self, steps_done: int) -> None:
        """Let modules of which a checkpoint held no state begin anew after so many steps."""
        for name, module in self.parts.items():
            if module.steps_done != steps_done:
                module.begin_at(steps_done)
                then = (
                    f"it is trained from step {steps_done} on" if self._are_trained else "no step is left to train it"
                )
                print(f"The checkpoint holds nothing of {name}: {then}.")

    def placed(self, view: View) -> View:
        """Return a training view with its cameras where poses put them after the last step."""
        if self._poses is None:
            return view
        rows = self._rows_of(view)
        return _seen_by(view, self._poses(self._poses.values(rows), rows))

    def placed_ahead(self, view: View, present: View) -> View | None:
        """Return a training view as `placed` will after the present step; None where that moves its cameras itself.

        Args:
            view: The upcoming one.
            present: That of the present step, of which no gradient is known.
        """
        if self._poses is None:
            return view
        rows = self._rows_of(view)
        if torch.isin(rows, self._rows_of(present)).any():
            return None
        return _seen_by(view, self._poses(self._poses.values_ahead(rows), rows))

    def begin_step(self, view: View) -> None:
        """Fetch what a view needs."""
        self._are_averaged = False
        if self._sky is not None:
            self._sky.fetch(self._sky.row)
        if self._exposure is not None:
            self._exposure.fetch(self._rows_of(view), own_views(len(view.photos), self._ranks))
        if self._poses is not None:  # of all cameras: each rank projects its Gaussians into them
            self._poses.fetch(self._rows_of(view))

    def cameras(self, view: View) -> Cameras:
        """Return the cameras of the present view, or of a part of it, for the step to find their poses' gradient.

        Where ranks train together, each finds what its Gaussians have of the gradient by the loss of all.
        """
        if self._poses is None:
            return view.cameras
        viewmats = self._poses(self._poses.leaf(), self._rows_of(view))
        return replace(view.cameras, viewmats=viewmats.float())

    def held_out(self) -> Callable[[View], View]:
        """Return what gives held-out views the cameras that those of training photos, which have moved, tell them.

        What the newest step has made of these is looked at once, for all views. The photos themselves are not asked.
        """
        if self._known_poses is None:
            return lambda view: view
        foretelling = self._known_poses.foretelling()

        def placed(view: View) -> View:
            camtoworlds = torch.linalg.inv(view.cameras.viewmats.double()).numpy()
            return _seen_by(view, torch.linalg.inv(torch.from_numpy(foretelling.poses(camtoworlds))))

        return placed

    def corrected_poses(self, scene: Scene) -> np.ndarray | None:
        """Return the poses of all photos, corrected, and held-out ones as `held_out`; None: none has been corrected.

        Args:
            scene: The run's.

        Returns:
            [n, 4, 4] float64, camera to world, in the scene's normalized world.
        """
        if self._poses is None or not bool(self._poses.rows.any()):
            return None
        rows, camtoworlds = torch.arange(len(scene.train_ids)), scene.camtoworlds.copy()
        camtoworlds[scene.train_ids] @= self._poses.corrections(self._poses.values(rows), rows).numpy()
        camtoworlds[scene.test_ids] = self._poses.foretelling().poses(camtoworlds[scene.test_ids])
        return camtoworlds

    def _rows_of(self, view: View) -> Tensor:
        """Return the rows [C], int64 on the host, of a training view's photos in the modules that are theirs."""
        assert view.image_ids is not None  # training views are photos of the scene
        return self._rows[view.image_ids]

    def backdrop(self) -> Backdrop | None:
        """Return the sky, of which a step finds the gradient; None where there is none."""
        if self._sky is None:
            return None
        rows = self._sky.leaf() if self._sky.is_fetched else self._sky.values(self._sky.row)
        # This rank's own loss, by which alone a sky moves its cameras, is one of those whose mean is the loss of all.
        share = 1.0 if self._ranks is None else 1 / self._ranks.size
        return partial(_sky_behind, self._sky, rows[0], share_in_loss=share)

    def exposed(self, colors: Tensor, view: View, tile: Tile | None = None, halo: int = 0) -> Tensor:
        """Return rendered colours as the photos of a training view show them, clipped where these are.

        Args:
            colors: [C, H, W, 3]; or [1, h, w, 3] of a tile with its halo.
            view: The photos.
            tile: None: all of the view.
            halo: Pixels around the tile.
        """
        if self._exposure is None:
            return colors
        rows, width, height = self._exposure.leaf(), view.cameras.width, view.cameras.height
        if tile is None:
            return clipped_as(view.images, self._exposure(colors, rows, Place(0, 0, width, height)))
        camera, x, y, w, h = tile.with_halo(halo, width, height)
        cameras = slice(camera, camera + 1)
        photos = view.part(cameras, slice(y, y + h), slice(x, x + w))
        return clipped_as(photos, self._exposure(colors, rows[cameras], Place(x, y, width, height)))

    def gather(self) -> None:
        """Take in the gradients of a part of the view whose backward pass is complete."""
        for module in self.parts.values():
            module.gather()

    def update(self) -> None:
        """Apply one step of Adam to what the view needed; ranks call this at once, and all apply the same."""
        self.gather()
        if self._ranks is not None and self.parts:
            self._average_gradients(self._ranks)
        for module in self.parts.values():
            module.update()

    def _average_gradients(self, ranks: Ranks) -> None:
        """Give all ranks the gradients by the loss of a step, which is the mean of theirs, in one message.

        Each rank knows those of its own loss; of poses what it has is part of a sum (`cameras`).
        """
        gradients = [module.gradient for module in self.parts.values()]
        factors = [ranks.size if module is self._poses else 1 for module in self.parts.values()]
        own = [factor * g.flatten().to(self._device) for factor, g in zip(factors, gradients, strict=True)]
        for gradient, mean in zip(gradients, ranks.mean(torch.cat(own)).split([len(g) for g in own]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        self._are_averaged = True

    def complete_step(self, steps_done: int) -> bool:
        """Apply the step of a view after an error, where the Gaussians have taken theirs, so that both are saved alike.

        Where ranks train together and have not told each other their gradients, which they are asked for no more, all
        take the step with a gradient of zero.

        Args:
            steps_done: By the Gaussians.

        Returns:
            Whether gradients are lost.
        """
        late = [module for module in self.parts.values() if module.is_fetched and module.steps_done < steps_done]
        are_lost = bool(late) and self._ranks is not None and not self._are_averaged
        for module in late:
            if are_lost:
                module.forget_gradient()
            module.update()
        return are_lost


def _poses_of(cfg: Config, scene: Scene, ids: np.ndarray, views_per_step: int, training: Training) -> Poses:
    """Return the poses of photos of a scene, by their numbers [k], as they are given."""
    # In float32 first, as photos come with them: without a correction a view is what it is without this.
    camtoworlds = torch.from_numpy(scene.camtoworlds[ids]).float().double()
    return Poses(
        [scene.image_names[index] for index in ids],
        torch.linalg.inv(camtoworlds),
        torch.from_numpy(seen_distances(scene, ids)).clamp(max=FARTHEST_PLACE * scene.scene_scale),
        scene.scene_scale,
        cfg.pose_opt_lr * math.sqrt(views_per_step),
        cfg.pose_opt_reg,
        replace(training, decay=lambda step: schedules.pose_decay(cfg, step)),
    )


def _seen_by(view: View, viewmats: Tensor) -> View:
    """Return a view with its cameras at poses [C, 4, 4], world to camera."""
    return replace(view, cameras=replace(view.cameras, viewmats=viewmats.float()))


def state_of(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """Return the tensors that a part has in a checkpoint, by its own names."""
    prefix = f"{part}/"
    return {key.removeprefix(prefix): value for key, value in checkpoint.state.items() if key.startswith(prefix)}


def sky_of(state: Mapping[str, Tensor], device: torch.device) -> Backdrop:
    """Return a sky that is trained no more.

    Args:
        state: Of the sky, in a checkpoint.
        device: Where pictures are rendered.

    Raises:
        InputError: It cannot be used.
    """
    sky = Sky(replace(UNTRAINED, device=device))
    _load("sky", sky, state)
    return partial(_sky_behind, sky, sky.values(sky.row)[0])


def _load(name: str, module: TrainedModule, state: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The {name} in the checkpoint cannot be used: choose another checkpoint.") from error


def _sky_behind(
    sky: Sky, coefficients: Tensor, cameras: Cameras, region: Region | None, *, share_in_loss: float = 1.0
) -> Tensor:
    viewmats, Ks = (t.to(coefficients.device, non_blocking=True) for t in (cameras.viewmats, cameras.Ks))
    if viewmats.requires_grad and share_in_loss < 1:
        viewmats = viewmats.view_as(viewmats)
        viewmats.register_hook(lambda gradient: gradient * share_in_loss)
    return sky(coefficients, viewmats, Ks, *(region or Region(0, 0, cameras.width, cameras.height)))
