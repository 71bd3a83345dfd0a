"""A video of a flight past the training cameras."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from imageio_ffmpeg import count_frames_and_secs
from torch import Tensor
from tqdm import tqdm

from configs import Config
from datasets.scene import Scene
from datasets.trajectories import flight
from offload.culling.cameras import Cameras
from training.files import replacing
from training.views import posed_cameras

NUM_FRAMES = 240
FRAMES_PER_SECOND = 30


@torch.no_grad()
def record_flight(
    scene: Scene, cfg: Config, draw: Callable[[Cameras], Tensor], path: Path, *, num_frames: int = NUM_FRAMES
) -> None:
    """Render a flight, frame by frame as held-out views are, and write it as an H.264 video.

    Args:
        scene: Gives the poses, and the intrinsics of its first training camera.
        cfg: Says how cameras draw.
        draw: Makes the picture [1, H, W, 3] of one camera.
        path: The .mp4 file, which appears when it is complete. Its sides are even, as the format wants them.
        num_frames: Of the video.

    Raises:
        OSError: The file cannot be written.
    """
    camera = scene.cameras[scene.camera_indices[scene.train_ids[0]]]
    K = torch.from_numpy(camera.K).float()[None]
    near_ids = np.setdiff1d(scene.train_ids, scene.far_ids)
    passed = near_ids if len(near_ids) else scene.train_ids
    poses = torch.from_numpy(flight(scene.camtoworlds[passed], num_frames))
    with replacing(path) as partial, _whole_video(partial, num_frames) as append:
        for pose in tqdm(poses, desc="video", unit="frame", leave=False):
            cameras = posed_cameras(torch.linalg.inv(pose).float()[None], K, camera.width, camera.height, cfg)
            frame = (draw(cameras)[0].clamp(0.0, 1.0) * 255.0).round().byte().cpu().numpy()
            append(frame[: camera.height // 2 * 2, : camera.width // 2 * 2])


@contextmanager
def _whole_video(path: Path, num_frames: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield what appends a frame [H, W, 3] uint8 to a video.

    Raises:
        OSError: In the end it does not hold all frames. Another program, ffmpeg, writes the file; it ends at a full
            disk, and imageio says so only where frames are still to come.
    """
    not_whole = OSError(errno.EIO, "ffmpeg has not written all frames, as where the disk is full")
    writer: Any = imageio.get_writer(path, fps=FRAMES_PER_SECOND, macro_block_size=1)  # of a plugin

    def append(frame: np.ndarray) -> None:
        try:
            writer.append_data(frame)
        except OSError as error:  # with all that ffmpeg was called with, on many lines
            raise not_whole from error

    try:
        yield append
    finally:
        with suppress(OSError):  # the frames are counted
            writer.close()
    try:
        frames, _ = count_frames_and_secs(str(path))
    except RuntimeError as error:
        raise not_whole from error
    if frames < num_frames:
        raise not_whole
