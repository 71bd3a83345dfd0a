"""Videos of a model: a calm path through the scene, with depth beside the colours where that is wanted."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import imageio.v2 as imageio
import numpy as np
import torch
from imageio_ffmpeg import count_frames_and_secs
from torch import Tensor
from tqdm import tqdm

from configs import Config
from datasets.normalize import transform_cameras
from datasets.scene import Scene
from datasets.trajectories import FASTEST_TURN, SHAPES, fastest_turn, through, trajectory
from datasets.trajectory_file import read_key_poses
from datasets.view_order import sample_of
from distributed.mesh import Ranks
from distributed.together import taken_in_turn
from errors import counted
from offload.culling.cameras import Cameras
from training.files import replacing
from training.views import posed_cameras

FRAMES_PER_SECOND = 30
GIVEN = "path"  # what a video is called whose path the user gives
NAMES = (*SHAPES, GIVEN)  # of files in videos/, each followed by the number of steps
FRAMES_FOR_DEPTH = 16  # of the path, in which points say how near and far it gets
FEWEST_POINTS = 16  # that say so
MOST_POINTS = 10_000  # that say so: more of them move the quantiles below by less than a shade
SPAN = (0.02, 0.98)  # quantiles of their depths that have the first and the last colour: strays do not take the scale
LEAST_SPAN = 1.001  # the far end over the near one, so that one depth everywhere is not divided by zero


class Draw(Protocol):
    """Make the picture of one camera, as `training.drawing.Drawing.draw`."""

    def __call__(self, cameras: Cameras, *, depth: bool = False) -> Tensor:
        """Return [1, H, W, 3], or 4 channels with the depth."""


class VideoLeft(Exception):
    """Say that a video has been left between two frames, since somebody asked to stop; at all ranks that make it."""


def video_file(cfg: Config, steps: int) -> str:
    """Return the path in the result folder of the video that --video makes after so many steps."""
    return f"videos/{cfg.trajectory if cfg.trajectory in SHAPES else GIVEN}_{steps}.mp4"


def poses_of(scene: Scene, cfg: Config) -> np.ndarray:
    """Return the poses [F, 4, 4] of the frames of the video, in the scene's world.

    Raises:
        InputError: The file that --trajectory names holds no poses.
    """
    seconds = cfg.video_seconds
    if cfg.trajectory not in SHAPES:
        keys = transform_cameras(scene.transform, read_key_poses(Path(cfg.trajectory)))
        return through(keys, frames_per_second=FRAMES_PER_SECOND, seconds=seconds)
    near_ids = np.setdiff1d(scene.train_ids, scene.far_ids)
    passed = near_ids if len(near_ids) else scene.train_ids
    return trajectory(
        cfg.trajectory,
        scene.camtoworlds[passed],
        scene.points.astype(np.float64),
        frames_per_second=FRAMES_PER_SECOND,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Lens:
    """Hold what the cameras of a video have in common."""

    K: np.ndarray  # [3, 3], pixels
    width: int
    height: int

    @staticmethod
    def of(scene: Scene, cfg: Config) -> Lens:
        """Return the lens of the first training picture; of another size it shows as much as fits into that."""
        camera = scene.cameras[scene.camera_indices[scene.train_ids[0]]]
        if not cfg.video_size:
            return Lens(camera.K, camera.width, camera.height)
        width, height = cfg.video_size
        scale = max(width / camera.width, height / camera.height)
        K = np.diag([scale, scale, 1.0]) @ camera.K
        K[:2, 2] += (np.array([width, height]) - scale * np.array([camera.width, camera.height])) / 2
        return Lens(K, width, height)


def record_video(
    scene: Scene,
    cfg: Config,
    draw: Draw,
    path: Path,
    ranks: Ranks | None = None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Render a path through the scene, frame by frame as held-out views are, and write it as an H.264 video.

    Args:
        scene: Gives the cameras that the path follows from.
        cfg: Says which path, how long and how large, and how cameras draw.
        draw: Makes the picture of one camera.
        path: The .mp4 file, which appears when it is complete. Its sides are even, as the format wants them: of frames
            with an odd number of rows or columns it has the last one twice.
        ranks: That draw together; the first one writes the file.
        is_interrupted: Returns whether this process has been asked to stop; then all leave the video.

    Raises:
        OSError: The file cannot be written.
        VideoLeft: Some rank has been asked to stop; there is no file.
    """
    poses, lens = poses_of(scene, cfg), Lens.of(scene, cfg)
    turn = fastest_turn(poses, FRAMES_PER_SECOND)
    if turn > FASTEST_TURN:
        tqdm.write(
            f"Warning: the given path turns by {turn:.0f} degrees a second in {len(poses) / FRAMES_PER_SECOND:.1f} s: "
            "a longer --video_seconds is calmer."
        )
    frames = _frames(scene, cfg, draw, poses, lens, ranks, is_interrupted)
    try:
        if ranks is None or ranks.leads:
            with replacing(path) as partial, whole_video(partial, len(poses)) as append:
                for frame in tqdm(frames, desc="video", total=len(poses), unit="frame", leave=False):
                    append(frame)
    finally:
        if ranks is not None:  # they draw together, whoever looks at the frames
            for _ in frames:
                pass


@torch.no_grad()
def _frames(
    scene: Scene,
    cfg: Config,
    draw: Draw,
    poses: np.ndarray,
    lens: Lens,
    ranks: Ranks | None,
    is_interrupted: Callable[[], bool],
) -> Iterator[np.ndarray]:
    """Yield the frames [H, W, 3] uint8 at poses [F, 4, 4], at all ranks.

    Raises:
        VideoLeft: At all ranks.
    """
    K = torch.from_numpy(lens.K).float()[None]
    span = depth_span(scene.points, poses, lens) if cfg.video_depth else None
    own, _ = taken_in_turn(np.arange(len(poses)), ranks)
    for turn, index in enumerate(own):
        viewmat = torch.linalg.inv(torch.from_numpy(poses[index])).float()[None]
        cameras = posed_cameras(viewmat, K, lens.width, lens.height, cfg)
        picture = draw(cameras, depth=span is not None)[0].cpu().numpy()  # [H, W, 3 or 4]
        frame = pixels(picture[..., :3])
        if span is not None:
            frame = np.concatenate([frame, depth_colors(picture[..., 3], span)], axis=1)
        own_turn = even(frame), is_interrupted()
        drawn, interrupted = zip(*([own_turn] if ranks is None else ranks.gather(own_turn)), strict=True)
        num_before = turn * len(drawn)
        if any(interrupted):
            raise VideoLeft(f"after {num_before} of {counted(len(poses), 'frame')}")
        yield from drawn[: len(poses) - num_before]


def pixels(colors: np.ndarray) -> np.ndarray:
    """Return colours [..., 3] in [0, 1] as uint8; what is outside is clamped."""
    return np.rint(np.clip(colors, 0.0, 1.0) * 255.0).astype(np.uint8)


def even(frame: np.ndarray) -> np.ndarray:
    """Return a frame [H, W, 3] with its last row or column twice where their number is odd."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")


def depth_span(points: np.ndarray, poses: np.ndarray, lens: Lens) -> tuple[float, float]:
    """Return how near and far what is seen gets along a path, by the scene's points; one span, so nothing flickers.

    Args:
        points: [P, 3].
        poses: [F, 4, 4] along the path.
        lens: Of its cameras.
    """
    sample = sample_of(points, MOST_POINTS)
    depths = []
    for pose in poses[:: len(poses) // FRAMES_FOR_DEPTH + 1]:
        in_camera = (sample - pose[:3, 3]) @ pose[:3, :3]  # [S, 3]
        depth = in_camera[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            places = (in_camera @ lens.K.T)[:, :2] / depth[:, None]
        depths.append(depth[(depth > 0) & ((places >= 0) & (places <= (lens.width, lens.height))).all(axis=1)])
    seen = np.concatenate(depths)
    if len(seen) < FEWEST_POINTS:  # the path looks elsewhere
        seen = np.linalg.norm(sample - poses[0, :3, 3], axis=1)
    near, far = np.quantile(seen, SPAN)
    return float(near), float(max(far, near * LEAST_SPAN))


def depth_colors(depth: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Return depths [H, W] as colours [H, W, 3] uint8, evenly in 1 / depth: red is near, blue is far, black nothing."""
    near, far = span
    closeness = 1.0 / np.maximum(depth, 1e-12)
    level = pixels((closeness - 1.0 / far) / (1.0 / near - 1.0 / far))
    colors = cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    colors[depth <= 0] = 0
    return colors


@contextmanager
def whole_video(
    path: Path, num_frames: int, frames_per_second: float = FRAMES_PER_SECOND
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield what appends a frame [H, W, 3] uint8 to a video.

    Args:
        path: The .mp4 file.
        num_frames: How many will be appended.
        frames_per_second: How many are shown in a second.

    Raises:
        OSError: In the end it does not hold all frames. Another program, ffmpeg, writes the file; it ends at a full
            disk, and imageio says so only where frames are still to come.
    """
    not_whole = OSError(errno.EIO, "ffmpeg has not written all frames, as where the disk is full")
    writer: Any = imageio.get_writer(path, fps=frames_per_second, macro_block_size=1)  # of a plugin

    def append(frame: np.ndarray) -> None:
        try:
            writer.append_data(frame)
        except OSError as error:  # with all that ffmpeg was called with, on many lines
            raise not_whole from error
        except RuntimeError as error:
            raise OSError(errno.ENOENT, "ffmpeg, which writes it, is not there any more") from error

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
