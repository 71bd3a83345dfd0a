"""Imports run one way: each room imports what docs/design.md lets it, and nothing else of the suite."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOWER = {"errors", "offload", "rendering", "datasets", "distributed"}
# Of each room, what its files may import beside one another: rooms, or single modules of them.
ROOMS = {
    "native": set(),
    "rendering": {"errors", "native"},
    "offload": {"native"},
    "datasets": {"errors"},
    "distributed": {"errors", "offload", "rendering"},
    "modules": LOWER,
    "strategies": {"errors", "configs", "offload", "distributed", "datasets.free_memory"},
    "reporting": {"offload.backends"},
    "viewer": {"errors", "offload.culling.cameras"},
    "training": LOWER | {"configs", "option_words", "trainers", "strategies", "modules", "reporting", "viewer"},
    "exports": LOWER | {"training"},
    "comparing": {
        "errors",
        "configs",
        "option_words",
        "trainers",
        "training",
        "reporting",
        "datasets.model_choice",
    },
}
SCRIPT = LOWER | {"startup", "configs", "option_words", "training", "strategies", "modules"}
# The files beside the rooms, and in them those that may import more than the others.
FILES = {
    "errors.py": set(),
    "configs.py": set(),
    "option_words.py": {"errors"},
    "startup.py": {"native"},
    "trainers.py": {"training.memory_estimate"},
    "export.py": SCRIPT | {"exports"},
    "compare.py": SCRIPT | {"trainers", "reporting", "comparing"},
    "view.py": SCRIPT | {"viewer"},
    **{path.name: SCRIPT for path in ROOT.glob("simple_trainer*.py")},
    "offload/errors.py": {"errors"},
    "offload/tiles/budget.py": {"errors.format_bytes"},
    "datasets/prepare.py": {"configs", "option_words"},  # a program, which looks at the scenes' options
    "datasets/prepared.py": {"configs"},
    "datasets/mega_nerf.py": {"configs"},
    "datasets/reconstruct.py": {"option_words"},  # a program, as the next
    "datasets/synthetic.py": {"option_words"},
}
OURS = {*ROOMS, "benchmarks", "tests"} | {name.removesuffix(".py") for name in FILES if "/" not in name}


def imported_by(source: str) -> set[str]:
    """What a file imports of the suite, wherever in it: "offload.backends.num_threads"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {f"{node.module}.{each.name}" for each in node.names}
    return {name for name in found if name.partition(".")[0] in OURS}


def not_allowed(name: str, source: str) -> list[str]:
    """What a file imports of the suite and may not."""
    room = name.rpartition("/")[0].partition("/")[0]
    allowed = FILES.get(name, set()) | (ROOMS[room] | {room} if room else set())
    return sorted(each for each in imported_by(source) if not any(f"{each}.".startswith(f"{it}.") for it in allowed))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    assert {name: wrong for name, text in found.items() if (wrong := not_allowed(name, text))} == {}


def test_the_files_beside_the_rooms_import_what_they_may():
    files = {file.name: file.read_text() for file in ROOT.glob("*.py")}
    assert files.keys() == {name for name in FILES if "/" not in name}
    assert {name: wrong for name, text in files.items() if (wrong := not_allowed(name, text))} == {}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("offload/store/memory.py", "import reporting.numbers"),
        ("offload/store/memory.py", "from errors import InputError"),
        ("offload/store/memory.py", "def f():\n    from rendering import ssim"),
        ("reporting/page.py", "from offload.models import device"),
        ("reporting/page.py", "from training import run"),
        ("training/run.py", "import comparing"),
        ("configs.py", "from errors import InputError"),
        ("trainers.py", "from training.memory_estimate_of_others import x"),
    ],
)
def test_an_import_that_goes_up_is_found(name, source):
    assert not_allowed(name, source)
