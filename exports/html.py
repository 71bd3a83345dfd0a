"""One self-contained HTML page with a viewer: `page.html` with the model as SPZ in it, which opens without a network.

The viewer is our own, of WebGL2 and nothing else: 18 kB in place of the megabytes that a viewer on top of an engine
brings, with nothing to download and no licence but the suite's. It sorts on another thread, draws harmonics up to
degree 3, and turns by mouse, fingers and keys.
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from exports.gaussians import Gaussians
from exports.spz import encode_spz, spz_bytes
from training.files import write_file

PAGE = Path(__file__).with_name("page.html")
TITLE, MODEL = "{{TITLE}}", "{{MODEL}}"  # what is put into it


def write_html(path: Path, gaussians: Gaussians) -> None:
    """Write the page; the model is in memory at once."""
    model = io.BytesIO()
    encode_spz(model, gaussians.in_morton_order())
    page = PAGE.read_text().replace(TITLE, html.escape(path.stem))
    before, after = page.split(MODEL)
    write_file(path, before.encode() + base64.b64encode(model.getbuffer()) + after.encode())


def html_bytes(count: int, sh_degree: int) -> int:
    """Return how large the file can become: as if nothing could be compressed."""
    return (1 << 16) + spz_bytes(count, sh_degree) * 4 // 3
