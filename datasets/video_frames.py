"""Takes photos out of a video: the sharpest frame of each interval, since a moving camera blurs most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import imageio.v2 as imageio
import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.images import save_jpeg
from datasets.links import write_whole
from errors import InputError, reason


def open_video(video: Path) -> tuple[float, float, Iterator[np.ndarray]]:
    """Return the frames per second of a video, its seconds, and its frames  # [H, W, 3] uint8.

    Raises:
        InputError: It does not exist, is no video, or there is no decoder.
    """
    if not video.is_file():
        raise InputError(f"--video {video} does not exist: name a video file.")
    with open(video, "rb"):  # ffmpeg would call one that may not be read no video
        pass
    reader: Any  # of a plugin
    try:
        reader = imageio.get_reader(video, "ffmpeg")
        meta = reader.get_meta_data()
    except ImportError as error:
        raise InputError(
            "Videos are read by imageio-ffmpeg, which is not installed: pip install imageio-ffmpeg."
        ) from error
    except Exception as error:  # of imageio, of ffmpeg, of the operating system
        last_line = str(error).strip().splitlines()[-1:]  # before it ffmpeg tells how it was built
        raise InputError(
            f"--video {video} cannot be read as a video ({reason(OSError(*last_line))}): convert it to MP4 (H.264), or "
            "check that it is complete."
        ) from error
    return float(meta["fps"]), float(meta.get("duration") or 0.0), reader.iter_data()


def write_sharpest_frames(video: Path, fps: float, folder: Path) -> int:
    """Write the sharpest frame of each 1 / `fps` seconds of a video into a folder, as frame_000001.jpg and so on.

    Args:
        video: The file.
        fps: Frames to take of each second; all are taken where the video has fewer.
        folder: Receives them; files of these names are replaced.

    Returns:
        How many were written.

    Raises:
        InputError: The video cannot be read, or the folder cannot be written.
    """
    video_fps, seconds, frames = open_video(video)
    fps = min(fps, video_fps)
    written = 0
    total = round(seconds * video_fps) or None
    best: np.ndarray | None = None
    best_sharpness, interval = -1.0, 0
    with tqdm(total=total, desc="frames", unit="frame", dynamic_ncols=True) as bar:
        for index, frame in enumerate(_until_damaged(frames, video)):
            bar.update()
            if int(index * fps / video_fps) != interval and best is not None:
                written += 1
                _write(best, folder / f"frame_{written:06d}.jpg")
                interval, best, best_sharpness = int(index * fps / video_fps), None, -1.0
            sharpness = sharpness_of(frame)
            if sharpness > best_sharpness:
                best, best_sharpness = np.array(frame), sharpness
    if best is not None:
        written += 1
        _write(best, folder / f"frame_{written:06d}.jpg")
    return written


def sharpness_of(frame: np.ndarray) -> float:
    """Return the variance of the Laplacian of a frame [H, W, 3] uint8: the sharper, the larger."""
    return float(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())


def _until_damaged(frames: Iterator[np.ndarray], video: Path) -> Iterator[np.ndarray]:
    """Yield frames, and say in one sentence that one cannot be decoded."""
    try:
        yield from frames
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--video {video} cannot be decoded to its end ({reason(error)}): convert it again."
        ) from error


def _write(frame: np.ndarray, path: Path) -> None:
    write_whole(path, lambda partial: save_jpeg(Image.fromarray(frame), partial))
