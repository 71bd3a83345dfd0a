"""Where the photos of a reconstruction come from: a folder of them, or a video."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets.image_files import checked_picture, fitting_workers
from datasets.images import in_threads, picture_sizes
from datasets.links import link_file
from datasets.model_choice import Say
from datasets.paths import photo_names
from datasets.video_frames import open_video, write_sharpest_frames
from errors import InputError, counted

FPS = 2.0  # frames that are taken of each second of a video, where --fps says nothing else
FEWEST_PHOTOS = 3  # of which one is held out, and two see the same


class Source:
    """Says where photos come from, and puts them into a dataset."""

    def __init__(self, what: str, identity: list[Any], put: Callable[[Path, Say], None]) -> None:
        """
        Args:
            what: Its name for sentences.
            identity: What JSON can hold, equal only for the same photos; of a video, its --fps comes last.
            put: Puts the photos into a folder, and says how.
        """
        self.what = what
        self.identity = identity
        self.put = put

    @classmethod
    def of(cls, photos: Path, video: Path | None, fps: float | None, out: Path) -> Source:
        """Look at a folder of photos, or at a video.

        Args:
            photos: The folder.
            video: The file; None: photos are taken.
            fps: Frames that are taken of each second of a video; None: `FPS`.
            out: The dataset's folder.

        Raises:
            InputError: There are no photos, or too few, or they cannot be read.
        """
        return cls._video(video, fps or FPS) if video else cls._photos(photos, out)

    @classmethod
    def _video(cls, video: Path, fps: float) -> Source:
        video_fps, seconds, _ = open_video(video)
        stat = video.stat()

        def put(images: Path, say: Say) -> None:
            say(f"{video}: {seconds:.1f} s of {video_fps:g} frames a second, the sharpest of each {1 / fps:.3g} s.")
            for name in photo_names(images) if images.is_dir() else ():  # of an interruption
                (images / name).unlink()
            count = write_sharpest_frames(video, fps, images)
            if count < FEWEST_PHOTOS:
                raise InputError(
                    f"--video {video} gives {counted(count, 'photo')}, too few to reconstruct: raise --fps, or take a "
                    "longer video."
                )

        return cls(f"{video}", [video.name, stat.st_size, stat.st_mtime_ns, fps], put)

    @classmethod
    def _photos(cls, folder: Path, out: Path) -> Source:
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist or is no folder: name the folder of the photos.")
        images = out / "images"
        in_place = images.is_dir() and images.samefile(folder)
        if not in_place and out.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--out {out} lies in the folder of the photos, {folder}: name one beside it.")
        names = sorted(photo_names(folder))
        if len(names) < FEWEST_PHOTOS:
            found = {0: "no photos", 1: "one photo"}.get(len(names), f"{len(names)} photos")
            raise InputError(
                f"{folder} holds {found}, and a reconstruction needs {FEWEST_PHOTOS} at least, of the same things "
                "from several places: name the folder of the photos, or take more."
            )
        others = [] if in_place or not images.is_dir() else sorted(photo_names(images) - set(names))
        if others:
            raise InputError(
                f"{images} holds {len(others)} photos that are not in {folder}, such as {others[0]}: move them away, "
                "or name another --out."
            )
        sizes = picture_sizes(folder, names)
        stats = [(folder / name).stat() for name in names]
        identity = [[name, stat.st_size] for name, stat in zip(names, stats, strict=True)]

        def put(images: Path, say: Say) -> None:
            workers = fitting_workers(os.cpu_count() or 1, max(width * height for width, height in sizes))
            in_threads(lambda name: checked_picture(folder / name), names, workers, "Checking photos")
            if in_place:
                return
            for name in names:
                link_file(folder / name, images / name)
            kinds = [_kind_of_link(folder / name, images / name) for name in names]
            counts = " and ".join(f"{kinds.count(kind):,} {kind}" for kind in sorted(set(kinds)))
            say(f"{images} holds {counts} of {folder}.")

        return cls(f"{folder}", identity, put)


def _kind_of_link(source: Path, target: Path) -> str:
    if target.is_symlink():
        return "symbolic links to photos"
    return "hard links to photos" if target.samefile(source) else "copies of photos"
