"""A picture of a model for somebody who looks at it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from offload.culling.cameras import Cameras


@torch.no_grad()
def frame(draw: Callable[[Cameras], Tensor], cameras: Cameras) -> np.ndarray:
    """Return the picture [H, W, 3] uint8 that one camera sees.

    Args:
        draw: Makes the picture [1, H, W, 3] of one camera.
        cameras: One.
    """
    return (draw(cameras)[0].clamp(0.0, 1.0) * 255.0).round().byte().cpu().numpy()
