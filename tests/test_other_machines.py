"""Tests that compare numbers pass as they would on an older processor, and with another number of cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
OF_TORCH = {"baseline": "default"}  # what torch calls them, where it has another word
COMPARE_NUMBERS = (
    *("adam", "camera", "codes", "compact_adam", "culling", "device_geometry", "gradients", "gsplat_parity", "losses"),
    *("made_gradients", "margins", "pipeline", "rasterizer", "regions", "spherical_harmonics_triton"),
)


def run_python(arguments: list[str], **environment: str) -> str:
    """Run Python in a process of its own, which must succeed; returns what it printed."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def chosen_instruction_sets(wanted: str) -> set[str]:
    """Ask the native modules which of their builds they choose when the environment asks for one."""
    code = """
from gaussian_offload_native import offload, rendering
print(offload.INSTRUCTION_SET, rendering.INSTRUCTION_SET)
"""
    return set(run_python(["-c", code], GAUSSIAN_OFFLOAD_CPU_CAPABILITY=wanted).split())


def test_the_environment_chooses_among_what_the_processor_can_do():
    (best,) = chosen_instruction_sets("")
    for index, wanted in enumerate(INSTRUCTION_SETS):
        assert chosen_instruction_sets(wanted) == {INSTRUCTION_SETS[min(index, INSTRUCTION_SETS.index(best))]}
    assert chosen_instruction_sets("another word") == {best}


@pytest.mark.slow
@pytest.mark.parametrize(("instruction_set", "threads"), [("baseline", "1"), ("avx2", "5")])
def test_numbers_are_right_on_another_machine(instruction_set, threads):
    """Other choices of torch and of the native kernels, and one thread or more than there are cores."""
    if chosen_instruction_sets(instruction_set) != {instruction_set}:
        pytest.skip(f"this processor does not have {instruction_set}")
    files = [f"tests/test_{name}.py" for name in COMPARE_NUMBERS]
    environment = {
        "GAUSSIAN_OFFLOAD_CPU_CAPABILITY": instruction_set,
        "ATEN_CPU_CAPABILITY": OF_TORCH.get(instruction_set, instruction_set),
        "OMP_NUM_THREADS": threads,
    }
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow"]
    run_python(["-m", "pytest", *options, *files], **environment)
