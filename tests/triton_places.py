"""Where kernels in Triton are tested: on a GPU, or without one in Triton's interpreter, where Triton is installed."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set by conftest.py
TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"
NEEDS = [] if INTERPRETED else [pytest.mark.cuda]  # marks of a test of Triton's kernels

# Kernels that torch can stand in for: the kind and the device of a test.
WITHOUT_GPU = [pytest.param("torch", "cpu", id="torch")]
if INTERPRETED:
    WITHOUT_GPU.append(pytest.param("triton", "cpu", id="triton, interpreted"))
ON_GPU = [pytest.param(kind, "cuda", id=f"{kind} on cuda", marks=pytest.mark.cuda) for kind in ("torch", "triton")]
