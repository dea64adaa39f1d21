"""Preference pairs from verified rollouts: chosen and rejected tokens with the part that enters the DPO loss.

Whole completions keep the token ids that were sampled. Per prompt the pairs are capped and spread over the families and
over the completions. When a prompt has several groups, the newest one builds first: its policy is closest to today's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.reward.answers import plain
from veripo_fast.reward.spans import Parsed, answer_closing, answer_end, answer_prefix, parse_group
from veripo_fast.types import Completion, Form, PairFamily, PreferencePair, Prompt, RolloutGroup, Verdict
from veripo_fast.verifier.account import Account
from veripo_fast.verifier.candidates import Candidate, GroupView, find_candidates
from veripo_fast.verifier.conclusions import conclusions

Encode: TypeAlias = Callable[[str], list[int]]
_TURNS = ("Wait, let me check this again.", "Hold on, let me verify that.", "Let me look once more.")
"""Neutral sentences between a wrong and a right reasoning: none says that the first one was wrong."""
_Side: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], str, int]
"""Token ids, loss mask, text, index of the completion or -1."""


def build_pairs(groups: list[RolloutGroup], verdicts: list[list[Verdict]], config: VerifierConfig, encode: Encode,
                eos_id: int, seed: int) -> tuple[list[PreferencePair], Account]:
    """Pairs of the families in `config.families`, and the account of everything.

    Args:
        verdicts: one list per group, as `check_group` gives them.
        encode: text to token ids, without special tokens; used only where a side is not a whole completion.
        eos_id: the end-of-turn token that closes such a side.
    """
    account = Account.open(verdicts, config.families)
    builder = _Builder(config, encode, eos_id, account)
    views = [GroupView(group, row, config) for group, row in zip(groups, verdicts, strict=True)]
    built = {number: builder.build(views[number], random.Random(f"{seed}:{groups[number].prompt.prompt_id}"))
             for number in sorted(range(len(groups)), key=lambda number: _age(groups[number]))}
    return [pair for number in range(len(groups)) for pair in built[number]], account


def _age(group: RolloutGroup) -> int:
    return -max((completion.policy_version for completion in group.completions), default=0)


class _Builder:
    """Builds the pairs of group after group; remembers how many each prompt has and which exist already."""

    def __init__(self, config: VerifierConfig, encode: Encode, eos_id: int, account: Account) -> None:
        self._config, self._encode, self._eos_id, self._account = config, encode, eos_id, account
        self._per_prompt: Counter[Prompt] = Counter()
        self._existing: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()

    def build(self, view: GroupView, rng: random.Random) -> list[PreferencePair]:
        """The pairs of one group: the families take turns until the prompt has its number of pairs."""
        queues = {family: self._queue(view, family, rng) for family in self._config.families}
        pairs: list[PreferencePair] = []
        uses: Counter[int] = Counter()
        used: set[int] = set()
        while any(queues.values()) and self._per_prompt[view.group.prompt] < self._config.max_pairs_per_prompt:
            for family in queues:
                if self._per_prompt[view.group.prompt] < self._config.max_pairs_per_prompt:
                    pair, indices = self._take(view, queues[family], uses, rng)
                    pairs += [pair] if pair else []
                    used |= indices
        for family, queue in queues.items():
            self._drop(family, "over max_pairs_per_prompt", len(queue))
        self._account.note_unused(view.verdicts, used, view.repeated)
        return pairs

    def _queue(self, view: GroupView, family: PairFamily, rng: random.Random) -> list[Candidate]:
        found = find_candidates(view, family)
        if found.lacking:
            self._account.groups_without[f"{family}: {found.lacking}"] += 1
        self._account.candidates[family] += len(found.candidates) + found.dropped.total()
        for reason, count in found.dropped.items():
            self._drop(family, reason, count)
        return rng.sample(found.candidates, len(found.candidates))

    def _take(self, view: GroupView, queue: list[Candidate], uses: Counter[int],
              rng: random.Random) -> tuple[PreferencePair | None, set[int]]:
        """The next new pair of a family: whole completions first, then completions that stand in the fewest pairs."""
        while queue:
            candidate = min(queue, key=lambda c: (c.kind == "assembled", uses[c.chosen] + uses[c.rejected]))
            queue.remove(candidate)
            pair = self._pair(view, candidate, rng)
            identity = (pair.prompt_id, pair.chosen_ids, pair.rejected_ids)
            if identity in self._existing or pair.chosen_ids == pair.rejected_ids:
                self._drop(candidate.family, "duplicate", 1)
                continue
            self._existing.add(identity)
            self._per_prompt[view.group.prompt] += 1
            self._account.kept[candidate.family] += 1
            self._account.spliced[candidate.family] += candidate.kind == "assembled"
            self._account.kept_without_verdict[candidate.family] += view.verdicts[candidate.chosen].consistent is None
            uses.update((candidate.chosen, candidate.rejected))
            return pair, {candidate.chosen, candidate.rejected}
        return None, set()

    def _drop(self, family: PairFamily, reason: str, count: int) -> None:
        if count:
            self._account.dropped[f"{family}: {reason}"] += count

    def _pair(self, view: GroupView, candidate: Candidate, rng: random.Random) -> PreferencePair:
        completions, parsed = view.group.completions, parse_group(view.group)
        better, worse = completions[candidate.chosen], completions[candidate.rejected]
        chosen, rejected = _whole(better, candidate.chosen), _whole(worse, candidate.rejected)
        if candidate.kind == "assembled":
            chosen = self._corrected(view, worse, parsed[candidate.rejected], better, parsed[candidate.chosen],
                                     rng.choice(_TURNS))
        elif candidate.kind == "answer":
            chosen, rejected = self._swapped(worse, parsed[candidate.rejected], view.verdicts[candidate.rejected],
                                             view.group.prompt.form)
        return PreferencePair(
            view.group.prompt.prompt_id, candidate.family, chosen[0], rejected[0], chosen[1], rejected[1],
            chosen[2], rejected[2], chosen[3], rejected[3], _reason(candidate, view.verdicts))

    def _corrected(self, view: GroupView, wrong: Completion, erring: Parsed, right: Completion, read: Parsed, turn: str
                   ) -> _Side:
        """Wrong reasoning up to its conclusion (masked: the policy must not learn to err first), a turn, right
        reasoning and answer."""
        before = _up_to_conclusion(wrong.text[:wrong.text.index("</think>")], erring.think or "", view)
        tail = right.text[right.text.index("</think>"):answer_end(right.text, view.group.prompt.form)]
        after = f" {turn} {read.think}{tail}"
        masked, learned = self._encode(before), [*self._encode(after), self._eos_id]
        return (*masked, *learned), (0,) * len(masked) + (1,) * len(learned), before + after, -1

    def _swapped(self, completion: Completion, read: Parsed, verdict: Verdict, form: Form) -> tuple[_Side, _Side]:
        """The same reasoning with the answer it supports, and with the one given; the loss starts where they differ."""
        prefix, closing = answer_prefix(completion.text, form), answer_closing(form)
        chosen_text, rejected_text = (
            f"{prefix}{answer}{closing}" for answer in (verdict.supported_answer, read.answer))
        chosen, rejected = ((*self._encode(text), self._eos_id) for text in (chosen_text, rejected_text))
        shared = next((place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
                      min(len(chosen), len(rejected)))
        return ((chosen, _mask(chosen, shared), chosen_text, -1),
                (rejected, _mask(rejected, shared), rejected_text, verdict.index))


def _up_to_conclusion(text: str, think: str, view: GroupView) -> str:
    """What was written until the reasoning's last conclusion; all of it where the rules see none, or cannot count in
    it because of LaTeX."""
    drawn = [found for found in conclusions(think, view.group.prompt, view.given) if found.answer is not None]
    whole = text.rstrip()
    if not drawn or plain(think) != think.strip():
        return whole
    return whole.removesuffix(think.strip()[drawn[-1].end + 1:]).rstrip()  # behind the end of its sentence


def _mask(ids: tuple[int, ...], shared: int) -> tuple[int, ...]:
    return (0,) * shared + (1,) * (len(ids) - shared)


def _whole(completion: Completion, index: int) -> _Side:
    return tuple(completion.token_ids), (1,) * len(completion.token_ids), completion.text, index


def _reason(candidate: Candidate, verdicts: list[Verdict]) -> str:
    chosen, rejected = verdicts[candidate.chosen], verdicts[candidate.rejected]
    if candidate.kind == "answer":
        return f"The same reasoning supports {chosen.supported_answer!r}, which is right, and not the answer given."
    if candidate.kind == "assembled":
        return "A wrong reasoning that is checked and corrected, against the wrong reasoning alone."
    return {
        "accuracy": f"Right and consistent (accuracy {chosen.accuracy:g}) against wrong ({rejected.accuracy:g}).",
        "consistency": f"Both right; the rejected reasoning supports {rejected.supported_answer!r} instead.",
        "reflection": "A reasoning that corrected itself and ended right, against a wrong one.",
        "repetition": f"Both right; {rejected.repetition:.0%} of the rejected reasoning repeats itself, "
                      f"{chosen.repetition:.0%} of the chosen one.",
    }[candidate.family]
