"""Who imports whom: kernels <- trainer <- bench <- tests, folders in one order, no cycles; no torch at start-up."""

import resource
from pathlib import Path

import pytest

from tests.support import import_rules
from tests.support.paths import REPOSITORY

ORDER = """types errors text < config < run weights distributed < schedule < recipes < reward < data < video < model
           < rollout < cache < verifier < stages evaluation < trainer < report < inspect < demo < commands < cli
           < __main__"""
"""Imports inside veripo_fast point left."""

TRAINER, KERNELS, BENCH = REPOSITORY / "veripo_fast", REPOSITORY / "kernels" / "veripo_kernels", REPOSITORY / "bench"
LAZY = ("veripo_fast", "veripo_kernels")
LIGHT = ["veripo_fast", "veripo_fast.types", "veripo_fast.errors", "veripo_fast.commands", "veripo_fast.cli",
         "veripo_fast.config.schema", "veripo_fast.config.load", "veripo_fast.config.describe",
         "veripo_fast.run.folder", "veripo_fast.run.checkpoint", "veripo_fast.run.metrics",
         "veripo_fast.evaluation.intervals", "veripo_fast.schedule.admission", "veripo_fast.schedule.planner",
         "veripo_fast.schedule.timeline", "veripo_fast.schedule.hardware", "veripo_fast.distributed.balance",
         "veripo_fast.distributed.flops"]
ROOT_MODULES, LONG, LONG_FILES, LONGEST = 8, 300, 6, 400
ROOT_FIRST = """
if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]
"""
"""What a script of bench begins with."""


# -- the source ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("places", "forbidden"), [
    ((KERNELS,), {"veripo_fast", "bench", "tests", "transformers"}),
    ((TRAINER,), {"bench", "tests"}),
    ((BENCH, *REPOSITORY.glob("*.py")), {"tests"}),
])
def test_direction(places, forbidden):
    assert all(import_rules.sources(place) for place in places)
    assert import_rules.users(forbidden, *places) == []


def test_imports_of_the_trainer_point_left():
    assert len(import_rules.import_graph([TRAINER])) > 80
    assert import_rules.out_of_order(TRAINER, ORDER, lazy=LAZY[:1]) == []


def test_no_module_imports_itself_through_others():
    assert import_rules.cycles([TRAINER, KERNELS, BENCH], lazy=LAZY) == []


def test_sizes():
    assert len(import_rules.root_modules(TRAINER)) <= ROOT_MODULES
    long = import_rules.long_files(LONG, TRAINER, KERNELS)
    assert len(long) <= LONG_FILES, long
    assert import_rules.long_files(LONGEST, TRAINER, KERNELS) == {}


@pytest.mark.parametrize("engine", ["vllm", "nvidia.dali", "deepspeed"])
def test_heavy_engine_has_one_lazy_place(engine):
    using = {path for path in import_rules.sources(TRAINER) for name, _ in import_rules.imports(path)
             if f"{name}.".startswith(f"{engine}.")}
    assert len(using) <= 1
    for path in using:
        assert not [name for name in import_rules.imports_at_load(path) if f"{name}.".startswith(f"{engine}.")]


def test_kernels_is_no_package():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_scripts_of_bench_put_the_root_on_the_path():
    """All but tied.py, which imports nothing of ours; torchvision's folder is appended, and pytest's conftest takes the
    folder away that pytest puts there."""
    texts = {path.name: path.read_text("utf-8") for path in import_rules.sources(BENCH)}
    scripts = {name for name, text in texts.items() if '\nif __name__ == "__main__":\n' in text}
    assert {name for name, text in texts.items() if ROOT_FIRST in text} == scripts - {"tied.py"}
    assert {name for name, text in texts.items() if "sys.path" in text.replace(ROOT_FIRST, "")} == {
        "conftest.py", "torchvision_folder.py"}


# -- the rules, on trees that break them -----------------------------------------------------------------------------

def tree(folder: Path, files: dict[str, str], name: str = "p") -> Path:
    """A package of the files by name."""
    for file, text in files.items():
        path = folder / name / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / name


LAZY_INIT = "if TYPE_CHECKING:\n    from p.cache.loader import Loader as Loader\n"


@pytest.mark.parametrize("statement", [
    "from p.cache import loader", "from p.cache.loader import Loader", "import p.cache.loader", "from p import cache",
    "from ..cache import loader", "from ..cache.loader import Loader", "from p import Loader",
    "def load():\n    from p.cache import loader", "if TYPE_CHECKING:\n    from p.cache.loader import Loader",
    "try:\n    import p.cache.loader as loader\nexcept ImportError:\n    pass",
])
def test_an_import_that_points_right_is_found(tmp_path, statement):
    package = tree(tmp_path, {
        "__init__": LAZY_INIT, "errors": "from os import path\n", "video/__init__": "", "cache/__init__": "",
        "video/decode": f"import os\n{statement}\n", "cache/loader": "from p.video import decode\n",
        "cache/disk": "from p.cache import loader\nfrom p import errors\n"})
    wrong = import_rules.out_of_order(package, "errors < video < cache", lazy=["p"])
    assert len(wrong) == 1 and wrong[0].startswith("p.video.decode imports p.cache")
    assert len(import_rules.out_of_order(package, "errors < video cache", lazy=["p"])) == 2  # one is not left of both


def test_a_folder_without_a_place_is_found(tmp_path):
    package = tree(tmp_path, {"video/decode": "", "weights/plan": "", "errors": "import p.weights.plan\n"})
    assert import_rules.out_of_order(package, "errors < video") == [
        "p.errors imports p.weights.plan", "p.weights.plan: weights has no place in the order"]


@pytest.mark.parametrize(("files", "group"), [
    ({"a": "import p.b", "b": "from p import a", "c": "import p.a"}, ["p.a", "p.b"]),
    ({"a": "def f():\n    import p.b", "b": "if TYPE_CHECKING:\n    from p.a import f"}, ["p.a", "p.b"]),
    ({"a": "from . import b", "b": "from .x.c import d", "x/c": "from ..a import e"}, ["p.a", "p.b", "p.x.c"]),
    ({"a": "import p.a"}, ["p.a"]),
    ({"__init__": "if TYPE_CHECKING:\n    from p.b import f as f", "a": "from p import f", "b": "import p.a"},
     ["p.a", "p.b"]),
])
def test_a_cycle_is_found(tmp_path, files, group):
    assert import_rules.cycles([tree(tmp_path, {"__init__": ""} | files)], lazy=["p"]) == [group]


def test_a_cycle_between_packages_is_found(tmp_path):
    first = tree(tmp_path, {"a": "import q.b\n"})
    second = tree(tmp_path, {"b": "import p.a\n", "c": "import p.a\n"}, name="q")
    assert import_rules.cycles([first, second]) == [["p.a", "q.b"]]
    assert import_rules.cycles([first]) == import_rules.cycles([second]) == []


@pytest.mark.parametrize("statement", [
    "import tests", "from tests.support import runs", "def f():\n    import tests.support.runs",
    "if TYPE_CHECKING:\n    from tests import support"])
def test_a_forbidden_import_is_found(tmp_path, statement):
    package = tree(tmp_path, {"kernels/rows": statement, "measure": "import tests_of_mine\nfrom bench import tests\n"})
    found = import_rules.users({"tests"}, package)
    assert len(found) == 1 and found[0].startswith("rows.py: tests")
    assert import_rules.users({"tests"}, package / "kernels" / "rows.py") == found


def test_modules_at_the_root_are_counted(tmp_path):
    package = tree(tmp_path, {"__init__": "", "types": "", "cache/loader": ""})
    assert import_rules.root_modules(package) == ["__init__.py", "types.py"]


def test_a_long_file_is_found(tmp_path):
    package = tree(tmp_path, {"a": "\n" * 300, "b/c": "\n" * 301})
    assert import_rules.long_files(300, package) == {str(package / "b" / "c.py"): 301}


# -- what is loaded --------------------------------------------------------------------------------------------------

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
