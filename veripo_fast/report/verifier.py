"""What the verifier did: the account of each DPO stage, and the verdicts and pairs of the groups that are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from veripo_fast.report.frames import checkpoint_folders
from veripo_fast.report.run_data import Row, RunData, finite, read_columns
from veripo_fast.report.scores import Table
from veripo_fast.text import number, plural
from veripo_fast.types import PreferencePair, RolloutGroup

MAX_TEXT = 12_000
"""Characters of a completion that are shown."""
VERDICT_FIELDS = ("prompt_id", "index", "accuracy", "finished", "length_tokens", "repetition", "consistent",
                   "supported_answer", "judge_score", "flags")
PAIR_FIELDS = tuple(pair_field.name for pair_field in fields(PreferencePair))


_TITLES = {"flags": "Checks failed, completions", "verdicts": "Think/answer, completions",
           "no_verdict": "Completions without a verdict", "unused": "Completions in no pair",
           "groups_without": "Groups without a candidate",
           "spliced": "Pairs kept with a spliced chosen side",
           "dropped": "Candidates not kept", "kept_without_verdict": "Pairs kept whose chosen side has no verdict"}
"""Titles of the account's tables, in order; other tables follow under their own name."""
_NOUNS = {"used": "completions in a pair"}


@dataclass
class Verification:
    """What the verifier did before one DPO stage."""

    stage: str
    summary: str
    tables: list[Table] = field(default_factory=list)


def verifications(run: RunData) -> list[Verification]:
    """What the verifier kept and what not, for every dpo stage that has an account."""
    folder = run.dir.root / "verifier"
    found = sorted(path.parent.name for path in folder.glob("*/account.json"))
    known = [stage.name for stage in run.stages]
    found.sort(key=lambda name: known.index(name) if name in known else len(known))
    accounts = ((name, _account(run, run.dir.verifier(name) / "account.json")) for name in found)
    return [_verification(name, account) for name, account in accounts if account]


def _account(run: RunData, path: Path) -> Row:
    """account.json (verifier/account.py says what it holds); empty, with a note, when it cannot be read."""
    try:
        account = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.notes.append(f"verifier/{path.parent.name}/account.json could not be read: {error}.")
        return {}
    return account if isinstance(account, dict) else {}


def _verification(stage: str, account: Row) -> Verification:
    plain = {key: value for key, value in account.items() if not isinstance(value, dict)}
    counts = {key: value for key, value in account.items() if isinstance(value, dict)}
    counts.pop("flag_rates", None)
    tables = [_family_table(counts.pop("candidates", {}), counts.pop("kept", {}))]
    whole = finite(plain.get("completions"))
    for key in [*(k for k in _TITLES if k in counts), *(k for k in counts if k not in _TITLES)]:
        title = _TITLES.get(key, key.replace("_", " ").capitalize())
        tables.append(_count_table(title, counts[key], whole if "ompletions" in title else None))
    said = [f"{_plain(value)} {_NOUNS.get(key, key.replace('_', ' '))}" for key, value in plain.items()]
    return Verification(stage, ", ".join(said), [table for table in tables if table.rows])


def _family_table(candidates: Row, kept: Row) -> Table:
    families = dict.fromkeys([*candidates, *kept])
    return Table("Pairs by family", ["", "candidates", "kept"],
                 [[name, _plain(candidates.get(name, "–")), _plain(kept.get(name, "–"))] for name in families])


def _count_table(title: str, counts: Row, whole: float | None) -> Table:
    """Counts, and their share of the completions where they count completions."""
    if not whole:
        return Table(title, [], [[name, _plain(count)] for name, count in counts.items()])
    return Table(title, [], [[name, _plain(count), f"{(finite(count) or 0.0) / whole * 100:.1f} %"]
                             for name, count in counts.items()])


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    known = finite(value)
    if known is not None:
        return number(known)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def verified_by(run: RunData, stage: str) -> list[str]:
    """The dpo stages that verified the rollouts of this stage."""
    return [dpo.name for dpo in run.stages if dpo.kind == "dpo" and dpo.rollouts_from == stage]


def cut(text: str) -> str:
    """The text up to MAX_TEXT characters, and how many follow."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}\n… {plural(len(text) - MAX_TEXT, 'character')} more"


class GroupVerdicts:
    """Verdicts and pairs of some prompts of one grpo stage.

    A verdict names its prompt and completion but not its step, and a prompt may come up in several steps. The blocks of
    verdicts of a prompt belong to its groups in order when there are as many; otherwise to the one group that has the
    same accuracies and endings. Where that is not unique no verdict is shown rather than a wrong one.
    """

    def __init__(self, run: RunData, stage: str, prompt_ids: set[str]) -> None:
        self.tokens = TokenText(run)
        self.verdicts: dict[tuple[str, int, int], list[Row]] = {}
        self.pairs: dict[str, list[Row]] = {}
        where = pc.field("prompt_id").isin(sorted(prompt_ids))
        for dpo in verified_by(run, stage):
            blocks = blocks_of(read_columns(run, f"verifier/{dpo}/verdicts.parquet", VERDICT_FIELDS, where))
            groups = _occurrences(run, stage, where) if blocks else {}
            for prompt_id, found in blocks.items():
                for place, block in _assigned(found, groups.get(prompt_id, {})):
                    self.verdicts[prompt_id, *place] = block
            for row in read_columns(run, f"verifier/{dpo}/pairs.parquet", PAIR_FIELDS, where):
                self.pairs.setdefault(row["prompt_id"], []).append(row)

    def verdicts_of(self, group: RolloutGroup, step: int, number: int) -> list[Row | None]:
        """One verdict, or None, per completion of group `number` of a step."""
        block = {row["index"]: row for row in self.verdicts.get((group.prompt.prompt_id, step, number), ())}
        return [shown_verdict(block[i]) if i in block else None for i in range(len(group.completions))]

    def pairs_of(self, group: RolloutGroup) -> list[Row]:
        """The pairs whose completions are those of this group."""
        return [{"family": row["family"], "reason": row["reason"],
                 "chosen": pair_side(row, "chosen", self.tokens),
                 "rejected": pair_side(row, "rejected", self.tokens)}
                for row in self.pairs.get(group.prompt.prompt_id, ()) if _from_group(row, group)]


def pair_side(row: Row, side: str, tokens: TokenText) -> Row:
    """The chosen or the rejected side of a pair, and which of its tokens enter the loss."""
    ids, mask = row[f"{side}_ids"], row[f"{side}_loss_mask"]
    runs = None if all(mask) else tokens.runs(ids, mask)
    return {"index": row[f"{side}_index"], "text": cut(row[f"{side}_text"]), "tokens": len(ids),
            "loss_tokens": sum(1 for bit in mask if bit), "runs": runs}


def blocks_of(rows: list[Row]) -> dict[str, list[list[Row]]]:
    """Verdicts by prompt, cut where the completion index starts again."""
    blocks: dict[str, list[list[Row]]] = {}
    for row in rows:
        found = blocks.setdefault(row["prompt_id"], [])
        if not found or row["index"] <= found[-1][-1]["index"]:
            found.append([])
        found[-1].append(row)
    return blocks


_Groups = dict[tuple[int, int], list[tuple[float, bool]]]


def _occurrences(run: RunData, stage: str, where: pc.Expression) -> dict[str, _Groups]:
    """Prompt -> its groups, by (step, number), each with accuracy and ending of every completion."""
    columns = ["prompt_id", "step", "group", "accuracy", "finish_reason"]
    found: dict[str, _Groups] = {}
    for path in run.dir.rollout_files(stage):
        for row in read_columns(run, str(path.relative_to(run.dir.root)), columns, where):
            group = found.setdefault(row["prompt_id"], {}).setdefault((row["step"], row["group"]), [])
            group.append((row["accuracy"], row["finish_reason"] == "stop"))
    return found


def _assigned(blocks: list[list[Row]], groups: _Groups) -> list[tuple[tuple[int, int], list[Row]]]:
    if len(blocks) == len(groups):
        return list(zip(groups, blocks, strict=True))
    result = []
    for block in blocks:
        facts = [(row["accuracy"], row["finished"]) for row in block]
        alike = [key for key, group in groups.items() if group == facts]
        if len(alike) == 1:
            result.append((alike[0], block))
    return result


def shown_verdict(row: Row) -> Row:
    """What the page says of a verdict."""
    return {"flags": list(row["flags"] or ()), "consistent": row["consistent"], "supported": row["supported_answer"],
            "repetition": finite(row["repetition"]) or 0.0, "think_tokens": row["length_tokens"],
            "judge_score": finite(row["judge_score"])}


def _from_group(row: Row, group: RolloutGroup) -> bool:
    """Whether the pair was built from this very group: the completions it names have the same first tokens."""
    named = [(row[f"{side}_index"], row[f"{side}_ids"]) for side in ("chosen", "rejected") if row[f"{side}_index"] >= 0]
    return all(index < len(group.completions) and _begin_alike(group.completions[index].token_ids, ids)
               for index, ids in named)


def _begin_alike(left: Sequence[int], right: Sequence[int]) -> bool:
    count = min(len(left), len(right))
    return count > 0 and list(left[:count]) == list(right[:count])


class TokenText:
    """Text of token runs, with the policy's own tokenizer where a checkpoint is at hand."""

    def __init__(self, run: RunData) -> None:
        found = [folder / "tokenizer.json" for folder in checkpoint_folders(run)]
        self.path = next((path for path in found if path.exists()), None)
        self._tokenizer: Any = None

    def runs(self, token_ids: list[int], loss_mask: list[int]) -> list[tuple[bool, str]] | None:
        """[(enters the loss, text)] in order; None without a tokenizer."""
        if self.path is None:
            return None
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self.path))
        parts = groupby(zip(token_ids, loss_mask, strict=True), key=lambda pair: bool(pair[1]))
        return [(used, self._tokenizer.decode([token for token, _ in tokens], skip_special_tokens=False))
                for used, tokens in parts]
