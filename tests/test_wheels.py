"""Wheels in a clean environment of each Python, and the folder of wheels for a node without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.support.children import run
from tests.support.paths import REPOSITORY
from veripo_fast import __version__

PYTHONS = ("3.11", "3.12")
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "veripo_fast", "kernels", "csrc")
LOSS = """
import sys, torch
from veripo_kernels import linear_policy_loss, reference, status
torch.manual_seed(0)
hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
tokens, lengths = torch.randint(0, 32, (6,)), torch.tensor([0, 2, 6], dtype=torch.int32)
old = reference.gather_logprobs(hidden.detach() @ head.detach().T, tokens)
loss, metrics, logprobs = linear_policy_loss(hidden, head, tokens, old, torch.tensor([1.0, -0.5]), lengths, loss="dapo")
loss.backward()
assert torch.isfinite(loss) and hidden.grad.abs().max() > 0 and head.grad.abs().max() > 0
assert torch.allclose(logprobs, old, atol=1e-5), (logprobs, old)
print(status())
print(sys.modules["veripo_kernels"].__file__)
"""


@cache
def interpreter(version: str) -> str:
    """Path of a Python of this version; "" when there is none."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)):
        if candidate and subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(candidate)
    return ""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels of a copy of the sources, by distribution, each with the compiled op where it can be built."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "*.so")
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / name, source)
    made = {}
    for name, folder in (("veripo_kernels", source / "kernels"), ("veripo_fast", source)):
        built = run(sys.executable, "-m", "pip", "wheel", folder, "--no-deps", "--no-build-isolation", "-w",
                    source / "dist", env=os.environ | {"CXXFLAGS": "-O0"})  # a third of the time; it is not timed
        assert built.returncode == 0, built.stderr
        [made[name]] = (source / "dist").glob(f"{name}-{__version__}-py3-none-*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Callable]:
    """Installs one wheel into a new environment; what is given runs commands of it, away from the checkout."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    @cache
    def make(name: str, version: str) -> Callable:
        if not interpreter(version):
            pytest.skip(f"there is no Python {version} here (python{version} on PATH, or in pyenv)")
        venv = tmp_path_factory.mktemp("clean") / "venv"
        for command in ((interpreter(version), "-m", "venv", "--without-pip", venv),
                        (sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-index",
                         "--no-deps", wheels[name])):
            done = run(*command, env=clean)
            assert done.returncode == 0, done.stderr

        def command_of(program: str, *arguments: str, libraries: str = "") -> subprocess.CompletedProcess[str]:
            return run(venv / "bin" / program, *arguments, cwd=venv, env=clean | {"PYTHONPATH": libraries})
        return command_of
    return make


def libraries(version: str) -> str:
    """Where the installed dependencies of this process lie, which another Python cannot load."""
    if interpreter(version) != sys.executable:
        pytest.skip(f"torch is installed here for Python {sys.version_info.major}.{sys.version_info.minor} alone; "
                    f"`make wheelhouse PYTHON=python{version}` and `make install-wheelhouse` try {version}")
    return sysconfig.get_path("purelib")


@pytest.mark.parametrize("version", PYTHONS)
def test_kernels_alone(environment: Callable, version: str) -> None:
    """The package, and nothing of the trainer; it imports without torch, and says which it needs."""
    command = environment("veripo_kernels", version)
    there = command("python", "-c", "import veripo_kernels; print(veripo_kernels.__file__)")
    assert there.returncode == 0 and "venv" in there.stdout, there.stderr
    assert "No module named 'veripo_fast'" in command("python", "-c", "import veripo_fast").stderr
    said = command("python", "-c", "from importlib.metadata import requires; print(requires('veripo-kernels'))")
    assert said.stdout == "['torch>=2.11']\n"


@pytest.mark.parametrize("version", PYTHONS)
@pytest.mark.parametrize("name", ["veripo_kernels", "veripo_fast"])
def test_a_fused_loss(environment: Callable, name: str, version: str) -> None:
    packages = libraries(version)
    done = environment(name, version)("python", "-c", LOSS, libraries=packages)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("venv/lib/python" + version + "/site-packages/veripo_kernels/__init__.py")


@pytest.mark.parametrize("version", PYTHONS)
def test_veripo_help(environment: Callable, version: str) -> None:
    """With no other package at all: `--help` needs none."""
    command = environment("veripo_fast", version)
    done = command("veripo", "--help")
    assert done.returncode == 0 and "  train  " in done.stdout, done.stdout + done.stderr
    there = command("python", "-c", "import veripo_fast, veripo_kernels; print(veripo_fast.__file__)")
    assert there.returncode == 0 and "venv" in there.stdout, there.stderr


# -- a folder of wheels ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheelhouse of two small packages, one of which needs the other, in parts of 1,000 bytes."""
    folder = tmp_path_factory.mktemp("small")
    for name, needs in (("first", ["second_of_two"]), ("second_of_two", [])):
        (folder / name / name).mkdir(parents=True)
        (folder / name / name / "__init__.py").write_text("# " + os.urandom(3000).hex() + "\nvalue = 7\n")
        (folder / name / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
            f'[project]\nname = "{name}"\nversion = "1.0"\ndependencies = {json.dumps(needs)}\n'
            f'[tool.setuptools]\npackages = ["{name}"]\n')
    done = wheelhouse("write", folder / "house", "--part-bytes", "1000", "--packages", "--no-index",
                      "--no-build-isolation", folder / "first", folder / "second_of_two")
    assert done.returncode == 0, done.stderr
    assert "2 wheels" in done.stdout and "in 10 parts" in done.stdout, done.stdout
    return folder / "house"


def wheelhouse(command: str, *arguments: object, script: Path = REPOSITORY / ".ci" / "wheelhouse.py"
               ) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, script, command, *map(str, arguments))


@pytest.fixture
def copied(house: Path, tmp_path: Path) -> Path:
    return shutil.copytree(house, tmp_path / "house")


def test_it_is_installed_without_an_index(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the script in the folder, which is all that the node gets."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    parts = sorted(copied.glob("*.part*"))
    assert len(parts) == 10 and max(path.stat().st_size for path in parts) == 1000
    checked = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=copied, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    done = wheelhouse("install", copied, "--venv", tmp_path / "venv", script=copied / "wheelhouse.py")
    assert done.returncode == 0, done.stderr
    there = run(tmp_path / "venv" / "bin" / "python", "-c", "import first, second_of_two; print(first.value)")
    assert there.stdout == "7\n"
    assert sorted(path.name for path in copied.iterdir() if path.is_dir()) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def change(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / "wheelhouse.json").read_text())
    (folder / "wheelhouse.json").write_text(json.dumps(manifest | values))


PART = "second_of_two-1.0-py3-none-any.whl.part002"


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: flip(folder / PART), f"{PART} is damaged: its SHA-256 is not that of wheelhouse.json"),
    (lambda folder: (folder / PART).unlink(), f"{PART} is missing; copy it again"),
    (lambda folder: os.truncate(folder / PART, 999), f"{PART} has 999 of 1000 bytes"),
    (lambda folder: change(folder, python="3.9"), "this wheelhouse is for Python 3.9, and this is "),
    (lambda folder: change(folder, machine="Linux riscv64"), "is for a machine of the kind Linux riscv64"),
    (lambda folder: change(folder, wheels={"../a.whl": {"parts": []}}), "names '../a.whl', which is no file of this"),
    (lambda folder: (folder / "wheelhouse.json").write_text("{"), "wheelhouse.json cannot be read"),
    (lambda folder: (folder / "wheelhouse.json").unlink(), "is no wheelhouse: it has no wheelhouse.json"),
])
def test_what_is_wrong_is_named_and_nothing_installed(copied: Path, tmp_path: Path, damage: Callable, words: str
                                                      ) -> None:
    damage(copied)
    done = wheelhouse("install", copied, "--venv", tmp_path / "venv")
    assert done.returncode == 1 and done.stderr.startswith("wheelhouse: ") and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "venv").exists()


def test_a_folder_that_holds_something_is_refused(copied: Path) -> None:
    done = wheelhouse("write", copied, "--packages", "first")
    assert done.returncode == 1 and done.stderr.endswith("is not empty; name a new folder\n")


def test_parts_of_the_makefile() -> None:
    """60 MiB, and the pinned torch; every variable of the help line is one of the recipe."""
    text = (REPOSITORY / "Makefile").read_text("utf-8")
    script = (REPOSITORY / ".ci" / "wheelhouse.py").read_text("utf-8")
    [pinned] = [line for line in (REPOSITORY / ".ci" / "constraints-cpu.txt").read_text().splitlines()
                if line.startswith("torch==")]
    assert f"TORCH ?= {pinned.partition('==')[2]}\n" in text and "PART_BYTES = 60 << 20" in script
    assert f'default="{pinned.partition("==")[2]}"' in script
    for name in ("PYTHON", "WHEELHOUSE", "TORCH", "CUDA", "EXTRAS"):
        assert f"$({name})" in text and f"{name}=" in text
