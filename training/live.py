"""Lets somebody watch a run in a browser: the scene while it trains, drawn between steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import cv2
import numpy as np
from torch import Tensor

from configs import Config
from datasets.image_files import decode_image
from datasets.scene import Scene
from datasets.trajectories import level_frame, middle_of
from datasets.upright import up_direction
from offload.culling.cameras import Cameras
from training.joint_viewing import FirstRank
from training.views import posed_cameras
from viewer.frustums import Photo
from viewer.page import IDLE, PORT, Page

if TYPE_CHECKING:
    from training.run import TrainingRun


class LiveViewer:
    """Draw the model for who has the page open, between steps, by the thread that trains: nothing of it changes."""

    def __init__(self, cfg: Config) -> None:
        """Open the page.

        Raises:
            InputError: viser is not installed, or the port is taken.
        """
        port = cfg.viewer[0] if cfg.viewer else PORT
        self.page = Page(port, cfg.viewer_host, can_pause=True)
        self._make = partial(posed_cameras, cfg=cfg)
        self._last = (0, time.perf_counter())  # steps and the time, when the page was told last

    def place(self, scene: Scene) -> None:
        """Stand where the first photo was taken, and have the cameras of photos to show."""
        near_ids = np.setdiff1d(scene.train_ids, scene.far_ids)
        ids = near_ids if len(near_ids) else scene.train_ids
        poses = scene.camtoworlds[ids]
        up = up_direction(poses, scene.points)
        focus = middle_of(level_frame(up), poses, scene.points.astype(np.float64))
        self.page.place(up, poses[0], float(np.linalg.norm(focus - poses[0, :3, 3])))
        self.page.show_photos([photo_of(scene, index) for index in ids], 0.03 * scene.scene_scale)

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Draw what is due, and wait where training is paused."""
        if run.ranks is None:
            if self.page.is_watched:
                self._show(run, steps_done, loss, run.drawing.draw, lambda: run.is_interrupted)
        elif run.agreed.is_watched:
            with FirstRank(run, run.ranks) as first:
                self._show(run, steps_done, loss, first.draw, first.is_interrupted)

    def _show(
        self,
        run: TrainingRun,
        steps_done: int,
        loss: Tensor,
        draw: Callable[[Cameras], Tensor],
        is_interrupted: Callable[[], bool],
    ) -> None:
        self._say(run, steps_done, loss)
        self.page.draw(draw, self._make, steps_done)
        while self.page.is_paused and self.page.is_watched and not is_interrupted():
            if not self.page.draw(draw, self._make, steps_done):
                time.sleep(IDLE)

    def _say(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        if not self.page.wants_words():
            return
        (steps, then), now = self._last, time.perf_counter()
        self._last = (steps_done, now)
        self.page.say(
            [
                f"**Step {steps_done:,}** of {run.cfg.max_steps:,}",
                f"{(steps_done - steps) / (now - then):.1f} steps a second",
                f"loss {loss.item():.4f}",
                f"{run.num_gaussians:,} Gaussians",
            ]
        )


def photo_of(scene: Scene, index: int) -> Photo:
    """Return a photo of a scene for a page: as its pinhole camera sees it, read when it is asked for."""
    camera = scene.cameras[scene.camera_indices[index]]

    def read(most_pixels: int) -> np.ndarray:
        picture = camera.undistort(decode_image(scene.image_paths[index]))
        scale = min(1.0, most_pixels / max(picture.shape))
        size = [max(round(scale * side), 1) for side in (camera.width, camera.height)]
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)

    fov = 2 * np.arctan(camera.height / 2 / camera.K[1, 1])
    return Photo(scene.image_names[index], scene.camtoworlds[index], float(fov), camera.width / camera.height, read)
