"""The levels of the vision cache: what is stored comes back bitwise or not at all, and nothing is computed twice."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import policies, runs
from tests.support.children import PATIENCE_SECONDS
from veripo_fast.cache import disk as module
from veripo_fast.cache.disk import VisionStore
from veripo_fast.cache.entries import DecodedMedia, read_frames, read_tower, tower_version, write_frames, write_tower
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.inputs import CacheConfig, DataConfig, ModelConfig, VideoConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.demo.corpus import write_clip
from veripo_fast.demo.world import random_clip
from veripo_fast.errors import ConfigError
from veripo_fast.model import encoding
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train
from veripo_fast.types import MediaInputs, Prompt, Video, VisionFeatures

CONTRACT = VideoConfig(fps=None, num_frames=4, min_pixels=32 * 32, max_pixels=64 * 64)
KEYS = [f"{number:032x}" for number in range(20)]
VERSION = "0" * 16


def decoded(key: str, size: int = 28) -> DecodedMedia:
    pixels = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    return DecodedMedia([("video", pixels, torch.tensor([0.0, 1 / 3, 0.7], dtype=torch.float64)),
                         ("image", pixels[:2] // 2, torch.zeros(2, dtype=torch.float64))], key)


def stored(store: VisionStore, *keys: str) -> None:
    """Write entries of equal size, oldest first."""
    for key in keys:
        store._write(f"{key}.frames", {"pixels.0": torch.zeros(1000, dtype=torch.uint8)}, "[]")
        os.utime(store.folder / f"{key}.frames.safetensors", (1000 + KEYS.index(key),) * 2)


def kept(store: VisionStore) -> list[str]:
    return [key for key in KEYS if (store.folder / f"{key}.frames.safetensors").exists()]


# -- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_comes_back_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    store = VisionStore(tmp_path, 1 << 20)
    media = MediaInputs(None, torch.tensor([[2, 4, 4], [1, 2, 2]]), ("video", "image"), ((1 / 3, 2e-17), (0.0,)),
                        KEYS[0])
    features = VisionFeatures(torch.randn(5, 7).to(dtype)[:, :6], (torch.randn(5, 6).to(dtype), torch.ones(5, 6)))
    write_tower(store, VERSION, media, features)
    frames = decoded(KEYS[0])
    write_frames(store, frames)
    store.close()
    again, output = read_tower(VisionStore(tmp_path, 1 << 20), VERSION, KEYS[0])
    assert torch.equal(again.grid_thw, media.grid_thw) and again.pixel_values is None
    assert (again.kinds, again.grid_seconds, again.key) == (media.kinds, media.grid_seconds, media.key)
    assert len(output.deepstack) == 2
    for ours, theirs in zip((output.embeddings, *output.deepstack), (features.embeddings, *features.deepstack),
                            strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs) and ours.data_ptr() % 16 == 0
    back = read_frames(store, KEYS[0])
    assert back.from_disk and [kind for kind, _, _ in back.frames] == ["video", "image"]
    for (_, pixels, seconds), (_, old_pixels, old_seconds) in zip(back.frames, frames.frames, strict=True):
        assert torch.equal(pixels, old_pixels) and torch.equal(seconds, old_seconds)
    assert read_tower(store, "1" * 16, KEYS[0]) is None and read_frames(store, KEYS[1]) is None
    assert store.damaged == 0


def test_any_cut_and_any_changed_byte_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = VisionStore(tmp_path, 1 << 20)
    write_frames(store, DecodedMedia([("video", torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2),
                                       torch.zeros(1, dtype=torch.float64))], KEYS[0]))
    store.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for number in range(len(whole)):
        for content in (whole[:number], whole[:number] + bytes([whole[number] ^ 4]) + whole[number + 1:]):
            path.write_bytes(content)
            assert read_frames(store, KEYS[0]) is None, number
            assert not path.exists()
    assert store.damaged == 2 * len(whole)
    assert f"the cache entry {path} is damaged" in caplog.text
    path.write_bytes(whole)
    assert read_frames(store, KEYS[0]) is not None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = VisionStore(tmp_path, 1 << 30)
    stored(store, KEYS[0])
    size = (tmp_path / f"{KEYS[0]}.frames.safetensors").stat().st_size
    store.max_bytes = 4 * size + size // 2
    stored(store, *KEYS[1:4])
    assert kept(store) == KEYS[:4] and store.read(f"{KEYS[0]}.frames") is not None  # a hit renews it
    stored(store, KEYS[4])
    assert kept(store) == [KEYS[0], *KEYS[2:5]] and store.evicted == 1
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= store.max_bytes
    smaller = VisionStore(tmp_path, 3 * size)  # what is there when a run begins counts too
    assert kept(smaller) == [KEYS[0], KEYS[4]] and smaller.evicted == 2
    smaller._write(f"{KEYS[9]}.frames", {"pixels.0": torch.zeros(10_000, dtype=torch.uint8)}, "[]")
    assert kept(smaller) == [KEYS[0], KEYS[4]], "one that never fits evicts nobody"


def test_only_old_leftovers_of_ours_are_deleted(tmp_path: Path) -> None:
    for name in (".tmp-young-1", ".tmp-old-1", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    old = time.time() - 2 * module.STALE_SECONDS
    for name in (".tmp-old-1", "model.safetensors"):
        os.utime(tmp_path / name, (old, old))
    VisionStore(tmp_path, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-young-1", "model.safetensors", "notes.txt"]


def test_entries_that_vanish_while_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VisionStore(tmp_path, 1 << 30)
    stored(store, *KEYS[:5])
    listed = list(tmp_path.iterdir())
    listed[0].unlink()
    store.max_bytes = 1
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(listed))
    plain = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: [plain(self, missing_ok) for _ in range(2)])
    store._evict()
    assert kept(store) == [] and store._bytes == 0


def fill(folder: Path, seed: int) -> None:
    """A process that writes and reads entries of a folder which holds only a few of them."""
    store = VisionStore(folder, 20_000)
    for number in range(60):
        key = KEYS[(number * (seed + 1)) % len(KEYS)]
        store.write_later(f"{key}.frames", {"pixels.0": torch.full((3000,), KEYS.index(key), dtype=torch.uint8)}, ["x"])
        for other in KEYS[::3]:
            found = store.read(f"{other}.frames")
            assert found is None or found[0]["pixels.0"].tolist() == [KEYS.index(other)] * 3000
    store.close()
    os._exit(0 if (store.damaged, store.failed_writes) == (0, 0) and store.evicted else 1)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_SECONDS)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert all(path.name.endswith(".frames.safetensors") for path in tmp_path.iterdir())


def test_a_full_disk_costs_time_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "atomic_write_bytes", full)
    store = VisionStore(tmp_path, 1 << 20)
    for key in KEYS[:3]:
        write_frames(store, decoded(key))
    store.close()
    assert store.failed_writes == 3 and list(tmp_path.iterdir()) == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "No space left" in caplog.text


def test_writing_is_bounded_and_finished_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module.atomic_write_bytes
    monkeypatch.setattr(module, "atomic_write_bytes", lambda *a: [time.sleep(0.005), plain(*a)])
    store = VisionStore(tmp_path, 1 << 20)
    for key in KEYS:
        write_frames(store, decoded(key, 4))
        assert len(store._pending) <= module.MAX_PENDING
    store.close()
    assert kept(store) == KEYS


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache\.folder .*file/cache cannot be made: Not a directory"):
        VisionStore(tmp_path / "file" / "cache", 1)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"disk_bytes": 0}, "disk_bytes must be greater than 0, got 0"),
    ({"prefetch_bytes": 0}, "prefetch_bytes must be greater than 0, got 0"),
    ({"host_bytes": -1}, "host_bytes must be 0 or larger, got -1"),
    ({"gpu_bytes": -1}, "gpu_bytes must be 0 or larger, got -1"),
    ({"prefetch_prompts": -1}, "prefetch_prompts must be 0 or larger, got -1"),
    ({"frames": True}, "frames are kept on disk: name a folder"),
])
def test_configurations_that_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        CacheConfig(**options)


# -- the loader ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(3):
        write_clip(folder / f"{seed}.mp4", random_clip(seed))
    return [policies.prompt_of(Video(str(folder / f"{seed}.mp4")), "What moves?", prompt_id=str(seed))
            for seed in range(3)]


@pytest.fixture
def fresh() -> Policy:
    """A policy whose weights the test may change."""
    return load_policy(ModelConfig(path=str(policies.checkpoint("qwen3_vl")), device="cpu"))


@pytest.fixture
def loaded(tmp_path: Path, clips: list[Prompt]) -> Callable:
    """Loads the clips as a new process would: (loaded prompts, loader closed)."""
    def load(policy: Policy, **options: object) -> tuple[list, PromptLoader]:
        loader = PromptLoader(policy, CONTRACT, 4096, lambda prompt, reason: pytest.fail(reason),
                              CacheConfig(**({"folder": str(tmp_path / "cache")} | options)))
        try:
            return loader.load(clips), loader
        finally:
            loader.close()

    return load


def work(loader: PromptLoader) -> tuple[int, int, int]:
    return loader.work.video_decodes, loader.work.tower_runs, loader.work.cache_hits


def same(one: list, other: list) -> bool:
    return all(torch.equal(a.features.embeddings, b.features.embeddings) and len(a.features.deepstack) > 0
               and all(map(torch.equal, a.features.deepstack, b.features.deepstack))
               and torch.equal(a.encoded.positions, b.encoded.positions) for a, b in zip(one, other, strict=True))


def test_a_restart_reads_the_towers_output(loaded: Callable) -> None:
    policy = policies.policy("qwen3_vl", freeze_vision=True)
    first, before = loaded(policy)
    again, after = loaded(policy)
    assert (work(before), work(after)) == ((3, 3, 0), (0, 0, 3)) and same(first, again)
    assert all(item.encoded.media.pixel_values is None for item in again)
    assert 0 < after.cache.bytes == before.cache.bytes
    assert before.work.wait_seconds > 0


def test_another_tower_never_meets_an_old_entry(loaded: Callable, fresh: Policy) -> None:
    first, _ = loaded(fresh, frames=True)
    version = tower_version(fresh)
    assert version == tower_version(policies.policy("qwen3_vl", freeze_vision=True))
    weight = next(iter(fresh.model.model.visual.parameters()))
    weight.data.view(-1)[3] = torch.nextafter(weight.data.view(-1)[3], torch.tensor(9.0))
    assert tower_version(fresh) != version
    weight.data += 0.01
    changed, loader = loaded(fresh)
    assert work(loader) == (0, 3, 3), "the frames serve every tower"
    assert not same(first, changed)
    assert same(changed, loaded(fresh)[0])
    fresh.model.model.visual.to(torch.bfloat16)
    assert tower_version(fresh) != version


def test_without_frames_another_tower_decodes_again(loaded: Callable, fresh: Policy) -> None:
    loaded(fresh)
    next(iter(fresh.model.model.visual.parameters())).data += 0.01
    assert work(loaded(fresh)[1]) == (3, 3, 0)


def test_a_tower_that_trains_keeps_frames_alone(loaded: Callable, tmp_path: Path) -> None:
    policy = policies.policy("qwen3_vl", freeze_vision=False)
    first, before = loaded(policy)
    again, after = loaded(policy)
    assert (work(before), work(after)) == ((3, 3, 0), (0, 3, 3)) and same(first, again)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.encoded.media.pixel_values, other.encoded.media.pixel_values)
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 3 and all(name.endswith(".frames.safetensors") for name in names)
    assert after.cache.bytes == 0


def test_without_room_in_host_memory_the_disk_serves(loaded: Callable, clips: list[Prompt]) -> None:
    policy = policies.policy("qwen3_vl", freeze_vision=True)
    first, _ = loaded(policy)
    again, loader = loaded(policy, host_bytes=0)
    assert same(first, again) and loader.cache.bytes == 0 and work(loader) == (0, 0, 3)


def test_a_damaged_entry_is_made_again(loaded: Callable, tmp_path: Path) -> None:
    policy = policies.policy("qwen3_vl", freeze_vision=True)
    first, _ = loaded(policy)
    victim = min((tmp_path / "cache").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    again, loader = loaded(policy)
    assert loader.store.damaged == 1 and work(loader) == (1, 1, 2) and same(first, again)
    assert work(loaded(policy)[1]) == (0, 0, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="levels above host memory need a GPU")
def test_the_gpu_level_and_pinned_memory(loaded: Callable, clips: list[Prompt]) -> None:
    policy = load_policy(ModelConfig(path=str(policies.checkpoint("qwen3_vl")), device="cuda"))
    first, loader = loaded(policy, gpu_bytes=1 << 20)
    assert all(features.embeddings.is_pinned() for _, features in loader.cache._entries.values())
    assert loader.gpu_cache.bytes == loader.cache.bytes > 0
    again, other = loaded(policy)
    assert work(other) == (0, 0, 3) and other.gpu_cache.bytes == 0 and same(first, again)
    assert all(item.features.embeddings.is_cuda for item in (*first, *again))


# -- a whole run -----------------------------------------------------------------------------------------------------


class Seen:
    """Every video and image that was decoded, and how many went through a tower, in the whole process."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.decoded: Counter[str] = Counter()
        self.encoded = 0
        for name in ("decode", "decode_image"):
            plain = getattr(encoding, name)
            patch.setattr(encoding, name, lambda medium, *rest, plain=plain: (
                self.decoded.update([medium.path]), plain(medium, *rest))[1])
        plain_tower = Policy.vision_features_of

        def tower(policy: Policy, media: list[MediaInputs]) -> list[VisionFeatures]:
            self.encoded += sum(len(item.kinds) for item in media)
            return plain_tower(policy, media)

        patch.setattr(Policy, "vision_features_of", tower)


def files_of(path: Path) -> set[str]:
    """Media files of a data file."""
    prompts, _ = load_prompts([str(path)], DataConfig())
    return {medium.path for prompt in prompts for medium in prompt.media}


def test_every_video_is_decoded_once_and_encoded_once_in_all_stages_and_restarts(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO, its evaluations and DPO on the same files; then the run again, which decodes nothing."""
    data = runs.corpus() / "train.jsonl"
    options = {"data__eval": [str(data)], "cache__folder": str(tmp_path / "cache"), "eval__samples": 1,
               "stages": [{"kind": "grpo"}, {"kind": "dpo"}]}
    runs.model()  # taught on the same files, if no test before needed it
    records = []
    for name, files in (("first", files_of(data)), ("second", set())):
        with monkeypatch.context() as patch:
            seen = Seen(patch)
            train(runs.config(tmp_path / name, **options))
        run = RunDir(tmp_path / name)
        records.append([{key: value for key, value in record.items() if key not in ("seconds", "speed")}
                        for path in (run.metrics, run.evals) for record in read_records(path)])
        assert seen.decoded == Counter(files) and seen.encoded == len(files)
        for record in read_records(run.metrics):
            assert (record["video_decodes"], record["tower_runs"]) == (0, 0), "the first evaluation had all of them"
            assert record["cache_hits"] >= 1
    assert len(records[0]) == 4 + 6
    assert records[0] == records[1]


def test_the_first_step_counts_what_it_decodes(tmp_path: Path) -> None:
    train(runs.config(tmp_path / "run", eval__at="never", stages=[{"kind": "grpo"}], grpo__steps=4))
    rows = read_records(RunDir(tmp_path / "run").metrics)
    files = len(files_of(runs.corpus() / "train.jsonl"))
    assert files > 2 and rows[0]["cache_hits"] == 0 < rows[0]["video_decodes"]
    assert sum(row["video_decodes"] for row in rows) == sum(row["tower_runs"] for row in rows) == files
    assert all(row["video_decodes"] == 0 < row["cache_hits"] for row in rows[2:]), "the second epoch"
    assert all(row["seconds"]["decode"] > 0 <= row["seconds"]["vision"] for row in rows)
