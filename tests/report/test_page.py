"""The report of a synthetic run (report_run.py): what it says, what it survives, how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from tests.report.test_timeline import LINES, line, rank
from tests.support.browser import Browser
from tests.support.report_run import half_done, make_run
from veripo_fast.errors import UserError
from veripo_fast.report import page as report
from veripo_fast.report.axes import ticks, y_range
from veripo_fast.report.charts import Band, line_chart, smooth
from veripo_fast.report.curves import curves
from veripo_fast.report.run_data import load_run
from veripo_fast.report.samples import collect
from veripo_fast.report.verifier import TokenText
from veripo_fast.text import number


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return report.write_report(run)


# --- what the file says -----------------------------------------------------------------------------------------------

def embedded(page: Path) -> dict[str, Any]:
    """The data of the sample viewer."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_one_file_without_network(page: Path) -> None:
    html = page.read_text()
    assert page.stat().st_size < 8_000_000
    assert set(re.findall(r'(?:src|href)\s*=\s*"([^"#][^":]*)', html)) <= {"data"}
    assert not re.search(r"https?://|@import|url\(", html)
    assert [path for path in page.parent.iterdir() if "tmp" in path.name and path.is_file()] == []


def test_headline_names_the_numbers(page: Path) -> None:
    text = re.sub(r"<[^>]+>|\s+", " ", page.read_text())
    assert "31.2 → 64.6 %" in text and "+33.4 points" in text
    assert "24.1 → 8.3 %" in text and "−15.8 points" in text  # before and after DPO, not from start to end
    assert "change on the same prompts: +" in text and "no verdict: 2.1 → 2.1 %" in text
    assert "run-7b &amp; &lt;tiny&gt;" in text and "6 min" in text
    assert "1 of 9 media could not be shown" in text


def test_every_metric_is_drawn_or_named(page: Path) -> None:
    html = page.read_text()
    for title in ("Reward", "Zero-variance groups", "Largest ratio", "Chosen drift", "Own metric", "Step time"):
        assert f"<b>{title}</b>" in html
    assert "kl to the reference 0" in html  # constant: named, not drawn


def test_account_of_the_verifier(page: Path) -> None:
    html = page.read_text()
    assert "96 groups, 576 completions, 141 pairs, 230 completions in a pair." in html
    assert "accuracy: lengths differ" in html and "flag_rates" not in html and "moov atom not found" in html


def test_samples_come_from_first_middle_and_last_steps(page: Path) -> None:
    groups = embedded(page)["groups"]
    assert sorted({g["step"] for g in groups if g["stage"] == "grpo-1"}) == [0, 6, 12, 17, 23]
    assert [(g["stage"], g["run_step"]) for g in groups][-1] == ("grpo-2", 48)
    shown = [strip for strip in embedded(page)["media"].values() if strip["frames"]]
    sources = [frame["source"] for strip in shown for frame in strip["frames"]]
    assert len(shown) == 8 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert shown[0]["frames"][0]["seconds"] == 0.0 < shown[0]["frames"][1]["seconds"]


def test_verdicts_belong_to_the_step_that_was_verified(page: Path) -> None:
    """The hostile prompt comes up in every step, but only the last one was verified."""
    groups = [g for g in embedded(page)["groups"] if g["stage"] == "grpo-1"]
    judged = {g["step"] for g in groups if any(c["verdict"] for c in g["completions"])}
    assert judged == {23}
    assert {g["step"] for g in groups if g["pairs"]} <= {23}
    pairs = [pair for g in groups for pair in g["pairs"]]
    assert {pair["family"] for pair in pairs} == {"accuracy", "consistency"}
    masked = next(pair for pair in pairs if pair["family"] == "consistency")
    assert masked["rejected"]["index"] == -1 and masked["rejected"]["loss_tokens"] == 3


def test_masked_tokens_are_told_apart(run: Path, tmp_path: Path) -> None:
    """A pair's tokens outside the loss are marked once a checkpoint brings the tokenizer."""
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")
    data = load_run(tmp_path)
    assert TokenText(data).runs([1, 2], [0, 1]) is None
    vocabulary = {token: index for index, token in enumerate(("so", "Ġ<b>", "ĠB", "ĠC"))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.decoder = ByteLevel()
    folder = data.dir.checkpoints / "step_000008"
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert TokenText(data).runs([0, 1, 2, 3], [0, 0, 1, 1]) == [(False, "so <b>"), (True, " B C")]


def test_samples_stop_at_the_budget(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veripo_fast.report.samples.BUDGET_BYTES", 60_000)
    samples = collect(load_run(run))
    assert len(json.dumps(samples)) < 70_000
    assert samples["left_out"] > 0 and {g["stage"] for g in samples["groups"]} == {"grpo-1", "grpo-2"}


# --- what a run may lack ----------------------------------------------------------------------------------------------

def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run folder .*nowhere does not exist"):
        report.write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run folder: it holds neither config.yaml nor metrics.jsonl"):
        report.write_report(tmp_path)


def test_unwritable_target(run: Path) -> None:
    with pytest.raises(UserError, match=r"the report cannot be written to /proc/"):
        report.write_report(run, Path("/proc/nowhere/report.html"))


def test_half_done_run(run: Path, tmp_path: Path) -> None:
    html = report.write_report(half_done(run, tmp_path / "half")).read_text()
    for sentence in ("dpo-1 has run 3 steps.", "grpo-2 has not started.", "No evaluation is recorded yet.",
                     "The verifier left no account of dpo-1.", "1 line could not be read (the first is line 28).",
                     "verifier/dpo-1/account.json could not be read",
                     "rollouts/grpo-1/step_000000.parquet could not be read"):
        assert sentence in html
    assert 'class="broken"' in html  # the loss that was not finite
    assert "dpo-1: " not in html.split("</header>")[0]


@pytest.mark.parametrize("keep", ["config.yaml", "metrics.jsonl"])
def test_bare_run(run: Path, tmp_path: Path, keep: str) -> None:
    shutil.copy(run / keep, tmp_path / keep)
    page = report.write_report(tmp_path, tmp_path / "elsewhere" / "page.html")
    assert page == tmp_path / "elsewhere" / "page.html"
    assert "There are no rollouts to show." in page.read_text()
    assert ("No training step is recorded yet." in page.read_text()) == (keep == "config.yaml")


def test_waits_and_ranks(run: Path, tmp_path: Path) -> None:
    """From timeline.jsonl, which older runs have not."""
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, copied / name)
    html = report.write_report(copied).read_text()
    assert "Waits and ranks are not recorded in this run." in html and "wait for ranks" not in html
    rows = [*LINES, line(4, 1, rank(0, 4, {"update": 3.0, "own < phase": 1.0}), stage="dpo-1")]
    (copied / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    html = report.write_report(copied).read_text()
    assert "Waits and ranks are not recorded" not in html and "own &lt; phase" in html
    bars = re.findall(r'aria-label="a step of ([^:]+): ([^"]+)"', html)
    assert [name for name, _ in bars] == ["grpo-1", "dpo-1"]
    assert bars[0][1] == ("vision 1.0 s, 6.7 %; rollout 8.8 s, 58.3 %; update 2.0 s, 13.3 %; "
                          "wait for media 0.25 s, 1.7 %; wait for ranks 1.8 s, 11.7 %; rest 1.2 s, 8.3 %")
    section = html[html.index("Where a step goes"):html.index('<section id="verifier"')]
    stacks = [sum(map(float, re.findall(r"width:([\d.]+)%", stack)))
              for stack in section.split('class="stack"')[1:]]
    assert stacks == [pytest.approx(100, abs=0.01)] * 2
    cells = re.sub(r"<[^>]+>|\s+", " ", section)
    assert re.search(r"Share of a step, mean over 1 rank and 2 ranks", cells)
    assert re.search(r"stragglers\s+11.7 %\s+0.0 %\s+slowest rank\s+1 in rollout\s+–", cells)
    assert re.search(r"the longest\s+20.0 s \(step 2\)\s+4.0 s \(step 4\)", cells)


def test_speed_is_drawn(tmp_path: Path) -> None:
    rows = [{"global_step": step, "stage": "grpo-1", "kind": "grpo", "step": step - 1, "loss": 0.0,
             "speed": {"step_seconds": 2.0, "flops": 1e12 * step, "needed_share": 0.9 + step / 100, "mfu": step / 10,
                       "sampled_tokens_per_second": 5.0 * step, "trained_tokens_per_second": 7.0 * step},
             "seconds": {"update": 1.0}} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = report.write_report(tmp_path).read_text()
    for title in ("Tokens sampled", "Tokens trained", "FLOPs", "Needed FLOPs", "MFU"):
        assert f"<b>{title}</b>" in html
    assert "step seconds" not in html.lower()


def test_terms_of_the_reward_are_drawn(tmp_path: Path) -> None:
    rows = [{"global_step": step, "stage": "grpo-1", "kind": "grpo", "step": step,
             "columns": {"length": 0.1 * step, "cites_frames": 0.5 - step}} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (drawn,) = curves(load_run(tmp_path))
    charts = {chart.title: chart for chart in drawn.charts}
    assert charts["Reward term length"].last == "0.2" and charts["Reward term cites frames"].last == "\N{MINUS SIGN}1.5"
    assert charts["Reward term length"].note == "mean per completion, before its weight"


# --- charts -----------------------------------------------------------------------------------------------------------

def test_axes_are_honest() -> None:
    assert y_range([0.31, 0.64], (0.0, 1.0)) == (0.0, 1.0)
    assert y_range([0.31, 1.2], (0.0, 1.0))[1] >= 1.2  # a value outside its range is never cut off
    assert y_range([40.0, 44.0], None)[0] == 0.0
    assert y_range([-3.0, -3.0], None)[0] < -3.0 < y_range([-3.0, -3.0], None)[1]
    assert y_range([0.0, 0.0], None) == (0.0, 1.0)
    shown = {0.0: "0", 5e-7: "5e-7", 0.0015: "0.0015", -2.5: "−2.5", 1234.6: "1,235", 1e9: "1e9"}
    assert {value: number(value) for value in shown} == shown
    assert ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1.0]


def test_smoothing_keeps_ends_and_gaps() -> None:
    assert smooth([1.0, 2.0, 3.0, None, 5.0], 3) == [1.0, 2.0, 2.5, None, 5.0]


def test_long_series_keep_their_spikes() -> None:
    values = [1.0] * 20_000
    values[12_345] = 50.0
    svg = line_chart("Loss", [Band("grpo-1", tuple(range(20_000)), tuple(values))], None)
    assert len(svg) < 60_000 and "50" in svg and "highest 50" in svg


# --- a real browser ---------------------------------------------------------------------------------------------------

def test_browser_shows_charts_and_frames(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.messages() == []
    assert browser.run("document.querySelectorAll('svg.line').length") >= 15
    assert browser.run("[...document.querySelectorAll('svg.line path')].every(path => path.getTotalLength() > 20)")
    assert browser.run("document.querySelectorAll('svg.interval .whisker').length") >= 16
    shown = """(async () => {
      const seen = [];
      for (let i = 0; i < 4; i++) {
        await Promise.all([...document.querySelectorAll('#sample img')].map((image) => image.decode()));
        seen.push([...document.querySelectorAll('#sample img')].map((image) => image.naturalWidth));
        document.getElementById('next').click();
      }
      return seen;
    })()"""
    widths = browser.run(shown)
    assert sum(map(len, widths)) >= 12 and min(w for row in widths for w in row) >= 56


def test_browser_runs_no_text_of_a_model(browser: Browser, page: Path) -> None:
    browser.open(page)
    count = browser.run("JSON.parse(document.getElementById('data').textContent).groups.length")
    for _ in range(count):
        browser.keys("j")
    assert browser.run("document.getElementById('where').textContent") == f"{count} of {count}"
    assert browser.run("document.title") == "run-7b & <tiny> – veripo report"
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img:not([src^=data])').length") == 0
    assert browser.messages() == []
    browser.run("document.body.append(document.createRange().createContextualFragment("
                "'<script>document.title=\"owned\"<\\/script>'))")
    assert browser.run("document.title") != "owned"  # even markup that got in would not run


def test_browser_keyboard_and_pickers(browser: Browser, page: Path) -> None:
    browser.open(page)
    where = "document.getElementById('where').textContent.split(' ')[0]"
    browser.keys("j", "j", "k")
    assert browser.run(where) == "2"
    browser.keys("\ue014")  # right arrow: scrolls nothing and moves only once the viewer has the focus
    assert browser.run(where) == "2"
    browser.run("document.getElementById('sample').focus()")
    browser.keys("\ue014", "\ue014", "\ue012")
    assert browser.run(where) == "3"
    browser.run("(() => { const pick = document.getElementById('pick-stage'); pick.value = 'grpo-2';"
                "pick.dispatchEvent(new Event('change')); })()")
    assert browser.run("document.getElementById('pick-step').value") == "33"


def test_browser_hover_reads_every_chart(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("""(() => {
      const svg = document.querySelector('.charts.grpo svg'), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 12, clientY: box.top + 20}));
    })()""")
    read = browser.run("[...document.querySelectorAll('.charts.grpo output')].map(o => o.textContent)")
    assert len(read) >= 10 and all(text.startswith("step 48: ") for text in read)


def test_browser_phone_has_no_sideways_scroll(browser: Browser, page: Path) -> None:
    browser.open(page, width=400, height=800)
    assert browser.run("document.documentElement.scrollWidth") == 400
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.open(page, width=400, height=800, dark=True)
    assert browser.run("getComputedStyle(document.body).backgroundColor") != light


def test_browser_shows_where_a_step_goes(browser: Browser, run: Path, tmp_path: Path) -> None:
    """Waits have a pattern of their own, and every bar is as long as the others."""
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path / name)
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LINES))
    browser.open(report.write_report(tmp_path))
    assert browser.messages() == []
    ranks = "getComputedStyle(document.querySelector('.stack .idle.ranks')).backgroundImage"
    assert browser.run(ranks).startswith("repeating-linear-gradient")
    assert browser.run(ranks) != browser.run(ranks.replace("ranks", "media"))
    ends = browser.run("[...document.querySelectorAll('[aria-label^=\"a step of\"] i:last-child')]"
                       ".map(part => Math.round(part.getBoundingClientRect().right))")
    assert len(ends) == 2 and abs(ends[0] - ends[1]) <= 1


def test_browser_half_done_run(browser: Browser, run: Path, tmp_path: Path) -> None:
    browser.open(report.write_report(half_done(run, tmp_path / "half")))
    assert browser.messages() == []
    assert browser.run("document.querySelectorAll('.completion').length") == 6
    assert browser.run("document.querySelectorAll('.strip .waiting').length") == 1
