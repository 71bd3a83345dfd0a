"""Finds, checks, decodes and scales the pictures of a dataset."""

import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.cache import CacheFile, fingerprint, is_writable, user_cache_dir
from errors import InputError, reason

Item = TypeVar("Item")
Result = TypeVar("Result")

_LISTED = 10  # files named in one message

# Decoders that are tried. Pillow knows many more formats, one of which hands the file to Ghostscript. A picture of
# more than 179 million pixels is refused by Pillow before anything is allocated (its decompression bomb limit).
_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP")


def prepare_images(
    data_dir: Path, names: list[str], *, data_factor: float = 1.0, num_workers: int | None = None
) -> tuple[list[Path], list[tuple[int, int]]]:
    """The picture files to train on, all present, whole and at the wanted scale.

    Scaled pictures are made where they are missing, in `images_{factor}` beside `images`, or in the user's cache
    where the dataset is read-only.

    Args:
        data_dir: the dataset; its pictures are in `images`.
        names: paths of the pictures relative to `images`.
        data_factor: how many times smaller than the originals, at least 1.
        num_workers: threads; all processors where None.

    Returns:
        For each name the file and its (width, height) in pixels.

    Raises:
        InputError: pictures are absent, damaged, or of a size that the factor does not explain.
    """
    if not 1 <= data_factor < np.inf:
        raise InputError(f"data_factor must be a number of at least 1 (got {data_factor}).")
    originals = data_dir / "images"
    if not originals.is_dir():
        raise InputError(f"{originals} does not exist: put the dataset's pictures there.")
    missing = [name for name in names if not (originals / name).is_file()]
    if missing:
        raise InputError(f"Pictures of the COLMAP model are missing from {originals}: {_listing(missing)}.")
    workers = num_workers or os.cpu_count() or 1

    folder = originals
    if data_factor != 1:
        folder = _scaled_folder(data_dir, names, data_factor)
        _scale_missing(data_dir, folder, names, data_factor, workers)
    found = _inspect(data_dir, folder, names, workers)
    damaged = [name for name, size in found.items() if size is None]
    if damaged:
        raise InputError(
            f"Pictures in {folder} are truncated or unreadable: {_listing(damaged)}; replace them by whole ones."
        )
    return [folder / name for name in names], [found[name] for name in names]


def decode_image(path: Path) -> np.ndarray:
    """The picture as COLMAP saw it: RGB, not turned by its EXIF orientation  # [H, W, 3] uint8.

    Gray, palette and CMYK pictures become RGB, 16 bits become 8, transparency is dropped.
    Raises InputError, naming the file, where it cannot be decoded.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return np.asarray(_to_rgb(image))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(f"{path} cannot be decoded ({reason(error)}): replace it by a whole picture.") from error


def picture_sizes(folder: Path, names: list[str], num_workers: int | None = None) -> list[tuple[int, int]]:
    """(width, height) of each picture, by its header alone. Raises InputError, naming the file, for one without."""

    def size(name: str) -> tuple[int, int]:
        try:
            with Image.open(folder / name, formats=_FORMATS) as image:
                return image.size
        except Exception as error:  # see decode_image
            raise InputError(
                f"{folder / name} cannot be decoded ({reason(error)}): replace it by a whole picture."
            ) from error

    return in_threads(size, names, num_workers or os.cpu_count() or 1, f"Reading sizes in {folder.name}")


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Save nearly without loss: colours at full resolution."""
    image.save(path, format="JPEG", quality=98, subsampling="4:4:4")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip at 255
        gray = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip((gray + 128) // 257, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pictures are not supported")
    return image if image.mode == "RGB" else image.convert("RGB")


def _inspect(data_dir: Path, folder: Path, names: list[str], workers: int) -> dict[str, tuple[int, int] | None]:
    """Decode each picture once, and remember that by its size and time. Maps names to (width, height), or None.

    A truncated picture should stop a run before it starts, not hours later when its turn comes.
    """
    stamps = fingerprint([folder / name for name in names])
    record = CacheFile(data_dir / "sparse", data_dir, f"checked_{folder.name}.npz")
    known: dict[tuple[str, int, int], tuple[int, int]] = {}
    for arrays in record.read():
        try:
            remembered = arrays["names"].tobytes().decode().split("\n")
            checked = zip(remembered, arrays["stamps"].tolist(), arrays["sizes"].tolist(), strict=True)
            known |= {(name, *stamp): (int(width), int(height)) for name, stamp, (width, height) in checked}
        except (KeyError, TypeError, ValueError):  # damaged: the pictures are decoded again
            continue

    keys = [(name, *stamp) for name, stamp in zip(names, stamps.tolist(), strict=True)]
    new = [key for key in keys if key not in known]
    sizes = in_threads(lambda key: _checked_size(folder / key[0]), new, workers, f"Checking {folder.name}")
    known |= {key: size for key, size in zip(new, sizes, strict=True) if size is not None}
    if new:
        whole = [key for key in keys if key in known]
        record.write(
            {
                "names": np.frombuffer("\n".join(key[0] for key in whole).encode(), np.uint8),
                "stamps": np.array([key[1:] for key in whole], np.int64).reshape(-1, 2),
                "sizes": np.array([known[key] for key in whole], np.int64).reshape(-1, 2),
            }
        )
    return {key[0]: known.get(key) for key in keys}


def _checked_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a picture that decodes to its end, else None."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            size = image.size
            image.draft(None, (1, 1))  # a JPEG is read to its end all the same, but mostly not transformed
            image.load()
            return size
    except Exception:  # see decode_image
        return None


def _scaled_folder(data_dir: Path, names: list[str], factor: float) -> Path:
    """The folder for scaled pictures: beside the originals where it is complete or can be written to."""
    folder = data_dir / f"images_{factor:.10g}"
    complete = all((folder / name).is_file() for name in names)
    if complete or is_writable(folder if folder.exists() else data_dir):
        return folder
    return user_cache_dir(data_dir) / folder.name


def _scale_missing(data_dir: Path, folder: Path, names: list[str], factor: float, workers: int) -> None:
    """Make the scaled pictures that are missing or damaged, each whole at once under its final name."""
    targets = dict(zip(names, _scaled_sizes(data_dir / "images", names, factor, workers), strict=True))
    present = [name for name in names if (folder / name).is_file()]
    found = _inspect(data_dir, folder, present, workers)
    # Pictures that came with the dataset may have been rounded another way.
    foreign = [n for n, size in found.items() if size and np.abs(np.subtract(size, targets[n])).max() > 1]
    if foreign:
        name = foreign[0]
        raise InputError(
            f"{folder / name} is {found[name][0]}x{found[name][1]} pixels where data_factor={factor:g} asks for "
            f"{targets[name][0]}x{targets[name][1]}: move the folder {folder} away."
        )
    todo = [name for name in names if found.get(name) is None]
    if not todo:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):  # a second run waits here, and then finds the work done
            for leftover in folder.rglob(".*.part"):
                leftover.unlink()
            todo = [name for name in todo if name in found or not (folder / name).is_file()]
            in_threads(
                lambda name: _scale_image(data_dir / "images" / name, folder / name, targets[name]),
                todo,
                workers,
                f"Scaling to {folder.name}",
            )
    except OSError as error:
        raise InputError(f"Scaled pictures cannot be written to {folder} ({reason(error)}).") from error


def _scaled_sizes(folder: Path, names: list[str], factor: float, workers: int) -> list[tuple[int, int]]:
    sizes = picture_sizes(folder, names, workers)
    return [(max(1, round(width / factor)), max(1, round(height / factor))) for width, height in sizes]


def _scale_image(source: Path, target: Path, size: tuple[int, int]) -> None:
    """Write `source` at `size` = (width, height) to `target`, in the same format."""
    image = Image.fromarray(decode_image(source)).resize(size, Image.Resampling.BICUBIC)  # antialiased
    with Image.open(source, formats=_FORMATS) as original:
        picture_format = "JPEG" if original.format == "MPO" else original.format  # MPO: a phone's JPEG
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    if picture_format == "JPEG":
        save_jpeg(image, temporary)
    else:
        image.save(temporary, format=picture_format)
    os.replace(temporary, target)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, which the system releases even when the process is killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def in_threads(function: Callable[[Item], Result], items: list[Item], workers: int, description: str) -> list[Result]:
    """function(item) of each item, in order; Pillow works outside the interpreter's lock. Stops at an error."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            results = pool.map(function, items)
            return list(tqdm(results, total=len(items), desc=description, unit="image", delay=1, leave=False))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
