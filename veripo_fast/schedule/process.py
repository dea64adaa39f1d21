"""What a process holds by itself: interpreter and libraries, and products that oneDNN compiles for bfloat16."""

from __future__ import annotations

from veripo_fast.schedule.placement import Owners
from veripo_fast.schedule.shapes import ModelShape

MIB = 1 << 20
PROCESS = {"none": 545 * MIB, "fsdp": 600 * MIB, "deepspeed": 640 * MIB, "vllm": 600 * MIB}
"""Interpreter, torch, transformers and the other libraries of a process by backend, once each has been used; what vLLM
adds stands by itself. Measured on Linux with the CPU builds of torch 2.13 (bench/bench_ledger.py); CUDA's add to it."""
LOADING = 450 * MIB
"""Of these, what is there while the policy loads, before the libraries first decode, score, step and talk."""


def process_bytes(backend: str, engine: str) -> Owners:
    """Of a rank, by the backend of its `Placement` and its rollout engine."""
    known = {"none": "none", "fsdp": "fsdp"}.get(backend, "deepspeed")
    return {"process": max(PROCESS[known], PROCESS["vllm"] if engine == "vllm" else 0)}


KERNELS, KERNEL_BYTES = 1024, 600 << 10
"""oneDNN keeps what it has compiled for the last so many shapes; bytes of one, measured with AVX-512 (bench_ledger.py:
rows of other counts raise what a process holds by 0.6 MB for each product)."""


def compiled_bytes(shape: ModelShape, passes: int | None) -> int:
    """Of products in bfloat16 on a CPU, which are compiled for each number of rows: forward, and two backward.

    Args:
        passes: micro-batches of a stage, each as long as no other; None: many.
    """
    if passes is None:
        return KERNELS * KERNEL_BYTES
    matrices = {(name.split(".")[-3], weight) for name, weight in shape.named
                if len(weight) == 2 and ".layers." in name}  # a matrix of the same shape elsewhere has other strides
    experts = shape.experts.layers * shape.experts.experts if shape.experts else 0
    return min(passes * 3 * (len(matrices) + experts), KERNELS) * KERNEL_BYTES
