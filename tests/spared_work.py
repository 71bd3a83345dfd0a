"""What tests leave out of runs of scripts, since it takes longer than a small run."""

from __future__ import annotations

import inspect
from functools import cache
from unittest.mock import Mock

import pytest


def leave_charts_undrawn(patch: pytest.MonkeyPatch) -> None:
    """Leave the charts of a run's page empty."""
    empty = '<svg role="img" aria-label="{}"></svg>'
    axes = {"get_ylim.return_value": (0, 1)}
    patch.setattr("reporting.charts._figure", lambda *_, **__: (None, Mock(**axes)))
    patch.setattr("reporting.charts._svg", lambda figure, title: empty.format(title))


def read_sources_once(patch: pytest.MonkeyPatch) -> None:
    """Let tyro, which finds help texts in the source of classes, look for each class once and not at every command."""
    patch.setattr(inspect, "getsource", cache(inspect.getsource))
