"""Lists the benchmarks: `python -m benchmarks`."""

import ast
from pathlib import Path


def benchmarks() -> dict[str, str]:
    """Return the name and first line of every module here that can be run; they are read, not imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module = ast.parse(path.read_text())
        runs = any(isinstance(part, ast.FunctionDef) and part.name == "main" for part in module.body)
        if runs and not path.name.startswith("__"):
            found[path.stem] = ast.get_docstring(module).partition("\n")[0]
    return found


def main() -> None:
    print("python -m benchmarks.NAME [--quick] [--help]\n")
    for name, purpose in benchmarks().items():
        print(f"  {name:18} {purpose}")


if __name__ == "__main__":
    main()
