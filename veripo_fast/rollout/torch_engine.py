"""The plain-torch rollout engine: runs anywhere and defines what a faster engine must give.

A prompt is prefilled once and its keys and values are shared by its G completions, which are decoded together. Prompts
leave the batch when all their completions have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy
from veripo_fast.model.shared_prefix import PromptCache
from veripo_fast.rollout.protocol import OnGroup, Sampling, not_finite
from veripo_fast.run.seeds import derive_seed
from veripo_fast.types import Completion, LoadedPrompt, RolloutGroup

EngineOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
        batch = pack([(item.encoded, []) for item in prompts])
        cache = PromptCache(self.policy.num_layers)
        hidden = self.policy.hidden(batch, [item.features for item in prompts], cache)
        cache.start_decoding([group.prompt for group in batch.groups], sampling.group_size, sampling.max_new_tokens)
        ends = torch.tensor([group.completion_start - 1 for group in batch.groups], device=hidden.device)
        following = torch.tensor([item.encoded.next_position for item in prompts], device=hidden.device)
        logits = self.policy.head(hidden[ends])
        if not logits.isfinite().all():
            raise not_finite(self.policy.version)
        groups: list[RolloutGroup | None] = [None] * len(prompts)
        noise = draws(sampling, numbers).to(logits.device)
        for number, output in self._decode(logits, following, cache, sampling, noise):
            groups[number] = group = self._group(prompts[number], *output)
            if on_group is not None:
                on_group(number, group)
        return [group for group in groups if group is not None]

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

    def _decode(self, logits: torch.Tensor, following: torch.Tensor, cache: PromptCache, sampling: Sampling,
                noise: torch.Tensor) -> Iterator[tuple[int, EngineOutput]]:
        """As prompts are finished, their number with tokens [G, R], log-probabilities, and the length of each
        completion; logits [N, V] start it, noise is float64 [N * G, R]."""
        size = sampling.group_size
        logits, positions = logits.repeat_interleave(size, 0), following.repeat_interleave(size)
        rows = torch.arange(len(logits), device=logits.device)
        numbers = torch.arange(len(logits) // size, device=logits.device)
        tokens = torch.zeros(len(logits), sampling.max_new_tokens, dtype=torch.long, device=logits.device)
        logprobs = torch.zeros(tokens.shape, device=logits.device)
        lengths = torch.full((len(logits),), sampling.max_new_tokens, device=logits.device)
        ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        ends = torch.tensor(self.policy.encoder.end_ids, device=logits.device)
        for step in range(sampling.max_new_tokens):
            token, logprob = sample(logits, sampling, self.policy.encoder.banned_ids, noise[rows, step])
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
            logits = self.policy.head(self.policy.decode_hidden(token, positions, cache))
            positions = positions + 1

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
    logprobs = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), -1)
    allowed = logprobs.clone()
    allowed[:, list(banned_ids)] = float("-inf")
    if sampling.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        tokens = _inverse(_weights(_truncate(allowed, sampling)), noise)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _inverse(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The first token [rows] at which the sum of weights [rows, V] passes a share of their total, never one without
    weight."""
    below = weights.cumsum(-1, dtype=torch.float64)
    wanted = (noise * below[:, -1]).clamp(max=torch.nextafter(below[:, -1], torch.zeros_like(noise)))
    return torch.searchsorted(below, wanted[:, None], right=True)[:, 0]


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
