"""What is installed: the wheel's contents, the pins, and the sentences of the install script."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.paths import REPOSITORY
from veripo_fast import __version__

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = {"veripo_fast": REPOSITORY / "veripo_fast", "veripo_kernels": REPOSITORY / "kernels" / "veripo_kernels"}
DATA_FOLDERS, DATA_FILES = ("demo/tiny_policy", "report/assets"), ("verifier/planted.jsonl",)


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory) -> Path:
    """A wheel that is built from a copy of the sources with files that must stay out."""
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
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file) -> set[str]:
    """Names inside the wheel."""
    return set(zipfile.ZipFile(wheel_file).namelist())


def test_wheel_holds_the_two_packages_alone(wheel):
    metadata = f"veripo_fast-{__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel} == {*PACKAGES, metadata}
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/entry_points.txt"} <= wheel


def test_wheel_holds_every_module_and_data_file(wheel):
    expected = {f"{package}/{path.relative_to(folder).as_posix()}"
                for package, folder in PACKAGES.items() for path in (*folder.rglob("*.py"), folder / "py.typed")}
    expected |= {f"veripo_fast/{name}" for name in DATA_FILES}
    for name in DATA_FOLDERS:
        expected |= {f"veripo_fast/{name}/{path.name}" for path in (PACKAGES["veripo_fast"] / name).iterdir()}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


USER_SCRIPT = """
import veripo_fast
from veripo_kernels import PolicyLoss

config: veripo_fast.Config = veripo_fast.load_config("run.yaml", ["--grpo.clip-high", "0.28"])
veripo_fast.train(config, resume=True)
for record in veripo_fast.evaluate(config):
    print(record["accuracy"])
policy = veripo_fast.load_policy(config.model)
loss = PolicyLoss("dapo", clip_high=config.grpo.clip_high)
"""
MISTAKES = {"veripo_fast.train(1)": 'has incompatible type "int"; expected "Config"',
            "config.grpo.step": 'has no attribute "step"; maybe "steps"',
            "veripo_fast.tain": "has no attribute",
            'PolicyLoss("gropo")': "has incompatible type"}


def test_a_script_of_a_user_is_type_checked_against_the_wheel(wheel_file, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel_file).extractall(site)
    (tmp_path / "script.py").write_text(USER_SCRIPT + "\n".join(MISTAKES) + "\n")
    checked = subprocess.run([sys.executable, "-m", "mypy", "--python-executable", tmp_path / "venv" / "bin" / "python",
                              "--follow-imports=silent", "--ignore-missing-imports", "--config-file", os.devnull,
                              "script.py"], cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    first = USER_SCRIPT.count("\n") + 1
    for number, (error, sentence) in enumerate(zip(errors, MISTAKES.values(), strict=True), start=first):
        assert error.startswith(f"script.py:{number}: ") and sentence in error, checked.stdout


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
    assert set(PROJECT["optional-dependencies"]) == {"vllm", "dali", "deepspeed", "flash", "trl", "liger", "remote",
                                                     "answers", "bench", "dev", "fla", "lora", "trackio", "wandb"}


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


# -- which build of torch is installed -------------------------------------------------------------------------------

TORCH = pins()["torch"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FAKE_PYTHON = f"""#!/bin/sh
case "$*" in
    *"venv --clear"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python; exit ;;
    *importlib.metadata*) exit 1 ;; # torch is not here yet
    *"index versions"*--index-url*) echo "Available versions: $INDEX_OFFERS"; exit ;;
    *"index versions"*) echo "Available versions: $PIP_OFFERS"; exit ;;
    *torch=={TORCH}) # PyPI's build
        folder=.venv/lib/python3.12/site-packages/torch/lib
        mkdir -p $folder && touch $folder/libtorch_cuda.so ;;
esac
echo "$*" >>calls
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Runs install.sh in a folder of its own, on a machine without a GPU."""
    shutil.copytree(REPOSITORY / ".ci", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return lambda *arguments: subprocess.run(["sh", ".ci/install.sh", *arguments], cwd=tmp_path, capture_output=True,
                                             text=True)


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("pip_offers", "index_offers", "arguments", "pins_triton"), [
    (f"9.9.0, {TORCH}+cpu, {TORCH}", "", f"torch=={TORCH}+cpu", True),
    (TORCH, f"9.9.0+cpu, {TORCH}+cpu", f"torch=={TORCH}+cpu --index-url {CPU_INDEX}", True),
    (TORCH, "", f"torch=={TORCH}", False),  # torch's CUDA build names its own triton
    (f"{TORCH}0+cpu, {TORCH}", f"{TORCH}1+cpu", f"torch=={TORCH}", False),
])
def test_the_cpu_build_comes_from_where_it_is_offered(install, tmp_path, monkeypatch, pip_offers, index_offers,
                                                      arguments, pins_triton):
    monkeypatch.setenv("PIP_OFFERS", pip_offers)
    monkeypatch.setenv("INDEX_OFFERS", index_offers)
    done = install("base", executable(tmp_path / "python", FAKE_PYTHON))
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if "torch==" in call] == [
        f"-m pip install --disable-pip-version-check {arguments}"]
    said = f"==> {CPU_INDEX} offers no CPU build here; taking PyPI's build for CUDA, 4.7 GB on disk instead of 0.8\n"
    assert done.stdout.count(said) == (not pins_triton)
    held = {line.split("==")[0] for line in (tmp_path / ".venv" / "constraints.txt").read_text("utf-8").splitlines()}
    assert {"torch", "torchcodec", "numpy"} <= held and ("triton" in held) == pins_triton


def test_without_any_index_the_missing_one_is_named(install, tmp_path, monkeypatch):
    """The real pip, whose every way out is a port that nothing listens at."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    done = install("base", sys.executable)
    python = f"Python {sys.version.split()[0]}"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"install: neither {CPU_INDEX}, the index of the CPU build, nor pip's own index offers torch {TORCH} to "
        f"{python}; PIP_INDEX_URL or PIP_FIND_LINKS can name a source that has it (pip's words: .venv/torch.log and "
        "above)")
    log = (tmp_path / ".venv" / "torch.log").read_text()
    assert log.count("No matching distribution found for torch") == 2 and "no such option" not in log


def test_ci_calls_the_two_test_targets_and_nothing_else():
    commands = [line for line in (REPOSITORY / ".ci" / "run").read_text("utf-8").splitlines() if line[:1] != "#"]
    assert commands == ['cd "$(dirname "$0")/.." && make test-engines && exec make test']
