"""The house: which room imports from which, held against the street of docs/architecture.md.

    make house

prints rooms, floors, arrows, arrows against the street, and what is too long. An import counts wherever it stands: at
the top of a module, within a function, or for type checkers alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "retrac_scale"
DOORS = {("query.topk", "report")}
"""Declared arrows back: an answer draws itself, by what stands further along the street."""
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
"""Lines of a module, and of a function's body without its docstring."""
KERNELS = {
    "gradients.tiles": "writes the machine code of a tile, one instruction after the other",
}
"""Modules whose functions may be longer, and why."""


@cache
def street() -> tuple[str, ...]:
    """The rooms in the order in which they may import from each other, from the page that explains them."""
    page = (ROOT / "docs" / "architecture.md").read_text().split("## The street", 1)[1].split("\n## ", 1)[0]
    return tuple(re.findall(r"^\| `(\w+)", page, re.M))


@cache
def modules() -> dict[str, Path]:
    """Module, without the package's name -> file."""
    found = {}
    front = ROOT / PACKAGE / "__main__.py"  # which is no room
    for file in sorted({*(ROOT / PACKAGE).rglob("*.py")} - {front}):
        name = ".".join(file.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = file
    return found


def rooms() -> set[str]:
    """Folders and files of the package's top level."""
    return {name.partition(".")[0] for name in modules()} - {""}


@cache
def reexported() -> dict[tuple[str, str], str]:
    """(package, public name) -> the module that the name comes from, by the stubs."""
    found = {}
    for stub in (ROOT / PACKAGE).rglob("__init__.pyi"):
        package = ".".join(stub.parent.relative_to(ROOT / PACKAGE).parts)
        for node in ast.walk(ast.parse(stub.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = ".".join(part for part in (package, node.module) if part)
                for alias in node.names:
                    inner = f"{base}.{alias.name}".strip(".")
                    found[package, alias.name] = inner if inner in modules() else base
    return found


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports from."""
    file = modules()[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix(f"{PACKAGE}.") for a in node.names if a.name.startswith(f"{PACKAGE}."))
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        elif node.module == PACKAGE or (node.module or "").startswith(f"{PACKAGE}."):
            base = str(node.module).removeprefix(PACKAGE).lstrip(".")
        else:
            continue
        for alias in node.names:
            inner = f"{base}.{alias.name}".strip(".")
            yield inner if inner in modules() else reexported().get((base, alias.name), base)


def arrows() -> dict[tuple[str, str], set[tuple[str, str]]]:
    """(room, room that it imports from) -> the modules on either side."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for module in modules():
        for other in imports(module):
            ends = module.partition(".")[0], other.partition(".")[0]
            if ends[0] != ends[1] and all(ends):
                found.setdefault(ends, set()).add((module, other))
    return found


def against_the_street() -> set[tuple[str, str]]:
    """Module -> module that stands further along the street, but the declared doors."""
    order = street()
    return {
        pair
        for (room, other), pairs in arrows().items()
        if order.index(other) > order.index(room)
        for pair in pairs
        if pair not in DOORS
    }


def floors() -> int:
    """The longest chain of rooms, each of which imports from the next."""
    below: dict[str, int] = {}
    for room in street():
        under = [below[b] for (a, b), pairs in arrows().items() if a == room and b in below and pairs - DOORS]
        below[room] = 1 + max(under, default=0)
    return max(below.values())


def too_long() -> list[str]:
    """Modules and functions above the limits."""
    found = []
    for module, file in modules().items():
        text = file.read_text()
        if text.count("\n") > LONGEST_FILE:
            found.append(f"{module} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and module not in KERNELS:
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = int(body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > LONGEST_FUNCTION:
                    found.append(f"{module}.{node.name} has {lines} lines")
    return found


def main() -> None:
    """Print what the house looks like."""
    back = against_the_street()
    print(f"{len(rooms())} rooms on {floors()} floors, {len(arrows())} arrows")
    print(f"{len(back)} against the street{''.join(f'{chr(10)}  {a} -> {b}' for a, b in sorted(back))}")
    print(f"declared doors: {', '.join(f'{a} -> {b}' for a, b in sorted(DOORS))}")
    print(f"{len(too_long())} too long{''.join(f'{chr(10)}  {line}' for line in too_long())}")


if __name__ == "__main__":
    main()
