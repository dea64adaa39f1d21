"""Which folders are packages, and how csrc/ is compiled; everything else is in pyproject.toml.

kernels/setup.py runs this file too, for a wheel of veripo_kernels alone, and takes what it says of csrc/.

`kernels/` is a source root, not a package: `kernels` is the import name of a Hugging Face package that transformers
imports, and a package of that name would shadow it. The compiled op is optional: where torch or a compiler is missing
the install says so in one line and goes on without it.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ALONE = "kernels"
"""Name under which kernels/setup.py runs this file, in its own folder."""
CSRC = "../csrc" if __name__ == ALONE else "csrc"
HEADERS = [str(path) for path in sorted(Path(CSRC).glob("*.h"))]
STEMS = ("gather_logprobs", "frames_to_patches", "copy_slices")
CPU = Extension("veripo_kernels._cpp", [f"{CSRC}/{stem}.cpp" for stem in STEMS], optional=True, depends=HEADERS)
CUDA = Extension("veripo_kernels._cuda", [f"{CSRC}/{stem}.cu" for stem in STEMS], optional=True, depends=HEADERS)
FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020B000000000000"]  # the oldest torch that may load it: 2.11


def torch_folder() -> Path | None:
    """Where torch is installed; it need not be imported for that."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def extensions() -> tuple[list[Extension], str]:
    """What can be compiled here, and if that is nothing, why."""
    torch = torch_folder()
    if torch is None:
        return [], "torch cannot be imported here (pip hides it unless --no-build-isolation is given)"
    if compiler() is None:
        return [], f"there is no C++ compiler ({os.environ.get('CXX', 'c++, g++ or clang++')})"
    if platform.system() != "Linux" or not Path(CPU.sources[0]).exists():
        return [], f"it needs Linux and {CPU.sources[0]}"
    cuda_torch = (torch / "lib" / "libtorch_cuda.so").exists()
    asked = os.environ.get("VERIPO_CUDA") or ("1" if cuda_torch else "0")
    return [CPU, CUDA] if asked == "1" and shutil.which("nvcc") else [CPU], ""


EXTENSIONS, REASON = extensions()


def say_left_out(reason: str) -> None:
    print(f"veripo-fast: going on without the compiled op: {reason}", flush=True)


class BuildExt(build_ext):
    """Calls the compilers directly: the library uses no Python API, and Python's flags may be another compiler's."""

    def run(self) -> None:
        if not EXTENSIONS:
            say_left_out(REASON)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = self.cuda_command(ext, target) if ext is CUDA else self.cpu_command(ext, target)
        print(shlex.join(command), flush=True)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(result.stderr, flush=True)
            say_left_out(f"{command[0]} could not compile {' and '.join(ext.sources)}, see above")

    def cpu_command(self, ext: Extension, target: Path) -> list[str]:
        torch = torch_folder()
        loops = ["-fopenmp-simd", "-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno"]
        return [*shlex.split(compiler()), *FLAGS, *loops, "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra",
                *shlex.split(os.environ.get("CXXFLAGS", "")), f"-isystem{torch}/include", *ext.sources,
                "-o", str(target), f"-L{torch}/lib", "-ltorch_cpu"]

    def cuda_command(self, ext: Extension, target: Path) -> list[str]:
        """Links with libtorch_cuda.so, and with an empty library of that name where torch is a CPU build."""
        torch, stub = torch_folder(), Path(self.build_temp) / "libtorch_cuda.so"
        if not (torch / "lib" / stub.name).exists():
            stub.parent.mkdir(parents=True, exist_ok=True)
            empty = [*shlex.split(compiler()), "-shared", f"-Wl,-soname,{stub.name}", "-x", "c++", os.devnull]
            subprocess.run([*empty, "-o", str(stub)], check=False)  # where it fails, nvcc's link fails and says so
        return ["nvcc", *FLAGS, "-DUSE_CUDA", "-gencode", "arch=compute_90a,code=sm_90a", "-shared",
                "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{torch}/include", *ext.sources, "-o", str(target),
                f"-L{torch}/lib", f"-L{stub.parent}", "-ltorch_cpu", "-Xlinker=--no-as-needed", "-ltorch_cuda"]


class BuildPy(build_py):
    """Runs in every build, also where there is no extension, and says why there is none."""

    def run(self) -> None:
        if not EXTENSIONS:
            say_left_out(REASON)
        super().run()


class Wheel(bdist_wheel):
    """One wheel for every Python: the library has no Python symbol in it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


COMMANDS = {"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": Wheel}

if __name__ != ALONE:
    setup(
        packages=find_packages(include=["veripo_fast", "veripo_fast.*"])
        + find_packages("kernels", include=["veripo_kernels", "veripo_kernels.*"]),
        package_dir={"veripo_kernels": "kernels/veripo_kernels"},
        package_data={"veripo_fast": ["py.typed", "demo/tiny_policy/*", "report/assets/*", "verifier/planted.jsonl"],
                      "veripo_kernels": ["py.typed"]},
        include_package_data=False,
        ext_modules=EXTENSIONS,
        cmdclass=COMMANDS,
    )
