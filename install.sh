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
        cat "$root"/*/csrc/*.h "$root"/*/csrc/*.cpp "$root"/native/*.h
        ls /dev/nvidiactl 2>/dev/null
    } | cksum
}

_gso_install() {
    local root="$1" dev="$2" begin=$SECONDS stamp installed environment
    _gso_activate || return 1
    environment="${VIRTUAL_ENV:-$CONDA_PREFIX}"
    stamp="$environment/.gaussian_offload_installed"
    installed=$(cat "$stamp" 2>/dev/null)
    if [ "$installed" = "dev $(_gso_fingerprint)" ] || [ "$installed" = "$dev $(_gso_fingerprint)" ]; then
        echo "Already installed in $environment"
        return 0
    fi
    _gso_check_tools || return 1

    python -m pip --version >/dev/null 2>&1 || python -m ensurepip -q ||
        { _gso_fail "$environment has no pip; install it (for example: python -m ensurepip)."; return 1; }
    if ! python -c 'import torch' 2>/dev/null; then
        echo "Installing torch $TORCH_VERSION"
        python -m pip install "torch==$TORCH_VERSION" ||
            { _gso_fail "torch $TORCH_VERSION could not be installed; see pip's message above."; return 1; }
    fi
    local extras=""
    [ "$dev" = dev ] && extras="[dev]"
    echo "Compiling the native kernels and installing what the suite needs"
    python -m pip install "$root$extras" ||
        { _gso_fail "the project could not be installed; see pip's message above."; return 1; }
    (cd "$root" && python -c 'import native') ||
        { _gso_fail "the native kernels were installed but cannot be loaded; see Python's message above."; return 1; }

    if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        _gso_install_gpu_packages || return 1
    elif [ -e /dev/nvidiactl ]; then
        echo "There is an NVIDIA GPU, but this torch cannot use it ($(python -c 'import torch; print(torch.__version__, "for CUDA", torch.version.cuda)'));" \
            "gsplat is left out, and the scripts run on the CPU. Install a torch that fits the driver, and run install.sh again."
    else
        echo "No usable CUDA GPU: gsplat is left out, and the scripts run on the CPU."
    fi
    echo "$dev $(_gso_fingerprint)" >"$stamp"
    echo "Installed in $environment in $((SECONDS - begin)) s"
}

_gso_check_tools() { # what pip cannot bring
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null ||
        { _gso_fail "no C++ compiler was found for the native kernels; install one (for example: apt-get install g++) or name it in CXX."; return 1; }
    python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        { _gso_fail "Python's headers (Python.h) were not found, which the native kernels are compiled with; install them (for example: apt-get install python3-dev)."; return 1; }
}

_gso_check_nvcc() { # it must be of torch's CUDA, by major version: torch refuses to compile with another
    local nvcc toolkit cuda
    nvcc="${CUDA_HOME:-${CUDA_PATH:-}}/bin/nvcc"
    [ -x "$nvcc" ] || nvcc=$(command -v nvcc) || nvcc=/usr/local/cuda/bin/nvcc
    [ -x "$nvcc" ] ||
        { _gso_fail "nvcc was not found, which gsplat needs to compile its CUDA code; install the CUDA toolkit and set CUDA_HOME."; return 1; }
    toolkit=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
    cuda=$(python -c 'import torch; print(torch.version.cuda)')
    [ "${toolkit%%.*}" = "${cuda%%.*}" ] ||
        { _gso_fail "$nvcc is of CUDA $toolkit and torch of CUDA $cuda, with which gsplat cannot be compiled; install the toolkit of CUDA ${cuda%%.*} and set CUDA_HOME, or a torch for CUDA ${toolkit%%.*}."; return 1; }
}

_gso_compile_jobs() { # how many compilers run at once: one a core, and 3 GB of memory for each
    local cores gigabytes
    cores=$(nproc)
    gigabytes=$(awk '/MemAvailable/ {print int($2 / 3e6)}' /proc/meminfo)
    [ "$gigabytes" -ge 1 ] || gigabytes=1
    echo $((cores < gigabytes ? cores : gigabytes))
}

_gso_gsplat_is_compiled() { # before it was installed; looked up without importing it, which would compile it
    python -c 'import glob, importlib.util, sys
folders = importlib.util.find_spec("gsplat").submodule_search_locations
sys.exit(not any(glob.glob(folder + "/csrc*.so") for folder in folders))'
}

_gso_install_gpu_packages() {
    if ! python -c 'import sys; from importlib.metadata import version; sys.exit(version("gsplat").split("+")[0] != sys.argv[1])' "$GSPLAT_VERSION" 2>/dev/null; then
        python -m pip install ninja "gsplat==$GSPLAT_VERSION" ||
            { _gso_fail "gsplat $GSPLAT_VERSION could not be installed; see pip's message above."; return 1; }
    fi
    if ! _gso_gsplat_is_compiled; then
        _gso_check_nvcc || return 1
        echo "Loading gsplat (its CUDA code is compiled the first time, which takes some minutes)"
    fi
    MAX_JOBS="${MAX_JOBS:-$(_gso_compile_jobs)}" python -c 'from gsplat.cuda._backend import _C; assert _C is not None' ||
        { _gso_fail "gsplat's CUDA code could not be compiled; see the compiler's message above."; return 1; }
    # LPIPS needs torchvision; without a build for this torch, LPIPS is reported as missing.
    python -c 'import torchvision' 2>/dev/null ||
        python -m pip install torchvision "torch==$(python -c 'import torch; print(torch.__version__.split("+")[0])')" ||
        echo "torchvision could not be installed: LPIPS will be reported as missing."
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
unset -f _gso_fail _gso_find_python _gso_activate _gso_fingerprint _gso_install _gso_check_tools _gso_check_nvcc \
    _gso_compile_jobs _gso_gsplat_is_compiled _gso_install_gpu_packages _gso_main
unset TORCH_VERSION GSPLAT_VERSION
(exit "$_gso_status")
