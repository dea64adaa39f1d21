"""Compiles every registered Triton kernel for an H100, on any machine, and reads what it costs from the machine code.

    python -m veripo_kernels.testing.sm90 [MODULE ...]     modules default to all of veripo_kernels.jit

Prints a JSON line per case; exits with 1 when a case has faults. A process of its own: no interpreter may be on here.
bench/bench_sm90.py does the same and keeps the lines.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from veripo_kernels.jit import Sm90Case

MAX_REGISTERS = 255
MAX_SHARED_BYTES = 227 * 1024


def jit_modules() -> list[str]:
    """Names of the modules below veripo_kernels.jit."""
    package = importlib.import_module("veripo_kernels.jit")
    return sorted(f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__))


def cases_of(module: str) -> Iterator[tuple[str, Sm90Case]]:
    """(module.name, case) of each case that a module registers."""
    for case in getattr(importlib.import_module(module), "SM90_CASES", []):
        yield f"{module.rsplit('.', 1)[-1]}.{case['name']}", case


def compile_case(case: Sm90Case) -> dict[str, Any]:
    """Registers per thread, bytes of stack and shared memory, and counts of the instructions that matter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case["kernel"].arg_names
    signature = {name: "constexpr" if name in case["constexprs"] else case["signature"][name] for name in names}
    source = ASTSource(fn=case["kernel"], signature=signature, constexprs=case["constexprs"],
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case["divisible_by_16"]})
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                              options={"num_warps": case["num_warps"], "num_stages": case["num_stages"]})
    return {"compile_seconds": round(time.perf_counter() - start, 2), "num_warps": case["num_warps"],
            "num_stages": case["num_stages"], "shared_bytes": compiled.metadata.shared,
            **read_machine_code(compiled.asm["cubin"])}


def read_machine_code(cubin: bytes) -> dict[str, int]:
    """What cuobjdump and nvdisasm, which Triton brings along, say of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, text = (subprocess.check_output([tools / tool, option, file], text=True)
                       for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    counts = {"spill_loads": r"\bLDL\b", "spill_stores": r"\bSTL\b", "wgmma": r"\bHGMMA\b", "mma": r"\bHMMA\b",
              "tma_loads": r"\bUTMALDG\b", "wide_loads": r"\bLDG\.\S*128\b", "wide_stores": r"\bSTG\.\S*128\b"}
    return {"registers": used["REG"], "stack_bytes": used["STACK"],
            **{name: len(re.findall(pattern, text)) for name, pattern in counts.items()}}


def faults(case: Sm90Case, report: dict[str, Any]) -> list[str]:
    """Why a compiled case must not be shipped; empty when it may."""
    found = [f"{report[name]} {name}" for name in ("spill_loads", "spill_stores", "stack_bytes") if report[name]]
    if report["registers"] > MAX_REGISTERS:
        found.append(f"{report['registers']} registers, more than {MAX_REGISTERS}")
    if report["shared_bytes"] > MAX_SHARED_BYTES:
        found.append(f"{report['shared_bytes']} shared_bytes, more than {MAX_SHARED_BYTES}")
    if case["wgmma"] and not report["wgmma"]:
        found.append(f"no warp-group matrix product ({report['mma']} of the older kind)")
    unknown = {parameter.name for parameter in case["kernel"].params
               if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment}
    found += [f"`{name}` is not specialized: no launch would know that it divides by 16"
              for name in sorted(unknown & set(case["divisible_by_16"]))]
    return found


def check_case(module: str, name: str) -> dict[str, Any]:
    """Name, report and faults of a case."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    case = dict(cases_of(module))[name]
    try:
        report = compile_case(case)
    except (CompilationError, PTXASError, RuntimeError) as error:
        return {"case": name, "faults": [f"does not compile: {error}"]}
    return {"case": name, **report, "faults": faults(case, report)}


def launch_keys(kernels: list[Any], launches: Callable[[], object]) -> set[str]:
    """What the kernels' launches inside `launches` would be compiled for: distinct types, alignments and constants.

    Nothing is compiled and nothing runs; tensors may be on the CPU.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, keys = make_backend(GPUTarget("cuda", 90, 32)), set()

    def recorder(kernel: Any) -> Callable[..., None]:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def run(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            _, specialization, launch = bind(*arguments, **options)
            keys.add(f"{kernel.__name__} {specialization} {launch}")

        return run

    for kernel in kernels:
        kernel.run = recorder(kernel)
    launches()
    for kernel in kernels:
        del kernel.run
    return keys


def compile_all(modules: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compiles the cases on all cores; prints and returns a row for each."""
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = [(module, name) for module in modules or jit_modules() for name, _ in cases_of(module)]
    pool = ProcessPoolExecutor(mp_context=get_context("fork"), initializer=_end_with_parent)
    rows = []
    with tempfile.TemporaryDirectory() as cache, pool:
        os.environ["TRITON_CACHE_DIR"] = cache
        for row in pool.map(check_case, *zip(*jobs, strict=True)):
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone, however that one ended."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Compiles the modules that the command line names; the exit code is 1 when a case has faults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    rows = compile_all(parser.parse_args().modules)
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
