"""`veripo bench video` at tiny sizes: what is measured, what counts as a right frame, what a line says.

The whole bench runs once, as a user starts it; its parts are judged with processes that answer what the test says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.video import bench_video, clips, peer, plot, rows, textured
from bench.video.worker import Worker, WorkerError, bundled_ffmpeg
from tests.support import children
from tests.support.paths import REPOSITORY
from tests.video.test_patches import oracle_folder

ROWS = "end_to_end,grpo_step,wrong_frames,prefetch_wait"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One quick run of everything: its lines and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "video.jsonl"
    done = veripo("bench", "video", "--quick", "--rounds", "2", "--out", str(out), "--plot",
                  "--torchvision", oracle_folder() or "none")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return SimpleNamespace(lines=lines, printed=done.stdout, out=out)


def veripo(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    return children.run(sys.executable, "-m", "veripo_fast.cli", *arguments,
                        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})


# -- the whole run ---------------------------------------------------------------------------------------------------

def of(run: SimpleNamespace, row: str) -> list[dict[str, Any]]:
    return [line for line in run.lines if line["row"] == row]


def test_every_line_has_its_recipe(run: SimpleNamespace) -> None:
    assert [line["row"] for line in run.lines] == [
        *["end_to_end"] * 2, "preprocessing", *["grpo_step"] * 5, *["wrong_frames"] * 4, *["prefetch_wait"] * 2]
    for line in run.lines:
        assert line["bench"] == "video" and line["quick"] and line["rounds"] == 2
        assert line["versions"]["torch"] and line["peer_versions"]["qwen-vl-utils"] and line["date"]
        assert "bench_video.py --quick" in line["command"] and line["device"].endswith(f"{line['cores']} threads")
    assert len(run.printed.splitlines()) == len(run.lines) + 1
    assert run.out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_both_sides_make_the_same_pixels(run: SimpleNamespace) -> None:
    torchcodec, decord = of(run, "end_to_end")
    assert "torchcodec" in torchcodec["peer"] and "decord" in decord["peer"]
    for line in (torchcodec, decord):
        assert line["frames_compared"] == 8 and line["grid"] == [4, 4, 6] and line["psnr_db"] > 45
        assert 0 < line["mae_levels"] < 1 and line["kbit_per_second"] > 0
    for line in (torchcodec, decord, *of(run, "preprocessing")):
        for kind in ("cpu", "wall"):
            ratios = [theirs / ours for theirs, ours in zip(line[f"peer_{kind}_seconds"], line[f"ours_{kind}_seconds"],
                                                            strict=True)]
            assert len(ratios) == 2 and min(ratios) > 0
            assert line[f"{kind}_speedup_min"] == pytest.approx(min(ratios), rel=1e-2)
            assert line[f"{kind}_speedup_max"] == pytest.approx(max(ratios), rel=1e-2)
    assert torchcodec["ours_cpu_seconds"] == decord["ours_cpu_seconds"]  # measured once, in the same rounds


def test_a_step_decodes_once_and_later_epochs_never(run: SimpleNamespace) -> None:
    lines = {(line["tower"], line["epoch"]): line for line in of(run, "grpo_step")}
    assert len(lines) == 5
    for (tower, epoch), line in lines.items():
        assert (line["video_decodes"], line["cache_hits"]) == ((2, 0) if epoch == "first" else (0, 2))
        assert line["tower_runs"] == (0 if tower == "frozen" and epoch != "first" else 2)
        assert (line["tower_cpu_seconds"] > 0) == (line["tower_runs"] > 0)
    assert "qwen-vl-utils" in lines["frozen", "first"]["peer"]
    assert lines["frozen", "disk"]["peer_cpu_seconds"] == lines["frozen", "first"]["ours_cpu_seconds"]
    frames = 2 * 8 * 3 * 56 * 84  # bytes of what both videos were resized to
    assert lines["trained", "disk"]["cache_bytes"] > frames > lines["frozen", "disk"]["cache_bytes"]


def test_our_decoders_give_the_right_frames(run: SimpleNamespace) -> None:
    lines = {line["decoder"]: line for line in of(run, "wrong_frames")}
    assert list(lines) == ["veripo (auto)", "veripo (torchcodec)", "veripo (pyav)", "decord2"]
    for name, line in lines.items():
        assert list(line["whole"]["clips"]) == ["h264-closed.mp4", "variable-rate.mp4", "av1.mp4"]
        assert (line["whole"]["asked"], line["damaged"]["asked"]) == (96, 192)
        for group in ("whole", "damaged"):
            assert sum(line[group][kind] for kind in ("right", "wrong", "refused")) == line[group]["asked"]
        if name != "decord2":
            assert (line["whole"]["right"], line["damaged"]["wrong"]) == (96, 0)
    closed = {name: line["whole"]["clips"]["h264-closed.mp4"] for name, line in lines.items()}
    assert closed["veripo (torchcodec)"]["taken_by"] == "torchcodec" and closed["veripo (pyav)"]["taken_by"] == "pyav"
    assert closed["decord2"]["right"] == 32 and "taken_by" not in closed["decord2"]
    assert lines["decord2"]["damaged"]["clips"]["page.mp4"]["reason"]


def test_waiting_is_counted_from_the_second_step_on(run: SimpleNamespace) -> None:
    with_prefetch, without = of(run, "prefetch_wait")
    assert (with_prefetch["prefetch"], without["prefetch"]) == (True, False)
    for line in (with_prefetch, without):
        assert len(line["wait_seconds"]) == len(line["step_seconds"]) == 3 and sum(line["video_decodes"]) > 0
        assert line["wait_share"] == pytest.approx(
            sum(line["wait_seconds"][1:]) / sum(line["step_seconds"][1:]), rel=0.02)
        assert 0 <= line["wait_share"] < 1


# -- options ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "said"), [
    (["--rows", "end_to_end,wrong_frame"], "unknown row 'wrong_frame'; did you mean wrong_frames?"),
    (["--rows", "xyz"], f"unknown row 'xyz'; there are {', '.join(ROWS.split(','))}"),
    (["--rounds", "0"], "--rounds must be at least 1, got 0"), (["--out", "a.txt"], "--out must end in .jsonl")])
def test_a_wrong_option_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                 arguments: list[str], said: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_video.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench_video.parsed()
    assert said in capsys.readouterr().err


# -- parts -----------------------------------------------------------------------------------------------------------

class Fake:
    """A session whose processes answer what the test says."""

    def __init__(self, folder: Path, answer: Any, **unusable: str | None) -> None:
        self.scale, self.rounds, self.folder, self.kept = rows.QUICK, 1, folder, folder
        self.ours = self.peer = SimpleNamespace(call=answer)
        self.unusable, self.versions, self.decord_missing = unusable, {"torch": "1"}, unusable.get("decord")
        self.readers = [name for name, reason in unusable.items() if reason is None]

    def common(self, row: str) -> dict[str, Any]:
        return {"row": row, "cores": 1}

    def left_out(self, row: str) -> Iterator[dict[str, Any]]:
        yield from rows.Session.left_out(self, row)


def test_a_missing_peer_is_left_out_and_said(tmp_path: Path) -> None:
    reason = "decord cannot be imported: No module named 'decord'"
    lines = list(rows.end_to_end(Fake(tmp_path, None, torchcodec=reason, decord=reason)))
    assert [line["not_measured"] for line in lines] == [reason, reason]
    assert all(reason in bench_video.told(line) for line in lines)

    def shown(task: str, path: str, **_: Any) -> dict[str, Any]:
        raise WorkerError("no")

    lines = list(rows.wrong_frames(Fake(tmp_path, shown, decord=reason)))
    assert (lines[0]["decoder"], lines[0]["not_measured"], len(lines)) == ("decord2", reason, 4)


def test_frames_are_judged_by_what_they_show() -> None:
    clip = clips.Clip(Path("a.mp4"), (30, 31, 32, 33), None, "cut")

    def judged(**answer: Any) -> tuple[int, ...]:
        row = rows.judged(clip, lambda clip, count: answer, 32)
        return tuple(row[kind] for kind in ("asked", "right", "wrong", "refused"))

    assert judged(indices=[0, 1, 2, 3], codes=[30, 31, 32, 33]) == (4, 4, 0, 0)
    assert judged(indices=[0, 1, 2, 3], codes=[30, 32, -1, 33]) == (4, 2, 2, 0)
    assert judged(indices=[0, 2, 9, 4], codes=[30, 32, 33, 34]) == (4, 2, 2, 0)  # frames that a player does not show
    assert judged(indices=[0, 1], codes=[30, 31]) == (4, 2, 2, 0)  # fewer than asked for

    def refuse(clip: clips.Clip, count: int) -> dict[str, Any]:
        raise WorkerError("broken file")

    row = rows.judged(clip, refuse, 32)
    assert (row["refused"], row["reason"]) == (4, "broken file")


def test_pixel_values_are_compared_frame_by_frame(tmp_path: Path) -> None:
    values = torch.randn(2 * 4 * 6, 1176)
    std = rows.CLIP_STD

    def row(changed: torch.Tensor, own: list[int], theirs: list[int]) -> dict[str, Any]:
        torch.save(values, tmp_path / "ours.pt")
        torch.save(changed, tmp_path / "peer.pt")
        return rows.agreeing(tmp_path, {"grid": [2, 4, 6], "indices": own},
                             {"grid": [2, 4, 6], "indices": theirs})

    assert row(values, [0, 5, 9, 14], [0, 5, 9, 14]) == {
        "frames_compared": 4, "mae_levels": 0, "max_levels": 0, "psnr_db": None}
    other = values.clone().view(2, 24, 3, 2, 196)
    other[1, :, 2, 1] += 2 / 255 / std[2]  # two levels of blue in the last frame
    off = row(other.view(48, 1176), [0, 5, 9, 14], [0, 5, 9, 14])
    assert (off["mae_levels"], off["max_levels"]) == (pytest.approx(2 / 12, rel=1e-3), pytest.approx(2, rel=1e-3))
    assert off["psnr_db"] == pytest.approx(20 * torch.tensor(255 / (2 / 12**0.5)).log10().item(), abs=0.1)
    off = row(other.view(48, 1176), [0, 5, 9, 14], [0, 5, 9, 15])
    assert (off["frames_compared"], off["mae_levels"]) == (3, 0)


def test_the_peer_works_once_per_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[str] = []
    monkeypatch.setattr(peer, "_use", lambda reader: None)
    monkeypatch.setattr(peer, "pixel_values", lambda path, frames, pixels: worked.append(path))
    peer.step("torchcodec", ["a", "b"], 3, 8, [1, 2])
    assert worked == ["a"] * 3 + ["b"] * 3
    asked = []

    def answer(task: str, **arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        spent = {"cpu_seconds": 1.0, "wall_seconds": 1.0}
        counts = dict.fromkeys(("video_decodes", "cache_hits", "tower_runs", "tower_cpu_seconds"), 1)
        return spent | dict.fromkeys(("first", "disk", "memory"), spent | counts) | {"cache_bytes": 1}

    list(rows.grpo_step(Fake(tmp_path, answer, torchcodec=None)))
    assert [arguments.get("group") for arguments in asked] == [None, None, 2]
    assert all(len(set(arguments["paths"])) == 2 for arguments in asked)


def test_the_bench_clip_is_made_once_and_says_what_it_is(tmp_path: Path) -> None:
    size = textured.Size(96, 160, seconds=3)
    path = textured.textured(size, tmp_path)
    made = path.stat().st_mtime_ns
    assert textured.textured(size, tmp_path) == path and path.stat().st_mtime_ns == made
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    about = textured.described(path, size)
    assert (about["clip"], about["seconds"], about["fps"]) == ("96p", 3, 30) and about["keyframes"] >= 2
    assert about["kbit_per_second"] == pytest.approx(path.stat().st_size * 8 / 3000, abs=1)


def test_the_figure_takes_the_newest_lines() -> None:
    lines = [{"row": "end_to_end", "clip": "720p", "peer": "a", "decoder": decoder, "n": n}
             for n, decoder in enumerate(("pyav", "torchcodec"))]
    lines += [{"row": "wrong_frames", "decoder": decoder, "n": 2} for decoder in ("pyav", "decord2")]
    assert [line["n"] for line in plot.newest(lines)] == [1, 2, 2]


# -- processes -------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time, torch
from bench.video.worker import measured, serve

def about():
    print("chatter of a library")
    return {"cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "more": os.environ["MORE"]}

def fail(kind):
    raise {"told": ValueError, "bug": KeyError}[kind]("\\n  first line\\nsecond")

def die():
    print("corrupted memory", file=sys.stderr)
    os._exit(11)

def sleep():
    _, spent = measured(lambda: time.sleep(0.2))
    return spent

def burn():
    def run():
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    return measured(run)[1]

def hang():
    time.sleep(3600)

serve({task.__name__: task for task in (about, fail, die, sleep, burn, hang)}, (ValueError,))
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "served.py").write_text(SCRIPT)
    with Worker(str(tmp_path / "served.py"), {min(os.sched_getaffinity(0))}, {"MORE": "yes"}) as it:
        yield it


def test_a_process_is_pinned_and_measures_itself(worker: Any) -> None:
    assert worker.call("about") == {"cores": [min(os.sched_getaffinity(0))], "threads": 1, "more": "yes"}
    idle, busy = worker.call("sleep"), worker.call("burn")
    assert idle["wall_seconds"] > 0.19 and idle["cpu_seconds"] < 0.1
    assert busy["cpu_seconds"] == pytest.approx(0.2, abs=0.05)


def test_a_failed_task_is_told_and_a_bug_ends_the_process(worker: Any) -> None:
    with pytest.raises(WorkerError, match=r"^ValueError: first line$"):
        worker.call("fail", kind="told")
    assert worker.call("about")["threads"] == 1
    with pytest.raises(WorkerError, match="exit code 1: KeyError"):
        worker.call("fail", kind="bug")
    assert not worker.alive


@pytest.mark.parametrize(("task", "seconds", "said"), [
    ("die", children.PATIENCE_SECONDS, "exit code 11: corrupted memory"), ("hang", 1, "longer than 1 sec")])
def test_a_crash_or_a_hang_is_an_error(worker: Any, task: str, seconds: float, said: str) -> None:
    worker.call("about")
    with pytest.raises(WorkerError, match=said):
        worker.call(task, timeout_seconds=seconds)


def test_the_peer_never_imports_veripo(tmp_path: Path) -> None:
    clip = clips.make_clip(tmp_path / "a.mp4", frames=20)
    environment = bundled_ffmpeg(tmp_path / "ffmpeg") | {"BENCH_TORCHVISION": oracle_folder() or ""}
    with Worker("peer.py", {min(os.sched_getaffinity(0))}, environment) as peer:
        assert peer.call("readers")["readers"] == {"torchcodec": None, "decord": None}
        answer = peer.call("end_to_end", reader="torchcodec", path=str(clip), frames=4, pixels=[784, 20_000])
        assert answer["indices"] == [0, 6, 13, 19] and answer["cpu_seconds"] > 0
        assert peer.call("alone") == {"alone": True}
