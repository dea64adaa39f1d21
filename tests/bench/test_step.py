"""`veripo bench step` at tiny sizes: both sides really step, what differs is not timed, a switch does what it says."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.step import bench_full_step, plot, rows
from bench.step.cases import CASES, PEER, Case, switches_of
from bench.step.ours import Ours
from bench.step.rows import MismatchError, Session
from bench.wide_model import write_checkpoint
from tests.support import children
from tests.support.paths import REPOSITORY

needs_peer = pytest.mark.skipif(find_spec(PEER) is None, reason="TRL is not installed")


def veripo(*arguments: str) -> Any:
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    return children.run(sys.executable, "-m", "veripo_fast.cli", "bench", "step", *arguments,
                        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One quick run of a case of each kind: its lines and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "step.jsonl"
    done = veripo("--quick", "--cases", "B,dpo", "--rounds", "2", "--threads", "1", "--plot", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(lines=[json.loads(line) for line in out.read_text().splitlines()], printed=done.stdout,
                           out=out)


# -- the whole run ---------------------------------------------------------------------------------------------------

@needs_peer
def test_both_sides_step_and_every_line_has_its_recipe(run: SimpleNamespace) -> None:
    expected = [(name, kind) for name in ("B", "dpo") for kind in (PEER, *switches_of(CASES[name]))]
    assert [(line["case"]["name"], line.get("switch", line["row"])) for line in run.lines if "case" in line] == expected
    for line in run.lines:
        assert line["bench"] == "full_step" and line["quick"] and (line["rounds"], line["threads"]) == (2, 1)
        assert line["versions"][PEER].startswith("1.16") and "--cases B,dpo" in line["command"]
    for line in run.lines[:-1]:
        assert line["logprobs_difference"] < 1e-5 and line["gradient_relative_difference"] < 1e-5
        assert line["loss_difference"] < 1e-6 and line["prompt_tokens"] > 16
    assert run.out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(run.printed.splitlines()) == len(run.lines) + 1 + 4


@needs_peer
def test_ratios_are_those_of_the_phases(run: SimpleNamespace) -> None:
    grpo, dpo = (next(line for line in run.lines if line.get("case", {}).get("name") == name) for name in ("B", "dpo"))
    assert set(grpo["ours_seconds"]) == {"vision", "rollout", "reward", "training"}
    assert set(grpo["peer_seconds"]) == {"rollout", "training"}
    assert set(dpo["ours_seconds"]) == {"vision", "reference", "training"}
    assert set(dpo["peer_seconds"]) == {"reference", "training"}
    assert grpo["engine_logprobs_difference"] < 1e-5
    for line in (grpo, dpo):
        for kind, suffix in (("seconds", ""), ("cpu_seconds", "_cpu")):
            sides = [[sum(values) for values in zip(*line[f"{side}_{kind}"].values(), strict=True)]
                     for side in ("peer", "ours")]
            ratios = [theirs / own for theirs, own in zip(*sides, strict=True)]
            assert line[f"step{suffix}_ratio_min"] == pytest.approx(min(ratios), rel=1e-2)
            assert line[f"step{suffix}_ratio_max"] == pytest.approx(max(ratios), rel=1e-2)
    last = run.lines[-1]
    assert last["row"] == "group_over_pair" and last["ours"] > 0 and last["peer"] > 0


def test_a_missing_peer_is_said_and_ours_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_full_step, "peer_missing", lambda: "it is on holiday")
    monkeypatch.setattr(sys, "argv", ["bench_full_step.py", "--quick", "--cases", "dpo", "--rounds", "1", "--threads",
                                      "1", "--out", str(tmp_path / "step.jsonl")])
    threads = torch.get_num_threads()
    bench_full_step.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "trl is not measured: it is on holiday" and printed[1].startswith("case dpo: ours alone, ")
    lines = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [line.get("switch", line["row"]) for line in lines] == ["ours", *switches_of(CASES["dpo"])]
    assert "peer_seconds" not in lines[0]


@pytest.mark.parametrize(("version", "said"), [
    (None, "trl is not installed (pip install trl==1.16.0)"), ("1.17.0", "trl 1.17.0 is installed"),
    ("1.160.0", "trl 1.160.0 is installed"), ("1.16.3", None)])
def test_another_version_of_the_peer_is_refused(monkeypatch: pytest.MonkeyPatch, version: str | None,
                                                said: str | None) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(rows.metadata, "version", installed)
    reason = rows.peer_missing()
    assert reason is None if said is None else reason is not None and reason.startswith(said)


# -- options ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "said"), [
    (["--cases", "A,dop"], "unknown case 'dop'; did you mean dpo?"),
    (["--cases", "xyz"], "unknown case 'xyz'; there are A, B, C, dpo"),
    (["--rounds", "0"], "--rounds must be at least 1, got 0"), (["--out", "a.txt"], "--out must end in .jsonl"),
    (["--threads", "0"], "--threads must be 1 to "), (["--threads", "100000"], "got 100000")])
def test_a_wrong_option_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                 arguments: list[str], said: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_full_step.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench_full_step.parsed()
    assert said in capsys.readouterr().err


# -- what differs is not timed ---------------------------------------------------------------------------------------

@needs_peer
@pytest.mark.parametrize("name", ["B", "dpo"])
def test_other_weights_are_a_mismatch(tmp_path: Path, name: str) -> None:
    """A thousandth more in one matrix of one layer."""
    with Session(CASES[name].quick(), tmp_path, {min(os.sched_getaffinity(0))}, True) as session:
        options = {"folder": str(tmp_path), "case": session.case.fields()}
        session.sides["ours"].call("start", **options)
        file = tmp_path / "model" / "model.safetensors"
        weights = load_file(file)
        changed = next(key for key in weights if key.endswith("language_model.layers.1.mlp.down_proj.weight"))
        weights[changed] = weights[changed] * 1.001
        save_file(weights, file, {"format": "pt"})
        session.sides[PEER].call("start", **options)
        for side in session.sides.values():
            side.call("check")
        with pytest.raises(MismatchError, match="gradients by"):
            rows.differences(torch.load(tmp_path / "ours.pt"), torch.load(tmp_path / "peer.pt"))


def test_log_probs_and_gradients_each_can_be_a_mismatch() -> None:
    logprobs, gradient = torch.randn(8), torch.randn(4, 4)

    def side(**changed: Any) -> dict[str, Any]:
        return {"logprobs": logprobs, "gradients": {"a": gradient, "b": gradient}} | changed

    assert rows.differences(side(), side()) == {"logprobs_difference": 0, "gradient_relative_difference": 0}
    for wrong in (side(logprobs=logprobs + 1e-4), side(gradients={"a": gradient, "b": gradient * 1.001}),
                  side(logprobs=logprobs * math.nan), side(gradients={"a": gradient, "b": gradient * math.nan})):
        with pytest.raises(MismatchError, match="log-probs differ by up to"):
            rows.differences(wrong, side())
    with pytest.raises(MismatchError, match="only one side has gradients of b"):
        rows.differences(side(gradients={"a": gradient}), side())
    nothing = {"a": torch.zeros(4, 4)}
    with pytest.raises(MismatchError):
        rows.differences(side(gradients=nothing), side(gradients=nothing))


def test_prompt_tokens_are_compared_one_by_one() -> None:
    rows.check_ids([[1, 2], [3]], [[1, 2], [3]])
    with pytest.raises(MismatchError, match="prompt 1 has 3 tokens here and 3 in trl; they differ from token 2 on"):
        rows.check_ids([[1], [3, 4, 5]], [[1], [3, 4, 6]])
    with pytest.raises(MismatchError, match="2 tokens here and 1 in trl; they differ from token 1 on"):
        rows.check_ids([[3, 4]], [[3]])


def test_a_side_that_writes_less_is_a_mismatch(tmp_path: Path) -> None:
    session = Session.__new__(Session)
    session.case, session.sides = CASES["B"], {"ours": SimpleNamespace(call=lambda task, **options: {"tokens": 1023})}
    with pytest.raises(MismatchError, match="ours trained 1023 completion tokens in a step, not 1024"):
        session.measured(1, [])


def test_rounds_are_paired_and_turn() -> None:
    order = []

    def call(name: str, task: str, switch: str = "") -> dict[str, Any]:
        order.append(switch or name)
        return {"tokens": CASES["B"].rows * CASES["B"].completion}

    session = Session.__new__(Session)
    session.case = CASES["B"]
    session.sides = {name: SimpleNamespace(call=lambda task, name=name, **options: call(name, task, **options))
                     for name in ("ours", PEER)}
    answers = session.measured(2, ["vision cache"])
    assert order == ["ours", PEER, "ours", PEER, "vision cache", PEER, "vision cache", "ours"]
    assert {name: len(values) for name, values in answers.items()} == {"ours": 2, PEER: 2, "vision cache": 2}


# -- switches --------------------------------------------------------------------------------------------------------

def ours(folder: Path, case: Case) -> Ours:
    if not (folder / "model").exists():
        write_checkpoint(folder / "model", case.size, vocabulary=case.vocabulary)
    side = Ours(folder, case)
    side.share()
    return side


def calls(side: Ours, monkeypatch: pytest.MonkeyPatch, switch: str) -> tuple[int, list[int]]:
    """Passes of the tower, and tokens of each pass of the language model but for decoding, in one step."""
    towers, passes = [], []
    tower, run = side.policy.vision_features, side.policy.step._run
    with monkeypatch.context() as patch:
        patch.setattr(side.policy, "vision_features", lambda media: towers.append(1) or tower(media))
        patch.setattr(side.policy.step, "_run", lambda batch, *rest, **options: passes.append(len(batch.token_ids))
                      or run(batch, *rest, **options))
        side.step(switch)
    return len(towers), passes


def test_a_switch_of_grpo_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = ours(tmp_path, CASES["B"].quick())
    prompt, group, length = len(side.prompts[0].encoded.token_ids), side.case.group, side.case.completion
    written = 2 * group * (length - 1)
    shared, repeated = 2 * prompt, 2 * group * prompt
    assert calls(side, monkeypatch, "") == (2, [shared, shared + written])
    assert calls(side, monkeypatch, "shared prefix") == (2, [repeated, repeated + written])
    assert calls(side, monkeypatch, "shared tower") == (4, [shared, shared + written])
    assert calls(side, monkeypatch, "engine's log-probs") == (2, [shared, shared + written, shared + written])
    assert calls(side, monkeypatch, "vision cache") == (0, [shared, shared + written])
    assert side.policy.version == 5


def test_a_switch_of_dpo_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = ours(tmp_path, CASES["dpo"].quick())
    prompt, written = len(side.prompts[0].encoded.token_ids), 4 * (side.case.completion - 1)
    assert calls(side, monkeypatch, "") == (2, [2 * prompt + written] * 2)
    assert calls(side, monkeypatch, "shared prefix") == (2, [4 * prompt + written] * 2)
    assert calls(side, monkeypatch, "shared tower") == (4, [2 * prompt + written] * 2)
    assert calls(side, monkeypatch, "vision cache") == (0, [2 * prompt + written] * 2)
    assert side.policy.version == 4


def test_the_step_without_a_fast_path_is_the_same_step(tmp_path: Path) -> None:
    """The weights after two steps of DPO, whose pairs are given."""
    weights = {}
    for switch in ("", "shared prefix", "shared tower"):
        side = ours(tmp_path, CASES["dpo"].quick())
        before = torch.cat([p.detach().flatten().clone() for _, p in side.policy.parameters()])
        side.step(switch)
        weights[switch] = torch.cat([p.detach().flatten() for _, p in side.policy.parameters()]) - before
    moved = weights[""].norm()
    assert moved > 0
    for switch, change in weights.items():
        assert (change - weights[""]).norm() < 0.02 * moved, switch


# -- figure and table ------------------------------------------------------------------------------------------------

def test_the_table_in_the_readme_is_made_from_the_results() -> None:
    lines = [json.loads(line) for line in (REPOSITORY / "bench/results/full_step.jsonl").read_text().splitlines()]
    assert plot.table([line for line in lines if not line["quick"]]) in (REPOSITORY / "README.md").read_text()


def test_the_newest_lines_are_shown_in_the_order_of_the_cases() -> None:
    def line(name: str, row: str, step: float, **more: Any) -> dict[str, Any]:
        ratios = {f"{part}_{kind}ratio_{which}": value + more.get("cpu", 0.0) * bool(kind)
                  for part, value in {"step": step, "training": 2.04, **more.get("rollout", {})}.items()
                  for kind in ("", "cpu_") for which in ("median", "min", "max")}
        return {"case": {"name": name}, "row": row, "training_memory_ratio": 1.5, "threads": 2, **ratios, **more}

    rollout = {"rollout": {"rollout": 3.0}}
    lines = [line("dpo", PEER, 2.8), line("B", "ours", 7.0), line("B", PEER, 9.0, **rollout),
             line("B", "without", 2.0, switch="shared prefix"), line("B", PEER, 4.6, **rollout)]
    assert [row["step_ratio_median"] for row in plot.newest(lines)] == [4.6, 2.0, 2.8]
    assert "2 threads" in plot.table(lines)
    one = plot.table([line("dpo", PEER, 2.8, threads=1, cpu=0.5)])
    assert "CPU time, one core" in one and "| 3.3 (3.3 to 3.3) | 2.5 (2.5 to 2.5) |  | 1.5 |" in one
    grpo, dpo = ([cell.strip()[:3] for cell in row.split("|")[2:6]] for row in plot.table(lines).splitlines()[2:])
    assert grpo == ["4.6", "2.0", "3.0", "1.5"] and dpo == ["2.8", "2.0", "", "1.5"]
