"""Waiting for what other threads and processes do, for tests: until it is done, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

HANGS_AFTER = 600  # seconds; what takes longer hangs. Below the time that pyproject.toml gives a test, which says less


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something to become so."""
    deadline = time.monotonic() + HANGS_AFTER
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.02)
