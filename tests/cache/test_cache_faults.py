"""The cache never ends a run: whatever lies in its folder, a run goes on, counts it, and says it once."""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from tests.support import policies
from tests.support.users import as_somebody, shared_folder
from veripo_fast.cache.disk import VisionStore, _crc32
from veripo_fast.cache.entries import EntryShape
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.inputs import CacheConfig, VideoConfig
from veripo_fast.demo.corpus import write_clip
from veripo_fast.demo.world import random_clip
from veripo_fast.types import Prompt, Video

CONTRACT = VideoConfig(fps=None, num_frames=4, min_pixels=32 * 32, max_pixels=64 * 64)
KEYS = [f"{number:032x}" for number in range(8)]

@pytest.fixture
def folder() -> Iterator[Path]:
    """A cache that every user may reach."""
    with shared_folder() as top:
        (top / "cache").mkdir()
        yield top / "cache"


def fill(store: VisionStore, *keys: str) -> None:
    for key in keys:
        store._write(f"{key}.frames", {"pixels.0": torch.zeros(1000, dtype=torch.uint8)}, "[]")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_filled_cache_that_cannot_be_changed_is_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another user's cache, larger than this run allows: entries are read, none is deleted, none is added."""
    fill(VisionStore(folder, 1 << 20), *KEYS[:4])
    folder.chmod(0o555)
    with as_somebody():
        store = VisionStore(folder, 2500)
        assert [store.read(f"{key}.frames") is not None for key in KEYS[:5]] == [True] * 4 + [False]
        assert store.renew(f"{KEYS[0]}.frames") is not None
        fill(store, *KEYS[4:7])
        store.close()
    assert (store.evicted, store.failed_writes, store.unreadable) == (0, 3, 0)
    assert len(list(folder.iterdir())) == 4
    said = warnings(caplog)
    assert len(said) == 2 and "cannot be deleted" in said[0] and "it is full" in said[1], said


def test_a_folder_where_others_files_stay_never_grows_past_its_bound(folder: Path) -> None:
    fill(VisionStore(folder, 1 << 20), *KEYS[:4])
    folder.chmod(0o1777)  # as /tmp: everybody writes, nobody deletes what others wrote
    size = sum(path.stat().st_size for path in folder.iterdir())
    with as_somebody():
        store = VisionStore(folder, size + 100)
        fill(store, *KEYS[4:])
        store.close()
    if os.geteuid() != 0:
        pytest.skip("as one user alone there are no files of another user")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= size + 100 + 2 * size // 4
    assert store.failed_writes == 3 and store.evicted == 1, "its own one goes, the others' four stay"


def test_a_folder_that_cannot_be_listed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(VisionStore(folder, 1 << 20), KEYS[0])
    folder.chmod(0o711)
    with as_somebody():
        if os.geteuid() == folder.stat().st_uid:
            folder.chmod(0o111)
        store = VisionStore(folder, 1 << 20)
        assert store.read(f"{KEYS[0]}.frames") is not None
        fill(store, KEYS[1])
        store.close()
    assert store.failed_writes == 1 and "cannot be listed" in caplog.text


def test_a_mount_that_is_read_only(folder: Path) -> None:
    fill(VisionStore(folder, 1 << 20), *KEYS[:2])
    bind = f"mount --bind {folder} {folder} 2>/dev/null && mount -o remount,ro,bind {folder} 2>/dev/null"
    if os.system(bind) != 0:
        os.system(f"umount {folder} 2>/dev/null")
        pytest.skip("this user may not mount")
    try:
        store = VisionStore(folder, 1500)
        assert store.read(f"{KEYS[0]}.frames") is not None and store.renew(f"{KEYS[1]}.frames") is not None
        fill(store, KEYS[2])
        store.close()
    finally:
        os.system(f"umount {folder}")
    assert (store.failed_writes, store.evicted) == (1, 0)


def test_files_that_may_grow_no_further(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real failure half-way through a write: the limit on a file's size."""
    store = VisionStore(tmp_path, 1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        fill(store, *KEYS[:2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.failed_writes == 2 and list(tmp_path.iterdir()) == [] and len(warnings(caplog)) == 1
    fill(store, KEYS[0])
    store.close()
    assert store.read(f"{KEYS[0]}.frames") is not None


# -- in an entry's place -----------------------------------------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.unlink()
    (path / "more").mkdir(parents=True)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [a_folder, a_pipe, a_link_to_itself, a_device])
def test_something_else_in_an_entrys_place(tmp_path: Path, put: Callable[[Path], None],
                                           caplog: pytest.LogCaptureFixture) -> None:
    store = VisionStore(tmp_path, 1 << 20)
    fill(store, *KEYS[:2])
    for key in KEYS[:2]:
        put(tmp_path / f"{key}.frames.safetensors")
    assert [store.read(f"{key}.frames") for key in KEYS[:2]] == [None, None]
    assert store.renew(f"{KEYS[0]}.frames") is None
    assert store.unreadable == 2 and len(warnings(caplog)) == 1
    fill(store, *KEYS[:2])
    again = VisionStore(tmp_path, 1)  # everything must go, as far as it can
    again.close()
    if put is a_folder:
        assert store.failed_writes == 2 and store.read(f"{KEYS[0]}.frames") is None
    else:
        assert store.failed_writes == 0


def test_an_entry_that_may_not_be_read_is_replaced(folder: Path) -> None:
    fill(VisionStore(folder, 1 << 20), KEYS[0])
    (folder / f"{KEYS[0]}.frames.safetensors").chmod(0o000)
    folder.chmod(0o777)
    with as_somebody():
        store = VisionStore(folder, 1 << 20)
        assert store.read(f"{KEYS[0]}.frames") is None and store.unreadable == 1
        fill(store, KEYS[0])
        assert store.read(f"{KEYS[0]}.frames") is not None
        store.close()


def sealed(tensors: dict[str, torch.Tensor], about: str) -> bytes:
    """An entry whose checksum is right."""
    return save(tensors, {"about": about, "crc32": str(_crc32(tensors, about))})


@pytest.mark.parametrize("about", ["[" * 100_000, "{", "NaN and more", "9" * 5000])
def test_an_entry_that_says_nonsense_of_itself(tmp_path: Path, about: str) -> None:
    store = VisionStore(tmp_path, 1 << 20)
    path = tmp_path / f"{KEYS[0]}.frames.safetensors"
    path.write_bytes(sealed({"pixels.0": torch.zeros(4, dtype=torch.uint8)}, about))
    assert store.read(f"{KEYS[0]}.frames") is None
    assert store.damaged == 1 and not path.exists()


# -- entries that are whole and do not fit -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Prompt:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, random_clip(0))
    return policies.prompt_of(Video(str(path)), "What moves?")


def load_clip(folder: Path, clip: Prompt, family: str, freeze: bool) -> tuple[object, PromptLoader]:
    policy = policies.policy(family, freeze_vision=freeze)
    loader = PromptLoader(policy, CONTRACT, 4096, lambda prompt, reason: pytest.fail(reason),
                          CacheConfig(folder=str(folder)))
    try:
        return loader.load_one(clip), loader
    finally:
        loader.close()


def change(path: Path, edit: Callable[[dict[str, torch.Tensor], str], str | None]) -> None:
    """Edit an entry and seal it again."""
    data = path.read_bytes()
    tensors = {key: value.clone() for key, value in load(data).items()}
    about = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]["about"]
    about = edit(tensors, about) or about
    path.write_bytes(sealed({key: value.contiguous() for key, value in tensors.items()}, about))


def nan(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["embeddings"][-1, -1] = float("nan")


def infinite_level(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["deepstack.0"][0, 0] = float("inf")


def a_row_less(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["embeddings"] = tensors["embeddings"][:-1]


def narrower(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["embeddings"] = tensors["embeddings"][:, :-1]


def a_level_less(tensors: dict[str, torch.Tensor], about: str) -> None:
    del tensors["deepstack.0"]


def another_type(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["embeddings"] = tensors["embeddings"].double()


def another_grid(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["grid_thw"] = tensors["grid_thw"] + 2


def no_grid(tensors: dict[str, torch.Tensor], about: str) -> None:
    del tensors["grid_thw"]
    tensors["other"] = torch.zeros(1)


def an_image(tensors: dict[str, torch.Tensor], about: str) -> str:
    return about.replace("video", "image")


def times_of_nan(tensors: dict[str, torch.Tensor], about: str) -> str:
    return '{"kinds": ["video"], "grid_seconds": [[NaN, NaN]]}'


def times_of_text(tensors: dict[str, torch.Tensor], about: str) -> str:
    return '{"kinds": ["video"], "grid_seconds": [["a", "b"]]}'


def a_list(tensors: dict[str, torch.Tensor], about: str) -> str:
    return "[1, 2]"


@pytest.mark.parametrize("edit", [nan, infinite_level, a_row_less, narrower, a_level_less, another_type, another_grid,
                                  no_grid, an_image, times_of_nan, times_of_text, a_list])
def test_a_towers_output_that_does_not_fit_is_made_again(tmp_path: Path, clip: Prompt, edit: Callable,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    first, _ = load_clip(tmp_path, clip, "qwen3_vl", True)
    (path,) = tmp_path.iterdir()
    change(path, edit)
    again, loader = load_clip(tmp_path, clip, "qwen3_vl", True)
    assert loader.store.damaged == 1 and loader.work.tower_runs == 1
    assert torch.equal(first.features.embeddings, again.features.embeddings)
    assert len(warnings(caplog)) == 1 and str(path) in caplog.text
    assert load_clip(tmp_path, clip, "qwen3_vl", True)[1].work.cache_hits == 1


def no_frames(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["pixels.0"] = tensors["pixels.0"][:0]


def odd_sides(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["pixels.0"] = tensors["pixels.0"][:, :, :-1]


def one_channel(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["pixels.0"] = tensors["pixels.0"][:, :1]


def floats(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["pixels.0"] = tensors["pixels.0"].float()


def a_time_less(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["seconds.0"] = tensors["seconds.0"][1:]


def a_time_of_nan(tensors: dict[str, torch.Tensor], about: str) -> None:
    tensors["seconds.0"][0] = float("nan")


def two_media(tensors: dict[str, torch.Tensor], about: str) -> str:
    tensors |= {"pixels.1": tensors["pixels.0"].clone(), "seconds.1": tensors["seconds.0"].clone()}
    return '["video", "video"]'


@pytest.mark.parametrize("family", policies.FAMILIES)
@pytest.mark.parametrize("edit", [no_frames, odd_sides, one_channel, floats, a_time_less, a_time_of_nan, two_media])
def test_frames_that_do_not_fit_are_decoded_again(tmp_path: Path, clip: Prompt, edit: Callable, family: str) -> None:
    first, _ = load_clip(tmp_path, clip, family, False)
    (path,) = tmp_path.iterdir()
    change(path, edit)
    again, loader = load_clip(tmp_path, clip, family, False)
    assert loader.store.damaged == 1 and loader.work.video_decodes == 1
    assert torch.equal(first.encoded.media.pixel_values, again.encoded.media.pixel_values)
    assert load_clip(tmp_path, clip, family, False)[1].work.cache_hits == 1


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_the_shape_is_the_towers_own(family: str) -> None:
    policy = policies.policy(family, freeze_vision=True)
    media = policies.random_media(policy.encoder, [("video", 3, 2, 4), ("image", 2, 1, 1)])
    with torch.no_grad():
        features = policy.vision_features(media)
    EntryShape.of(policy, [Video("a"), policies.Image("b")]).check_tower(media, features)
