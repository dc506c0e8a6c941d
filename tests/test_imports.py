"""Modules import each other in one direction, also inside functions and for types."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ccm

ROOT = Path(ccm.__file__).parent


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> the modules of the package that it names in an import, wherever that stands."""
    files = {
        ".".join(("ccm", *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name.rsplit(".", 1)[0].split(".")
        asked = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                asked |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        modules = {name for name in asked if name in files}
        packages = {f"{name}.__init__" for name in asked - modules if f"{name}.__init__" in files}
        found[name] = modules | {other for other in packages if other != name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def below(graph: dict[str, set[str]], start: str) -> dict[str, set[str]]:
    """What a module imports, and what that imports."""
    reached, waiting = {}, [start]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached[name] = graph[name]
            waiting += graph[name]
    return reached


def test_the_core_has_no_circle_and_no_baseline() -> None:
    graph = imports()
    core = below(graph, "ccm.compressor")
    assert not circle(core)
    assert not [name for name in core if "methods" in name or "evaluation" in name or "training" in name]


def test_a_circle_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert {"ccm.reader", "ccm.memory"} <= below(imports(), "ccm.compressor").keys()
