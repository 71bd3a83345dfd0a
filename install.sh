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
        python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null
    } | cksum
}

_gso_install() {
    local root="$1" dev="$2" begin=$SECONDS stamp installed environment
    _gso_activate || return 1
    environment="${VIRTUAL_ENV:-$CONDA_PREFIX}"
    stamp="$environment/.gaussian_offload_installed"
    installed=$(cat "$stamp" 2>/dev/null || true) # a shell may have `set -e`
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

_gso_install_gpu_packages() {
    if ! _gso_gsplat_loads; then
        _gso_compile_gsplat || return 1
    fi
    # LPIPS needs torchvision; without a build for this torch, LPIPS is reported as missing.
    python -c 'import torchvision' 2>/dev/null ||
        python -m pip install torchvision "torch==$(python -c 'import torch; print(torch.__version__.split("+")[0])')" ||
        echo "torchvision could not be installed: LPIPS will be reported as missing."
}

_gso_gsplat_loads() { # the right version, compiled for this torch; looked up without `import gsplat`, which may compile
    python - "$GSPLAT_VERSION" 2>/dev/null <<'END'
import importlib.metadata, importlib.util, pathlib, sys
import torch
assert importlib.metadata.version("gsplat").split("+")[0] == sys.argv[1]
(folder,) = importlib.util.find_spec("gsplat").submodule_search_locations
(library,) = pathlib.Path(folder).glob("csrc*.so")
spec = importlib.util.spec_from_file_location("csrc", library)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
END
}

_gso_compile_gsplat() { # when it is installed, and not, as its wheel does, whenever a process imports it first
    local cuda_home jobs
    cuda_home=$(_gso_find_cuda) || return 1
    python -m pip install ninja setuptools wheel ||
        { _gso_fail "ninja, setuptools and wheel, which gsplat is compiled with, could not be installed; see pip's message above."; return 1; }
    jobs="${MAX_JOBS:-$(_gso_compile_jobs)}"
    echo "Compiling gsplat $GSPLAT_VERSION for this GPU with $cuda_home, $jobs files at once, which takes some minutes"
    # Without pip's cache, in which what was compiled for another torch could lie.
    CUDA_HOME="$cuda_home" MAX_JOBS="$jobs" python -m pip install --no-build-isolation --no-cache-dir --force-reinstall \
        --no-deps --no-binary gsplat "gsplat==$GSPLAT_VERSION" && python -m pip install "gsplat==$GSPLAT_VERSION" ||
        { _gso_fail "gsplat $GSPLAT_VERSION could not be compiled or installed; see the message above."; return 1; }
    _gso_gsplat_loads ||
        { _gso_fail "gsplat $GSPLAT_VERSION was compiled but cannot be loaded; see python -c 'import torch; from gsplat import csrc'."; return 1; }
}

_gso_find_cuda() { # prints the toolkit's folder, whose major version must be that of torch's CUDA
    local nvcc folder="" candidate toolkit cuda
    nvcc=$(command -v nvcc) && nvcc=$(readlink -f "$nvcc")
    for candidate in "${CUDA_HOME:-}" "${CUDA_PATH:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda; do
        # nvcc on the path may be a script that calls the true one: its folder holds no headers
        [ -x "$candidate/bin/nvcc" ] && [ -e "$candidate/include/cuda_runtime.h" ] && folder="$candidate" && break
    done
    [ -n "$folder" ] || [ -z "$nvcc" ] || folder="${nvcc%/bin/nvcc}" # headers elsewhere, where nvcc finds them
    [ -n "$folder" ] ||
        { _gso_fail "nvcc was not found, which gsplat's CUDA code is compiled with; install the CUDA toolkit and set CUDA_HOME."; return 1; }
    toolkit=$("$folder/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
    cuda=$(python -c 'import torch; print(torch.version.cuda)')
    [ "${toolkit%%.*}" = "${cuda%%.*}" ] ||
        { _gso_fail "$folder/bin/nvcc is of CUDA $toolkit and torch of CUDA $cuda, with which gsplat cannot be compiled; install the toolkit of CUDA ${cuda%%.*} and set CUDA_HOME, or a torch for CUDA ${toolkit%%.*}."; return 1; }
    echo "$folder"
}

_gso_compile_jobs() { # how many compilers run at once: one a core, and 3 GB of memory for each
    local cores gigabytes
    cores=$(nproc)
    gigabytes=$(awk '/MemAvailable/ {print int($2 / 3e6)}' /proc/meminfo)
    [ "$gigabytes" -ge 1 ] || gigabytes=1
    echo $((cores < gigabytes ? cores : gigabytes))
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

_gso_leave() { # nothing behind in the shell that sourced this file, but the exit code of what came before
    local result=$?
    unset TORCH_VERSION GSPLAT_VERSION
    unset -f _gso_fail _gso_find_python _gso_activate _gso_fingerprint _gso_install _gso_check_tools \
        _gso_install_gpu_packages _gso_gsplat_loads _gso_compile_gsplat _gso_find_cuda _gso_compile_jobs _gso_main _gso_leave
    return "$result"
}

_gso_main "$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)" "$@"
_gso_leave
