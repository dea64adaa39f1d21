"""The plain-torch rollout engine: runs anywhere and defines what a faster engine must give.

A prompt is prefilled once and its keys and values are shared by its G completions, which are decoded together. Prompts
leave the batch when all their completions have ended. Beside keys and values, what is held does not grow with a batch:
prompts are prefilled and tokens are drawn for a part of it at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from veripo_fast.model.packing import micro_batches, pack
from veripo_fast.model.policy import Policy
from veripo_fast.model.shared_prefix import PromptCache
from veripo_fast.rollout.protocol import OnGroup, Sampling, not_finite
from veripo_fast.run.seeds import derive_seed
from veripo_fast.schedule.workload import MOST_LOGITS, PREFILL_TOKENS
from veripo_fast.types import Completion, LoadedPrompt, RolloutGroup

EngineOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_BLOCK = 128
"""Tokens whose probabilities are added up first; Qwen's vocabularies are multiples of it."""


class TorchEngine:
    """Samples from the trainer's own weights: nothing to sync, nothing to wake."""

    rebuilds = 0

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(self, prompts: Sequence[LoadedPrompt], sampling: Sampling, on_group: OnGroup | None = None, *,
                 numbers: Sequence[int] | None = None, keep_caches: bool = False) -> list[RolloutGroup]:
        """See `RolloutEngine`; nothing is kept between calls. Sharded weights are whole while it samples."""
        with self.policy.backend.whole():
            return self._sampled(prompts, sampling, on_group, range(len(prompts)) if numbers is None else numbers)

    def _sampled(self, prompts: Sequence[LoadedPrompt], sampling: Sampling, on_group: OnGroup | None,
                 numbers: Sequence[int]) -> list[RolloutGroup]:
        if not prompts:
            return []
        cache = PromptCache([len(item.encoded.token_ids) for item in prompts])
        hidden = self._prefill(prompts, cache)
        cache.start_decoding(sampling.group_size, sampling.max_new_tokens)
        following = torch.tensor([item.encoded.next_position for item in prompts], device=hidden.device)
        groups: list[RolloutGroup | None] = [None] * len(prompts)
        noise = draws(sampling, numbers).to(hidden.device)
        with self.policy.decoding(len(prompts) * sampling.group_size, sampling.max_new_tokens):
            for number, output in self._decode(hidden, following, cache, sampling, noise):
                groups[number] = group = self._group(prompts[number], *output)
                if on_group is not None:
                    on_group(number, group)
        return [group for group in groups if group is not None]

    def _prefill(self, prompts: Sequence[LoadedPrompt], cache: PromptCache) -> torch.Tensor:
        """Run the prompts into the cache; hidden states [N, D] of their last tokens."""
        ends = []
        for part in micro_batches([len(item.encoded.token_ids) for item in prompts], PREFILL_TOKENS):
            batch = pack([(prompts[number].encoded, []) for number in part])
            ends.append(self.policy.hidden(batch, [prompts[number].features for number in part], cache))
        return torch.cat(ends)

    def sync(self) -> dict[str, float]:
        """Nothing: the weights are the trainer's own."""
        return {}

    def remedies(self) -> Iterable[tuple[str, Callable[[], None]]]:
        """Nothing: nothing is kept."""
        return ()

    def sleep(self) -> None:
        """Nothing: no memory is kept between calls."""

    def close(self) -> None:
        """Nothing."""

    def _decode(self, hidden: torch.Tensor, following: torch.Tensor, cache: PromptCache, sampling: Sampling,
                noise: torch.Tensor) -> Iterator[tuple[int, EngineOutput]]:
        """As prompts are finished, their number with tokens [G, R], log-probabilities, and the length of each
        completion; last hidden states [N, D] of the prompts start it, noise is float64 [N * G, R].

        Raises:
            TrainingError: the first logits are not finite.
        """
        size, device = sampling.group_size, hidden.device
        positions = following.repeat_interleave(size)
        rows = torch.arange(len(positions), device=device)
        numbers = torch.arange(len(hidden), device=device)
        tokens = torch.zeros(len(rows), sampling.max_new_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(tokens.shape, device=device)
        lengths = torch.full((len(rows),), sampling.max_new_tokens, device=device)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        ends = torch.tensor(self.policy.encoder.end_ids, device=device)
        for step in range(sampling.max_new_tokens):
            token, logprob = self._draw(hidden, sampling, noise[rows, step], first=step == 0)
            tokens[rows, step], logprobs[rows, step] = token, logprob
            stops = torch.isin(token, ends) & ~ended
            lengths[rows[stops]] = step + 1
            ended |= stops
            done = ended.view(-1, size).all(1) | (step + 1 == sampling.max_new_tokens)
            for number in numbers[done].tolist():
                own = slice(number * size, (number + 1) * size)
                yield number, (tokens[own].cpu(), logprobs[own].cpu(), lengths[own].cpu())
            if done.all():
                break
            if done.any():
                numbers, keep = numbers[~done], (~done).nonzero()[:, 0]
                cache.keep(keep)
                alive = (~done).repeat_interleave(size)
                rows, token, positions, ended = rows[alive], token[alive], positions[alive], ended[alive]
            hidden = self.policy.decode_hidden(token, positions, cache)
            positions = positions + 1

    def _draw(self, hidden: torch.Tensor, sampling: Sampling, noise: torch.Tensor, *, first: bool
              ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next token and its log-probability for each completion, from hidden states of each or, at `first`, of each
        prompt; logits exist for a part of them at a time."""
        copies = sampling.group_size if first else 1
        part = max(MOST_LOGITS // (self.policy.vocabulary * copies), 1)
        drawn = []
        for states, numbers in zip(hidden.split(part), noise.split(part * copies), strict=True):
            logits = self.policy.head(states)
            if first and not logits.isfinite().all():
                raise not_finite(self.policy.version)
            drawn.append(sample(logits.repeat_interleave(copies, 0) if first else logits, sampling,
                                self.policy.encoder.banned_ids, numbers))
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def _group(self, item: LoadedPrompt, tokens: torch.Tensor, logprobs: torch.Tensor,
               lengths: torch.Tensor) -> RolloutGroup:
        completions = []
        for row, length in enumerate(lengths.tolist()):
            ids = tokens[row, :length].tolist()
            completions.append(Completion(
                token_ids=ids, text=self.policy.encoder.decode_completion(ids),
                rollout_logprobs=logprobs[row, :length].tolist(),
                finish_reason="stop" if ids[-1] in self.policy.encoder.end_ids else "length",
                policy_version=self.policy.version))
        return RolloutGroup(item.prompt, completions, self.policy.encoder.opens_think)


def draws(sampling: Sampling, numbers: Sequence[int]) -> torch.Tensor:
    """Uniform float64 [prompts * G, R] in [0, 1): a number for every token of a completion, from a seed per prompt."""
    parts = [torch.rand(sampling.group_size, sampling.max_new_tokens, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(derive_seed(sampling.seed, number)))
             for number in numbers]
    return torch.cat(parts)


def sample(logits: torch.Tensor, sampling: Sampling, banned_ids: Sequence[int],
           noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row of logits [rows, V], by the inverse of its distribution function.

    Args:
        noise: float64 [rows], uniform in [0, 1).

    Returns:
        int64 [rows] tokens and float32 [rows]: log softmax(logits / temperature) of each, before bans, top-k and top-p.
    """
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    logprobs = torch.log_softmax(logits, -1)
    if sampling.temperature == 0:
        tokens = _with(logprobs.clone(), banned_ids, float("-inf")).argmax(-1)
    elif sampling.truncates:
        allowed = _with(logprobs.clone(), banned_ids, float("-inf"))
        tokens = _inverse(_weights(_truncate(allowed, sampling)), noise)
    else:
        tokens = _inverse(_plain_weights(logprobs, banned_ids), noise)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _inverse(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The first token [rows] at which the sum of weights [rows, V] passes a share of their total, never one without
    weight.

    A running sum over the vocabulary costs more than the softmax. It is taken over blocks, and then inside of one.
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % _BLOCK)).view(len(weights), -1, _BLOCK)
    below = blocks.sum(-1).double().cumsum(-1)
    wanted = noise * below[:, -1]
    block = _first_above(below, wanted)
    before = F.pad(below, (1, 0)).gather(-1, block[:, None])[:, 0]
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].double().cumsum(-1)
    return block * _BLOCK + _first_above(inside, wanted - before)


def _first_above(sums: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where running sums [rows, n] first pass what is wanted [rows]; their end where rounding keeps them below it."""
    wanted = wanted.minimum(torch.nextafter(sums[:, -1], torch.zeros_like(wanted)))
    return torch.searchsorted(sums, wanted[:, None], right=True)[:, 0]


def _with(rows: torch.Tensor, tokens: Sequence[int], value: float) -> torch.Tensor:
    """Rows [rows, V] after `value` was written at some tokens."""
    rows[:, list(tokens)] = value
    return rows


def _plain_weights(logprobs: torch.Tensor, banned_ids: Sequence[int]) -> torch.Tensor:
    """`_weights` of log-probabilities before bans, with one pass over the vocabulary where bans take little."""
    weights = logprobs.exp()
    taken = weights[:, list(banned_ids)].sum(-1) > 0.5
    _with(weights, banned_ids, 0.0)
    if taken.any():
        weights[taken] = _weights(_with(logprobs[taken], banned_ids, float("-inf")))
    return weights


def _weights(logprobs: torch.Tensor) -> torch.Tensor:
    """Probabilities up to a factor per row. There is one where banned tokens have taken all but nothing, as they may
    near temperature 0."""
    best = logprobs.amax(-1, keepdim=True)
    return (logprobs - torch.where(best < -50, best, 0.0)).exp()


def _truncate(logprobs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Top-k, then top-p (the smallest set of tokens whose probability reaches top_p, never empty)."""
    if 0 < sampling.top_k < logprobs.shape[-1]:
        worst = logprobs.topk(sampling.top_k, -1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < worst, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = torch.softmax(logprobs, -1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logprobs = logprobs.masked_fill(drop, float("-inf"))
    return logprobs
