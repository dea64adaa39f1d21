"""`veripo report RUN`: one self-contained HTML file that says how a run went.

Charts are SVG and tables are HTML, both made here, so the page reads without JavaScript; the sample viewer and the
hover read-out need it. Text written by models reaches the page in two ways only: escaped by Jinja, or inside a JSON
block whose `<` are escaped and whose strings the script sets as text. A content security policy allows our one script
by its hash and no network, so a completion that holds `<script>` is only text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from veripo_fast.errors import UserError
from veripo_fast.report import curves, scores, verifier
from veripo_fast.report.alarms import alarms
from veripo_fast.report.difficulty import difficulty
from veripo_fast.report.memory import memory_table
from veripo_fast.report.pair_browser import browse
from veripo_fast.report.run_data import Row, RunData, load_run
from veripo_fast.report.samples import collect
from veripo_fast.report.step_bars import step_bars
from veripo_fast.run.atomic import atomic_write_bytes
from veripo_fast.text import plural

ASSETS = Path(__file__).parent / "assets"
MAX_SKIPPED = 200
"""Skipped records listed by name; the count is always whole."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of run folder `run` to `out`, a file or a folder (default: the run folder).

    Whatever the run holds so far is shown and what is absent is named. Raises UserError if `run` is not a run folder or
    the file cannot be written.
    """
    data = load_run(Path(run))
    target = data.dir.report if out is None else Path(out)
    if target.is_dir():
        target = target / "report.html"
    _write(target, _render(data))
    return target


def page_environment() -> jinja2.Environment:
    """How pages are rendered; templates find the style sheet as `style`."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.globals["style"] = Markup((ASSETS / "report.css").read_text(encoding="utf-8"))
    return environment


def _render(run: RunData) -> str:
    environment = page_environment()
    environment.filters |= {"percent": scores.percent, "tidy": scores.tidy}
    environment.globals |= {"interval": scores.interval, "other_score": scores.other_score,
                            "stage_state": scores.stage_state, "stage_text": scores.stage_text}
    return environment.get_template("report.html").render(_context(run))


def _context(run: RunData) -> Row:
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    samples, verifications = collect(run), verifier.verifications(run)
    pairs = browse(run, samples["media"])
    skipped_columns = list(dict.fromkeys(key for row in run.skipped for key in row))
    return {
        "run": run,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "figures": scores.headline(run),
        "evaluation": scores.evaluation_charts(run),
        "scores": scores.by_stage(run),
        "other_scores": scores.other_scores(run),
        "modes": list(scores.by_mode(run)),
        "by_type": scores.type_table(run),
        "curves": curves.curves(run),
        "time_bars": curves.time_bars(run),
        "time_table": curves.time_table(run),
        "phases": curves.phase_order(run),
        "step_bars": step_bars(run),
        "memory_table": memory_table(run),
        "verifications": verifications,
        "skipped_columns": skipped_columns,
        "skipped_rows": [[_cell(row.get(key)) for key in skipped_columns] for row in run.skipped[:MAX_SKIPPED]],
        "samples": samples,
        "samples_json": Markup(_script_json(samples | {"browser": pairs["shown"]})),
        "pairs": pairs,
        "alarms": alarms(run),
        "controls": scores.control_table(run),
        "judge_line": scores.judge_line(run),
        "by_source": scores.inconsistency_table(run),
        "difficulty": difficulty(run),
        "absent": _absent(run, samples, verifications),
    }


def _script_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _cell(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _absent(run: RunData, samples: Row, verifications: list[verifier.Verification]) -> list[str]:
    """Sentences that say what this report does not hold, and why."""
    said = [sentence for stage in run.stages if (sentence := _unfinished(stage.name, len(stage.rows),
                                                                         stage.expected_steps, stage.finished))]
    if not any(stage.rows for stage in run.stages):
        said.append("No training step is recorded yet.")
    if not run.evals:
        said.append("No evaluation is recorded yet.")
    if not samples["groups"]:
        said.append("There are no rollouts to show.")
    verified = {item.stage for item in verifications}
    said += [f"The verifier left no account of {stage.name}." for stage in run.of_kind("dpo")
             if stage.name not in verified]
    hidden = sum(bool(strip["error"]) for strip in samples["media"].values())
    if hidden:
        said.append(f"{hidden} of {plural(len(samples['media']), 'medium')} could not be shown; the samples say why."
                    .replace("mediums", "media"))
    if samples["left_out"]:
        said.append(f"{plural(samples['left_out'], 'sample')} left out to keep this file small.")
    return said + run.notes


def _unfinished(name: str, done: int, asked: int | None, finished: bool) -> str:
    if finished:
        return ""
    if not done:
        return f"{name} has not started."
    return f"{name} has run {f'{done:,} of ' if asked else ''}{plural(asked or done, 'step')}."


def _write(target: Path, text: str) -> None:
    """Write so that `target` holds either the whole report or what it held before."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(target, text.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"the report cannot be written to {target}: {error.strerror or error}") from error
