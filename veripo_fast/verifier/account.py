"""The books of the verifier: what became a pair, and for everything that did not, why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from veripo_fast.types import PairFamily, Verdict
from veripo_fast.verifier.checks import FLAGS


@dataclass
class Account:
    """Counts of one run of the verifier.

    For every family: groups = groups with candidates + those in `groups_without`, and candidates = kept + those in
    `dropped`. completions = used + those in `unused`. Keys are "family: reason" or a reason.
    """

    groups: int = 0
    completions: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    """Completions that failed each check; one may fail several."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Completions found consistent and inconsistent, and those without a verdict (unknown)."""
    no_verdict: Counter[str] = field(default_factory=Counter)
    """Completions without a verdict, by the reason: no conclusion, no reply (a judge was asked, and its reply was
    missing or could not be read), no answer, unreadable answer, small margin, not judged."""
    candidates: Counter[str] = field(default_factory=Counter)
    """Possible pairs by family."""
    kept: Counter[str] = field(default_factory=Counter)
    """Pairs by family."""
    spliced: Counter[str] = field(default_factory=Counter)
    """Of these, pairs whose chosen side is put together from a wrong and a right completion (`reflection`)."""
    kept_without_verdict: Counter[str] = field(default_factory=Counter)
    """Of those kept, pairs whose chosen reasoning was found neither consistent nor inconsistent: only `repetition`
    takes one, because its two sides differ in length and not in what they conclude."""
    groups_without: Counter[str] = field(default_factory=Counter)
    """Groups in which a family found no candidate."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Candidates that became no pair."""
    used: int = 0
    """Completions that stand in at least one pair."""
    unused: Counter[str] = field(default_factory=Counter)
    """Completions that stand in no pair, by their first failed check or else by what they lacked."""

    @classmethod
    def open(cls, verdicts: Sequence[Sequence[Verdict]], families: Iterable[PairFamily]) -> Account:
        """The account before any pair is built."""
        flat = [verdict for row in verdicts for verdict in row]
        names = {True: "consistent", False: "inconsistent", None: "unknown"}
        account = cls(groups=len(verdicts), completions=len(flat))
        account.flags.update(dict.fromkeys(FLAGS, 0))
        account.flags.update(flag for verdict in flat for flag in verdict.flags)
        account.verdicts.update(dict.fromkeys(names.values(), 0))
        account.verdicts.update(names[verdict.consistent] for verdict in flat)
        for counter in (account.candidates, account.kept, account.spliced, account.kept_without_verdict):
            counter.update(dict.fromkeys(families, 0))
        return account

    def note_unused(self, row: Sequence[Verdict], used: set[int], repeated: set[int]) -> None:
        """Enter the completions of one group that stand in no pair."""
        self.used += len(used)
        for verdict in row:
            if verdict.index not in used:
                no_verdict = "no verdict" if verdict.consistent is None else "no partner, or over a limit"
                reason = verdict.flags[0] if verdict.flags else no_verdict
                self.unused["repeated" if verdict.index in repeated else reason] += 1

    def to_json(self) -> dict[str, object]:
        """Plain objects: counts, and under flag_rates the share of completions with each flag, 0 to 1."""
        total = max(1, self.completions)
        return {"groups": self.groups, "completions": self.completions, "pairs": self.kept.total(), "used": self.used,
                "flags": dict(self.flags), "flag_rates": {flag: n / total for flag, n in self.flags.items()},
                "verdicts": dict(self.verdicts), "no_verdict": dict(self.no_verdict),
                "candidates": dict(self.candidates), "kept": dict(self.kept),
                "spliced": {family: count for family, count in self.spliced.items() if count},
                "kept_without_verdict": dict(self.kept_without_verdict), "groups_without": dict(self.groups_without),
                "dropped": dict(self.dropped), "unused": dict(self.unused)}
