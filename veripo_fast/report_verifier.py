"""The verifier section: what was kept, what was not, and why."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from veripo_fast.report_charts import number
from veripo_fast.report_data import Row, RunData, finite, plural, read_columns
from veripo_fast.report_scores import Table


@dataclass
class Verification:
    """What the verifier did before one DPO stage."""

    stage: str
    summary: list[str]
    tables: list[Table] = field(default_factory=list)


def verifications(run: RunData) -> list[Verification]:
    """What the verifier kept and what not, for every dpo stage that has files."""
    names = [stage.name for stage in run.stages if stage.kind == "dpo"]
    folder = run.dir.root / "verifier"
    names += sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in names) if folder.is_dir() else []
    found = (_verification(run, name) for name in names if run.dir.verifier(name).is_dir())
    return [item for item in found if item.tables or item.summary]


def _verification(run: RunData, stage: str) -> Verification:
    folder = run.dir.verifier(stage)
    result = Verification(stage, [])
    verdicts = read_columns(run, f"verifier/{stage}/verdicts.parquet", ["prompt_id", "consistent", "flags"])
    if verdicts:
        result.summary.append(_verdict_sentence(verdicts))
        flags = Counter(flag for row in verdicts for flag in row["flags"] or ())
        clean = sum(not row["flags"] for row in verdicts)
        result.tables.append(_share_table("Checks failed", [*flags.most_common(), ("none", clean)], len(verdicts)))
    pairs = read_columns(run, f"verifier/{stage}/pairs.parquet", ["prompt_id", "family"])
    if pairs:
        prompts = len({row["prompt_id"] for row in pairs})
        result.summary.append(f"{plural(len(pairs), 'pair')} from {plural(prompts, 'prompt')}.")
        families = Counter(row["family"] for row in pairs)
        result.tables.append(_share_table("Pairs by family", families.most_common(), len(pairs)))
    result.tables += _account_tables(run, folder / "account.json")
    return result


def _verdict_sentence(verdicts: list[Row]) -> str:
    said = [row["consistent"] for row in verdicts if row["consistent"] is not None]
    prompts = len({row["prompt_id"] for row in verdicts})
    return (f"{plural(len(verdicts), 'completion')} of {plural(prompts, 'prompt')} judged: {said.count(True):,} "
            f"consistent, {said.count(False):,} inconsistent, {len(verdicts) - len(said):,} undecided.")


def _share_table(title: str, counts: list[tuple[str, int]], whole: int) -> Table:
    return Table(title, ["", "count", "share"],
                 [[name, f"{count:,}", f"{count / whole * 100:.1f} %"] for name, count in counts])


def _account_tables(run: RunData, path: Path) -> list[Table]:
    """account.json as tables: its numbers, then one table for each object in it."""
    if not path.exists():
        return []
    try:
        account = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        run.notes.append(f"{path.parent.name}/account.json could not be read: {error.msg}.")
        return []
    if not isinstance(account, dict):
        return []
    tables = [_object_table("Account", {k: v for k, v in account.items() if not isinstance(v, dict)})]
    tables += [_object_table(str(key).replace("_", " ").capitalize(), value)
               for key, value in account.items() if isinstance(value, dict)]
    return [table for table in tables if table.rows]


def _object_table(title: str, values: Row) -> Table:
    rows = [[str(key).replace("_", " "), _plain(value)] for key, value in values.items()]
    return Table(title, ["", ""], rows)


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    known = finite(value)
    if known is not None:
        return number(known)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
