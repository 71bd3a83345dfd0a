"""The compiled kernels: modules `offload` and `rendering` of the installed package gaussian_offload_native.

They are all that the distribution installs; everything else runs from its checkout. An environment may be shared by two
checkouts, and a checkout may move on without `source install.sh`; so the kernels carry a hash of the sources that they
were built from, which must be that of this checkout.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["offload", "rendering", "source_hash"]

_ROOT = Path(__file__).resolve().parent.parent


def source_hash(root: Path = _ROOT) -> str:
    """Hash a checkout's C++ sources as CMakeLists.txt does: SHA-256 of the files' SHA-256 digests, in path order."""
    folders = ("native", "offload/csrc", "rendering/csrc")
    files = [file for folder in folders for pattern in ("*.cpp", "*.h") for file in (root / folder).glob(pattern)]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


try:
    from gaussian_offload_native import offload, rendering
except ImportError as error:
    raise ImportError(
        f"The compiled kernels are missing from this environment: run `source {_ROOT}/install.sh`."
    ) from error

_expected = source_hash()
if any(getattr(module, "SOURCE_HASH", None) != _expected for module in (offload, rendering)):
    raise ImportError(
        f"The compiled kernels of this environment were built from other sources than those of {_ROOT}: "
        f"run `source {_ROOT}/install.sh`, in an environment of its own where several checkouts are in use."
    )
