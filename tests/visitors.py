"""Who looks at a page without a browser: a camera that is moved, and the pictures that are shown to it, for tests."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import numpy as np
from scipy.spatial.transform import Rotation


def free_port() -> int:
    """A port that who asks for it by its number gets, and for a minute nobody who asks for any: a connection there has
    just been closed."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as those set it who serve there
        found.bind(("127.0.0.1", 0))
        found.listen()
        with socket.create_connection(found.getsockname()):
            found.accept()[0].close()  # this end first, so that the system remembers it
        return found.getsockname()[1]


def page_camera(pose: np.ndarray, width: int = 80, height: int = 60, fov: float = 1.0) -> SimpleNamespace:
    """What viser knows of the camera of a page."""
    x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat()
    return SimpleNamespace(
        wxyz=np.array([w, x, y, z]),
        position=pose[:3, 3],
        fov=fov,
        aspect=width / height,
        image_width=width,
        image_height=height,
        update_timestamp=1.0,
    )


class Visitor:
    """Stand for viser's server with one page open: no browser, and what it shows is kept."""

    def __init__(self, page) -> None:
        self.pictures: list[np.ndarray] = []
        self.looks_while_paused = 0  # how often the page has looked at this
        self._page = page
        scene = SimpleNamespace(set_background_image=lambda picture, **_: self.pictures.append(picture))
        self.handle = SimpleNamespace(camera=None, scene=scene)
        self._stamp = 0.0

    def move(self, pose: np.ndarray) -> None:
        self._stamp += 1
        self.handle.camera = page_camera(pose)
        self.handle.camera.update_timestamp = self._stamp

    def clients(self) -> dict[int, object]:
        self.looks_while_paused += self._page.is_paused
        self.while_paused(self.looks_while_paused)
        return {0: self.handle}

    def while_paused(self, looks: int) -> None:
        """After ten looks somebody presses the button again."""
        if looks == 10 and self._page.is_paused:
            self._page._toggle()
