"""What runs at the same time changes no bit of a run, and each overlap can be switched off."""

from __future__ import annotations

from pathlib import Path

from tests.support import runs
from tests.support.run_compare import assert_same
from veripo_fast.config.load import apply_overrides
from veripo_fast.report.timeline import read_windows
from veripo_fast.schedule.timeline import MAIN
from veripo_fast.trainer import train

ON = {"cache.prefetch_prompts": 64, "reward.streamed": True, "checkpoint.asynchronous": True}
OFF = {"cache.prefetch_prompts": 0, "reward.streamed": False, "checkpoint.asynchronous": False}


def lanes(run: Path) -> dict[str, set[str]]:
    """Names of spans -> the lanes that they are in."""
    found: dict[str, set[str]] = {}
    for window in read_windows(run):
        for name, lane, _, _ in window["ranks"][0]["spans"]:
            found.setdefault(name, set()).add(lane)
    return found


def test_a_run_without_overlaps_is_bitwise_the_same(tmp_path: Path) -> None:
    base = runs.config(tmp_path / "on", grpo__steps=3)
    train(apply_overrides(base, ON))
    train(apply_overrides(base, {**OFF, "run_dir": str(tmp_path / "off")}))
    on, off = lanes(tmp_path / "on"), lanes(tmp_path / "off")
    assert on["score"] == {"rewards"} and off["score"] == {MAIN}
    assert "write checkpoint" in on and "write checkpoint" not in off
    assert_same(tmp_path / "on", tmp_path / "off")
