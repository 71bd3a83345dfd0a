"""Shows a finished model in a browser.

    python view.py MODEL [--port 8080] [--host 127.0.0.1] [--device auto]

MODEL is a checkpoint or a 3DGS PLY file of any program. It stays in host memory; what a view sees is brought to the
device, so that a model may be many times larger than the GPU's memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import startup  # noqa: F401, before torch is imported
from distributed.mesh import refuse_several
from errors import refusing, stopped_by_signals
from option_words import parse
from training.opened import open_model
from training.run import select_device
from viewer.page import HOST, IDLE, PORT, Page


@dataclass
class Options:
    model: tyro.conf.Positional[Path]
    """A checkpoint (ckpts/ckpt_30000.pt) or a 3DGS PLY file."""
    port: int = PORT
    """Where the page is served."""
    host: str = HOST
    """By whom it may be opened: from this machine alone, or 0.0.0.0 from everywhere."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to render; auto takes CUDA where there is a GPU."""
    antialiased: bool = False
    """Draw as a model that was trained with --antialiased; of a checkpoint this is known."""


def main() -> None:
    """Show a model until Ctrl-C or SIGTERM; the exit code is 2 for bad input."""
    with refusing():
        refuse_several("view.py shows a model")
        options = parse(Options, __doc__)
    with refusing(), stopped_by_signals():
        try:
            show(options)
        except KeyboardInterrupt:
            print("Closed.")


def show(options: Options) -> None:
    """Serve the page, and draw for who opens it.

    Raises:
        InputError: The model cannot be read, viser is not installed, or the port is taken.
    """
    page = Page(options.port, options.host)
    try:
        model, up, pose = open_model(options.model, select_device(options.device), antialiased=options.antialiased)
        page.place(up, pose)
        page.say([options.model.name, f"{model.gaussians.num_gaussians:,} Gaussians"])
        print(f"{options.model} is shown at {page.url}; Ctrl-C ends.", flush=True)
        while True:
            if not page.draw(model.draw, model.make_cameras, 0):
                time.sleep(IDLE)
    finally:
        page.close()


if __name__ == "__main__":
    main()
