"""A video of a flight past the training cameras."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
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
    with replacing(path) as partial:
        writer: Any  # of a plugin
        with imageio.get_writer(partial, fps=FRAMES_PER_SECOND, macro_block_size=1) as writer:
            for pose in tqdm(poses, desc="video", unit="frame", leave=False):
                cameras = posed_cameras(torch.linalg.inv(pose).float()[None], K, camera.width, camera.height, cfg)
                frame = (draw(cameras)[0].clamp(0.0, 1.0) * 255.0).round().byte().cpu().numpy()
                writer.append_data(frame[: camera.height // 2 * 2, : camera.width // 2 * 2])
