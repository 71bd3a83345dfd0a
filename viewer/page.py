"""The page in a browser on which somebody looks at a model, served by viser."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from errors import InputError
from offload.culling.cameras import Cameras
from viewer.frame import frame
from viewer.frustums import Frustums, Photo
from viewer.pace import Pace

PORT, HOST = 8080, "127.0.0.1"
EVERYWHERE = "0.0.0.0"  # as a host: by whoever reaches this machine
ELSEWHERE = ("192.0.2.1", 9)  # an address that is nobody's (RFC 5737)
LONGEST_SIDE = 960  # pixels of a picture, at first
IDLE = 0.02  # seconds between looks at a page where nothing is to draw: too short to be noticed, and costs nothing
SAY_AGAIN = 0.5  # seconds between changes of what the page says


@dataclass
class _Client:
    """Hold somebody's page: how it is drawn for, and the camera that it was drawn with."""

    handle: Any
    pace: Pace
    seen: float = -math.inf  # update_timestamp of the camera


# Makes cameras of viewmats [1, 4, 4], Ks [1, 3, 3], width and height; the rest of what they are is the model's.
MakeCameras = Callable[[torch.Tensor, torch.Tensor, int, int], Cameras]


def cameras_of(camera: Any, num_pixels: int, make: MakeCameras) -> Cameras:
    """Return what a page's camera, viser's, sees in about so many pixels."""
    aspect = camera.aspect or 1.0
    height = max(round(math.sqrt(num_pixels / aspect)), 2)
    width = max(round(height * aspect), 2)
    focal = height / 2 / math.tan(camera.fov / 2)
    K = torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    w, x, y, z = camera.wxyz
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_quat([x, y, z, w]).as_matrix(), camera.position
    viewmat = torch.from_numpy(np.linalg.inv(pose)).float()
    return make(viewmat[None], K[None], width, height)


def check_free(port: int, host: str) -> None:
    """Refuse a port that is taken: viser would serve at the next one, and try for ever at a host that is none.

    Raises:
        InputError: Naming the port.
    """
    if not 1 <= port <= 65535:
        raise InputError(f"Port {port} is none: give one from 1 to 65535, such as {PORT}.")
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
            tried.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"Port {port} is in use: give another one, such as {port + 1}.") from error
        raise InputError(
            f"The viewer cannot be served at {host}:{port} ({error.strerror or error}): give a port above 1023, and "
            "127.0.0.1, 0.0.0.0 or an address of this machine as its host."
        ) from error


def address_of(host: str) -> str:
    """Return under which address a page is opened that is served to a host."""
    if host != EVERYWHERE:
        return host
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect(ELSEWHERE)  # sends nothing, but finds by which address this machine goes out
        return way.getsockname()[0]
    return HOST  # it is in no network


class Page:
    """Serve a page, and draw for all who have it open. Nothing is drawn by itself: whoever has the model calls `draw`.

    Attributes:
        url: What to open.
        is_paused: Whether somebody has pressed Pause.
    """

    def __init__(self, port: int = PORT, host: str = HOST, *, can_pause: bool = False) -> None:
        """
        Args:
            port: Where to serve.
            host: By whom it may be opened: 127.0.0.1, or none, from this machine alone, 0.0.0.0 from everywhere.
            can_pause: Show the button.

        Raises:
            InputError: viser is not installed, or the port is taken.
        """
        try:
            import viser  # which is an extra
        except ModuleNotFoundError as error:
            raise InputError(
                "The viewer needs viser, which is not installed: run 'pip install viser' in this environment."
            ) from error
        host = host or HOST  # viser would serve to everybody
        check_free(port, host)
        logging.getLogger("websockets.server").setLevel(logging.CRITICAL)  # whoever knocks and goes prints no traceback
        with _quiet():
            self._server = viser.ViserServer(host=host, port=port, label="Gaussians", verbose=False)
        self.url = f"http://{address_of(host)}:{port}"
        self.is_paused = False
        self._clients: dict[int, _Client] = {}
        self._said = -math.inf
        gui: Any = self._server.gui
        gui.configure_theme(dark_mode=True)
        self._text = gui.add_markdown("")
        self._longest_side = gui.add_slider("Longest side", min=160, max=2560, step=32, initial_value=LONGEST_SIDE)
        self._frustums: Frustums | None = None
        if can_pause:
            self._button = gui.add_button("Pause")
            self._button.on_click(lambda _: self._toggle())

    @property
    def is_watched(self) -> bool:
        """Return whether anybody has the page open."""
        return bool(self._server.get_clients())

    def place(self, up: np.ndarray, pose: np.ndarray, distance: float = 1.0) -> None:
        """Say where who opens the page stands.

        Args:
            up: [3] direction that stays up when the camera is turned.
            pose: [4, 4] of the camera.
            distance: From it to what is turned around, in world units.
        """
        start = self._server.initial_camera
        self._server.scene.set_up_direction(tuple(up))
        start.position = pose[:3, 3]
        start.look_at = pose[:3, 3] + distance * pose[:3, 2]
        start.up = up

    def show_photos(self, photos: Sequence[Photo], size: float) -> None:
        """Let photos and their cameras be shown.

        Args:
            photos: All that there are.
            size: Of what stands for one, in world units.
        """
        self._frustums = Frustums(self._server, photos, size)

    def draw(self, draw: Callable[[Cameras], torch.Tensor], make: MakeCameras, version: int) -> int:
        """Draw for all pages for which a picture is due; one for which device memory does not suffice is black.

        Args:
            draw: Makes the picture [1, H, W, 3] of one camera.
            make: Makes cameras that draw as the model wants.
            version: Of the model: another one is another picture.

        Returns:
            How many were drawn.
        """
        drawn = 0
        for client in self._present():
            camera = client.handle.camera
            if camera.update_timestamp != client.seen:
                client.seen = camera.update_timestamp
                client.pace.move(time.perf_counter())
            began = time.perf_counter()
            num_pixels = client.pace.pixels_due(began, version, self._most_pixels(camera))
            if num_pixels:
                cameras = cameras_of(camera, num_pixels, make)
                try:
                    picture = frame(draw, cameras)
                except torch.OutOfMemoryError:  # who looks must not end a training
                    picture = np.zeros((cameras.height, cameras.width, 3), np.uint8)
                client.handle.scene.set_background_image(picture, format="jpeg", jpeg_quality=85)
                client.pace.drew(began, time.perf_counter(), version, cameras.width * cameras.height)
                drawn += 1
        return drawn

    def wants_words(self) -> bool:
        """Return whether what the page says may be changed again; making the words may cost something."""
        return self.is_watched and time.perf_counter() - self._said >= SAY_AGAIN

    def say(self, lines: list[str]) -> None:
        """Show some lines of text."""
        self._said = time.perf_counter()
        self._text.content = "  \n".join(lines)  # two spaces end a line in Markdown

    def close(self) -> None:
        """Serve no longer."""
        if self._frustums is not None:
            self._frustums.close()
        with _quiet():
            self._server.stop()

    def _present(self) -> list[_Client]:
        handles = self._server.get_clients()
        self._clients = {key: client for key, client in self._clients.items() if key in handles}
        for key, handle in handles.items():
            self._clients.setdefault(key, _Client(handle, Pace()))
        return list(self._clients.values())

    def _most_pixels(self, camera: Any) -> int:
        """Return the pixels of a picture that fills the page, as far as its longest side may be."""
        width, height = max(camera.image_width, 1), max(camera.image_height, 1)
        scale = min(1.0, self._longest_side.value / max(width, height))
        return max(int(width * scale) * int(height * scale), 4)

    def _toggle(self) -> None:
        self.is_paused = not self.is_paused
        self._button.label = "Go on" if self.is_paused else "Pause"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let viser not print its banner, which a progress bar would tear."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
