"""One record never ends a data set: whatever stands in a line, a row, an item or an archive, the others are used."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.users import as_somebody, shared_folder
from veripo_fast.config.inputs import DataConfig
from veripo_fast.data import archives, files, prompts
from veripo_fast.data.archives import read_index
from veripo_fast.data.keys import GOLD_KEYS, KNOWN_KEYS, MEDIA_KEYS
from veripo_fast.data.prompts import load_prompts, read_prompts
from veripo_fast.data.sources import find_sources
from veripo_fast.errors import DataError
from veripo_fast.run.memory import reset_resident_peak, status_bytes
from veripo_fast.types import Prompt

CONFIG = DataConfig(template="none", text_only=True)
GOOD = {"problem": "2+2?", "answer": "4"}
DEEP = '{"problem": "?", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}"
DIGITS = '{"problem": "?", "answer": ' + "7" * 5000 + "}"
LINES = {
    "a path of 300 characters": (json.dumps(GOOD | {"path": "x" * 300 + ".mp4"}), "File name too long"),
    "a path of 300 folders": (json.dumps(GOOD | {"path": "x/" * 3000 + "a.mp4"}), "File name too long"),
    "a zero byte in a path": (json.dumps(GOOD | {"path": "a\0.mp4"}), "zero byte"),
    "deep": (DEEP, "nested too deeply"),
    "deep in a text": (json.dumps({"messages": "[" * 100_000, "answer": "x"}), "nested too deeply"),
    "digits": (DIGITS, "a number of more than 4300 digits"),
    "a lone surrogate": ('{"problem": "\\ud800", "answer": "\\ud800", "problem_type": "mcq"}', "cannot be read as"),
    "28 options": (json.dumps(GOOD | {"options": [f"o{i}" for i in range(28)]}), "letters end at Z"),
    "an id of nothing": (json.dumps({"problem_id": [], "problem": {}, "answer": 1}), "has no question"),
    "infinity": ('{"problem": "?", "answer": Infinity, "problem_type": "numerical"}', "cannot be read as number"),
    "base64": (json.dumps(GOOD | {"image": "data:image/png;base64,@@@"}), "in base64 that cannot be read"),
}


def text_of(values: list[str], suffix: str) -> str:
    return f"[{', '.join(values)}]" if suffix == "json" else "\n".join(values) + "\n"


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", LINES)
def test_a_line_or_an_item(tmp_path: Path, name: str, suffix: str) -> None:
    line, words = LINES[name]
    file = tmp_path / f"d.{suffix}"
    file.write_text(text_of([json.dumps(GOOD), line, json.dumps(GOOD)], suffix))
    found, (skipped,) = load_prompts([str(file)], CONFIG)
    assert len(found) == 2 and words in skipped.reason
    assert skipped.record.removeprefix(str(file)).startswith((":2", ":item 2"))
    assert len(skipped.reason) < 1000 and "\n" not in skipped.reason


@pytest.mark.parametrize("value", ["7" * 5000, "[" * 100_000 + "]" * 100_000,
                                   '{"a": ["}", "\\"]"], "b": ' + "7" * 5000 + "}"])
def test_an_item_that_is_no_object(tmp_path: Path, value: str) -> None:
    file = tmp_path / "d.json"
    for order in ([value, json.dumps(GOOD)], [json.dumps(GOOD), value]):
        file.write_text(text_of(order, "json"))
        found, skipped = load_prompts([str(file)], CONFIG)
        assert (len(found), len(skipped)) == (1, 1)


def test_a_line_that_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    lines = [json.dumps(GOOD), json.dumps(GOOD | {"text": "x" * (3 << 20)}), json.dumps(GOOD)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    found, (skipped,) = load_prompts([str(tmp_path / "d.jsonl")], CONFIG)
    assert len(found) == 2 and skipped.reason == "is longer than 1 MiB" and skipped.record.endswith(":2")


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that may be entered, with one in it that may not."""
    with shared_folder() as folder:
        (folder / "closed").mkdir()
        (folder / "closed" / "a.mp4").touch()
        (folder / "open.mp4").touch()
        (folder / "closed").chmod(0)
        yield folder


def test_a_folder_without_permission(closed: Path) -> None:
    rows = [GOOD | {"path": "closed/a.mp4"}, GOOD | {"path": "open.mp4"}]
    (closed / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with as_somebody():
        found, (skipped,) = load_prompts([str(closed / "d.jsonl")], CONFIG)
        assert len(found) == 1 and "Permission denied" in skipped.reason
        sources = find_sources([closed])
        assert [medium.path for medium in sources.media] == [str(closed / "open.mp4")]
        assert "closed cannot be read: Permission denied" in sources.broken[0].reason
        for name in ("d.jsonl", "d.parquet", "d.tar", "d.json"):
            with pytest.raises(DataError, match="cannot be read: Permission denied"):
                load_prompts([str(closed / "closed" / name)], CONFIG)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            find_sources([closed / "closed" / "a.mp4"])


# -- archives ---------------------------------------------------------------------------------------------------------


def claims(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_member_with_a_long_name_of_eight_gigabytes(tmp_path: Path, kind: bytes) -> None:
    first = io.BytesIO()
    with tarfile.open(fileobj=first, mode="w") as tar:
        content = json.dumps(GOOD).encode()
        info = tarfile.TarInfo("0.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    path = tmp_path / "s.tar"
    path.write_bytes(first.getvalue()[:1024] + claims(kind, 8 << 30))
    with path.open("r+b") as file:
        file.truncate(9 << 30)  # sparse: the header is true
    reset_resident_peak()
    before = status_bytes("VmHWM")
    index = read_index(path)
    assert list(index.places) == ["0.json"] and "damaged after its member 0.json" in index.problem
    assert "8589934592 bytes" in index.problem
    found, (skipped,) = load_prompts([str(path)], CONFIG)
    assert len(found) == 1 and "damaged" in skipped.reason
    assert status_bytes("VmHWM") - before < 64 << 20
    assert archives.MOST_HEADER < 8 << 30


# -- Parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_with_two_hundred_megabytes_of_metadata(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD]), path)
    body = path.read_bytes()
    with path.open("wb") as file:
        file.write(body[:-8])
        file.seek(200 << 20, io.SEEK_CUR)
        file.write((200 << 20).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="has 200 MiB of Parquet metadata, more than 64 MiB: write it with") as caught:
        load_prompts([str(path)], CONFIG)
    assert "\n" not in str(caught.value)


def test_rows_that_python_cannot_hold(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"2+2?", b"\xff\xfe", b"2+2?"], pa.binary()).buffers())
    times = pa.array([0, 1 << 62, 0], pa.timestamp("us"))
    pq.write_table(pa.table({"problem": texts, "answer": ["4"] * 3, "time": times}), tmp_path / "d.parquet")
    found, (skipped,) = load_prompts([str(tmp_path / "d.parquet")], CONFIG)
    assert [prompt.prompt_id for prompt in found] == ["d.parquet:row 1", "d.parquet:row 3"]
    assert skipped.record.endswith(":row 2") and "cannot be read" in skipped.reason


# -- anything ---------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(
    ["<video>", "a.mp4", "[{", '[{"role": "user"}]', "data:video/mp4;base64,", "s3://b/x", "file://", "/9j/" * 99,
     "A"])
PART = st.dictionaries(st.sampled_from(
    ["type", "text", "video", "image", "url", "path", "bytes", "fps", "nframes", "video_start", "role", "content",
     "from", "value", "A", "ground_truth", "answer", "index", "label"]), SCALARS | st.lists(SCALARS, max_size=3),
    max_size=5)
VALUE = SCALARS | PART | st.lists(SCALARS | PART | st.lists(SCALARS, max_size=2), max_size=4)
ROW = st.dictionaries(st.sampled_from(sorted(KNOWN_KEYS | {"a0", "a1", "vidoes", "A", "B"})) | st.text(max_size=6),
                      VALUE, max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROW, max_size=6), text_only=st.booleans())
def test_no_record_raises(tmp_path: Path, rows: list[dict[str, Any]], text_only: bool) -> None:
    rows = [{"problem": "?", "answer": "x", **row} for row in rows] + rows
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    try:
        found, skipped = read_prompts([str(file)], DataConfig(text_only=text_only, answer_index=0))
    finally:
        del os.environ["XDG_CACHE_HOME"]
    assert len(found) + len(skipped) == len(rows)
    assert all(isinstance(prompt, Prompt) and prompt.gold for prompt in found)
    assert all(item.reason and "\n" not in item.reason for item in skipped)


# -- media that are not there -----------------------------------------------------------------------------------------


def test_a_large_set_is_not_looked_up_and_a_wrong_folder_is_noticed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(prompts, "LOOKED_UP", 40)
    monkeypatch.setattr(prompts, "SAMPLED", 10)
    looked: list[str] = []
    monkeypatch.setattr(prompts, "missing", lambda medium: looked.append(medium.path) or real(medium))
    (tmp_path / "0.mp4").touch()
    rows = [GOOD | {"path": f"{number % 2}.mp4", "problem_id": number} for number in range(100)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, skipped = load_prompts([str(tmp_path / "d.jsonl")], CONFIG)
    assert (len(found), skipped, len(looked)) == (100, [], 10)
    with pytest.raises(DataError, match=r"none of the 10 media .* is there; the first, of prompt 0: .*media_root"):
        load_prompts([str(tmp_path / "d.jsonl")], DataConfig(media_root=str(tmp_path / "else")))
    monkeypatch.setattr(prompts, "LOOKED_UP", 100)
    found, skipped = load_prompts([str(tmp_path / "d.jsonl")], CONFIG)
    assert (len(found), len(skipped)) == (50, 50)
    assert skipped[0].record == f"{tmp_path}/d.jsonl:2 (1)" and "does not exist" in skipped[0].reason


real = prompts.missing
assert set(GOLD_KEYS) | set(MEDIA_KEYS) <= KNOWN_KEYS
