"""Rules about who imports whom, each a function over a folder of source. Every import statement counts: those inside
functions and under TYPE_CHECKING too.

A package given as `lazy` loads what its `__init__.py` names when it is used (PEP 562): whoever imports such a name
imports the module that holds it, and `__init__.py` itself imports nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

Graph = dict[str, set[str]]
"""Module -> the modules that it imports."""


def sources(*places: Path) -> list[Path]:
    """The Python files that are given or lie below a folder."""
    return sorted(path for place in places for path in (place.rglob("*.py") if place.is_dir() else [place]))


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of a package and all below it."""
    found = {}
    for path in sources(package):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(node: ast.AST, package: str = "") -> list[tuple[str, str]]:
    """(dotted name, name that it gets) for each import of a statement; `package` is what one leading dot means."""
    if isinstance(node, ast.Import):
        return [(alias.name, alias.asname or alias.name) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        base = ".".join([*parents[:len(parents) - node.level + 1], *base.split(".")]).rstrip(".")
    return [(f"{base}.{alias.name}", alias.asname or alias.name) for alias in node.names]


def imports(path: Path, module: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, name that it gets) of every import in a file; `module` is the file's own name."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        yield from imported(node, package)


def imports_at_load(path: Path) -> Iterator[str]:
    """Names that are imported when the module is: all but those inside functions or under TYPE_CHECKING."""
    nodes: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        yield from (name for name, _ in imported(node))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        nodes.extend(node.orelse if guarded else ast.iter_child_nodes(node))


def import_graph(packages: Collection[Path], lazy: Collection[str] = ()) -> Graph:
    """What the modules of the packages import of each other."""
    files = {name: path for package in packages for name, path in modules(package).items()}
    statements = {name: list(imports(path, name)) for name, path in files.items()}
    homes = {f"{package}.{name}": target for package in lazy for target, name in statements[package]}
    graph: Graph = {}
    for module in files:
        targets = [] if module in lazy else [homes.get(target, target) for target, _ in statements[module]]
        graph[module] = {found for target in targets if (found := _module_of(target, files))}
    return graph


def _module_of(target: str, files: Collection[str]) -> str:
    """`a.b` of `a.b.name`; empty where it is none of the files."""
    while target and target not in files:
        target = target.rpartition(".")[0]
    return target


def out_of_order(package: Path, order: str, lazy: Collection[str] = ()) -> list[str]:
    """Imports of a module or folder that is not left of the importing one; `order` is written `a b < c < d`."""
    places = {name: place for place, names in enumerate(order.split("<")) for name in names.split()}
    wrong = []
    for module, targets in import_graph([package], lazy).items():
        own = _part(module)
        if own and own not in places:
            wrong.append(f"{module}: {own} has no place in the order")
            continue
        for target in sorted(targets):
            theirs = _part(target)
            if own and theirs and theirs != own and places.get(theirs, len(places)) >= places[own]:
                wrong.append(f"{module} imports {target}")
    return wrong


def _part(module: str) -> str:
    """`b` of `a.b.c`; empty for the package itself."""
    return ".".join(module.split(".")[1:2])


def cycles(packages: Collection[Path], lazy: Collection[str] = ()) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others: strongly connected components."""
    graph = import_graph(packages, lazy)
    reached = {module: _reached(graph, module) for module in graph}
    groups = {tuple(sorted(other for other in found if module in reached[other])) for module, found in reached.items()}
    return [list(group) for group in sorted(groups) if group]


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    left = list(graph[start])
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left.extend(graph[module])
    return found


def users(names: Collection[str], *places: Path) -> list[str]:
    """`file: name` of each import of one of the top-level names."""
    return [f"{path.name}: {name}" for path in sources(*places) for name, _ in imports(path)
            if name.split(".")[0] in names]


def root_modules(package: Path) -> list[str]:
    """File names of the modules that lie in no folder of the package."""
    return sorted(path.name for path in package.glob("*.py"))


def long_files(most_lines: int, *places: Path) -> dict[str, int]:
    """Name -> number of lines of each file that has more."""
    lines = {str(path): len(path.read_text("utf-8").splitlines()) for path in sources(*places)}
    return {name: count for name, count in lines.items() if count > most_lines}
