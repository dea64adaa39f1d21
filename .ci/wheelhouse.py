"""A folder with all that a node without a network needs, and its installation there. Needs Python and pip alone.

    python3.12 .ci/wheelhouse.py write FOLDER [--torch 2.13.0] [--cuda cpu|cu130] [--extras liger,deepspeed]
    python3.12 FOLDER/wheelhouse.py install FOLDER --venv .venv

The Python that writes is the Python that installs: same version, same kind of machine. Wheels larger than a part are
cut, so that they pass through mail gateways and drop boxes. wheelhouse.json has size and SHA-256 of every part and of
every whole wheel; SHA256SUMS has the same for `sha256sum -c`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
MANIFEST, SUMS = "wheelhouse.json", "SHA256SUMS"
PART_BYTES = 60 << 20
_BLOCK = 1 << 20
_INDEX = "https://download.pytorch.org/whl/"


class Refused(Exception):
    """Something a user can mend, in one sentence."""


def this_python() -> dict[str, str]:
    """What wheels depend on: version of Python, kind of machine."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": version, "machine": f"{platform.system()} {platform.machine()}"}


# -- writing ----------------------------------------------------------------------------------------------------------

def write(folder: Path, packages: Sequence[str], part_bytes: int, wanted: dict[str, str]) -> None:
    """Collect the wheels of `packages` and of all that they need, and write them in parts.

    Args:
        packages: requirements and options, as `pip wheel` takes them.
        wanted: what the user asked for, by name; kept beside the wheels.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty; name a new folder")
    if part_bytes < 1:
        raise Refused(f"parts must have at least one byte, got {part_bytes}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as collected:
        pip("wheel", "--wheel-dir", collected, *packages)
        wheels = {path.name: split(path, folder, part_bytes) for path in sorted(Path(collected).glob("*.whl"))}
    manifest = this_python() | {"wanted": wanted, "wheels": wheels}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    shutil.copyfile(__file__, folder / Path(__file__).name)
    files = [MANIFEST, Path(__file__).name, *(part["name"] for wheel in wheels.values() for part in wheel["parts"])]
    (folder / SUMS).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in files), "utf-8")
    size = sum(wheel["bytes"] for wheel in wheels.values())
    say(f"{folder}: {len(wheels)} wheels, {size / 1e6:,.1f} MB in {len(files) - 2} parts of at most "
        f"{part_bytes / 2**20:g} MiB, for Python {manifest['python']} on {manifest['machine']}")


def split(wheel: Path, folder: Path, part_bytes: int) -> dict[str, Any]:
    """Move a wheel into a folder, cut where it is larger than a part; its entry of the manifest."""
    entry: dict[str, Any] = {"bytes": wheel.stat().st_size, "sha256": sha256(wheel), "parts": []}
    if entry["bytes"] <= part_bytes:
        wheel.rename(folder / wheel.name)
        entry["parts"] = [{"name": wheel.name, "bytes": entry["bytes"], "sha256": entry["sha256"]}]
        return entry
    count = -(-entry["bytes"] // part_bytes)
    with wheel.open("rb") as file:
        for number in range(count):
            path = folder / f"{wheel.name}.part{number:03d}"
            copy(file, path, part_bytes)
            entry["parts"].append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)})
    wheel.unlink()
    return entry


def copy(file: Any, path: Path, most: int) -> None:
    """At most so many bytes from an open file into a new one."""
    with path.open("wb") as out:
        while most and (block := file.read(min(most, _BLOCK))):
            out.write(block)
            most -= len(block)


def requirements(torch: str, cuda: str, extras: str) -> list[str]:
    """What `pip wheel` is asked for: this repository, torch as it was chosen, and the versions that were tested."""
    release, index = torch_source(torch, cuda)
    lines = (REPOSITORY / ".ci" / "constraints-cpu.txt").read_text("utf-8").splitlines()
    held = [line for line in lines if re.match(r"[\w.-]+==", line) and not line.startswith(
        ("torch==", "triton==") if cuda == "cpu" else ("torch==", "torchcodec==", "triton=="))]
    constraints = Path(tempfile.mkdtemp()) / "constraints.txt"
    constraints.write_text("\n".join(held) + "\n", "utf-8")
    return [f"torch=={release}", *index, "-c", str(constraints), own_wheel(constraints.parent, extras)]


def torch_source(torch: str, cuda: str) -> tuple[str, list[str]]:
    """Version of torch for pip and the index that has it: pip's own sources first, then that of the build."""
    build, index = f"{torch}+{cuda}", ["--extra-index-url", _INDEX + cuda]
    if cuda == "pip":
        return torch, []
    if offers(build, []):
        return build, []
    if offers(build, ["--index-url", _INDEX + cuda]):
        return build, index
    say(f"{_INDEX}{cuda} offers no torch {build} to Python {this_python()['python']}; taking torch {torch} of pip's "
        "own index, whatever it was built for")
    return torch, []


def offers(version: str, index: Sequence[str]) -> bool:
    """Whether pip finds torch in a version."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--retries", "1", "--timeout", "15", *index]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    listed = re.search(r"^Available versions: (.*)$", found, re.MULTILINE)
    return listed is not None and version in listed[1].replace(" ", "").split(",")


def own_wheel(folder: Path, extras: str) -> str:
    """The wheel of this repository as a requirement; with the compiled op where `.venv` has torch and a compiler is."""
    builder = REPOSITORY / ".venv" / "bin" / "python"
    has_torch = builder.exists() and subprocess.run([builder, "-c", "import torch, setuptools"], capture_output=True,
                                                    check=False).returncode == 0
    command = [str(builder), "-m", "pip", "wheel", "--no-build-isolation"] if has_torch else [
        sys.executable, "-m", "pip", "wheel"]
    called(*command, "--quiet", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY))
    [wheel] = folder.glob("veripo_fast-*.whl")
    if wheel.name.endswith("-any.whl"):
        say("veripo-fast goes without its compiled op, which is built where .venv has torch (`make demo`) and a C++ "
            "compiler is; everything works without it, slower")
    return f"veripo-fast[{extras}] @ {wheel.as_uri()}" if extras else str(wheel)


# -- installing -------------------------------------------------------------------------------------------------------

def install(folder: Path, venv: Path) -> None:
    """Check every part, join the wheels, and install them into a virtual environment without any index."""
    manifest = read_manifest(folder)
    check_python(manifest)
    for wheel in manifest["wheels"].values():
        for part in wheel["parts"]:
            check(folder / part["name"], part)
    with tempfile.TemporaryDirectory(dir=folder) as joined:
        for name, wheel in manifest["wheels"].items():
            join(folder, Path(joined) / name, wheel)
        if not (venv / "bin" / "python").exists():
            called(sys.executable, "-m", "venv", str(venv))
        wheels = [str(Path(joined) / name) for name in manifest["wheels"]]
        called(str(venv / "bin" / "python"), "-m", "pip", "install", "--no-index", "--no-deps",
               "--disable-pip-version-check", *wheels)
    say(f"{len(wheels)} wheels are installed in {venv}; to use them: source {venv}/bin/activate")


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        names = [*manifest["wheels"], *(part["name"] for wheel in manifest["wheels"].values()
                                        for part in wheel["parts"])]
    except FileNotFoundError:
        raise Refused(f"{folder} is no wheelhouse: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{folder / MANIFEST} cannot be read: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise Refused(f"{folder / MANIFEST} names {name!r}, which is no file of this folder")
    return manifest


def check_python(manifest: dict[str, Any]) -> None:
    here = this_python()
    for what, word in (("python", "Python"), ("machine", "a machine of the kind")):
        if manifest.get(what) != here[what]:
            raise Refused(f"this wheelhouse is for {word} {manifest.get(what)}, and this is {here[what]} "
                          f"({sys.executable}); "
                          + (f"run make install-wheelhouse PYTHON=python{manifest.get(what)}" if what == "python" else
                             "write one on a machine like this"))


def check(path: Path, entry: dict[str, Any]) -> None:
    """Refuse a file that is missing, cut or changed, by name."""
    if not path.is_file():
        raise Refused(f"{path.name} is missing; copy it again")
    if path.stat().st_size != entry["bytes"]:
        raise Refused(f"{path.name} has {path.stat().st_size} of {entry['bytes']} bytes; copy it again")
    if sha256(path) != entry["sha256"]:
        raise Refused(f"{path.name} is damaged: its SHA-256 is not that of {MANIFEST}; copy it again")


def join(folder: Path, wheel: Path, entry: dict[str, Any]) -> None:
    with wheel.open("wb") as out:
        for part in entry["parts"]:
            with (folder / part["name"]).open("rb") as file:
                shutil.copyfileobj(file, out, _BLOCK)
    check(wheel, entry)


# -- both -------------------------------------------------------------------------------------------------------------

def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def pip(*arguments: str) -> None:
    called(sys.executable, "-m", "pip", *arguments)


def called(*command: str) -> None:
    """Run a command; what it says goes to the terminal."""
    code = subprocess.run(command, check=False, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}).returncode
    if code:
        raise Refused(f"{' '.join(command[:4])} ended with code {code}, see above")


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="collect wheels in a folder")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--torch", default="2.13.0", help="version of torch")
    writing.add_argument("--cuda", default="cpu", help="build of torch: cpu, cu130, ..., or pip: that of pip's index")
    writing.add_argument("--extras", default="", help="extras of veripo-fast, with commas")
    writing.add_argument("--part-bytes", type=int, default=PART_BYTES)
    writing.add_argument("--packages", nargs=argparse.REMAINDER,
                         help="what `pip wheel` is asked for in place of veripo-fast")
    installing = commands.add_parser("install", help="install from such a folder")
    installing.add_argument("folder", type=Path)
    installing.add_argument("--venv", type=Path, default=Path(".venv"))
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "install":
            install(asked.folder, asked.venv)
        else:
            packages = asked.packages or requirements(asked.torch, asked.cuda, asked.extras)
            wanted = {name: getattr(asked, name) for name in ("torch", "cuda", "extras")} if not asked.packages else {}
            write(asked.folder, packages, asked.part_bytes, wanted)
    except Refused as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
