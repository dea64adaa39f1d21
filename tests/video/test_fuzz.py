"""Damaged bytes through probe and decoder in a subprocess: no crash, no hang, no error but MediaError, flat memory.

The subprocess is this file run as a module (`python -m tests.video.test_fuzz TASK FOLDER COUNT`), so that a crash in
FFmpeg is an exit code here and not the end of the test run.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bench.video.clips import make_clip, open_gop
from tests.support.memory import held_bytes
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Video

SEED = 20250519
TIMEOUT_SECONDS = 300.0
"""For a file that is decoded in milliseconds: what takes so long under any load hangs."""
SLOWEST_CPU_SECONDS = 10.0
WARM = 200
"""Probes after which memory should have reached its level: FFmpeg and malloc keep what they took."""
MAX_GROWTH_MB = 8.0


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    small = {"frames": 24, "size": (64, 96)}
    make_clip(folder / "h264.mp4", **small)
    make_clip(folder / "open.mp4", options=open_gop(8), **small)
    make_clip(folder / "sound.mov", faststart=False, audio=True, **small)
    make_clip(folder / "stream.ts", **small)
    make_clip(folder / "hevc.mkv", codec="libx265", options={"preset": "ultrafast", "x265-params": "log-level=none"},
              **small)
    make_clip(folder / "vp9.webm", codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"}, **small)
    make_clip(folder / "mjpeg.mkv", codec="mjpeg", options={}, pixel_format="yuvj420p", **small)
    return folder


def test_damaged_files_end_in_frames_or_a_media_error(clips, python):
    result = python("-m", "tests.video.test_fuzz", "mutate", str(clips), "200")
    assert result.returncode == 0, result.stderr[-2000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["decoded"] + counts["refused"] == 200
    assert counts["decoded"] >= 20 and counts["refused"] >= 20  # mutations reach past the opening, and do damage
    assert counts["slowest_cpu_seconds"] < SLOWEST_CPU_SECONDS


def test_memory_stays_flat_over_a_thousand_files(clips, python):
    result = python("-m", "tests.video.test_fuzz", "repeat", str(clips), "1000")
    assert result.returncode == 0, result.stderr[-2000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["probed"] == 1000 and counts["refused"] >= 50
    assert counts["grown_mb"] < MAX_GROWTH_MB


# -- inside the subprocess ---------------------------------------------------------------------------------------------

def mutate(data: bytes, rng: random.Random) -> bytes:
    """One kind of damage, at a place drawn at random; headers are hit more often than their share of the bytes."""
    broken = bytearray(data)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 1024)
    kind = rng.choice(["flip", "bits", "hole", "cut", "repeat", "noise", "swap"])
    at = rng.randrange(reach)
    length = rng.randrange(1, max(len(data) // 8, 2))
    if kind == "flip":
        broken[at] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for _ in range(rng.randrange(2, 200)):
            broken[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif kind == "hole":
        broken[at:at + length] = bytes(len(broken[at:at + length]))
    elif kind == "cut":
        del broken[max(at, 1):]
    elif kind == "repeat":
        broken[at:at] = broken[at:at + length]
    elif kind == "noise":
        broken[at:at + length] = rng.randbytes(len(broken[at:at + length]))
    else:
        other = rng.randrange(len(data))
        broken[at:at + 64], broken[other:other + 64] = broken[other:other + 64], broken[at:at + 64]
    return bytes(broken)


def fuzz(folder: Path, count: int) -> dict[str, float]:
    """Probe and decode `count` damaged copies of the folder's files; only MediaError is caught."""
    from veripo_fast.video.deadline import run_with_deadline
    from veripo_fast.video.decode import decode
    from veripo_fast.video.ffmpeg import torchcodec_decoder
    from veripo_fast.video.probe import probe_video

    torchcodec_decoder()  # its import takes seconds, which are no hang
    rng = random.Random(SEED)
    contract = VideoConfig(num_frames=6, fps=None, timeout_seconds=TIMEOUT_SECONDS)
    sources = sorted(folder.iterdir())
    counts: Counter[str] = Counter()
    slowest = 0.0
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / f"damaged{source.suffix}"
        path.write_bytes(mutate(source.read_bytes(), rng))
        print(f"{number} {source.name}", file=sys.stderr, flush=True)  # the last line names the file of a crash
        started = time.process_time()
        try:
            run_with_deadline(lambda deadline, name=str(path): probe_video(name, deadline), str(path), TIMEOUT_SECONDS)
            frames = decode(Video(str(path)), contract, 28)
            assert len(frames.pixels) == len(frames.pts_seconds) == len(frames.indices) > 0
            counts["decoded"] += 1
        except MediaError:
            counts["refused"] += 1
        slowest = max(slowest, time.process_time() - started)
        path.unlink()
    return {**counts, "slowest_cpu_seconds": slowest}


def repeat(folder: Path, count: int) -> dict[str, float]:
    """Probe good and damaged files again and again; resident memory after WARM of them and at the end."""
    from veripo_fast.video.probe import probe_video

    rng = random.Random(SEED)
    for source in sorted(folder.iterdir()):
        for copy in range(2):
            (folder / f"bad{copy}-{source.name}").write_bytes(mutate(source.read_bytes(), rng))
    paths = sorted(folder.iterdir())
    refused, level = 0, 0.0
    for number in range(count):
        if number == WARM:
            level = held_bytes() / 1e6
        try:
            probe_video(str(paths[number % len(paths)]), time.monotonic() + TIMEOUT_SECONDS)
        except MediaError:
            refused += 1
    return {"probed": count, "refused": refused, "grown_mb": held_bytes() / 1e6 - level}


if __name__ == "__main__":
    faulthandler.enable()
    task = {"mutate": fuzz, "repeat": repeat}[sys.argv[1]]
    print(json.dumps(task(Path(sys.argv[2]), int(sys.argv[3]))))
