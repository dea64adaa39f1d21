"""What a process holds by itself, whatever it trains: interpreter and libraries."""

from __future__ import annotations

from veripo_fast.schedule.placement import Owners

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
