"""Weights of trainer and vLLM in one process: what a hand-over costs, and what a second copy takes.

    make engines && .venv-engines/bin/python bench/bench_engine.py [--size 400m] [--dtype bfloat16] [--updates 20]

For shared and for copied weights, each in a process of its own: resident memory with trainer and engine at hand, the
largest difference between the engine's log-probs and the trainer's at the start and after each AdamW step, and the time
of sleep, wake and sync beside that of a step. For copied weights also a hand-over against a plain copy of equal bytes,
a loop over tensors, and vLLM's reload_weights, in interleaved rounds. On a GPU the same, on that GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench import recipe
from bench.measure import Ratio, clock_of, paired
from bench.tied import PATHS, tied
from bench.wide_model import TEXT, video_prompts, write_checkpoint
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import in_own_memory, load_policy
from veripo_fast.rollout.limits import EngineLimits
from veripo_fast.rollout.parity import ParityGate
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.run.memory import status_bytes
from veripo_fast.types import LoadedPrompt, RolloutGroup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLING = Sampling(4, 0.7, 16, 0, top_p=0.9, top_k=20)
_RESULT = "RESULT "


def held_bytes(device: torch.device) -> int:
    """Memory in use: of the process on a CPU, of the device on a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return status_bytes("VmRSS")


# -- one way, in a child ---------------------------------------------------------------------------------------------

def measure(folder: Path, weights: str, dtype: str, updates: int, rounds: int) -> dict[str, Any]:
    """The row of one way."""
    policy = in_own_memory(load_policy(ModelConfig(path=str(folder), dtype=dtype)))  # as a run has it
    device = policy.device
    alone = held_bytes(device)
    engine = VllmEngine(policy, EngineLimits(1024, 2048, 64, 1 << 30), weights=weights)
    prompts = video_prompts(policy, 4)
    groups = engine.generate(prompts, SAMPLING)
    row: dict[str, Any] = {
        "weights": weights, "parameters": sum(p.numel() for p in policy.model.parameters()),
        "weight_bytes": sum(p.nbytes for p in policy.model.parameters()),
        "held_bytes": held_bytes(device), "held_bytes_before_engine": alone}
    if weights == "copy":
        row |= hand_over(engine, rounds)
    row |= train(engine, prompts, groups, updates)
    engine.close()
    return row


def hand_over(engine: VllmEngine, rounds: int) -> dict[str, Any]:
    """A hand-over of all weights, over a plain copy of the same bytes; and beside what it replaces."""
    sync, policy, device = engine._sync, engine.policy, engine.policy.device
    count = sync.sync(policy.version, everything=True).bytes
    one = torch.zeros(count, dtype=torch.uint8, device=device)
    other = torch.zeros_like(one)
    pairs = [(part_of(sync.sources, copy.source), part_of(sync.targets, copy.target)) for copy in sync.copies]

    @torch.no_grad()
    def loop() -> None:
        for source, target in pairs:
            target.copy_(source)

    def reload() -> None:
        engine._reload((name, p.detach()) for name, p in policy.model.named_parameters() if ".visual." not in name)

    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: other.copy_(one), "sync": lambda: sync.sync(policy.version, everything=True), "loop": loop,
        "reload": reload}
    seconds = paired(ways, rounds, clock_of(device), warmups=1)
    ratios = {name: Ratio.of(seconds[name], seconds["plain"]) for name in ("sync", "loop", "reload")}
    return {"sync_bytes": count, "rounds": rounds} | {
        f"{name}_over_plain_copy": [round(value, 3) for value in (ratio.median, ratio.low, ratio.high)]
        for name, ratio in ratios.items()}


def part_of(tensors: Any, part: Any) -> torch.Tensor:
    """[rows, columns] of a part of a named tensor."""
    matrix = tensors[part.name].detach().reshape(-1, part.width)
    return matrix[part.rows[0]:part.rows[1], part.columns[0]:part.columns[1]]


def train(engine: VllmEngine, prompts: list[LoadedPrompt], groups: list[RolloutGroup], updates: int) -> dict[str, Any]:
    """Parity at the start and after each step, and the share of sleep, wake and sync in a step."""
    policy = engine.policy
    gate = ParityGate(policy, engine)
    gaps = [gate.check(prompts, groups, SAMPLING).largest]
    adamw = torch.optim.AdamW([p for _, p in policy.parameters()], lr=1e-4)
    between, total, sent = 0.0, 0.0, 0.0
    for _ in range(updates):
        started = time.perf_counter()
        engine.sleep()
        between += time.perf_counter() - started
        batch = pack([(prompt.encoded, [row.token_ids for row in group.completions])
                      for prompt, group in zip(prompts, groups, strict=True)])
        loss = -policy.completion_logprobs(batch, policy.features_of(prompts)).mean()
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        policy.version += 1
        woke = time.perf_counter()
        sent += engine.sync().get("sync_bytes", 0.0)
        between += time.perf_counter() - woke
        groups = engine.generate(prompts, SAMPLING)
        total += time.perf_counter() - started
        gaps.append(gate.check(prompts, groups, SAMPLING).largest)
    return {"updates": updates, "largest_gap": max(gaps), "largest_gap_at_start": gaps[0], "tolerance": gate.tolerance,
            "bytes_per_sync": sent / max(updates, 1), "sleep_wake_sync_share": between / total if total else None}


def gpu_rows(size: str, updates: int) -> list[dict[str, Any]]:
    """Both ways in this process, as rows with a limit: parity, the hand-over, and the share of sleep, wake and sync."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), size, torch.bfloat16)
        ways = {weights: measure(Path(folder), weights, "bfloat16", updates, 5) for weights in ("copy", "alias")}
    rows = [_row("sync over a device copy", ways["copy"]["sync_over_plain_copy"][0], 2.0, ways["copy"])]
    for weights, way in ways.items():
        rows.append(_row(f"log-probs of engine and trainer, {weights}", way["largest_gap"], way["tolerance"], way))
        rows.append(_row(f"sleep, wake and sync in a step, {weights}", way["sleep_wake_sync_share"], 0.05, way))
    return rows


def _row(name: str, value: float, limit: float, way: dict[str, Any]) -> dict[str, Any]:
    return {"row": name, "value": round(value, 4), "limit": limit, "passed": value <= limit, **way}


# -- all ways --------------------------------------------------------------------------------------------------------

def in_child(folder: Path, weights: str, args: argparse.Namespace) -> dict[str, Any]:
    command = tied(sys.executable, __file__, "--size", args.size, "--dtype", args.dtype, "--updates", str(args.updates),
                   "--rounds", str(args.rounds), "--threads", str(args.threads), "--child", weights, "--folder",
                   str(folder))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)})
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        raise SystemExit(f"{weights}: the child ended with {done.returncode}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix(_RESULT))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(TEXT), default="400m")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    for name, value in (("updates", 20), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--child", choices=["alias", "copy"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        row = measure(args.folder, args.child, args.dtype, args.updates, args.rounds)
        print(_RESULT + json.dumps(row), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.size, DTYPES[args.dtype])
        rows = [in_child(Path(folder), weights, args) for weights in ("alias", "copy")]
    saved = rows[1]["held_bytes"] - rows[0]["held_bytes"]
    print(f"shared weights hold {saved / 1e6:.0f} MB less than copied ones; the weights are "
          f"{rows[0]['weight_bytes'] / 1e6:.0f} MB")
    for row in rows:
        print(row)
        recipe.append("engine", {"bench": "engine", "size": args.size, "dtype": args.dtype, **row})


if __name__ == "__main__":
    main()
