"""hf:// and s3:// through fsspec, with a store in memory behind the scheme: copied once, and named where that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image as PilImage

from veripo_fast.config.inputs import DataConfig, VideoConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.data.remote import local_files
from veripo_fast.errors import DataError, MediaError
from veripo_fast.types import Image
from veripo_fast.video.decode import decode_image
from veripo_fast.video.patches import fingerprint


class Store(MemoryFileSystem):
    """Counts what is fetched."""

    protocol = ("s3", "hf")
    store: dict = {}  # noqa: RUF012
    fetched: list[str] = []  # noqa: RUF012

    def get_file(self, rpath: str, lpath: str, **options: object) -> None:
        self.fetched.append(rpath)
        super().get_file("/" + rpath.lstrip("/"), lpath, **options)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for scheme in ("s3", "hf"):
        fsspec.register_implementation(scheme, Store, clobber=True)
    store = Store()
    Store.fetched.clear()
    PilImage.fromarray(np.full((56, 56, 3), 90, np.uint8)).save(tmp_path / "c.png")
    store.pipe_file("/bucket/clips/c.png", (tmp_path / "c.png").read_bytes())
    rows = [{"problem": "?", "answer": "red", "images": [path]} for path in (
        "clips/c.png", "s3://bucket/clips/c.png", "hf://bucket/clips/c.png", "clips/gone.png")]
    store.pipe_file("/bucket/d.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    yield store
    Store.store.clear()


def test_a_data_file_and_its_media(store: Store, tmp_path: Path) -> None:
    prompts, skipped = load_prompts(["s3://bucket/d.jsonl"], DataConfig())
    assert not skipped and store.fetched == ["bucket/d.jsonl"], "media are fetched when they are loaded"
    media = [medium for prompt in prompts for medium in prompt.media]
    assert [medium.path for medium in media] == ["s3://bucket/clips/c.png", "s3://bucket/clips/c.png",
                                                 "hf://bucket/clips/c.png", "s3://bucket/clips/gone.png"]
    contract = VideoConfig(min_pixels=784, max_pixels=4 * 784)
    for medium in media[:3]:
        assert isinstance(medium, Image)
        assert torch.equal(decode_image(medium, contract, 28),
                           decode_image(Image(str(tmp_path / "c.png")), contract, 28))
        assert fingerprint(medium, contract) == fingerprint(medium, contract)
    assert len(store.fetched) == 3, "each address once"
    with pytest.raises(MediaError, match=r"s3://bucket/clips/gone\.png does not exist"):
        fingerprint(media[3], contract)


def test_media_root_may_be_a_store(store: Store, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "?", "answer": 1, "image": "c.png"}))
    (prompt,), _ = load_prompts([str(tmp_path / "d.jsonl")], DataConfig(media_root="s3://bucket/clips"))
    assert prompt.media[0].path == "s3://bucket/clips/c.png"


def test_what_is_missing_is_said(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data file s3://bucket/none\.jsonl does not exist"):
        load_prompts(["s3://bucket/none.jsonl"], DataConfig())

    def without(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", without)
    with pytest.raises(DataError, match=r"Install s3fs to access S3; pip install 'veripo-fast\[remote\]'"):
        load_prompts(["s3://bucket/e.jsonl"], DataConfig())
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


def test_data_files_are_found_before_a_run_begins(store: Store) -> None:
    """A run fingerprints the copies; what cannot be copied is named as a data file."""
    found = local_files(["s3://bucket/d.jsonl", "here.jsonl"])
    assert found["here.jsonl"] == "here.jsonl" and Path(found["s3://bucket/d.jsonl"]).read_bytes().count(b"\n") == 4
    with pytest.raises(DataError, match=r"data file s3://bucket/gone\.jsonl"):
        local_files(["s3://bucket/gone.jsonl"])
