"""metrics.jsonl and TensorBoard: valid JSON always, torn lines survived, resumes that forget what came later."""

import json
import time

import numpy as np
import pytest
import torch

from veripo_fast.run.metrics import MetricsLog, read_records


def test_records_come_back(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.log({"stage": "grpo-1", "global_step": 1, "loss": 0.5, "seconds": {"rollout": 1.5}})
    log.log({"global_step": 2, "loss": np.float32(0.25), "count": torch.tensor(3), "flags": ("a", True, None)})
    assert read_records(log.path) == [
        {"stage": "grpo-1", "global_step": 1, "loss": 0.5, "seconds": {"rollout": 1.5}},
        {"global_step": 2, "loss": 0.25, "count": 3, "flags": ["a", True, None]}]


def test_nan_and_infinity_become_null(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log({"a": float("nan"), "b": [float("inf")], "c": torch.tensor(float("-inf"))})
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail) == {"a": None, "b": [None], "c": None}


def test_floats_are_exact(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log({"x": 0.1 + 0.2})
    assert read_records(log.path)[0]["x"] == 0.1 + 0.2


def test_truncate_after_a_step(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log({"note": "no step"})
    for step in range(1, 6):
        log.log({"global_step": step})
    before = log.path.read_bytes().splitlines(keepends=True)
    assert log.truncate_after(3) == 2
    assert log.path.read_bytes() == b"".join(before[:4])
    log.log({"global_step": 4})
    assert [record.get("global_step") for record in read_records(log.path)] == [None, 1, 2, 3, 4]


def test_truncate_without_a_file(tmp_path):
    assert MetricsLog(tmp_path / "none.jsonl").truncate_after(3) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", ['{"global_step": 2, "lo', "{", '{"global_step": 2}'])
def test_torn_last_line_is_cut_before_the_next_record(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_text('{"global_step": 1}\n' + torn)
    MetricsLog(path).log({"global_step": 2, "new": True})
    assert read_records(path) == [{"global_step": 1}, {"global_step": 2, "new": True}]


def test_torn_line_is_left_out_and_said(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    path.write_text('{"global_step": 1}\n{"glob')
    assert read_records(path) == [{"global_step": 1}]
    assert "line 2 is not a JSON object" in caplog.text
    assert MetricsLog(path).truncate_after(1) == 0
    assert path.read_text() == '{"global_step": 1}\n'


def test_tensorboard_scalars_and_their_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tensorboard"
    with MetricsLog(tmp_path / "m.jsonl", folder) as log:
        for step in (1, 2, 3):
            log.log({"stage": "grpo-1", "global_step": step, "loss": step / 2, "seconds": {"rollout": 1.0},
                     "skipped": True, "kl": float("nan")})
    time.sleep(1.01)  # files of one second are ordered by a count as text, 10 before 9; a resume is later
    with MetricsLog(tmp_path / "m.jsonl", folder) as log:
        log.truncate_after(1)
        log.log({"global_step": 2, "loss": 9.0})
    events = EventAccumulator(str(folder))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "seconds/rollout"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 9.0)]
