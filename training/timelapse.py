"""A video of the training: one view, drawn now and then while the model grows.

Each frame is a file of its own, which is there or not, so a kill loses none that was drawn. The video is made of them
when the run ends, whichever way, and anew when it has gone on; but ranks that are stopped leave that to the run which
goes on, since torchrun kills them soon after.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import imageio.v3 as imageio
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs import Config
from errors import counted
from training.files import replacing, write_file
from training.schedules import is_due
from training.video import FRAMES_PER_SECOND, VideoLeft, even, pixels, whole_video
from training.views import posed_cameras

if TYPE_CHECKING:
    from training.run import TrainingRun

FRAMES = "videos/timelapse"  # a folder of step_{N}.jpg
VIDEO = "videos/timelapse.mp4"
SECONDS = 10  # that the video takes, where that is neither slower nor faster than can be watched
SLOWEST = 2  # frames a second


class Timelapse:
    """Draw the first held-out view after every `timelapse` steps, the first step and the last."""

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Draw a frame where it is due."""
        if _is_due(run.cfg, steps_done):
            self._draw(run, steps_done)

    def make_missing(self, run: TrainingRun, steps: int) -> None:
        """Draw the frame where it is due and not there."""
        if _is_due(run.cfg, steps) and not run.results.has(_frame_of(steps)):
            self._draw(run, steps)

    def make_video(self, run: TrainingRun) -> bool:
        """Make the video of the frames that there are, up to the steps that the model has had.

        Returns:
            False where it was left between two frames, since somebody asked to stop; of several ranks the first knows.
        """
        frames = frames_until(run.results.path, run.model.steps_done) if run.cfg.timelapse and run.speaks else []
        if not frames:
            return True
        has_time = run.ranks is None and run.is_interrupted  # stopped before, and another Ctrl-C ends it at once
        try:
            with run.results.missed_if_unwritable("The timelapse"):
                write_video(
                    frames,
                    run.results.path / VIDEO,
                    lambda: not has_time and (run.is_interrupted or run.agreed.interrupted),
                )
        except VideoLeft as left:
            tqdm.write(f"The timelapse was left {left}: --resume makes it anew.")
            return False
        return True

    def _draw(self, run: TrainingRun, steps: int) -> None:
        frame = self._frame(run)
        if frame is None:
            return
        with run.results.missed_if_unwritable(f"The frame of step {steps}", was_asked_for=False):
            content = imageio.imwrite("<bytes>", frame, extension=".jpg", quality=92)
            write_file(run.results.path / _frame_of(steps), content)

    @torch.no_grad()
    def _frame(self, run: TrainingRun) -> np.ndarray | None:
        """Return the picture [H, W, 3] uint8 of the view, with even sides; of several ranks the first has it."""
        scene = run.scene
        near_ids = np.setdiff1d(scene.test_ids, scene.far_ids)
        image_id = int((near_ids if len(near_ids) else scene.train_ids)[0])
        camera = scene.cameras[scene.camera_indices[image_id]]
        viewmat = torch.from_numpy(np.linalg.inv(scene.camtoworlds[image_id])).float()[None]
        K = torch.from_numpy(camera.K).float()[None]
        cameras = posed_cameras(viewmat, K, camera.width, camera.height, run.cfg)
        draw = run.drawing.draw if run.ranks is None else run.drawing.draw_for_first
        picture: Tensor | None = draw(cameras)
        return None if picture is None else even(pixels(picture[0].cpu().numpy()))


def _is_due(cfg: Config, steps: int) -> bool:
    return cfg.timelapse > 0 and (steps % cfg.timelapse == 0 or is_due(cfg, steps, (1,)))


def _frame_of(steps: int) -> str:
    return f"{FRAMES}/step_{steps:09d}.jpg"


def frames_until(result_dir: Path, steps: int) -> list[Path]:
    """Return the frames drawn up to so many steps, in their order; one after them is of a run that was begun anew."""
    numbered = {int(path.stem.removeprefix("step_")): path for path in (result_dir / FRAMES).glob("step_*[0-9].jpg")}
    return [numbered[number] for number in sorted(numbered) if number <= steps]


def write_video(frames: list[Path], path: Path, is_interrupted: Callable[[], bool]) -> None:
    """Write an H.264 video of pictures, and say how it shows them; those of another size than the last are left out.

    Raises:
        OSError: It cannot be written; one that was there is as it was.
        VideoLeft: It has been asked to stop; the same.
    """
    shape = imageio.improps(frames[-1]).shape
    frames = [frame for frame in frames if imageio.improps(frame).shape == shape]
    pace = pace_of(len(frames))
    with replacing(path) as partial, whole_video(partial, len(frames), pace) as append:
        for number, frame in enumerate(frames):
            if is_interrupted():
                raise VideoLeft(f"after {number} of {counted(len(frames), 'frame')}")
            append(imageio.imread(frame))
    tqdm.write(
        f"The timelapse shows {counted(len(frames), 'frame')}, {pace:g} a second, in {len(frames) / pace:.1f} s."
    )


def pace_of(num_frames: int) -> float:
    """Return how many frames a second are shown, so that the video takes ten seconds.

    With fewer than 20 frames each is shown for half a second, and above 300 they follow as those of any video.
    """
    return min(max(num_frames / SECONDS, SLOWEST), float(FRAMES_PER_SECOND))
