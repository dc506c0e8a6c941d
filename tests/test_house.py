"""The plan of the house: no circle of imports, and every folder imports only what it may."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"

#: What the modules of a folder may import beside their own; the command line may import all, and nobody imports it.
#: The core saves and loads what it makes, so it knows files as files know it; no two modules of them do.
MAY = {
    "__init__": "",
    "__main__": "cli",
    "errors": "",
    "hub": "errors",
    "core": "errors files",
    "encoder_decoder": "errors core",
    "decoding": "core models",
    "files": "errors hub core",
    "chat": "errors",
    "models": "errors hub",
    "methods": "errors core files chat models decoding",
    "session": "errors core files chat models methods",
    "comparison": "chat methods session",
    "data": "errors hub chat models",
    "planning": "errors chat core decoding files models methods serving",
    "training": "errors hub core encoder_decoder decoding files chat models methods data planning evaluation",
    "evaluation": "errors core files chat models methods data",
    "serving": "errors core files chat models methods",
    "bench": "__init__ errors core decoding methods models serving",
    "cli": "errors core files chat models methods session comparison data planning training evaluation "
    "serving bench",
}


def modules(source: Path = SOURCE) -> dict[str, Path]:
    found = {}
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that one imports, also within functions; what only type checkers see does not count."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                if target in known:
                    yield target


def graph(source: Path = SOURCE) -> dict[str, set[str]]:
    known = modules(source)
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def circle(of: dict[str, set[str]]) -> list[str]:
    """Modules that each are imported by the next, the first again at the end; none where there is no circle."""
    try:
        TopologicalSorter(of).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def folder(module: str) -> str:
    return (*module.split("."), "__init__")[1]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle(graph()) == []


def test_folders_import_only_what_they_may() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if folder(other) not in (folder(module), "__init__", *MAY[folder(module)].split())
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_a_circle_is_found_wherever_the_import_stands(tmp_path: Path) -> None:
    (tmp_path / "house").mkdir()
    for name, text in {
        "__init__": "",
        "a": "from typing import TYPE_CHECKING\nfrom . import b\nif TYPE_CHECKING:\n    from .c import x\n",
        "b": "from house.c import x\n",
        "c": "x = 1\n",
    }.items():
        (tmp_path / "house" / f"{name}.py").write_text(text)
    assert graph(tmp_path)["house.a"] == {"house.b"} and graph(tmp_path)["house.b"] == {"house.c"}
    assert circle(graph(tmp_path)) == []
    (tmp_path / "house" / "c.py").write_text("def later():\n    from .a import b\n")
    assert set(circle(graph(tmp_path))) == {"house.a", "house.b", "house.c"}
