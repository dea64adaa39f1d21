"""Who imports whom: kernels <- trainer <- bench and tests, heavy engines in one lazy place, no torch at start-up."""

import ast
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

LIGHT = ["veripo_fast", "veripo_fast.types", "veripo_fast.errors", "veripo_fast.cli", "veripo_fast.config.schema",
         "veripo_fast.config.load", "veripo_fast.config.describe", "veripo_fast.run.folder",
         "veripo_fast.run.checkpoint", "veripo_fast.run.metrics", "veripo_fast.evaluation.intervals"]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    return []


def imports(folder: str) -> Iterator[tuple[Path, str]]:
    """(file, dotted name) of every import statement below a folder."""
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            yield from ((path.relative_to(REPOSITORY), name) for name in imported(node))


def imports_at_load(path: Path) -> Iterator[str]:
    """Names that are imported when the module is: all but those inside functions or under TYPE_CHECKING."""
    nodes: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        yield from imported(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        nodes.extend(node.orelse if guarded else ast.iter_child_nodes(node))


@pytest.mark.parametrize(("folder", "forbidden"), [
    ("kernels/veripo_kernels", {"veripo_fast", "bench", "tests", "transformers"}),
    ("veripo_fast", {"bench", "tests"}),
])
def test_direction(folder, forbidden):
    assert list(imports(folder)), f"no import found below {folder}"
    assert [(path, name) for path, name in imports(folder) if name.split(".")[0] in forbidden] == []


@pytest.mark.parametrize("engine", ["vllm", "nvidia.dali", "deepspeed"])
def test_heavy_engine_has_one_lazy_place(engine):
    users = {path for path, name in imports("veripo_fast") if f"{name}.".startswith(f"{engine}.")}
    assert len(users) <= 1
    for path in users:
        assert not [name for name in imports_at_load(REPOSITORY / path) if f"{name}.".startswith(f"{engine}.")]


def test_kernels_is_no_package():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_light_modules_need_no_torch(python):
    heavy = {"torch", "transformers", "av", "pyarrow"}
    code = f"import sys, {', '.join(LIGHT)}; print(sorted({heavy} & set(sys.modules)))"
    assert python("-c", code, check=True).stdout == "[]\n"


def test_package_alone_needs_nothing(python):
    code = ("import sys; before = set(sys.modules); import veripo_fast, veripo_kernels\n"
            "print(sorted({name for name in set(sys.modules) - before"
            " if name.split('.')[0] not in sys.stdlib_module_names and not name.startswith('_')}))")
    assert python("-c", code, check=True).stdout == "['veripo_fast', 'veripo_kernels']\n"


def test_help_takes_less_than_half_a_second_and_no_torch(python):
    code = ("import sys\nfrom veripo_fast.cli import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'numpy', 'yaml'} & set(sys.modules)\nsys.exit(f'imported {heavy}' if heavy else 0)")
    seconds = []
    while len(seconds) < 5 and min(seconds, default=1.0) >= 0.5:  # where cores are shared, CPU time varies too
        before = children_cpu_seconds()
        result = python("-c", code)
        seconds.append(children_cpu_seconds() - before)
        assert result.returncode == 0, result.stderr
    assert min(seconds) < 0.5


def children_cpu_seconds():
    """Of the processes that have ended: what they took of a processor, however many others wanted it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
