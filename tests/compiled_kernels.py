"""Kernels in Triton that a test launches in the interpreter are compiled for a GPU as well, which none is needed for.

The interpreter runs what the compiler refuses. `compiled_as_launched` notes what is launched within it, and lets
a process without the interpreter compile each of these kernels, for the same kinds of arguments. As a program this file
is that process: it reads the launches as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
HOPPER = ("cuda", 90, 32)  # as Triton names a GPU: its kind, its capability, the threads of a warp
OPTIONS = {"num_warps", "num_stages"}  # of a launch
MOST = 1 << 10  # of a constant: tests give the interpreter larger blocks than a GPU could take
KINDS = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@contextmanager
def compiled_as_launched() -> Iterator[set[str]]:
    """Compile what is launched within; the interpreter must be on.

    Yields:
        The names of these kernels, when it has ended.

    Raises:
        AssertionError: With what the compiler says.
    """
    from triton.runtime.interpreter import InterpretedFunction

    launches: dict[str, None] = {}  # in their order, each once
    names: set[str] = set()
    run = InterpretedFunction.run

    def noting(self, *arguments: object, grid: object, warmup: bool, **named: object) -> object:
        launches[json.dumps(_launch(self, arguments, named), sort_keys=True)] = None
        names.add(self.fn.__name__)
        return run(self, *arguments, grid=grid, warmup=warmup, **named)

    InterpretedFunction.run = noting
    try:
        yield names
    finally:
        InterpretedFunction.run = run
    assert launches, "no kernel was launched"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compiled_kernels"]
    given = "\n".join(launches)
    ended = subprocess.run(command, input=given, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _launch(kernel, arguments: tuple, named: dict) -> dict[str, object]:
    """Describe a launch: where the kernel is, and of each argument its kind, or its value where it is a constant."""
    import triton.language as tl

    values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    constants = {name for name, kind in kernel.fn.__annotations__.items() if kind in (tl.constexpr, "tl.constexpr")}
    return {
        "module": kernel.fn.__module__,
        "name": kernel.fn.__name__,
        "kinds": {name: _kind(values[name]) for name in kernel.arg_names if name not in constants},
        "constants": {name: min(values[name], MOST) for name in kernel.arg_names if name in constants},
        "options": {name: value for name, value in values.items() if name in OPTIONS},
    }


def _kind(value: object) -> object:
    """Return the kind of an argument as Triton's compiler takes it; that of None is a constant."""
    if value is None:
        return "constexpr"
    if torch.is_tensor(value):
        return f"*{KINDS[value.dtype]}"
    if isinstance(value, tuple):
        return [_kind(each) for each in value]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _compile(launch: dict) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch["module"]), launch["name"])
    kinds = {name: tuple(kind) if isinstance(kind, list) else kind for name, kind in launch["kinds"].items()}
    constants = launch["constants"] | {name: None for name, kind in kinds.items() if kind == "constexpr"}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, places), target=GPUTarget(*HOPPER), options=launch["options"])


def main() -> None:
    for line in sys.stdin:
        launch = json.loads(line)
        try:
            _compile(launch)
        except Exception as error:  # the compiler has many
            sys.exit(f"{launch['module']}.{launch['name']} does not compile for {launch}:\n{error}")


if __name__ == "__main__":
    main()
