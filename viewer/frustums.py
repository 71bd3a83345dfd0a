"""The cameras of photos on a page, and the photos in them: shown where somebody asks, and not read before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

MOST = 200  # that are shown, evenly of all
COLOR = (232, 113, 10)
PHOTO_PIXELS = 192  # of a photo's longest side


@dataclass(frozen=True)
class Photo:
    """Hold a photo with its camera."""

    name: str
    pose: np.ndarray  # [4, 4] camera to world, x right, y down, z forward
    fov: float  # of its height, radians
    aspect: float  # width by height
    read: Callable[[int], np.ndarray]  # returns it [h, w, 3] uint8, with a longest side of so many pixels


class Frustums:
    """Show cameras of photos on all pages of a server once its box is ticked; a click on one moves there."""

    def __init__(self, server: Any, photos: Sequence[Photo], size: float) -> None:
        """
        Args:
            server: viser's.
            photos: All that there are.
            size: Of what stands for one, in world units.
        """
        chosen = np.unique(np.linspace(0, len(photos) - 1, min(MOST, len(photos))).round().astype(int))
        self._photos = [photos[index] for index in chosen]
        self._frustums = [self._add(server, photo, size) for photo in self._photos]
        self._places = np.array([photo.pose[:3, 3] for photo in self._photos]).reshape(-1, 3)
        self._size = size
        self._are_shown = False
        self._reader = ThreadPoolExecutor(max_workers=1)  # one photo in memory at a time, and training keeps its cores
        box = server.gui.add_checkbox("Cameras", initial_value=False)
        box.on_update(lambda event: self._show(box.value, event.client))

    def close(self) -> None:
        """Read no more photos."""
        self._are_shown = False
        self._reader.shutdown(cancel_futures=True)

    def _add(self, server: Any, photo: Photo, size: float) -> Any:
        x, y, z, w = Rotation.from_matrix(photo.pose[:3, :3]).as_quat()
        frustum = server.scene.add_camera_frustum(
            f"/cameras/{photo.name}",
            fov=photo.fov,
            aspect=photo.aspect,
            scale=size,
            thickness=0.03 * size,  # of its lines, in world units too
            color=COLOR,
            wxyz=(w, x, y, z),
            position=photo.pose[:3, 3],
            visible=False,
        )

        def jump(event: Any) -> None:
            with event.client.atomic():
                event.client.camera.wxyz = (w, x, y, z)
                event.client.camera.position = photo.pose[:3, 3]
            self._show_around(photo.pose[:3, 3])

        frustum.on_click(jump)
        return frustum

    def _show(self, visible: bool, client: Any) -> None:
        place = np.full(3, np.inf) if client is None else np.asarray(client.camera.position)
        self._are_shown = visible
        self._show_around(place)
        if visible:
            self._reader.submit(self._read, place)

    def _show_around(self, place: np.ndarray) -> None:
        """Show what is to be shown, but none next to a place [3]: its photo would hide what is drawn of the model."""
        is_clear = np.linalg.norm(self._places - place, axis=1) > self._size
        for frustum, visible in zip(self._frustums, self._are_shown & is_clear, strict=True):
            frustum.visible = bool(visible)

    def _read(self, place: np.ndarray) -> None:
        """Read the photos that are not there yet, those nearest to a place [3] first, while they are shown."""
        for index in np.linalg.norm(self._places - place, axis=1).argsort():
            if not self._are_shown:
                return
            frustum = self._frustums[index]
            if frustum.image is None:
                try:
                    frustum.image = self._photos[index].read(PHOTO_PIXELS)
                except Exception:  # what is wrong with a photo is training's to say
                    continue
