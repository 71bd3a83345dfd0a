"""Finds the pictures of a dataset and their masks, checks each file once, and scales them."""

from __future__ import annotations

import fcntl
import os
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.cache import CacheFile, fingerprint, is_writable, user_cache_dir
from datasets.camera import check_shape, has_shape
from datasets.image_files import (
    PictureFault,
    Seen,
    checked_mask,
    checked_picture,
    decode_mask,
    decode_picture,
    fitting_workers,
    highest_of_16_bits,
    picture_format,
    picture_size,
    unscaled_values,
)
from datasets.masks import find_masks, scaled_mask
from datasets.model_choice import Say, quiet
from errors import InputError, counted, reason

Item = TypeVar("Item")
Result = TypeVar("Result")
Size = tuple[int, int]  # width and height in pixels
Stamp = tuple[int, int]  # bytes of a file, and the time of its last change in nanoseconds

_LISTED = 10  # files named in one message
_RULES = 2  # to be raised with each rule that files are newly refused by, so that those checked before are looked at
# Largest difference of brightness, of 255, between blurred pictures of one photo that two programs have scaled. On 20
# photos, scaled by 2 and 4, it was at most 3.9 between filters against aliasing and with JPEG of quality 80, 8 and more
# with filters that alias; where an area a twelfth of the width was blurred before, half were above 15.
_SAME_PICTURE = 5


@dataclass(frozen=True)
class Pictures:
    """The files to train on, one entry a photo."""

    paths: list[Path]
    sizes: list[Size]
    masks: list[Path | None]  # files of masks/, at the pictures' scale or any other
    seen_shares: np.ndarray  # [n] float64: of the pixels, not hidden by alpha or mask (the lower of the two)
    num_alpha: int  # photos that are transparent somewhere


@dataclass(frozen=True)
class _Checked:
    """Hold what was learned of a file: it can be decoded, and this is in it."""

    size: Size
    seen_share: float
    source: Stamp  # of the original that it was scaled from; (0, 0): none, or unknown
    highest: int  # value of an original of 16 bits a channel; 0 of others, -1: not looked at


def prepare_images(
    data_dir: Path,
    names: list[str],
    *,
    camera_sizes: np.ndarray | None = None,
    masks: dict[str, str] | None = None,
    data_factor: float = 1.0,
    num_workers: int | None = None,
    say: Say = quiet,
) -> Pictures:
    """Find the picture files to train on, all present, whole, and at the wanted scale, and their masks.

    Scaled files are made where they are missing or older than their originals, in `images_{factor}` beside `images`
    and `masks_{factor}` beside `masks`, or in the user's cache where the dataset is read-only.

    Args:
        data_dir: The dataset; its pictures are in `images`.
        names: Paths of the pictures relative to `images`.
        camera_sizes: [n, 2] width and height of the pictures that the model was made of, whose shape these must have.
        masks: By picture name, the path of its mask in `masks`; empty to go by the files' names.
        data_factor: How many times smaller than the originals, at least 1.
        num_workers: Threads; all processors where None.
        say: Is told what was found beside the pictures, and made again.

    Raises:
        InputError: Pictures are absent, cannot be used, or are of a size that cameras or the factor do not explain.
    """
    if not 1 <= data_factor < np.inf:
        raise InputError(f"--data_factor is {data_factor}: give a number of at least 1.")
    originals = data_dir / "images"
    if not originals.is_dir():
        raise InputError(f"{originals} does not exist: put the dataset's pictures there.")
    missing = [name for name in names if not (originals / name).is_file()]
    if missing:
        raise InputError(
            f"Pictures of the model are missing from {originals}: {_listing(missing)}.{_hint(originals, missing)}"
        )
    workers = num_workers or os.cpu_count() or 1
    wanted = None if camera_sizes is None else dict(zip(names, map(tuple, camera_sizes.tolist()), strict=True))
    photos = _Folder(data_dir, "images", {name: name for name in names}, checked_picture, _scale_image, workers)
    found = photos.at_scale(data_factor, wanted, say)
    paths = {name: path for name, (path, _) in found.items()}
    checked = {name: entry for name, (_, entry) in found.items()}

    mask_names = masks or find_masks(data_dir / "masks", names, say)
    mask_paths: dict[str, Path] = {}
    shares = {name: checked[name].seen_share for name in names}
    if mask_names:
        files = _Folder(data_dir, "masks", mask_names, checked_mask, _scale_mask, workers)
        found = files.at_scale(data_factor, {name: checked[name].size for name in mask_names}, say)
        mask_paths = {name: path for name, (path, _) in found.items()}
        shares |= {name: min(shares[name], entry.seen_share) for name, (_, entry) in found.items()}
    return Pictures(
        paths=[paths[name] for name in names],
        sizes=[checked[name].size for name in names],
        masks=[mask_paths.get(name) for name in names],
        seen_shares=np.array([shares[name] for name in names]),
        num_alpha=sum(checked[name].seen_share < 1 for name in names),
    )


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Save nearly without loss: colours at full resolution."""
    image.save(path, format="JPEG", quality=98, subsampling="4:4:4")


def picture_sizes(folder: Path, names: list[str]) -> list[Size]:
    """Read (width, height) of each picture from its header alone. Raises InputError, naming the file, without one."""
    return in_threads(lambda name: picture_size(folder / name), names, os.cpu_count() or 1, f"Reading {folder.name}")


class _Folder:
    """One folder of files, one a photo, that are checked once, and scaled beside it."""

    def __init__(
        self,
        data_dir: Path,
        kind: str,
        files: dict[str, str],
        check: Callable[[Path], Seen],
        scale: Callable[[Path, Path, Size], None],
        workers: int,
    ) -> None:
        """
        Args:
            data_dir: The dataset.
            kind: "images" or "masks", the folder's name.
            files: By picture name, the path in the folder.
            check: Decodes a file and returns what of it is seen, or raises PictureFault.
            scale: Writes a file, first path, at a size to the second path.
            workers: Threads.
        """
        self._data_dir = data_dir
        self._kind = kind
        self._files = files
        self._check = check
        self._scale = scale
        self._workers = workers

    def at_scale(self, factor: float, shapes: dict[str, Size] | None, say: Say) -> dict[str, tuple[Path, _Checked]]:
        """Return each picture's file at a scale, and what is known of it.

        Args:
            factor: How many times smaller than the originals.
            shapes: By picture name, the size whose shape the original must have; None: any.
            say: Is told what is made again.

        Raises:
            InputError: A file cannot be used.
        """
        originals = self._data_dir / self._kind
        if factor == 1:
            known = self._remembered(originals)
            keys = self._keys(originals, self._files)
            new = [name for name, key in keys.items() if key not in known]
            sizes = self._headers(originals, new, shapes)
            entries = self._examine(originals, self._files, new, sizes, (0, 0))
            checked = {name: entries[name] if name in entries else known[key] for name, key in keys.items()}
            self._warn_of(self._check_values({name: entry.highest for name, entry in checked.items()}), say)
            if new:
                self._remember(originals, {keys[name]: checked[name] for name in self._files})
            return {name: (originals / self._files[name], checked[name]) for name in self._files}
        folders = [self._data_dir / f"{self._kind}_{factor:.10g}"]
        folders.append(user_cache_dir(self._data_dir) / folders[0].name)
        if not is_writable(folders[0] if folders[0].exists() else self._data_dir):
            plan = self._plan(folders[0], factor, shapes)
            if not plan.todo:
                return self._finished(plan, say)
            folders = folders[1:]
        return self._finished(self._carried_out(self._plan(folders[0], factor, shapes), say), say)

    def _plan(self, folder: Path, factor: float, shapes: dict[str, Size] | None) -> _Plan:
        """Find out which scaled files are there and of the originals that lie there now."""
        originals = self._data_dir / self._kind
        names = self._scaled_names()
        sources = {name: stamp for (name, *_), stamp in zip(*self._stamped(originals, self._files), strict=True)}
        present = {name: names[name] for name in self._files if (folder / names[name]).is_file()}
        known = self._remembered(folder)
        keys = self._keys(folder, present)
        plan = _Plan(folder, names, sources, {}, {}, {}, [], {}, [])
        for name, key in keys.items():
            if key in known and known[key].source == sources[name]:
                plan.kept[name] = known[key]
        rest = [name for name in self._files if name not in plan.kept]
        if not rest:
            self._look_at_values(plan)
            return plan
        sizes = self._headers(originals, rest, shapes)
        plan.targets.update({name: _scaled_size(sizes[name], factor) for name in rest})
        tiny = next((name for name, size in plan.targets.items() if min(size) < 2), None)
        if tiny is not None:
            raise InputError(
                f"--data_factor {factor:g} leaves {plan.targets[tiny][0]}x{plan.targets[tiny][1]} pixels of {tiny}: "
                "choose a smaller one."
            )
        plan.source_sizes.update(sizes)
        for name, entry in self._sound(folder, {n: names[n] for n in rest if n in present}).items():
            # Files that came with the dataset may have been rounded another way.
            if np.abs(np.subtract(entry.size, plan.targets[name])).max() > 1:
                if keys[name] in known and known[keys[name]].source != (0, 0):
                    plan.stale.append(name)  # made from an original of another size
                    continue
                raise InputError(
                    f"{folder / names[name]} is {entry.size[0]}x{entry.size[1]} pixels where --data_factor {factor:g} "
                    f"asks for {plan.targets[name][0]}x{plan.targets[name][1]}: move the folder {folder} away."
                )
            made_here = keys[name] in known and known[keys[name]].source != (0, 0)
            is_older = keys[name][2] < sources[name][1]
            if made_here or (is_older and not self._shows(folder / names[name], originals / self._files[name])):
                plan.stale.append(name)
            else:
                plan.kept[name] = _Checked(entry.size, entry.seen_share, sources[name], -1)
        self._look_at_values(plan)
        return plan

    def _look_at_values(self, plan: _Plan) -> None:
        """Find out which values the originals of 16 bits reach: their scaled files have 8, and do not tell.

        Raises:
            InputError: They hold fewer bits.
        """
        plan.highest.update({name: entry.highest for name, entry in plan.kept.items() if entry.highest >= 0})
        unknown = [name for name in self._files if name not in plan.highest]
        if self._kind == "masks":
            plan.highest.update(dict.fromkeys(unknown, 0))
        elif unknown:
            originals = self._data_dir / self._kind
            sizes = plan.source_sizes.values() or [entry.size for entry in plan.kept.values()]
            workers = fitting_workers(self._workers, max(w * h for w, h in sizes))
            paths = {name: originals / self._files[name] for name in unknown}
            plan.highest.update(self._in_threads(originals, highest_of_16_bits, paths, workers, "Reading depths"))
        plan.dark += self._check_values(plan.highest)

    def _check_values(self, highest: dict[str, int]) -> list[str]:
        """Return the pictures of 16 bits that are nearly black beside others.

        Args:
            highest: By picture name, the highest value of a picture of 16 bits; 0 of others.

        Raises:
            InputError: All of them hold fewer bits.
        """
        originals = self._data_dir / self._kind
        paths = {originals / self._files[name]: name for name, value in highest.items() if value > 0}
        faults, dark = unscaled_values({path: highest[name] for path, name in paths.items()})
        if faults:
            raise InputError(self._faults_of(originals, faults))
        return [paths[path] for path in dark]

    def _warn_of(self, dark: list[str], say: Say) -> None:
        if dark:
            which = f"{dark[0]} is" if len(dark) == 1 else f"{len(dark):,} photos, such as {dark[0]}, are"
            say(
                f"Warning: {which} nearly black: of 16 bits only the lower 12 are used, where other photos use all. "
                "If they come from another camera, multiply their values by 16; else leave them out of the model."
            )

    def _carried_out(self, plan: _Plan, say: Say) -> _Plan:
        """Make the scaled files that a plan finds missing, damaged or stale, each whole at once under its own name."""
        if plan.stale:
            say(
                f"{len(plan.stale):,} of {counted(len(self._files), 'file')} in {plan.folder} were not made of the "
                f"present ones in {self._kind}, such as {plan.stale[0]}: that is scaled again."
            )
        todo = plan.todo
        if not todo:
            return plan
        originals, folder = self._data_dir / self._kind, plan.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = {name: (folder / plan.names[name]).is_file() for name in todo}
            with _exclusive(folder):  # a second run waits here, and then finds the work done
                for leftover in folder.rglob(".*.part"):
                    leftover.unlink()
                todo = [name for name in todo if before[name] or not (folder / plan.names[name]).is_file()]
                workers = fitting_workers(self._workers, max(w * h for w, h in plan.source_sizes.values()))
                in_threads(
                    lambda name: self._scale(
                        originals / self._files[name], folder / plan.names[name], plan.targets[name]
                    ),
                    todo,
                    workers,
                    f"Scaling to {folder.name}",
                )
        except PictureFault as error:
            raise InputError(self._faults_of(originals, [error])) from error
        except OSError as error:
            raise InputError(
                f"Scaled files cannot be written to {folder} ({reason(error)}): make room there."
            ) from error
        made = {name: plan.names[name] for name in plan.todo}
        sizes = self._headers(folder, list(made), None, made)
        for name, entry in self._examine(folder, made, list(made), sizes, (0, 0)).items():
            plan.kept[name] = _Checked(entry.size, entry.seen_share, plan.sources[name], plan.highest[name])
        return plan

    def _finished(self, plan: _Plan, say: Say) -> dict[str, tuple[Path, _Checked]]:
        self._warn_of(plan.dark, say)
        keys = self._keys(plan.folder, plan.names)
        was_known = all(entry.highest >= 0 for entry in plan.kept.values())
        plan.kept.update({n: replace(entry, highest=plan.highest[n]) for n, entry in plan.kept.items()})
        if plan.targets or not was_known:  # something was looked at
            self._remember(plan.folder, {keys[name]: plan.kept[name] for name in self._files})
        return {name: (plan.folder / plan.names[name], plan.kept[name]) for name in self._files}

    def _scaled_names(self) -> dict[str, str]:
        """Return scaled files' names: of pictures their own, of masks COLMAP's."""
        return {name: file if self._kind == "images" else f"{name}.png" for name, file in self._files.items()}

    def _shows(self, scaled: Path, original: Path) -> bool:
        """Tell whether a scaled file of unknown origin is the original, but for another program's way of scaling."""
        try:
            if self._kind == "masks":
                there = decode_mask(scaled)
                return bool((scaled_mask(decode_mask(original), there.shape[::-1]) != there).mean() < 0.02)
            there = decode_picture(scaled)[0]
            here = Image.fromarray(decode_picture(original)[0]).resize(there.shape[1::-1], Image.Resampling.BICUBIC)
        except PictureFault:
            return False
        difference = (np.asarray(here, np.float32) - there) @ np.array([0.299, 0.587, 0.114], np.float32)  # [H, W]
        return float(np.abs(cv2.GaussianBlur(difference, (0, 0), 1.5)).max()) < _SAME_PICTURE

    def _headers(
        self,
        folder: Path,
        names: list[str],
        shapes: dict[str, Size] | None,
        files: dict[str, str] | None = None,
    ) -> dict[str, Size]:
        """Read the sizes of files by their headers, which need no memory, and compare their shapes.

        Raises:
            InputError: A file has no header, or another shape.
        """
        paths = {name: folder / (files or self._files)[name] for name in names}
        sizes = self._in_threads(folder, picture_size, paths, self._workers, "Reading sizes")
        for name, size in sizes.items():
            if shapes is None:
                continue
            shape, mask_of = shapes[name], name if self._kind == "masks" else None
            if mask_of is not None and not has_shape(size, shape):  # a mask is made of the photo as it is stored
                shape = picture_size(self._data_dir / "images" / name)
            check_shape(paths[name], size, shape, mask_of)
        return sizes

    def _examine(
        self, folder: Path, files: dict[str, str], names: list[str], sizes: dict[str, Size], source: Stamp
    ) -> dict[str, _Checked]:
        """Decode files: what cannot be used should stop a run before it starts, not hours later when its turn comes.

        Raises:
            InputError: Files cannot be used.
        """
        if not names:
            return {}
        workers = fitting_workers(self._workers, max(sizes[name][0] * sizes[name][1] for name in names))
        paths = {name: folder / files[name] for name in names}
        found = self._in_threads(folder, self._check, paths, workers, "Checking")
        return {name: _Checked(sizes[name], found[name].share, source, found[name].highest) for name in names}

    def _sound(self, folder: Path, files: dict[str, str]) -> dict[str, _Checked]:
        """Decode scaled files, and leave out those that cannot be used: they are made again."""

        def examined(name: str) -> _Checked | None:
            try:
                path = folder / files[name]
                return _Checked(picture_size(path), self._check(path).share, (0, 0), -1)
            except PictureFault:
                return None

        results = in_threads(examined, list(files), self._workers, f"Checking {folder.name}")
        return {name: entry for name, entry in zip(files, results, strict=True) if entry is not None}

    def _in_threads(
        self, folder: Path, function: Callable[[Path], Result], paths: dict[str, Path], workers: int, doing: str
    ) -> dict[str, Result]:
        """Return function(path) by name. Raises InputError for all files for which it raises PictureFault."""

        def attempted(name: str) -> Result | PictureFault:
            try:
                return function(paths[name])
            except PictureFault as fault:
                return fault

        results = dict(zip(paths, in_threads(attempted, list(paths), workers, f"{doing}: {folder.name}"), strict=True))
        faults = [result for result in results.values() if isinstance(result, PictureFault)]
        if faults:
            raise InputError(self._faults_of(folder, faults)) from faults[0]
        return {name: result for name, result in results.items() if not isinstance(result, PictureFault)}

    def _faults_of(self, folder: Path, faults: list[PictureFault]) -> str:
        """Say of files that cannot be used what is wrong with them: one file in its own words, many by their causes."""
        if len(faults) == 1:
            return str(faults[0])
        groups: dict[tuple[str, str], list[str]] = {}
        for fault in faults:
            groups.setdefault((fault.cause, fault.remedy), []).append(str(fault.path.relative_to(folder)))
        causes = [f"{_listing(names)}, since {cause} ({remedy})" for (cause, remedy), names in groups.items()]
        return f"Files in {folder} cannot be decoded: {'; '.join(causes[:_LISTED])}."

    def _stamped(self, folder: Path, files: dict[str, str]) -> tuple[list[tuple[str, str]], list[Stamp]]:
        stamps = fingerprint([folder / file for file in files.values()]).tolist()
        return list(files.items()), [(size, time) for size, time in stamps]

    def _keys(self, folder: Path, files: dict[str, str]) -> dict[str, tuple[str, int, int]]:
        """Return by picture name what a file is known by: its path, size and time."""
        return {name: (file, *stamp) for (name, file), stamp in zip(*self._stamped(folder, files), strict=True)}

    def _record(self, folder: Path) -> CacheFile:
        return CacheFile(self._data_dir / "sparse", self._data_dir, f"checked_{folder.name}.npz")

    def _remembered(self, folder: Path) -> dict[tuple[str, int, int], _Checked]:
        known: dict[tuple[str, int, int], _Checked] = {}
        for arrays in self._record(folder).read():
            try:
                is_current = int(arrays["rules"]) == _RULES
                if folder.name == self._kind and not is_current:
                    continue  # but what scaled files were made of holds
                highest = arrays["highest"].tolist() if is_current else [-1] * len(arrays["sizes"])
                names = arrays["names"].tobytes().decode().split("\n")
                columns = (arrays[column].tolist() for column in ("stamps", "sizes", "seen_shares", "sources"))
                for name, stamp, size, share, source, value in zip(names, *columns, highest, strict=True):
                    known[name, int(stamp[0]), int(stamp[1])] = _Checked(
                        (int(size[0]), int(size[1])), float(share), (int(source[0]), int(source[1])), int(value)
                    )
            except (KeyError, TypeError, ValueError, IndexError):  # damaged, or of an earlier form: looked at again
                continue
        return known

    def _remember(self, folder: Path, checked: dict[tuple[str, int, int], _Checked]) -> None:
        self._record(folder).write(
            {
                "rules": np.array(_RULES),
                "names": np.frombuffer("\n".join(name for name, *_ in checked).encode(), np.uint8),
                "stamps": np.array([key[1:] for key in checked], np.int64).reshape(-1, 2),
                "sizes": np.array([entry.size for entry in checked.values()], np.int64).reshape(-1, 2),
                "seen_shares": np.array([entry.seen_share for entry in checked.values()], np.float64),
                "highest": np.array([entry.highest for entry in checked.values()], np.int64),
                "sources": np.array([entry.source for entry in checked.values()], np.int64).reshape(-1, 2),
            }
        )


@dataclass
class _Plan:
    """Say what is to be done to have all files of a folder at a scale; dictionaries are by picture name."""

    folder: Path
    names: dict[str, str]  # in `folder`
    sources: dict[str, Stamp]  # of the originals
    source_sizes: dict[str, Size]  # of originals whose scaled files are not known, as is
    targets: dict[str, Size]
    kept: dict[str, _Checked]
    stale: list[str]  # there, and of other originals
    highest: dict[str, int]  # value of each original of 16 bits a channel; 0 of others
    dark: list[str]  # nearly black originals

    @property
    def todo(self) -> list[str]:
        return [name for name in self.names if name not in self.kept]


def _scaled_size(size: Size, factor: float) -> Size:
    return max(1, round(size[0] / factor)), max(1, round(size[1] / factor))


def _scale_image(source: Path, target: Path, size: Size) -> None:
    """Write a picture at a size, in the same format. Its transparency becomes all or nothing, as it is used."""
    rgb, seen = decode_picture(source)
    image = Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC)  # antialiased
    if seen is not None:
        image.putalpha(Image.fromarray(scaled_mask(seen, size)).convert("L"))
    _write(image, target, picture_format(source))


def _scale_mask(source: Path, target: Path, size: Size) -> None:
    _write(Image.fromarray(scaled_mask(decode_mask(source), size)).convert("L"), target, "PNG")


def _write(image: Image.Image, target: Path, file_format: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    if file_format in ("JPEG", "MPO"):  # MPO: a phone's JPEG
        save_jpeg(image, temporary)
    elif file_format in ("WEBP", "AVIF"):
        image.save(temporary, format=file_format, **({"lossless": True} if file_format == "WEBP" else {"quality": 98}))
    else:
        image.save(temporary, format=file_format)
    os.replace(temporary, target)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which the system releases even when the process is killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def in_threads(function: Callable[[Item], Result], items: list[Item], workers: int, description: str) -> list[Result]:
    """Return function(item) of each item, in order; Pillow works outside the interpreter's lock. Stops at an error."""
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


def _hint(folder: Path, missing: list[str]) -> str:
    """Say where a missing picture may be: under a name that differs in letters, suffix or folder alone."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFKD", PurePosixPath(name.replace("\\", "/")).stem).casefold().strip("\"' ")

    present: dict[str, str] = {}
    for place, _, files in os.walk(folder):
        for file in files:
            present.setdefault(plain(file), (Path(place).relative_to(folder) / file).as_posix())
    stands = next((name for name in missing if (folder / name).exists() or (folder / name).is_symlink()), None)
    if stands is not None:
        kind = "a link to nothing" if (folder / stands).is_symlink() else "no file"
        return f" What is called {stands} there is {kind}: put the picture in its place."
    similar = next(((name, present[plain(name)]) for name in missing if plain(name) in present), None)
    if similar is None:
        return " Put them there, or use the model that belongs to these pictures."
    return f" In the place of {similar[0]} there is {similar[1]}: give the pictures the names that the model has."
