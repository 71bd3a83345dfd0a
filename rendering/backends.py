"""What renders: torch and native kernels on the CPU; on CUDA gsplat's kernels, and Triton's, in their place.

This is the one place that chooses. Modules that stand in a pair have functions of the same names and arguments.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_ON_CUDA = {
    "rendering.cpu_rasterizer": "rendering.gsplat_rasterizer",
    "rendering.ssim": "rendering.ssim_triton",
}


def kernels_for(device: torch.device, module: str) -> ModuleType:
    """Return the module whose functions compute where tensors are.

    Args:
        device: Of the tensors.
        module: The full name of the one for the CPU. The other, with gsplat and Triton, which a run without CUDA may
            lack, is imported when it is first asked for.
    """
    return importlib.import_module(_ON_CUDA[module] if device.type == "cuda" else module)
