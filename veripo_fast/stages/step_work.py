"""What a step has cost so far: seconds by phase, media and tokens, FLOPs; and the part of its metrics that says so.

Of a step's FLOPs those count as needed that a run would make which shares every prefix and pads nothing. Done beyond
them, and counted as spare where they are made, are:
  - passes of weight 0 that a rank makes while others still have a micro-batch (`Policy.idle`),
  - tokens that the torch engine decodes behind the end of a completion, until its whole group has ended,
  - passes of the parity gate,
  - a tower's passes over media that another rank of the same engine has encoded too,
  - prompts of DPO pairs that are packed once per pair, and completions that several pairs of a step share.
A group without a signal had to be sampled to be known as one, so its rollout was needed; no update is made of it. Not
seen are: media that two engines encode in one step, what vLLM computes twice (a prompt that it has preempted), what is
recomputed by gradient checkpointing, and attention between tokens that do not see each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from veripo_fast.cache.loader import VideoWork
from veripo_fast.config.schema import RolloutConfig
from veripo_fast.distributed.flops import ModelCost, group_flops, tower_flops
from veripo_fast.distributed.shares import over_ranks
from veripo_fast.distributed.world import World
from veripo_fast.model.policy import Policy
from veripo_fast.schedule.hardware import hardware_of
from veripo_fast.types import EncodedPrompt, LoadedPrompt, PreferencePair, RolloutGroup


class StepWork:
    """Of the step that runs or comes next, on this rank."""

    def __init__(self, policy: Policy, rollout: RolloutConfig, world: World) -> None:
        self.policy = policy
        self.rollout = rollout
        self.world = world
        self.peak_flops = _peak(policy)
        self.seconds: dict[str, float] = {}
        """By phase, the checkpoint before the step included."""
        self.counts: dict[str, float] = {}
        """Of media, and of the engine."""
        self._new_rollout()
        self.begin()

    def begin(self, global_step: int = 0) -> None:
        """The step begins here."""
        if self.policy.adapters is not None:
            self.policy.adapters.begin_step(global_step, self.world.rank)
        self._began = time.perf_counter()
        self._before = self.policy.passes.copy()

    def _new_rollout(self) -> None:
        self.sampled_tokens = self.prompts = self.prompt_tokens = self.patches = 0

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Count the time of a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def loaded(self, done: VideoWork) -> None:
        """Count what loading prompts has cost."""
        self.counts |= {"video_decodes": done.video_decodes, "tower_runs": done.tower_runs,
                        "cache_hits": done.cache_hits, "decoder_fallbacks": done.decoder_fallbacks}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """A block whose passes all ranks of an engine make alike: those of the first are needed."""
        with self.policy.passes.spare(self._repeats()):
            yield

    def sampled(self, prompts: Sequence[LoadedPrompt], groups: Sequence[RolloutGroup]) -> None:
        """Count what the engine sampled; of ranks that share one the first counts all."""
        if self._repeats():
            return
        cost, passes = self.policy.text_cost, self.policy.passes
        for prompt, group in zip(prompts, groups, strict=True):
            lengths = [len(completion.token_ids) for completion in group.completions]
            needed = group_flops(cost, len(prompt.encoded.token_ids), lengths, backward=False)
            self.sampled_tokens += sum(lengths)
            self.prompts += 1
            self.prompt_tokens += len(prompt.encoded.token_ids)
            self.patches += sum(math.prod(grid) for grid in grids(prompt.encoded))
            passes.flops += needed
            if self.rollout.engine == "torch":
                whole = group_flops(cost, len(prompt.encoded.token_ids), [max(lengths)] * len(lengths), backward=False)
                passes.flops += whole - needed
                passes.spare_flops += whole - needed
            if self.rollout.vision == "pixels":
                passes.flops += tower_flops(self.policy.cost, grids(prompt.encoded), backward=False)

    def metrics(self) -> dict[str, Any]:
        """The work of all ranks since `begin` as metrics of the step; seconds and counts begin anew. Collective.

        Wall times and counts of a process, under `seconds` and `speed` too, are others after a resume.
        """
        done = self.policy.passes.since(self._before)
        own = {"sampled": self.sampled_tokens, "trained": done.trained_tokens, "flops": done.flops,
               "spare": done.spare_flops, "prompts": self.prompts, "prompt_tokens": self.prompt_tokens,
               "patches": self.patches}
        counts = over_ranks(self.counts | own, self.world)
        step_seconds = time.perf_counter() - self._began  # until the last rank has come
        sampled, trained, flops, spare, prompts, prompt_tokens, patches = (counts.pop(name) for name in own)
        speed: dict[str, float] = {"step_seconds": step_seconds, "ranks": self.world.size, "flops": flops}
        if prompts:
            speed |= {"prompt_tokens_mean": prompt_tokens / prompts, "patches_mean": patches / prompts}
        if sampled:
            speed["sampled_tokens_per_second"] = sampled / step_seconds
        if self.seconds.get("update"):
            speed["trained_tokens_per_second"] = trained / self.seconds["update"]
        if flops:
            speed["needed_share"] = 1 - spare / flops
        if self.peak_flops:
            speed["mfu"] = flops / (step_seconds * self.world.size * self.peak_flops)
        metrics = {**counts, "speed": speed, "seconds": self.seconds}
        self.seconds, self.counts = {}, {}
        self._new_rollout()
        return metrics

    def _repeats(self) -> bool:
        """Whether an earlier rank shares this one's engine."""
        return self.world.rank % self.rollout.tensor_parallel != 0


def grids(prompt: EncodedPrompt) -> list[list[int]]:
    """Time, height and width in patches of each medium."""
    media = prompt.media
    return [] if media is None else list(media.grid_thw.tolist())


def repeated_flops(cost: ModelCost, pairs: Sequence[tuple[EncodedPrompt, PreferencePair]]) -> int:
    """FLOPs of an update over pairs beyond those of one over their prompts, each once with its distinct completions."""
    done = 0
    prompts: dict[str, EncodedPrompt] = {}
    completions: dict[str, set[tuple[int, ...]]] = {}
    for prompt, pair in pairs:
        sides = (pair.chosen_ids, pair.rejected_ids)
        done += group_flops(cost, len(prompt.token_ids), [len(side) for side in sides], grids(prompt))
        prompts[pair.prompt_id] = prompt
        completions.setdefault(pair.prompt_id, set()).update(sides)
    once = _once(cost, prompts, completions)
    return done - once


def _once(cost: ModelCost, prompts: Mapping[str, EncodedPrompt], completions: Mapping[str, set[tuple[int, ...]]]
          ) -> int:
    return sum(group_flops(cost, len(prompt.token_ids), [len(side) for side in completions[name]], grids(prompt))
               for name, prompt in prompts.items())


def _peak(policy: Policy) -> float | None:
    """Dense bfloat16 FLOPs per second of the device; None where they are not known, as on a CPU."""
    if policy.device.type != "cuda":
        return None
    import torch

    hardware = hardware_of(torch.cuda.get_device_name(policy.device))
    return None if hardware is None else hardware.bf16_flops
