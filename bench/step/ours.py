"""Our side of the step bench, served by bench/video/worker.py: makes what both sides are given, checks and steps.

The pieces of a stage in the order of `stages/grpo.py` and `stages/dpo.py`: tower, engine, rewards, update. Left out are
decoding, which has its own bench (`veripo bench video`), and what a run writes to disk. Rewards are given: the first
half of a group has 1, the other 0, because random weights answer nothing right and a group without a signal is dropped.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench.step.cases import VISION, Case
from bench.step.phases import Phases
from bench.video.worker import Answer, serve
from bench.wide_model import write_checkpoint
from veripo_fast.cache.memory import VisionCache
from veripo_fast.config.alignment import DpoConfig
from veripo_fast.config.inputs import CacheConfig, ModelConfig, VideoConfig
from veripo_fast.config.objectives import GrpoConfig, RolloutConfig
from veripo_fast.config.schema import Config, OptimizerConfig
from veripo_fast.demo.corpus import write_clip
from veripo_fast.demo.world import random_clip
from veripo_fast.errors import UserError
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import in_own_memory, load_policy
from veripo_fast.model.step import PairLossInputs, PolicyLossInputs
from veripo_fast.reward.groups import reward_groups
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.stages.dpo import dpo_update, preference_loss_of, reference_logprobs
from veripo_fast.stages.grpo import GrpoUpdate, policy_loss_of
from veripo_fast.stages.optimizer import Optimizer, step_policy
from veripo_fast.stages.pair_rows import PairRow
from veripo_fast.types import Completion, LoadedPrompt, Message, PreferencePair, Prompt, RolloutGroup, Video

QUESTION = "What does the red shape do?"
STEPS = 1 << 20
"""More than a bench takes; the schedule is constant."""


class Ours:
    """A policy with its loaded prompts, ready to step.

    Args:
        folder: holds the checkpoint in model/ and the clips; gets the files that both sides share.
    """

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        self.config = config_of(folder, case)
        self.policy = in_own_memory(load_policy(self.config.model))
        encoder = self.policy.encoder
        media_ids = [*encoder.pad_ids.values(), encoder.config.vision_start_token_id,
                     encoder.config.vision_end_token_id]
        self.banned = sorted({*media_ids, *encoder.end_ids})
        encoder.banned_ids = self.banned  # of a real checkpoint the tokenizer knows nearly all rows; here it does not
        self.cache = VisionCache(self.config.cache.host_bytes)
        self.prompts = [self._encoded(number) for number in range(case.prompts)]
        self.with_features(self.prompts, self.cache)
        self.optimizer = Optimizer(self.policy.backend, self.config.optimizer, self.config.grpo.learning_rate, STEPS)
        self.engine = TorchEngine(self.policy)
        self.steps = 0

    def _encoded(self, number: int) -> LoadedPrompt:
        """A prompt with its pixels, without the tower's output."""
        path = self.folder / f"clip-{number}.mp4"
        if not path.exists():
            write_clip(path, random_clip(number))
        prompt = Prompt(f"p{number}", (Message("user", (Video(str(path)), QUESTION)),), "text", "")
        media = self.policy.encoder.load_media(prompt, self.config.video)
        return LoadedPrompt(prompt, self.policy.encoder.encode(prompt, media), None)

    # -- what both sides share ------------------------------------------------------------------------------------

    def share(self) -> dict[str, Any]:
        """What the peer is given: messages, pixels, times, completions, banned tokens; our ids are for comparison."""
        dice = torch.Generator().manual_seed(2)
        allowed = torch.tensor(sorted({*range(self.case.vocabulary)} - {*self.banned}))
        count = 2 if self.case.kind == "dpo" else self.case.group
        self.completions = [[allowed[torch.randint(len(allowed), (self.case.completion,), generator=dice)].tolist()
                             for _ in range(count)] for _ in self.prompts]
        shared = [{"question": QUESTION, "pixel_values": item.encoded.media.pixel_values,
                   "grid_thw": item.encoded.media.grid_thw, "grid_seconds": list(item.encoded.media.grid_seconds[0])}
                  for item in self.prompts if item.encoded.media is not None]
        torch.save({"prompts": shared, "completions": self.completions, "banned": self.banned,
                    "advantages": advantages(self.case.group)}, self.folder / "shared.pt")
        return {"ids": [item.encoded.token_ids.tolist() for item in self.prompts],
                "parameters": sum(p.numel() for p in self.policy.model.parameters())}

    def check(self) -> Answer:
        """Log-probs and gradients of the first prompt with the shared completions, to ours.pt."""
        prompt = self.with_features(self.prompts[:1])[0]
        batch = pack([(prompt.encoded, self.completions[0])])
        with torch.no_grad():
            logprobs = self.policy.completion_logprobs(batch, [prompt.features])
        tokens = len(logprobs)
        if self.case.kind == "dpo":
            sums = logprobs.view(2, -1).sum(1)[None]
            inputs: Any = PairLossInputs(preference_loss_of(self.config), sums, torch.ones(tokens), 1)
        else:
            inputs = PolicyLossInputs(policy_loss_of(self.config), advantages(self.case.group), None, None, 1.0,
                                      self.case.group, tokens)
        output = self.policy.forward(batch, [prompt.features], inputs)
        self.policy.backend.backward(output.loss)
        torch.save({"logprobs": logprobs, "gradients": {
            name: p.grad for name, p in self.policy.parameters() if p.grad is not None}}, self.folder / "ours.pt")
        self.policy.backend.discard()
        return {"loss": float(output.loss)}

    # -- steps ----------------------------------------------------------------------------------------------------

    def with_features(self, prompts: Sequence[LoadedPrompt], cache: VisionCache | None = None) -> list[LoadedPrompt]:
        """With the tower's output: from the cache, or by a pass per prompt."""
        loaded = []
        for item in prompts:
            media = item.encoded.media
            assert media is not None
            entry = cache.get(media.key) if cache else None
            features = entry[1] if entry else self.policy.vision_features(media)
            if cache and entry is None:
                cache.put(replace(media, pixel_values=None), features)
            loaded.append(replace(item, features=features))
        return loaded

    def step(self, switch: str = "") -> Answer:
        """One step, without or with the fast path that `switch` names."""
        self.steps += 1
        return self.dpo_step(switch) if self.case.kind == "dpo" else self.grpo_step(switch)

    def grpo_step(self, switch: str) -> Answer:
        case, phases = self.case, Phases()
        copies = case.group if switch == "shared prefix" else 1
        config = replace(self.config, grpo=replace(self.config.grpo, prompts_per_step=case.prompts * copies))
        update = GrpoUpdate(self.policy, self.optimizer, config, None)
        phases.switch("vision")
        loaded = self.with_features(self.prompts, self.cache if switch == "vision cache" else None)
        phases.switch("rollout")
        repeated = [item for item in loaded for _ in range(copies)]
        groups = self.engine.generate(repeated, Sampling(case.group // copies, 1.0, case.completion, self.steps))
        phases.switch("reward")
        whole = [RolloutGroup(item.prompt, [row for group in groups[start:start + copies] for row in group.completions])
                 for item, start in zip(loaded, range(0, len(groups), copies), strict=True)]
        for group in whole:
            give_rewards(group.completions)
        reward_groups(whole, config)
        phases.switch("vision" if switch == "shared tower" else "training")
        if switch == "shared tower":
            repeated = loaded = self.with_features(self.prompts)
            phases.switch("training")
        if switch == "engine's log-probs":
            with torch.no_grad():
                batch = pack([(item.encoded, [row.token_ids for row in group.completions])
                              for item, group in zip(loaded, whole, strict=True)])
                self.policy.completion_logprobs(batch, [item.features for item in loaded])
        values = update.run(repeated, groups)
        phases.switch(None)
        tokens = sum(len(row.token_ids) for group in groups for row in group.completions)
        return phases.answer() | {"tokens": tokens, "parity": values["parity_max"]}

    def dpo_step(self, switch: str) -> Answer:
        phases = Phases()
        cache = self.cache if switch == "vision cache" else None
        phases.switch("vision")
        loaded = self.with_features(self.prompts, cache)
        phases.switch("reference")
        rows = pair_rows(loaded, self.completions)
        if switch == "shared prefix":
            values = self._repeated_pairs(rows, phases)
        else:
            with TemporaryDirectory() as folder:
                reference = reference_logprobs(self.policy, len(rows), lambda numbers: [rows[n] for n in numbers],
                                               self.config, Path(folder) / "reference.parquet", lambda count: None)
            if switch == "shared tower":
                phases.switch("vision")
                rows = pair_rows(self.with_features(self.prompts), self.completions)
            phases.switch("training")
            values = dpo_update(self.policy, self.optimizer, rows, reference, self.config)
        phases.switch(None)
        return phases.answer() | {"tokens": self.case.rows * self.case.completion, "loss": values["loss"]}

    def _repeated_pairs(self, rows: list[PairRow], phases: Phases) -> dict[str, float]:
        """Reference and update with a prompt for each side of a pair; ends in the training phase."""
        batch = pack([(row.prompt.encoded, [list(ids)]) for row in rows
                      for ids in (row.pair.chosen_ids, row.pair.rejected_ids)])
        features = [row.prompt.features for row in rows for _ in range(2)]
        with torch.no_grad():
            sums = self.policy.completion_logprobs(batch, features).view(len(rows), 2, -1).sum(2)
        phases.switch("training")
        mask = torch.ones(len(batch.targets))
        output = self.policy.forward(batch, features, PairLossInputs(
            preference_loss_of(self.config), sums, mask, len(rows)))
        loss = self.optimizer.backward(output.loss)
        step_policy(self.policy, self.optimizer)
        return {"loss": loss}


def config_of(folder: Path, case: Case) -> Config:
    """The run that a step belongs to; what it does not name is the default."""
    pixels = case.side ** 2
    return Config(
        model=ModelConfig(path=str(folder / "model"), device="cpu"), cache=CacheConfig(),
        optimizer=OptimizerConfig(max_tokens=case.max_tokens),
        video=VideoConfig(fps=None, num_frames=case.frames, min_pixels=pixels, max_pixels=pixels),
        rollout=RolloutConfig(group_size=case.group, max_new_tokens=case.completion),
        grpo=GrpoConfig(prompts_per_step=case.prompts), dpo=DpoConfig(pairs_per_step=case.prompts, learning_rate=1e-6))


def advantages(group: int) -> torch.Tensor:
    """Of the check: float32 [G], of both signs."""
    return torch.tensor([1.0 if number < group // 2 else -1.0 for number in range(group)])


def give_rewards(completions: Sequence[Completion]) -> None:
    """1 for the first half of a group, 0 for the other."""
    for number, completion in enumerate(completions):
        completion.reward = float(number < len(completions) // 2)


def pair_rows(loaded: Sequence[LoadedPrompt], completions: Sequence[Sequence[list[int]]]) -> list[PairRow]:
    """The pair of each prompt; every token enters the loss."""
    rows = []
    for number, (item, (chosen, rejected)) in enumerate(zip(loaded, completions, strict=True)):
        ones = (1,) * len(chosen)
        pair = PreferencePair(item.prompt.prompt_id, "accuracy", tuple(chosen), tuple(rejected), ones, ones, "", "",
                              0, 1)
        rows.append(PairRow(number, item, pair))
    return rows


_side: dict[str, Ours] = {}


def start(folder: str, case: dict[str, Any], seed: int = 0) -> Answer:
    """Make checkpoint and clips where there are none, load both, and write what the sides share."""
    torch.manual_seed(0)
    random.seed(0)
    place, wanted = Path(folder), Case.of(case)
    if not (place / "model").exists():
        write_checkpoint(place / "model", wanted.size, vocabulary=wanted.vocabulary, vision=VISION, seed=seed)
    _side["it"] = Ours(place, wanted)
    return _side["it"].share()


def check() -> Answer:
    return _side["it"].check()


def step(switch: str) -> Answer:
    return _side["it"].step(switch)


if __name__ == "__main__":
    serve({task.__name__: task for task in (start, check, step)}, (UserError,))
