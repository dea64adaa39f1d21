"""What the report says first (alarms), who judged, controls, difficulty, the pair browser, filters, several runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_page import embedded
from tests.support.browser import Browser
from tests.support.report_run import HOSTILE, make_run
from veripo_fast.cli import main
from veripo_fast.report import page as report
from veripo_fast.report import pair_browser
from veripo_fast.report.alarms import alarms
from veripo_fast.report.difficulty import difficulty, level
from veripo_fast.report.run_data import load_run
from veripo_fast.report.scores import control_table, inconsistency_table, judge_line
from veripo_fast.run.folder import RunDir
from veripo_fast.verifier.store import read_pairs, write_pairs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("views"))


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return report.write_report(run)


def changed(run: Path, folder: Path, name: str, change: Any) -> Path:
    """A copy of the run's records in which `change` was made to every line of one of its files."""
    folder.mkdir(parents=True)
    for file in ("config.yaml", "metrics.jsonl", "evals.jsonl"):
        shutil.copy(run / file, folder / file)
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(row | change(row)) + "\n" for row in rows))
    return folder


# -- what is said ----------------------------------------------------------------------------------------------------

def test_alarms_stand_first_and_name_the_step(run: Path, tmp_path: Path) -> None:
    def ill(row: dict[str, Any]) -> dict[str, Any]:
        if row["kind"] == "dpo":
            return {"chosen_drift": -0.1 * row["step"], "skipped_updates": float(row["step"] == 2)}
        first = row["stage"] == "grpo-1"
        return {"zero_reward_steps": max(0, row["step"] - 20) if first else 0,
                "steps_without_signal": row["step"] if row["step"] < 6 and first else 0,
                "collapsed_steps": 0 if first else int(row["step"] > 3)}

    said = alarms(load_run(changed(run, tmp_path / "ill", "metrics.jsonl", ill)))
    assert said == [
        "grpo-1: all rewards were 0 in 3 steps, first in step 22. Look at its rollouts, and at reward and the data's "
        "answers.",
        "grpo-1: no group carried a signal for 5 steps in a row, up to step 6, so nothing was learned.",
        "dpo-1: chosen completions became less likely than under the reference, first in step 28, at most by 0.7 nats "
        "per token.",
        "dpo-1: optimizer steps were skipped in 1 step: loss or gradient was not finite.",
        "grpo-2: the policy had collapsed in 1 step, first in step 37."]
    html = report.write_report(tmp_path / "ill").read_text()
    assert html.index("<h2>Alarms</h2>") < html.index('aria-label="Headline"') and "up to step 6" in html
    assert alarms(load_run(run)) == [] and "<h2>Alarms</h2>" not in report.write_report(run).read_text()


@pytest.mark.parametrize(("chose", "sentence"), [
    (True, 'the judge "rules" says, which also chose the pairs that were trained on'),
    (False, 'the judge "rules" says, which chose no pair of this run.'), (None, 'the judge "rules" says.')])
def test_the_judge_is_named(run: Path, tmp_path: Path, chose: bool | None, sentence: str) -> None:
    folder = changed(run, tmp_path / "judged", "evals.jsonl", lambda row: {"judge": "rules",
                                                                           "judge_chose_pairs": chose})
    assert sentence in judge_line(load_run(folder))
    assert sentence in report.write_report(folder).read_text().replace("&#34;", '"')
    assert judge_line(load_run(run)) == ""


def test_controls_and_inconsistency_through_the_stages(run: Path, tmp_path: Path) -> None:
    one = {"prompts": 230, "accuracy_whole": 0.5, "accuracy": 0.25, "format_rate": 0.75, "gain": 0.25,
           "gain_low": -0.05, "gain_high": 0.3, "as_well_rate": 0.125, "chance": 0.2}
    folder = changed(run, tmp_path / "controls", "evals.jsonl", lambda row: {
        "controls": {"blind": one} if (row["stage"], row["mode"]) == ("start", "greedy") else {},
        "inconsistency_by_source": {"a": row["inconsistency_rate"] / 2, "b": row["inconsistency_rate"]}})
    data = load_run(folder)
    table = control_table(data)
    assert table is not None and table.rows == [
        ["start, greedy, blind", "230", "50.0", "25.0", "75.0", "+25.0 (−5.0 to +30.0)", "12.5", "20.0"]]
    through = inconsistency_table(data)
    assert through is not None and through.header == ["", "start", "grpo-1", "dpo-1", "grpo-2"]
    assert through.rows[0] == ["a", "11.2", "12.0 (+0.8)", "4.2 (−7.9)", "4.8 (+0.6)"]
    assert [row[0] for row in through.rows] == ["a", "b", "all"] and through.rows[2][3] == "8.3 (−15.8)"
    assert control_table(load_run(run)) is None
    alone = inconsistency_table(load_run(run))
    assert alone is not None and [row[0] for row in alone.rows] == ["all"]


def test_difficulty_is_that_of_the_first_evaluation(run: Path, tmp_path: Path) -> None:
    assert [level(value) for value in (0, 0.25, 0.5, 0.75, 1)] == [
        "never right", "under half", "half or more", "half or more", "always right"]
    found = difficulty(load_run(run))
    assert found is not None and found.mode == "greedy" and found.table.header == ["", "start", "grpo-2"]
    assert [row[0].split(" (")[0] for row in found.table.rows] == ["never right", "always right"]
    assert [row[1].split(",")[0] for row in found.table.rows] == ["0.0", "100.0"]
    assert sum(int(re.findall(r"\((\d+)\)", row[0])[0]) for row in found.table.rows) == 9
    assert difficulty(load_run(changed(run, tmp_path / "none", "evals.jsonl", lambda row: {}))) is None


def test_pairs_with_question_verdicts_and_mask(run: Path, page: Path) -> None:
    shown = embedded(page)["browser"]
    stored = read_pairs(RunDir(run).verifier("dpo-1") / "pairs.parquet")
    assert len(shown) == len(stored) and {pair["family"] for pair in shown} == {"accuracy", "consistency"}
    for pair in shown:
        assert pair["stage"] == "dpo-1" and pair["step"] is None and pair["question"] and pair["reason"]
        assert pair["media"] and all(key in embedded(page)["media"] for key in pair["media"])
    accuracy = next(pair for pair in shown if pair["family"] == "accuracy")
    assert "wrong" in accuracy["rejected"]["verdict"]["flags"] and "wrong" not in accuracy["chosen"]["verdict"]["flags"]
    consistency = next(pair for pair in shown if pair["family"] == "consistency")
    assert consistency["chosen"]["loss_tokens"] == 3 and consistency["rejected"]["verdict"] is None
    assert f"{len(stored)} of {len(stored)} pairs" in page.read_text()


def test_pairs_of_an_online_stage_and_of_lost_rollouts(run: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(run, tmp_path / "online", "metrics.jsonl", lambda row: {})
    shutil.copytree(RunDir(run).verifier("dpo-1"), RunDir(folder).verifier("dpo-1"))
    pairs = read_pairs(RunDir(run).verifier("dpo-1") / "pairs.parquet")
    for step in (0, 3, 7):
        write_pairs(RunDir(folder).step_pairs("grpo-2", step), pairs)
    shown = pair_browser.browse(load_run(folder), {})
    assert shown["total"] == 4 * len(pairs)
    online = [pair for pair in shown["shown"] if pair["stage"] == "grpo-2"]
    assert sorted((pair["step"], pair["family"]) for pair in online) == [
        (step, family) for step in (0, 3, 7) for family in ("accuracy", "consistency")]
    assert {pair["question"] for pair in online} == {None}, "there are no rollouts in this copy"
    monkeypatch.setattr(pair_browser, "BUDGET_BYTES", 3000)
    assert 0 < len(pair_browser.browse(load_run(folder), {})["shown"]) < len(shown["shown"])


# -- a real browser --------------------------------------------------------------------------------------------------

def text_of(browser: Browser, name: str) -> str:
    return str(browser.run(f"document.getElementById('{name}').textContent"))


def choose(browser: Browser, name: str, value: str, event: str = "change") -> None:
    browser.run(f"(() => {{ const pick = document.getElementById('{name}'); pick.value = {json.dumps(value)};"
                f"pick.dispatchEvent(new Event('{event}')); }})()")


def test_browser_filters_and_finds_samples(browser: Browser, page: Path) -> None:
    browser.open(page)
    groups = embedded(page)["groups"]
    assert text_of(browser, "where") == f"1 of {len(groups)}"
    paired = sum(bool(group["pairs"]) for group in groups)
    choose(browser, "pick-kind", "with pairs")
    assert text_of(browser, "where") == f"1 of {paired}" and 0 < paired < len(groups)
    assert browser.run("document.querySelectorAll('#sample .pair').length") >= 1
    choose(browser, "pick-kind", "any")
    choose(browser, "pick-text", "  GREY square ", "input")
    found = sum(any("grey square" in text.lower() for text in (
        group["question"], *(c["text"] for c in group["completions"]))) for group in groups)
    assert text_of(browser, "where") == f"1 of {found}" and found < len(groups)
    choose(browser, "pick-text", "no such words", "input")
    assert text_of(browser, "where") == "none" and "No sample matches." in text_of(browser, "sample")
    assert browser.run("document.getElementById('pick-step').options.length") == 0
    browser.keys("j")
    choose(browser, "pick-text", "", "input")
    assert text_of(browser, "where") == f"1 of {len(groups)}" and browser.messages() == []


def test_browser_shows_pairs_side_by_side(browser: Browser, page: Path) -> None:
    browser.open(page)
    pairs = embedded(page)["browser"]
    assert text_of(browser, "pair-where") == f"1 of {len(pairs)}"
    boxes = browser.run("[...document.querySelectorAll('#pair .side')].map(side => side.getBoundingClientRect().left)")
    assert len(boxes) == 2 and boxes[0] < boxes[1]
    choose(browser, "pair-family", "consistency")
    count = sum(pair["family"] == "consistency" for pair in pairs)
    assert text_of(browser, "pair-where") == f"1 of {count}"
    assert "is not what it supports" in text_of(browser, "pair") and "loss on 3 of" in text_of(browser, "pair")
    choose(browser, "pair-family", "any")
    choose(browser, "pair-text", HOSTILE, "input")
    assert text_of(browser, "pair-where").startswith("1 of ") and "document.title" in text_of(browser, "pair")
    for _ in pairs:
        browser.run("document.getElementById('pair-next').click()")
    assert browser.run("document.title") == "run-7b & <tiny> – veripo report" and browser.messages() == []
    choose(browser, "pair-text", "no such words", "input")
    assert text_of(browser, "pair-where") == "none" and "No pair matches." in text_of(browser, "pair")


def test_browser_several_runs_on_one_page(browser: Browser, run: Path, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(run, tmp_path / "b" / run.name, "metrics.jsonl", lambda row: {"collapsed_steps": 1})
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("dpo_beta: 0.1", "dpo_beta: 0.3"))
    target = tmp_path / "page"
    assert main(["report", str(run), str(other), "--out", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    html = target.read_text()
    assert not re.search(r"https?://|@import|url\(|<script", html) and "&lt;tiny&gt;" in html
    shutil.copy(target, tmp_path / "runs.html")
    browser.open(tmp_path / "runs.html")
    assert browser.messages() == [] and browser.run("document.querySelectorAll('svg.interval').length") == 6
    names = browser.run("[...document.querySelectorAll('.legend')][0].textContent")
    assert f"{tmp_path.name}" not in names and names.count("run-7b & <tiny>") == 2 and "b/run-7b" in names
    assert browser.run("document.querySelectorAll('svg.line').length") >= 7
    cells = browser.run("[...document.querySelectorAll('table')].at(-1).textContent.replace(/\\s+/g, ' ')")
    assert "dpo.dpo_beta0.10.3" in cells and "run_dir" not in cells
    assert "the policy had collapsed" in browser.run("document.querySelector('.alarms').textContent")
    browser.open(tmp_path / "runs.html", width=400, height=800)
    assert browser.run("document.documentElement.scrollWidth") == 400
    assert main(["report", *[str(run)] * 7]) == 2
    assert "7 runs do not fit on one page; name 6 at most" in capsys.readouterr().err
    assert main(["report", str(run), str(tmp_path / "gone")]) == 2
