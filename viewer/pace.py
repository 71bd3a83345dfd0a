"""When to draw for somebody who looks at a model: at once while the camera moves, if coarse; sharp when it rests."""

from __future__ import annotations

import math
from dataclasses import dataclass

RESTS_AFTER = 0.2  # seconds without a movement
MOVING_SECONDS = 1 / 15  # that a picture may take while the camera moves
RESTING_SECONDS = 1.0  # the same when it rests
LEAST_PIXELS = 120 * 90
TRAINING_SHARE = 0.95  # of the time that is training's while nobody moves a camera
OFTEN = 1.0  # seconds between pictures of a model that changes, at least


@dataclass
class Pace:
    """Decide for one camera when its next picture is due; times are in seconds of one clock."""

    seconds_per_pixel: float = 0.0  # 0 until there is a picture
    _moved: float = -math.inf  # when the camera moved last
    _drawn: float = -math.inf  # when its last picture was begun
    _took: float = 0.0  # seconds, for the last sharp one
    _is_sharp: bool = False
    _version: int = -1  # of the model in it
    _most_pixels: int = 0  # that were wanted

    def move(self, now: float) -> None:
        """Note that the camera has moved."""
        self._moved, self._is_sharp = now, False

    def pixels_due(self, now: float, version: int, most_pixels: int) -> int:
        """Return how many pixels the picture that is due should have; 0 where none is.

        Args:
            now: The time.
            version: Of the model; another one than before is another picture.
            most_pixels: As large as the page, or the most that is wanted.
        """
        rests = now - self._moved >= RESTS_AFTER
        is_new = version != self._version and now - self._drawn >= max(OFTEN, self._took / (1 - TRAINING_SHARE))
        if self._moved > self._drawn and not rests:
            seconds = MOVING_SECONDS
        elif (rests and not self._is_sharp) or is_new:
            seconds = RESTING_SECONDS
        else:
            return 0
        self._most_pixels = most_pixels
        affordable = int(seconds / self.seconds_per_pixel) if self.seconds_per_pixel else 0
        return min(most_pixels, max(affordable, LEAST_PIXELS))

    def drew(self, began: float, ended: float, version: int, num_pixels: int) -> None:
        """Note a picture, and learn how long the next ones take."""
        self._drawn, self._version = began, version
        took = max(ended - began, 1e-4)
        self.seconds_per_pixel = took / num_pixels
        rested = began - self._moved >= RESTS_AFTER
        # What a small picture takes says little of a large one, so a picture may come in two or three sizes.
        self._is_sharp = rested and (num_pixels >= 0.98 * self._most_pixels or took > RESTING_SECONDS / 2)
        if self._is_sharp:
            self._took = took
