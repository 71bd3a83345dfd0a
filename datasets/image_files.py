"""Opens, checks and decodes picture and mask files, and says of one that cannot be used what it is and what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from datasets.free_memory import free_bytes
from errors import InputError, reason

# Decoders that are tried: what COLMAP reads, as far as Pillow decodes it without another program (it hands EPS to
# Ghostscript). The content of a file decides, not its name.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", *(("AVIF",) if features.check("avif") else ()))
# fmt: off
PHOTO_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm", ".pnm", ".jp2", ".j2k", ".jpx",
    ".mpo", ".avif", ".heic", ".heif", ".jxl", ".gif", ".tga", ".exr", ".hdr", ".pfm",
))
# Photos as a sensor saw them. Many are TIFF files whose first picture is a thumbnail, which must not be taken for them.
_RAW_SUFFIXES = frozenset((
    ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".orf", ".raf", ".rw2", ".pef", ".srw",
    ".iiq", ".3fr", ".fff", ".erf", ".mef", ".mos", ".x3f", ".rwl",
))
# fmt: on

# Large-format frames have 100 to 450 million pixels, far above the bound at which Pillow suspects an attack. Here the
# camera of the COLMAP model and the free memory are the bounds, and this one where there is no camera.
Image.MAX_IMAGE_PIXELS = None
MOST_PIXELS = 1_000_000_000
_LEAST_BYTES = 4  # that a pixel takes while it is decoded
_MOST_BYTES = 16  # with the coefficients of a progressive JPEG, and a copy
_HALF_SEEN = 128  # of 255
_SENSOR_BITS = (8, 10, 12, 14)  # that pictures of 16 bits hold where nobody has scaled their values
_DARK_BITS = 12  # of a picture of 16 bits beside others that use all of them, below which it is nearly black
_SUBFILE_TYPE = 254  # the TIFF tag whose lowest bit says "a smaller version of another picture in this file"


class PictureFault(InputError):
    """A picture file that cannot be used.

    Attributes:
        path: The file.
        cause: What is wrong with it, "it is ...", the same words for the same fault.
        remedy: What helps.
    """

    def __init__(self, path: Path, cause: str, remedy: str, detail: str = "") -> None:
        """Make the sentence; `detail` is what a library says of this one file."""
        super().__init__(f"{path} cannot be decoded, since {cause}{f' ({detail})' if detail else ''}: {remedy}.")
        self.path = path
        self.cause = cause
        self.remedy = remedy


def decode_image(path: Path) -> np.ndarray:
    """Decode a picture as COLMAP saw it: RGB, not turned by its EXIF orientation  # [H, W, 3] uint8.

    Gray, palette and CMYK pictures become RGB, 16 bits become 8, transparency is dropped.

    Raises:
        PictureFault: It cannot be decoded.
    """
    return decode_picture(path)[0]


def decode_picture(path: Path, size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode a picture as `decode_image` does, and its transparency.

    Args:
        path: The file.
        size: Width and height that it must have, which are then its bound.

    Returns:
        [H, W, 3] uint8, and [H, W] bool, false where the picture is more transparent than not; None where it is
        nowhere.

    Raises:
        PictureFault: It cannot be decoded.
    """
    with _opened(path) as image:
        if size is not None and image.size != size:
            raise PictureFault(path, "its size has changed since the scene was loaded", "start again")
        _check_memory(path, image.size, bounded=size is not None)
        return np.asarray(to_rgb(path, image)), seen_of(image)


def decode_alpha(path: Path) -> np.ndarray | None:
    """Decode the transparency of a picture alone, as `decode_picture` does; of one that has none the header is read.

    Raises:
        PictureFault: It cannot be decoded.
    """
    with _opened(path) as image:
        return seen_of(image)


def decode_mask(path: Path) -> np.ndarray:
    """Decode a mask as COLMAP understands it  # [H, W] bool, false where the photo is to be ignored.

    That is where all channels are 0. A lossy mask is not exactly 0 there, so in a JPEG dark is 0.

    Raises:
        PictureFault: It cannot be decoded.
    """
    with _opened(path) as image:
        _check_memory(path, image.size)
        lossy = image.format in ("JPEG", "MPO")
        if image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        elif image.mode in ("LA", "La", "RGBA", "RGBa", "RGBX"):
            image = image.convert("L" if image.mode.startswith("L") else "RGB")
        values = np.asarray(image)
        highest = values if values.ndim == 2 else values.max(axis=2)
        return highest >= _HALF_SEEN if lossy else highest != 0


def picture_size(path: Path) -> tuple[int, int]:
    """Return the width and height of a picture by its header alone.

    Raises:
        PictureFault: It has none.
    """
    with _opened(path) as image:
        return image.size


def is_turned(path: Path) -> bool:
    """Tell whether a picture's EXIF orientation turns or mirrors it where it is shown.

    Raises:
        PictureFault: It is no picture.
    """
    with _opened(path) as image:
        try:
            return image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
        except Exception:  # what stands in EXIF is as many programs wrote it
            return False


def picture_format(path: Path) -> str:
    """Return Pillow's name of a picture's format.

    Raises:
        PictureFault: It has none.
    """
    with _opened(path) as image:
        return image.format or "PNG"


@dataclass(frozen=True)
class Seen:
    """Say what there is in a picture or mask.

    share: of the pixels, that are not hidden by it.
    highest: value of a picture of 16 bits a channel; 0 for others.
    """

    share: float
    highest: int = 0


def checked_picture(path: Path) -> Seen:
    """Decode a picture to its end, as far as that tells whether training will be able to.

    Raises:
        PictureFault: Training could not decode it.
    """
    with _opened(path) as image:
        _check_memory(path, image.size, bounded=True)
        if image.format in ("JPEG", "MPO"):  # without transparency, and always convertible
            image.draft(None, (1, 1))  # read to its end all the same, but mostly not transformed
            image.load()
            return Seen(1.0)
        is_deep = _has_16_bits(image)
        rgb = to_rgb(path, image)
        seen = seen_of(image)
        return Seen(1.0 if seen is None else float(seen.mean()), _highest_of_16_bits(image, rgb) if is_deep else 0)


def checked_mask(path: Path) -> Seen:
    """Decode a mask to its end.

    Raises:
        PictureFault: Training could not decode it.
    """
    return Seen(float(decode_mask(path).mean()))


def highest_of_16_bits(path: Path) -> int:
    """Return the highest value of a picture of 16 bits a channel; 0 for others, which are not decoded.

    Raises:
        PictureFault: It cannot be decoded.
    """
    with _opened(path) as image:
        if not _has_16_bits(image):
            return 0
        _check_memory(path, image.size, bounded=True)
        return _highest_of_16_bits(image, to_rgb(path, image))


def unscaled_values(highest: dict[Path, int]) -> tuple[list[PictureFault], list[Path]]:
    """Find pictures of 16 bits whose values are those of fewer bits, so that they would be dark or black.

    The photos of a dataset come from one sensor and one program, so what all of them reach together tells how many
    bits they hold. Where some use all bits, others of them are dark.

    Args:
        highest: By path, the highest value of each picture of 16 bits.

    Returns:
        A fault for each picture that cannot be used; and those that are nearly black beside others that are not.
    """
    reached = max(highest.values(), default=0).bit_length()
    bits = next((bits for bits in _SENSOR_BITS if reached <= bits), 16)
    if bits == 16:
        return [], [path for path, value in highest.items() if value < 1 << _DARK_BITS]
    if bits == 8:
        cause = "its values of 16 bits are all below 256, so it would be black"
        remedy = "save it with 8 bits a channel, or with values up to 65535, under the same name"
    else:
        cause = (
            f"its values of 16 bits are all below {1 << bits}, as those of a {bits}-bit sensor are, so it would be "
            + ("a quarter as bright as it is" if bits == 14 else "nearly black")
        )
        remedy = f"multiply its values by {1 << (16 - bits)}, or save it with 8 bits a channel, under the same name"
    return [PictureFault(path, cause, remedy) for path in highest], []


def to_rgb(path: Path, image: Image.Image) -> Image.Image:
    """Convert an opened picture to 8-bit RGB without its transparency. Raises PictureFault where that has no sense."""
    if image.mode.startswith("I"):  # gray of 16 bits, which convert() would clip at 255
        gray = np.asarray(image).astype(np.int64)
        low, high = int(gray.min()), int(gray.max())
        if low < 0 or high > 65535:
            raise PictureFault(
                path, "its values are not of 8 or 16 bits", "save it with 8 or 16 bits a channel, under the same name"
            )
        rgb = Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    elif image.mode == "RGB":
        image.load()
        rgb = image
    elif image.has_transparency_data and image.mode in ("P", "PA", "L", "1"):
        rgb = image.convert("RGBA").convert("RGB")
    else:
        try:
            rgb = image.convert("RGB")
        except ValueError as error:
            raise PictureFault(
                path, f"its colours are {image.mode}, which cannot be converted", "save it as RGB, under the same name"
            ) from error
    return rgb


def seen_of(image: Image.Image) -> np.ndarray | None:
    """Return where an opened picture is opaque  # [H, W] bool; None where it is everywhere."""
    if not image.has_transparency_data:
        return None
    alpha = image if image.mode in ("RGBA", "LA", "PA") else image.convert("RGBA")
    seen = np.asarray(alpha.getchannel("A")) >= _HALF_SEEN
    return None if seen.all() else seen


def fitting_workers(workers: int, num_pixels: int) -> int:
    """Return how many threads may decode pictures of so many pixels at once, at least 1."""
    return max(1, min(workers, free_bytes() // (2 * _MOST_BYTES * max(num_pixels, 1))))


def _check_memory(path: Path, size: tuple[int, int], bounded: bool = False) -> None:
    num_pixels = size[0] * size[1]
    if num_pixels > MOST_PIXELS and not bounded:
        raise PictureFault(
            path,
            f"its header asks for {size[0]}x{size[1]} pixels, more than {MOST_PIXELS:,}",
            "check that it is a photo",
        )
    if num_pixels * _LEAST_BYTES > free_bytes():
        raise PictureFault(
            path,
            f"its {size[0]}x{size[1]} pixels take {num_pixels * _LEAST_BYTES / 2**30:.1f} GiB of memory, and "
            f"{free_bytes() / 2**30:.1f} are free",
            "free memory, or put pictures in images that have been scaled down",
        )


def _has_16_bits(image: Image.Image) -> bool:
    """Tell whether a picture that is not decoded yet has 16 bits a channel; of colours Pillow keeps the upper 8."""
    if image.mode.startswith("I"):  # gray, of which all is left
        return True
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any((isinstance(a, str) and ";16" in a) or (image.format == "PPM" and a == 65535) for a in arguments):
            return True
    return False


def _highest_of_16_bits(image: Image.Image, rgb: Image.Image) -> int:
    """Return the highest value of a picture of 16 bits, decoded; of colours Pillow has left the upper bytes alone."""
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    upper = int(np.asarray(rgb).max())
    return upper << 8 | 255 if upper else 255


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture; whatever fails in the block becomes a PictureFault."""
    try:
        if path.suffix.lower() in _RAW_SUFFIXES:
            raise PictureFault(
                path,
                "it is a raw photo",
                "develop it to JPEG or TIFF, of the size that COLMAP saw",
            )
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_SUBFILE_TYPE, 0) & 1:
                raise PictureFault(
                    path,
                    "its first picture is a thumbnail",
                    "save the photo alone, under the same name",
                )
            if image.mode == "F":
                raise PictureFault(
                    path,
                    "its values are floating-point numbers",
                    "save it with 8 or 16 bits a channel, under the same name",
                )
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise PictureFault(path, "it is not there any more", "put it back") from error
    except PermissionError as error:
        raise PictureFault(path, "it may not be read", "change its permissions") from error
    except UnidentifiedImageError as error:
        raise _fault_of_unknown(path) from error
    except MemoryError as error:
        raise PictureFault(path, "memory ran out", "free memory, or raise --data_factor") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise PictureFault(
            path, "it is truncated or damaged", "replace it by a whole picture", reason(error)
        ) from error


def _fault_of_unknown(path: Path) -> PictureFault:
    """Say what a file is that no decoder takes."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start.strip(b"\0"):
        what = "it is empty" if not start else "it holds zeros"
        return PictureFault(path, what, "replace it by a whole picture")
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    kinds = {
        "it is a HEIC picture": brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"),
        "it is an AVIF picture": brand in (b"avif", b"avis"),
        "it is a raw photo": brand == b"crx " or start.startswith((b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"IIU\0")),
        "it is a video": brand != b"" or start[8:12] == b"AVI ",
        "it is a JPEG XL picture": start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")),
        "it is an OpenEXR picture of floating-point numbers": start.startswith(b"\x76\x2f\x31\x01"),
        "it is a Radiance picture of floating-point numbers": start.startswith((b"#?RADIANCE", b"#?RGBE")),
        "its values are floating-point numbers": start.startswith((b"PF\n", b"PF ", b"Pf\n")),
        "it is a TIFF picture of a kind that is not read, such as one of floating-point colours": start.startswith(
            (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        ),
        "it is a GIF picture": start.startswith(b"GIF8"),
        "it is a Photoshop document": start.startswith(b"8BPS"),
        "it is a PDF or PostScript document": start.startswith((b"%PDF", b"%!PS")),
        "it is a web page and no picture": start.lstrip().lower().startswith((b"<!doctype", b"<html")),
        "it is the address of a file in Git LFS": start.startswith(b"version https://git-lfs"),
    }
    cause = next((kind for kind, is_it in kinds.items() if is_it), None)
    if cause is None:
        return PictureFault(
            path, "it is truncated, damaged, or of no known format", "replace it by a whole picture, a JPEG or PNG"
        )
    if "web page" in cause or "Git LFS" in cause:
        return PictureFault(path, cause, "download the picture itself")
    return PictureFault(path, cause, "convert it to JPEG or PNG, of the same size, under the same name")
