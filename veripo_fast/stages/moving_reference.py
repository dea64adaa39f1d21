"""A reference that follows the policy as a moving mean, and what rewards are told a reference says (GRPO-CARE)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.distributed.shares import padded
from veripo_fast.distributed.state_files import read_state
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy
from veripo_fast.reward.spans import answer_bounds
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.stages.reference import Reference
from veripo_fast.stages.session import Session
from veripo_fast.types import LoadedPrompt, RolloutGroup


class MovingReference:
    """A reference that follows the policy: mean = decay * mean + (1 - decay) * policy, every so many steps.

    The mean is in float32: at a decay of 0.995 a bfloat16 weight would never move. It lies on the ranks as the
    reference's weights do, and in the checkpoint beside the optimizer's state.

    Args:
        policy: the reference, at the start of the stage.
        optimizer: of the followed policy; its checkpoints get the mean.
    """

    def __init__(self, session: Session, policy: Policy, optimizer: Optimizer, config: GrpoConfig) -> None:
        self.session, self.policy = session, policy
        self.decay, self.every = config.reference_decay, config.reference_every
        trained = {name for name, _ in session.policy.parameters()}
        self.weights = {name: weight.detach() for name, weight in policy.all_parameters() if name in trained}
        self.means = {f"reference/{name}": weight.float() for name, weight in self.weights.items()}
        optimizer.beside |= self.means
        if session.state.step and session.checkpoint is not None:
            read_state(session.checkpoint / "trainer" / "optimizer", dict(self.means), session.world)
            self._show()

    @torch.no_grad()
    def step_done(self, step: int) -> None:
        """Follow the policy if it is time, behind the update of a step of the stage. Collective."""
        if (step + 1) % self.every:
            return
        for name, whole in self.session.policy.backend.weights():
            mean = self.means.get(f"reference/{name}")
            if mean is not None:
                mean.lerp_(_laid_out(whole.detach(), mean), 1 - self.decay)
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.means[f"reference/{name}"])


def _laid_out(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A weight in float32 on the ranks as another one is; `whole` is empty on all ranks but the first. Collective."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole.to(like)
    if whole.shape != like.shape:
        whole = torch.empty(like.shape, device=like.to_local().device)
    return distribute_tensor(whole.to(like.to_local()), like.device_mesh, like.placements)


@torch.no_grad()
def tell_logprobs(reference: Reference, loaded: Mapping[int, LoadedPrompt], groups: Mapping[int, RolloutGroup],
                  temperature: float, session: Session) -> None:
    """Fill in `reference_logprobs` and `answer_tokens` of groups that have no reward yet. Collective.

    Args:
        loaded, groups: of this rank, by number.
    """
    wanted = [number for number, group in groups.items() if any(row.reward is None for row in group.completions)]
    for number in padded(wanted, session.world):
        if number is None:
            reference.idle()
            continue
        prompt, rows = loaded[number], groups[number].completions
        batch = pack([(prompt.encoded, [row.token_ids for row in rows])])
        logprobs = reference.completion_logprobs(batch, reference.features_of([prompt]), temperature=temperature)
        for row, own in zip(rows, logprobs.split([len(row.token_ids) for row in rows]), strict=True):
            row.reference_logprobs = own.tolist()
            row.answer_tokens = answer_tokens(session.policy.encoder, row.token_ids, row.text, prompt.prompt.form)


def answer_tokens(encoder: PromptEncoder, token_ids: list[int], text: str, form: Any) -> tuple[int, int] | None:
    """The first token of a completion with a character of its answer, and the one behind the last; None without."""
    bounds = answer_bounds(text, form)
    if bounds is None:
        return None
    known = partial(_characters, encoder, token_ids, text)
    counts = range(len(token_ids) + 1)
    begin, end = (bisect_left(counts, bound, key=known) for bound in bounds)
    return begin - (known(begin) > bounds[0]), end  # a token may hold the end of the tag too


def _characters(encoder: PromptEncoder, token_ids: list[int], text: str, count: int) -> int:
    """How many characters of a text its first tokens give; half a character, which decodes to U+FFFD, is none."""
    begun = encoder.decode_completion(token_ids[:count])
    return len(begun) if text.startswith(begun) else len(begun.rstrip("\ufffd"))
