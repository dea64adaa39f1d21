"""What is installed: the wheel's contents, the pins, and the sentences of the install script."""

import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from veripo_fast import __version__

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = {"veripo_fast": REPOSITORY / "veripo_fast", "veripo_kernels": REPOSITORY / "kernels" / "veripo_kernels"}
DATA_FOLDERS = ("demo/tiny_policy", "report/assets")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names inside a wheel that is built from a copy of the sources with files that must stay out."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for folder in ("veripo_fast", "kernels"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=ignored)
    for folder in ("tests", "bench", "csrc"):
        (source / folder).mkdir()
        (source / folder / "__init__.py").touch()
    (source / "veripo_fast" / "stray.bin").touch()
    command = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-w", source / "dist"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [path] = (source / "dist").glob("*.whl")
    assert path.name == f"veripo_fast-{__version__}-py3-none-any.whl"
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_holds_the_two_packages_alone(wheel):
    metadata = f"veripo_fast-{__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel} == {*PACKAGES, metadata}
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/entry_points.txt"} <= wheel


def test_wheel_holds_every_module_and_data_file(wheel):
    expected = {f"{package}/{path.relative_to(folder).as_posix()}"
                for package, folder in PACKAGES.items() for path in (*folder.rglob("*.py"), folder / "py.typed")}
    for name in DATA_FOLDERS:
        expected |= {f"veripo_fast/{name}/{path.name}" for path in (PACKAGES["veripo_fast"] / name).iterdir()}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_shipped_policy_is_small():
    files = list((PACKAGES["veripo_fast"] / "demo" / "tiny_policy").iterdir())
    assert any(path.suffix == ".safetensors" for path in files)
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def pins() -> dict[str, str]:
    lines = (REPOSITORY / ".ci" / "constraints-cpu.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): version for name, version in pairs}


def extra(name: str) -> list[Requirement]:
    """What an extra asks for, with the extras it names."""
    asked = list(map(Requirement, PROJECT["optional-dependencies"][name]))
    own = [part for requirement in asked if requirement.name == PROJECT["name"] for part in sorted(requirement.extras)]
    return [r for r in asked if r.name != PROJECT["name"]] + [r for part in own for r in extra(part)]


def test_every_dependency_is_pinned_within_its_range():
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *extra("dev")]:
        if requirement.name != "setuptools":
            assert requirement.specifier.contains(pins()[requirement.name.lower()]), str(requirement)


def test_extras():
    assert set(PROJECT["optional-dependencies"]) == {"vllm", "dali", "deepspeed", "trl", "liger", "bench", "dev"}


@pytest.mark.parametrize(("python", "words"), [
    ("exit 1", "install: Python 3.9.2 is too old, 3.11 or newer is needed"),
    ('case "$2" in *ensurepip*) exit 1;; esac', "install: FOLDER/python cannot make virtual environments"),
    (None, "install: there is no FOLDER/python; install Python 3.11 or 3.12"),
])
def test_install_says_what_is_wrong_with_python(tmp_path, python, words):
    shutil.copytree(REPOSITORY / ".ci", tmp_path / ".ci")
    if python is not None:
        (tmp_path / "python").write_text(f'#!/bin/sh\nif [ "$1" = -V ]; then echo Python 3.9.2; exit; fi\n{python}\n')
        (tmp_path / "python").chmod(0o755)
    result = subprocess.run(["sh", ".ci/install.sh", "base", tmp_path / "python"], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 1
    assert words in result.stderr.replace(str(tmp_path), "FOLDER")
    assert not (tmp_path / ".venv").exists()


def test_ci_calls_make_test_and_nothing_else():
    commands = [line for line in (REPOSITORY / ".ci" / "run").read_text("utf-8").splitlines() if line[:1] != "#"]
    assert commands == ['cd "$(dirname "$0")/.." && exec make test']
