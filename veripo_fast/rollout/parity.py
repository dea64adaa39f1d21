"""The parity gate: an engine's log-probs against the trainer's, on prompts of the run.

An engine that reads a prompt otherwise than the trainer, or samples from other weights, still gives fluent text; only
the log-probs tell. Where they differ by more than rounding, the run stops. The message shows the first token that
differs and, where it is known, the kind of fault: each known one is tried, on the trainer's side by reading the prompt
as the fault would, on the engine's by mending what may be stale.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from veripo_fast.config.schema import Config
from veripo_fast.errors import TrainingError
from veripo_fast.model.policy import Policy
from veripo_fast.model.replay import pack_rollouts
from veripo_fast.rollout.protocol import RolloutEngine, Sampling
from veripo_fast.types import Completion, LoadedPrompt, MediaInputs, RolloutGroup

TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 1.0}
"""Largest difference of a log-prob, in nats, that rounding explains at temperature 1 (0.5 was seen in bfloat16)."""
MEAN_TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 0.05}
"""Largest mean of the absolute differences: rounding averages out, a fault does not (0.03 was seen in bfloat16)."""
PROMPTS = 6
"""Prompts of a check."""
_CONTEXT = 8
"""Tokens shown on each side of the first difference."""


@dataclass(frozen=True)
class Difference:
    """The first token whose log-probs differ by more than the tolerance."""

    prompt_id: str
    index: int
    """Of the token in its completion."""
    before: str
    token: str
    after: str
    engine_logprob: float
    trainer_logprob: float

    def __str__(self) -> str:
        return (f"prompt {self.prompt_id!r}, completion token {self.index}, ...{self.before!r} [{self.token!r}] "
                f"{self.after!r}...: engine {self.engine_logprob:.5f}, trainer {self.trainer_logprob:.5f}")


@dataclass(frozen=True)
class Parity:
    """How far an engine's log-probs lie from the trainer's."""

    largest: float
    """Largest absolute difference of a token, in nats; infinite where either is not finite."""
    mean: float
    """Mean of the absolute differences."""
    tokens: int
    first: Difference | None
    """None: all are within the tolerances. Where the mean alone is not, the token that differs most."""


def gate_of(config: Config, policy: Policy, engine: RolloutEngine) -> ParityGate | None:
    """The gate of an engine; None for the torch engine, which runs the trainer's own forward."""
    if config.rollout.engine == "torch":
        return None
    return ParityGate(policy, engine, config.rollout.parity_tolerance)


class ParityGate:
    """Checks an engine against the policy that it samples from.

    Args:
        tolerance: in nats; 0 takes that of the weights' dtype.
    """

    def __init__(self, policy: Policy, engine: RolloutEngine, tolerance: float = 0.0) -> None:
        self.policy = policy
        self.engine = engine
        self.tolerance = tolerance or TOLERANCES[policy.model.dtype]
        self.mean_tolerance = tolerance or MEAN_TOLERANCES[policy.model.dtype]

    def check(self, prompts: Sequence[LoadedPrompt], groups: Sequence[RolloutGroup], sampling: Sampling) -> Parity:
        """Compare what was just sampled: prompts of every kind (text, image, video, several media), drawn by the seed.

        Log-probs are compared, not how tokens are drawn from them. Collective: where weights are sharded, every rank
        makes as many passes.

        Raises:
            TrainingError: the log-probs differ; names the token and, where ranks share nothing, the fault.
        """
        chosen = _some(prompts, sampling.seed)
        parity = self.measure([(prompts[i], groups[i]) for i in chosen], sampling)
        if self.policy.backend.sharded:
            with torch.no_grad():
                for _ in range(PROMPTS - len(chosen)):
                    self.policy.idle()
        if parity.first is not None:
            raise TrainingError(
                f"the rollout engine's log-probs differ from the trainer's by {parity.largest:.2g} nats, "
                f"{parity.mean:.2g} in the mean, and rounding explains {self.tolerance / _cold(sampling):.0e} and "
                f"{self.mean_tolerance / _cold(sampling):.0e} (rollout.parity_tolerance, at temperature "
                f"{sampling.temperature:g}): {parity.first}. {self._diagnosis(prompts, groups, chosen, sampling)}")
        return parity

    def measure(self, rows: Sequence[tuple[LoadedPrompt, RolloutGroup]], sampling: Sampling) -> Parity:
        """Difference over the completions of `rows`."""
        tolerance, mean_tolerance = self.tolerance / _cold(sampling), self.mean_tolerance / _cold(sampling)
        gaps: list[float] = []
        first = worst = None
        for prompt, group in rows:
            trained = trainer_logprobs(self.policy, prompt, group, sampling.temperature)
            for completion, own in zip(group.completions, trained, strict=True):
                found = logprob_gaps(own, completion.rollout_logprobs)
                if max(found) >= max(gaps, default=0.0):
                    worst = self._difference(prompt, completion, own, found.index(max(found)))
                if first is None and max(found) > tolerance:
                    index = next(i for i, gap in enumerate(found) if gap > tolerance)
                    first = self._difference(prompt, completion, own, index)
                gaps += found
        mean = sum(gaps) / max(len(gaps), 1)
        return Parity(max(gaps, default=0.0), mean, len(gaps), first or (worst if mean > mean_tolerance else None))

    def _difference(self, prompt: LoadedPrompt, completion: Completion, own: Sequence[float], index: int) -> Difference:
        ids, decode = completion.token_ids, self.policy.encoder.tokenizer.decode
        return Difference(prompt.prompt.prompt_id, index, decode(ids[max(index - _CONTEXT, 0):index]),
                          decode(ids[index:index + 1]), decode(ids[index + 1:index + 1 + _CONTEXT]),
                          completion.rollout_logprobs[index], own[index])

    # -- the kind of fault --------------------------------------------------------------------------------------------

    def _diagnosis(self, prompts: Sequence[LoadedPrompt], groups: Sequence[RolloutGroup], chosen: Sequence[int],
                   sampling: Sampling) -> str:
        if self.policy.backend.distributed:
            return "Which fault it is can be found out by one process: start it without torchrun, on the same prompts"
        rows = [(prompts[i], groups[i]) for i in chosen]
        for fault, reading in FAULTS.items():
            if self._explains(reading, rows, sampling):
                return f"The fault is known: {fault}."
        if self._right_again(prompts, chosen, sampling):
            return "The same batch sampled once more is right, so the fault comes and goes"
        for fault, mend in self.engine.remedies():
            mend()
            if self._right_again(prompts, chosen, sampling):
                return f"The fault is known: {fault}."
        return "The fault is none of those that are known"

    def _right_again(self, prompts: Sequence[LoadedPrompt], chosen: Sequence[int], sampling: Sampling) -> bool:
        """Whether the whole batch, sampled again with what the engine has kept, agrees with the trainer."""
        again = self.engine.generate(prompts, sampling, keep_caches=True)
        return self.measure([(prompts[i], again[i]) for i in chosen], sampling).first is None

    def _explains(self, reading: Callable[[Policy, LoadedPrompt], LoadedPrompt | None],
                  rows: Sequence[tuple[LoadedPrompt, RolloutGroup]], sampling: Sampling) -> bool:
        """Whether the trainer agrees with the engine once it reads the prompts with this fault."""
        changed = [(reading(self.policy, prompt), group) for prompt, group in rows]
        read = [(prompt, group) for prompt, group in changed if prompt is not None]
        rest = [row for row, (prompt, _) in zip(rows, changed, strict=True) if prompt is None]
        return bool(read) and self.measure(read + rest, sampling).first is None


def trainer_logprobs(policy: Policy, prompt: LoadedPrompt, group: RolloutGroup, temperature: float
                     ) -> list[list[float]]:
    """The policy's log-probs of the tokens of each completion; temperature 0 counts as 1, as in sampling. Where the
    engine told which experts it chose, they are those of an update, which replays them."""
    with torch.no_grad():
        batch = pack_rollouts([(prompt.encoded, group)], policy.routers)
        logprobs = policy.completion_logprobs(batch, [prompt.features], temperature=temperature or 1.0)
    return [row.tolist() for row in logprobs.split([len(completion.token_ids) for completion in group.completions])]


def largest_gap(policy: Policy, prompts: Sequence[LoadedPrompt], groups: Sequence[RolloutGroup], temperature: float
                ) -> float:
    """Largest difference between the log-probs of sampled groups and the policy's, in nats."""
    gaps = [0.0]
    for prompt, group in zip(prompts, groups, strict=True):
        trained = trainer_logprobs(policy, prompt, group, temperature)
        for completion, own in zip(group.completions, trained, strict=True):
            gaps += logprob_gaps(own, completion.rollout_logprobs)
    return max(gaps)


def logprob_gaps(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Absolute differences; infinite where either is not finite, because NaN would pass every comparison."""
    return [abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in zip(one, other, strict=True)]


def _cold(sampling: Sampling) -> float:
    """A temperature below 1 divides logits, and their rounding with them."""
    return min(sampling.temperature or 1.0, 1.0)


def _some(prompts: Sequence[LoadedPrompt], seed: int) -> list[int]:
    """Indices of at most `PROMPTS` prompts, drawn by the seed: one of each kind, then a second of each, and so on."""
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    kinds: dict[tuple[str, ...], int] = {}
    ranked: list[tuple[int, int, int]] = []
    for index in order:
        media = prompts[index].encoded.media
        kind = () if media is None else media.kinds
        ranked.append((kinds.setdefault(kind, 0), len(ranked), index))
        kinds[kind] += 1
    return [index for *_, index in sorted(ranked)][:PROMPTS]


# -- faults that a trainer can imitate -------------------------------------------------------------------------------


def _transformers_positions(policy: Policy, prompt: LoadedPrompt) -> LoadedPrompt | None:
    """With the positions of the installed transformers, whose text after a Qwen2.5-VL video begins too early."""
    media = prompt.encoded.media
    if media is None or "video" not in media.kinds or policy.encoder.family.video_time != "positions":
        return None
    ids = prompt.encoded.token_ids[None]
    kinds = sum((ids == policy.encoder.pad_ids[kind]) * number for number, kind in ((1, "image"), (2, "video")))
    grids = {f"{kind}_grid_thw": media.grid_thw[[name == kind for name in media.kinds]] for kind in set(media.kinds)}
    seconds = [(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
               for times, kind in zip(media.grid_seconds, media.kinds, strict=True) if kind == "video"]
    positions, delta = policy.model.model.get_rope_index(
        ids, kinds, second_per_grid_ts=torch.tensor(seconds), **grids)
    encoded = replace(prompt.encoded, positions=positions[:, 0].cpu(),
                      next_position=int(delta.item()) + ids.shape[1])
    return replace(prompt, encoded=encoded)


def _at_24_fps(policy: Policy, prompt: LoadedPrompt) -> LoadedPrompt | None:
    """As if every Qwen2.5-VL video had 24 frames a second, which Hugging Face's processor takes without metadata."""
    media = prompt.encoded.media
    if media is None or "video" not in media.kinds or policy.encoder.family.video_time != "positions":
        return None
    spacing = policy.encoder.vision.temporal_patch_size / 24
    seconds = tuple(tuple(spacing * index for index in range(len(times))) for times in media.grid_seconds)
    return replace(prompt, encoded=policy.encoder.encode(prompt.prompt, replace(media, grid_seconds=seconds)))


def _normalised_twice(policy: Policy, prompt: LoadedPrompt) -> LoadedPrompt | None:
    """With mean and standard deviation taken off pixel values that they were taken off before."""
    media = prompt.encoded.media
    if media is None or media.pixel_values is None:
        return None
    spec = policy.encoder.vision
    pixels = media.pixel_values.float().view(len(media.pixel_values), 3, -1)
    mean, std = (torch.tensor(values)[None, :, None] for values in (spec.mean, spec.std))
    twice: MediaInputs = replace(media, pixel_values=((pixels - mean) / std).view_as(media.pixel_values))
    with torch.no_grad():
        return replace(prompt, features=policy.vision_features(twice))


FAULTS: dict[str, Callable[[Policy, LoadedPrompt], LoadedPrompt | None]] = {
    "the engine places the text after a video as transformers does, at max(height, width) and not past the video":
        _transformers_positions,
    "the engine times videos as if they had 24 frames a second": _at_24_fps,
    "the engine normalises pixel values a second time": _normalised_twice,
}
"""What is wrong -> the prompt as the trainer would read it with that fault; None where it changes nothing."""
