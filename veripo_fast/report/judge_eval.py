"""`veripo judge-eval`: a judge against a labelled set, as text, as JSON and as a page with a reliability plot."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from veripo_fast.config.schema import Config
from veripo_fast.errors import UserError
from veripo_fast.report.charts import IntervalMark, interval_chart
from veripo_fast.report.page import page_environment
from veripo_fast.reward.math_answers import math_budget
from veripo_fast.rollout.local_texts import LocalTexts
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.folder import check_out, make_out
from veripo_fast.text import plural, printable, rank_prefix
from veripo_fast.verifier.calibration import SHIPPED, Calibration, check_judge, read_set
from veripo_fast.verifier.judges import no_progress
from veripo_fast.verifier.proportions import Share
from veripo_fast.verifier.store import policy_scorer
from veripo_fast.verifier.verify import calibrate, make_judge

_BY_SCORE = ("The judge's score as a probability that it is right, from each edge on, and the share in which it is "
             "right. A calibrated judge rises from 50 to 100 %.")
_BY_VERDICT = "The judge has no score, so its verdict is all it says: the share of each that is right."
_BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Edges of the judge's own confidence."""


def evaluate_judge(config: Config, name: str = SHIPPED, limit: int | None = None) -> Calibration:
    """The verdicts of the configuration's judge on a labelled set, in one process.

    Items without a usable reply get no verdict here, however many there are: what a run refuses is measured.

    Raises:
        DataError: the set cannot be read.
        JudgeError: a judge that cannot be reached or loaded.
    """
    items = read_set(name, limit)
    config = replace(config, verifier=replace(config.verifier, endpoint_max_failures=1.0, llm_max_failures=1.0))
    with ExitStack() as stack, math_budget(config.reward.math_seconds_per_batch):
        judge = make_judge(config.verifier, None, lambda: policy_scorer(config, stack), LocalTexts(config))
        return calibrate(items, lambda groups: judge.judge(groups, no_progress))


def judge_eval_command(config: Config, name: str, limit: int | None, out: Path | None) -> str:
    """Measure the judge; returns the table. The files in `out`, if any, are written before a judge is refused.

    Raises:
        JudgeError: the judge is under a floor of the configuration, or always says the same.
    """
    if rank_prefix():
        raise UserError("judge-eval runs in one process; start it without torchrun")
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}")
    if out is not None:
        check_out(out)
    calibration = evaluate_judge(config, name, limit)
    if out is not None:
        _write(out, config, name, calibration)
    table = as_text(config, name, calibration)
    if calibration.faults(config.verifier):
        print(table)
    check_judge(config.verifier.judge, calibration, config.verifier)
    return table


def as_text(config: Config, name: str, calibration: Calibration) -> str:
    """What is printed."""
    verdicts = calibration.verdicts()
    lines = [f"judge {config.verifier.judge} on {plural(len(calibration.items), 'item')} of {printable(name)}: "
             + ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("consistent", "inconsistent", "no verdict"))]
    lines += [f"  {title:28} {share}" for title, share in calibration.shares().items()]
    if calibration.no_verdict():
        lines.append("  no verdict because           " + ", ".join(
            f"{why} {count}" for why, count in calibration.no_verdict().most_common()))
    width = max(len(kind) for kind in calibration.by_kind())
    lines.append(f"  {'kind':{width}} items  right  consistent  inconsistent  no verdict")
    for kind, part in calibration.by_kind().items():
        counts = part.verdicts()
        lines.append(f"  {printable(kind):{width}} {len(part.items):5} {part.agreement.count:6} "
                     f"{counts['consistent']:11} {counts['inconsistent']:13} {counts['no verdict']:11}")
    return "\n".join(lines)


def as_json(config: Config, name: str, calibration: Calibration) -> dict[str, object]:
    """What judge_eval.json holds."""
    return {"judge": config.verifier.judge, "set": name, "items": len(calibration.items),
            "verdicts": dict(calibration.verdicts()), "no_verdict": dict(calibration.no_verdict()),
            "shares": {title: share.to_json() for title, share in calibration.shares().items()},
            "kinds": {kind: {"items": len(part.items), "verdicts": dict(part.verdicts()),
                             "agreement": part.agreement.to_json()} for kind, part in calibration.by_kind().items()},
            "reliability": {label: share.to_json() for label, share in reliability(calibration).items()},
            "refused": calibration.faults(config.verifier)}


def reliability(calibration: Calibration) -> dict[str, Share]:
    """How often the judge is right, by how sure it is, over its verdicts.

    A judge with a score (nats between the best two answers) is as sure as 1 / (1 + exp(-|score|)). One without has said
    no more than the verdict, which is then the bin.
    """
    decided = [(judgement, item.consistent) for judgement, item in
               zip(calibration.judgements, calibration.items, strict=True) if judgement.consistent is not None]
    if not has_scores(calibration):
        return {name: Share.of(truth is verdict for judgement, truth in decided if judgement.consistent is verdict)
                for name, verdict in (("consistent", True), ("inconsistent", False))}
    right: dict[str, list[bool]] = {f"{low:.0%}": [] for low in _BINS[:-1]}
    for judgement, truth in decided:
        confidence = 1 / (1 + math.exp(-abs(judgement.score or 0.0)))
        low = max(edge for edge in _BINS[:-1] if edge <= confidence)
        right[f"{low:.0%}"].append(judgement.consistent is truth)
    return {label: Share.of(outcomes) for label, outcomes in right.items()}


def has_scores(calibration: Calibration) -> bool:
    """Whether the judge gives a number beside its verdict."""
    return any(judgement.score is not None for judgement in calibration.judgements)


def _write(out: Path, config: Config, name: str, calibration: Calibration) -> None:
    make_out(out)
    atomic_write_text(out / "judge_eval.json", json.dumps(as_json(config, name, calibration), indent=2) + "\n")
    page = page_environment().get_template("judge_eval.html").render(
        judge=config.verifier.judge, name=name, items=len(calibration.items),
        refused=calibration.faults(config.verifier), shares=calibration.shares(),
        kinds=[(kind, part, part.verdicts()) for kind, part in calibration.by_kind().items()],
        reasons=calibration.no_verdict().most_common(), plot=_plot(reliability(calibration)),
        plot_note=_BY_SCORE if has_scores(calibration) else _BY_VERDICT)
    atomic_write_text(out / "judge_eval.html", page)


def _plot(shares: dict[str, Share]) -> Markup:
    marks = [None if share.value is None else IntervalMark(share.value, *share.interval) for share in shares.values()]
    return interval_chart("How often the judge is right, by how sure it is", list(shares),
                          {"right": marks}, (0.0, 1.0), percent=True)
