"""Pictures inside a page, and the files of photo and rendering that a run leaves."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WIDEST = 640  # pixels, in a page


@dataclass(frozen=True)
class Picture:
    """Hold a picture that stands in a page itself."""

    caption: str
    source: str  # a data URI


def halves(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return photo and rendering [H, W, 3] uint8 of a held-out view; None where the file is missing or damaged."""
    try:
        with Image.open(path) as image:
            pair = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):  # Pillow's ways to say that a PNG is damaged
        return None
    middle = pair.shape[1] // 2
    return pair[:, :middle], pair[:, middle:]


def data_uri(picture: np.ndarray) -> str:
    """Return a picture [H, W, 3] uint8 as a WebP inside a URI, at most `WIDEST` wide."""
    image = Image.fromarray(picture)
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "webp", quality=88)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
