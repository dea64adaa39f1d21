"""Fingerprints of what a run was begun with."""

from pathlib import Path

from veripo_fast.run import inputs
from veripo_fast.run.inputs import differences, file_fingerprint, read_inputs, take_inputs, write_inputs


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(5000))
    before = file_fingerprint(path)
    for place in (0, 2500, 4999):
        content = bytearray(5000)
        content[place] = 1
        path.write_bytes(content)
        assert file_fingerprint(path) != before
    path.write_bytes(bytes(5000))
    assert file_fingerprint(path) == before == f"5000:{before.split(':')[1]}"


def test_a_large_file_is_sampled_at_both_ends_and_between(tmp_path: Path) -> None:
    size = inputs._BLOCKS * inputs._BLOCK_BYTES * 2
    path = tmp_path / "a"
    path.write_bytes(bytes(size))
    before = file_fingerprint(path, whole_bytes=1 << 20)
    for place in (0, size - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert file_fingerprint(path, whole_bytes=1 << 20) != before
        before = file_fingerprint(path, whole_bytes=1 << 20)


def test_differences_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "chat_template.jinja").write_text("a")
    (model / "notes.md").write_text("of no interest")
    data = tmp_path / "train.jsonl"
    data.write_text("1\n")
    before = take_inputs({str(data): str(data)}, model)
    assert set(before["model"]) == {"config.json", "chat_template.jinja"}
    assert {"python", "torch"} <= set(before["versions"])
    data.write_text("1\n2\n")
    (model / "chat_template.jinja").write_text("b")
    (model / "tokenizer.json").write_text("{}")
    (model / "config.json").unlink()
    now = take_inputs({str(data): str(data)}, model)
    assert differences(before, now, "data") == [f"{data} has changed"]
    assert differences(before, now, "model") == ["chat_template.jinja has changed", "config.json is gone",
                                                 "tokenizer.json is new"]
    assert differences({"versions": {"torch": "1"}}, {"versions": {"torch": "2"}}, "versions") == [
        "torch has changed (1 before, 2 now)"]


def test_commands_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    assert read_inputs(path) == {}
    write_inputs(path, {"data": {}}, [])
    write_inputs(path, {"data": {}}, read_inputs(path)["commands"])
    assert len(read_inputs(path)["commands"]) == 2
    path.write_text("[1")
    assert read_inputs(path) == {}
