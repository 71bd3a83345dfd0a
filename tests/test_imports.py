"""Imports run one way: rooms know nothing of those above them (docs/design.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"errors", "configs", "option_words"}
ABOVE = {"training", "strategies", "modules", "exports", "viewer", "comparing", "benchmarks", "tests"} | SCRIPTS
ROOMS = {
    "offload": ABOVE | {"datasets", "rendering", "distributed", "configs"},
    "rendering": ABOVE | {"datasets", "distributed", "configs"},
    "datasets": ABOVE | {"offload", "rendering", "distributed"},
    "distributed": ABOVE | {"datasets", "configs"},
    "strategies": ABOVE - {"strategies"},
    "modules": ABOVE - {"modules"},
}


def imported_by(file: Path) -> set[str]:
    """The first names of all modules that a file imports, wherever in it."""
    found = re.findall(r"^ *(?:from (\w+)[\w.]* import|import (\w+))", file.read_text(), re.MULTILINE)
    return {name for names in found for name in names if name}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_none_above_it(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): imported_by(file) & ROOMS[room] for file in files}
    assert {file: names for file, names in found.items() if names} == {}
