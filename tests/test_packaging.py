"""The suite runs from its checkout: what is installed, and that its kernels are those of the checkout."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import native

ROOT = Path(__file__).parent.parent


def run_python(code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], cwd=folder, capture_output=True, text=True)


def test_the_compiled_kernels_are_all_that_an_installation_makes_importable():
    files = importlib.metadata.files("gaussian-offload")
    assert files is not None
    top = {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info")}
    assert top == {"gaussian_offload_native"}


def test_no_folder_of_the_checkout_can_be_imported_from_elsewhere(tmp_path):
    """`datasets` is also the name of Hugging Face's package, which other programs of an environment may import."""
    names = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert {"datasets", "offload", "rendering", "training"} <= set(names)
    code = f"import importlib.util\nfor name in {names}: print(importlib.util.find_spec(name))"
    found = run_python(code, tmp_path, "-I")
    assert found.returncode == 0, found.stderr
    assert str(ROOT / "") not in found.stdout.replace(sys.prefix, "")


@pytest.fixture
def moved_on(tmp_path: Path) -> Path:
    """A copy of native/__init__.py and of all that the kernels are compiled from."""
    sources = [file for pattern in ("native/*.h", "*/csrc/*.h", "*/csrc/*.cpp") for file in ROOT.glob(pattern)]
    for source in [ROOT / "native/__init__.py", *sources]:
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    return tmp_path


def test_every_source_counts(moved_on):
    sources = [*moved_on.rglob("*.h"), *moved_on.rglob("*.cpp")]
    assert len(sources) > 15
    assert native.source_hash(moved_on) == native.offload.SOURCE_HASH == native.rendering.SOURCE_HASH
    hashes = {native.source_hash(moved_on)}
    for source in sources:
        source.write_text(source.read_text() + "// another\n")
        hashes.add(native.source_hash(moved_on))
    assert len(hashes) == len(sources) + 1


def test_kernels_of_other_sources_are_refused(moved_on):
    """A checkout that has moved on without `source install.sh` is told so."""
    assert run_python("import native", moved_on).returncode == 0
    changed = moved_on / "offload/csrc/store.cpp"
    changed.write_text(changed.read_text() + "// another\n")
    refused = run_python("import native", moved_on)
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert "were built from other sources" in last
    assert f"source {moved_on}/install.sh" in last

    shutil.copy(ROOT / "startup.py", moved_on)  # which every script imports first: a sentence, no traceback
    stopped = run_python("import startup", moved_on)
    assert stopped.returncode == 2
    assert stopped.stderr.startswith("Error: The compiled kernels of this environment were built from other sources")
    assert len(stopped.stderr.splitlines()) == 1


def test_missing_kernels_are_named(moved_on):
    missing = run_python("import sys; sys.modules['gaussian_offload_native'] = None; import native", moved_on)
    assert missing.returncode == 1
    assert "The compiled kernels are missing from this environment" in missing.stderr.splitlines()[-1]


def test_version_is_one():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert importlib.metadata.version("gaussian-offload") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
