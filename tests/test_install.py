"""install.sh, as far as it goes without installing anything; CI runs it whole."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "install.sh"


def source(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Source install.sh in a shell that then prints what of it is left."""
    after = "echo status $?; declare -F; compgen -v | grep -iE '^(_gso|torch_v|gsplat_v)'"
    command = ["bash", "-c", f'source "{SCRIPT}" "$@"; {after}', "bash", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_unknown_option_is_named_and_nothing_is_left_in_the_shell():
    refused = source("--devel")
    assert refused.stderr == "install.sh: unknown option '--devel'; the only option is --dev.\n"
    assert refused.stdout.split() == ["status", "1"]
