"""Idle share of the ranks of a step, simulated: the dealer beside round robin and a sort by length.

    python bench/bench_balance.py [--ranks 64] [--per-rank 4,8,16] [--steps 50]

Groups are drawn with replacement from bench/results/lengths.json, which says where its numbers are from:

  video  real videos, sampled as the default contract has it; completions of another corpus, math, put to them at random
  math   real reasoning without a video
  demo   groups of a run of ours, as they were

Costs are the FLOPs of Qwen2.5-VL 7B, and the time of a group is taken to be its cost. A step's idle share is the mean
over ranks of 1 - own load / fullest load; `least` is what no deal of whole groups avoids. `deal_owned` knows where the
groups lie, `deal_by_tokens` counts their tokens in place of FLOPs. Lines go to bench/results/balance.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import measure, recipe
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.distributed.balance import Deal, deal, idle_share
from veripo_fast.distributed.flops import ModelCost, TowerCost, group_flops
from veripo_fast.video.contract import TEMPORAL_PATCH, frame_count, resized_size

LENGTHS = recipe.RESULTS / "lengths.json"
TOWER = TowerCost(depth=32, hidden=1280, intermediate=3420, out_hidden=3584, mlp_matrices=3, merged=4, mergers=1,
                  patch_features=1176, full_blocks=4, window=64)
PATCH_SIZE, MERGE_SIZE = 14, 2
TEXT_TOKENS = 150
"""Of a question with its instruction; the corpora do not say."""
FRAMES_PER_SECOND = 30
"""Of the videos of NExT-QA, whose list has frames alone."""


class Group(NamedTuple):
    """Sizes of a prompt and its completions."""

    prompt: int
    completions: Sequence[int]
    grid_thw: Sequence[Sequence[int]] = ()

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.completions)


def model_cost(tower_trained: bool) -> ModelCost:
    """Qwen2.5-VL 7B."""
    return ModelCost(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128, vocabulary=152064,
                     tower=TOWER if tower_trained else None)


def video_group(frames: int, width: int, height: int, completions: Sequence[int]) -> Group:
    """A prompt about a video, as the default contract samples it."""
    contract = VideoConfig()
    pairs = -(-frame_count(frames, frames / FRAMES_PER_SECOND, contract) // TEMPORAL_PATCH)
    sides = resized_size(height, width, PATCH_SIZE * MERGE_SIZE, contract.min_pixels, contract.max_pixels)
    rows, columns = (side // PATCH_SIZE for side in sides)
    return Group(TEXT_TOKENS + pairs * rows * columns // MERGE_SIZE ** 2, completions, [(pairs, rows, columns)])


def corpora() -> dict[str, Callable[[random.Random], Group]]:
    """What draws a group of each corpus."""
    stored = json.loads(LENGTHS.read_text())
    completions, videos = stored["aime"]["completions"], stored["nextqa"]["videos"]
    groups = stored["demo"]["groups"]
    return {"video": lambda draw: video_group(*draw.choice(videos), draw.choice(completions)),
            "math": lambda draw: Group(TEXT_TOKENS, draw.choice(completions)),
            "demo": lambda draw: Group(*draw.choice(groups))}


def round_robin(groups: Sequence[Group], ranks: int) -> Deal:
    return [list(range(rank, len(groups), ranks)) for rank in range(ranks)]


def length_sort(groups: Sequence[Group], ranks: int) -> Deal:
    """Longest first, to the ranks there and back again."""
    dealt: Deal = [[] for _ in range(ranks)]
    for place, index in enumerate(sorted(range(len(groups)), key=lambda index: -groups[index].tokens)):
        turn, rank = divmod(place, ranks)
        dealt[ranks - 1 - rank if turn % 2 else rank].append(index)
    return dealt


def moved_share(costs: Sequence[float], dealt: Deal, owners: Sequence[int]) -> float:
    """Share of the cost that is dealt to another rank than its owner."""
    moved = sum(costs[index] for rank, part in enumerate(dealt) for index in part if owners[index] != rank)
    return moved / sum(costs)


def measure_steps(draw_group: Callable[[random.Random], Group], cost: ModelCost, ranks: int, per_rank: int, steps: int
                  ) -> dict[str, Any]:
    """The result line: idle shares over many steps, and what the dealer took."""
    draw, owners = random.Random(0), [rank for rank in range(ranks) for _ in range(per_rank)]
    idle: dict[str, list[float]] = {}
    moved: dict[str, list[float]] = {"deal": [], "deal_owned": []}
    seconds: list[float] = []
    for _ in range(steps):
        groups = [draw_group(draw) for _ in owners]
        costs = [group_flops(cost, *group) for group in groups]
        started = time.perf_counter()
        dealt = deal(costs, ranks)
        seconds.append(time.perf_counter() - started)
        ways = {"round_robin": round_robin(groups, ranks), "length_sort": length_sort(groups, ranks), "deal": dealt,
                "deal_owned": deal(costs, ranks, owners),
                "deal_by_tokens": deal([group.tokens for group in groups], ranks)}
        for name, way in ways.items():
            idle.setdefault(name, []).append(statistics.fmean(idle_share(costs, way)))
        for name, shares in moved.items():
            shares.append(moved_share(costs, ways[name], owners))
        mean = sum(costs) / ranks
        idle.setdefault("least", []).append(1 - mean / max(mean, *costs))
    line: dict[str, Any] = {}
    for name, shares in idle.items():
        line |= {f"{name}_idle_mean": measure.digits(statistics.fmean(shares)),
                 f"{name}_idle_max": measure.digits(max(shares))}
    line |= {f"{name}_moved_mean": measure.digits(statistics.fmean(shares)) for name, shares in moved.items()}
    return line | {"deal_seconds_median": measure.digits(statistics.median(seconds)),
                   "deal_seconds_max": measure.digits(max(seconds))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--per-rank", type=lambda text: list(map(int, text.split(","))), default=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    for corpus, draw_group in corpora().items():
        for tower_trained in (False, True) if corpus == "video" else (False,):
            for per_rank in args.per_rank:
                line = {"bench": "balance", "corpus": corpus, "ranks": args.ranks, "groups": args.ranks * per_rank,
                        "group_size": 8, "model": "Qwen2.5-VL 7B", "tower_trained": tower_trained, "steps": args.steps}
                line |= measure_steps(draw_group, model_cost(tower_trained), args.ranks, per_rank, args.steps)
                recipe.append("balance", line)
                print(line, flush=True)


if __name__ == "__main__":
    main()
