#!/usr/bin/env bash
# Sets everything up; source it (or run it) from anywhere:   source install.sh [--dev]
# Uses the active environment, or makes and activates .venv beside this file. Safe to run again, and then quick.

TORCH_VERSION="2.13.0"
GSPLAT_VERSION="1.5.3"

_gso_fail() { echo "install.sh: $1" >&2; return 1; }

_gso_find_python() { # prints the newest Python this suite runs on
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

_gso_activate() {
    local python
    if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
        python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            _gso_fail "the active environment's Python is older than 3.10; deactivate it, or activate one with Python 3.10 or newer."
        return
    fi
    if [ ! -x "$root/.venv/bin/python" ]; then
        python=$(_gso_find_python) ||
            { _gso_fail "no Python 3.10 or newer was found; install one (for example: apt-get install python3.11 python3.11-venv)."; return 1; }
        echo "Making the environment $root/.venv"
        "$python" -m venv "$root/.venv" ||
            { rm -rf "$root/.venv"; _gso_fail "$python cannot make a virtual environment; install its venv module (for example: apt-get install python3-venv)."; return 1; }
    fi
    # shellcheck disable=SC1091
    . "$root/.venv/bin/activate"
}

_gso_fingerprint() { # of all that decides what an installation holds
    {
        echo "$root $(command -v python)"
        cat "$root/install.sh" "$root/pyproject.toml" "$root/CMakeLists.txt"
        cat "$root"/*/csrc/* "$root"/native/*
        ls /dev/nvidiactl 2>/dev/null
    } | cksum
}

_gso_install() {
    local root="$1" dev="$2" stamp installed environment
    _gso_activate || return 1
    environment="${VIRTUAL_ENV:-$CONDA_PREFIX}"
    stamp="$environment/.gaussian_offload_installed"
    installed=$(cat "$stamp" 2>/dev/null)
    if [ "$installed" = "dev $(_gso_fingerprint)" ] || [ "$installed" = "$dev $(_gso_fingerprint)" ]; then
        echo "Already installed in $environment"
        return 0
    fi
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null ||
        { _gso_fail "no C++ compiler was found for the native kernels; install one (for example: apt-get install g++) or name it in CXX."; return 1; }

    python -m pip --version >/dev/null 2>&1 || python -m ensurepip -q || return 1
    if ! python -c 'import torch' 2>/dev/null; then
        python -m pip install "torch==$TORCH_VERSION" ||
            { _gso_fail "torch $TORCH_VERSION could not be installed; see pip's message above."; return 1; }
    fi
    local extras=""
    [ "$dev" = dev ] && extras="[dev]"
    python -m pip install "$root$extras" ||
        { _gso_fail "the project could not be installed; see pip's message above."; return 1; }

    if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        _gso_install_gpu_packages || return 1
    else
        echo "No usable CUDA GPU: gsplat is left out, and the scripts run on the CPU."
    fi
    echo "$dev $(_gso_fingerprint)" >"$stamp"
    echo "Installed in $environment"
}

_gso_install_gpu_packages() {
    if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("gsplat") is None)'; then
        command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
            { _gso_fail "nvcc was not found, which gsplat needs to compile its CUDA code; install the CUDA toolkit and set CUDA_HOME."; return 1; }
        python -m pip install ninja "gsplat==$GSPLAT_VERSION" ||
            { _gso_fail "gsplat $GSPLAT_VERSION could not be installed; see pip's message above."; return 1; }
    fi
    echo "Loading gsplat (its CUDA code is compiled once, which takes some minutes)"
    python -c 'from gsplat.cuda._backend import _C; assert _C is not None' ||
        { _gso_fail "gsplat's CUDA code could not be compiled; see the compiler's message above."; return 1; }
    # LPIPS needs torchvision; without a build for this torch, LPIPS is reported as missing.
    python -c 'import torchvision' 2>/dev/null ||
        python -m pip install torchvision "torch==$(python -c 'import torch; print(torch.__version__.split("+")[0])')" || true
}

_gso_main() {
    local root="$1" dev=""
    shift
    case "${1:-}" in
        --dev) dev=dev ;;
        "") ;;
        *) _gso_fail "unknown option '$1'; the only option is --dev."; return 1 ;;
    esac
    _gso_install "$root" "$dev"
}

_gso_main "$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)" "$@"
_gso_status=$?
# Leave nothing behind in the shell that sourced this file.
unset -f _gso_fail _gso_find_python _gso_activate _gso_fingerprint _gso_install _gso_install_gpu_packages _gso_main
unset TORCH_VERSION GSPLAT_VERSION
(exit "$_gso_status")
