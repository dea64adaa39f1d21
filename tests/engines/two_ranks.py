"""Two ranks under torchrun: one engine of both, or one each. Run by test_ranks.py; prints a line of JSON per rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.engines.conftest import LIMITS, policy_of
from tests.support.engine_runs import SAMPLED, TRUNCATED, completions, prompts_of
from veripo_fast.errors import TrainingError
from veripo_fast.rollout.parity import largest_gap
from veripo_fast.rollout.vllm_engine import VllmEngine


def main(folder: Path, size: int, router_replay: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    policy = policy_of(folder, freeze_vision=False)
    engine = VllmEngine(policy, LIMITS, vision="pixels", tensor_parallel=size, router_replay=router_replay)
    seed = 0 if size == 2 else 100 * rank
    gaps, found, told = [], [], []
    for sampling in (SAMPLED, TRUNCATED):
        prompts = prompts_of(policy, seed=seed)
        groups = engine.generate(prompts, sampling)
        gaps.append(largest_gap(policy, prompts, groups, sampling.temperature))
        found.append(completions(groups))
        told += [(group.prompt_experts, [row.experts for row in group.completions]) for group in groups]
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        policy.version += 1
    everywhere: list = [None, None]
    dist.all_gather_object(everywhere, (found, told))
    message = ""
    if size == 2:
        try:
            engine.generate(prompts_of(policy)[:1 + rank], SAMPLED)
        except TrainingError as error:
            message = str(error)
    result = {"rank": rank, "gaps": gaps, "same": everywhere[0] == everywhere[1], "message": message,
              "world": dist.get_world_size(), "tells": all(row is not None and None not in rows for row, rows in told)}
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["router_replay"])
