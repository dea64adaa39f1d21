"""AdamW's state in host memory while completions are sampled: the same training, bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import runs
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config, OptimizerConfig
from veripo_fast.distributed.backend import LocalBackend
from veripo_fast.distributed.offload import HostCopies
from veripo_fast.errors import ConfigError
from veripo_fast.run.folder import RunDir
from veripo_fast.schedule.admission import Excess, remedy
from veripo_fast.schedule.ledger import predict
from veripo_fast.schedule.shapes import read_shape
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.trainer import train

GIB = 1 << 30


def test_what_comes_back_is_what_went_away() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.arange(12).reshape(3, 4).to(dtype)
        view, copies, expected = tensor.t(), HostCopies(), tensor.clone()
        assert copies.take([tensor]) == tensor.numel() * tensor.itemsize and copies
        assert tensor.untyped_storage().nbytes() == 0
        assert copies.bring_back() == expected.numel() * expected.itemsize and not copies
        assert torch.equal(tensor, expected) and torch.equal(view, expected.t())
    assert HostCopies().bring_back() == 0 and HostCopies().take([]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_goes_away_between_steps(dtype: torch.dtype, tmp_path: Path) -> None:
    """Masters of bfloat16 weights go with the moments; a state that is asked for is whole."""
    def run(offload: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        named = [(name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
                 for name, shape in (("a", (3, 4)), ("b", (5,)))]
        optimizer = Optimizer(LocalBackend(torch.nn.Identity(), lambda: named), OptimizerConfig(), 0.1, 4)
        for step in range(4):
            if offload:
                moved = optimizer.offload()
                numbers = sum(parameter.numel() for _, parameter in named)
                kinds = (2 if step else 0) + (dtype == torch.bfloat16)
                assert moved == 4 * kinds * numbers and optimizer.offload() == 0
                state = optimizer.backend.movable()
                assert all(tensor.untyped_storage().nbytes() == 0 for tensor in state)
            for _, parameter in named:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.loss = float("nan") if step == 2 else 1.0
            assert (optimizer.step() is None) == (step == 2)
        if offload:
            optimizer.offload()
        return [parameter.detach() for _, parameter in named], optimizer.state()

    (weights, state), (others, other) = run(False), run(True)
    assert all(torch.equal(one, two) for one, two in zip(weights, others, strict=True))
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The loop in bfloat16, without and with it."""
    folders = []
    for offload in (False, True):
        folder = tmp_path_factory.mktemp("offload") / "run"
        train(runs.config(folder, model__dtype="bfloat16", optimizer__offload=offload, eval__at="never",
                          grpo__updates_per_rollout=2, grpo__steps=3))
        folders.append(folder)
    return folders[0], folders[1]


def test_the_loop_gives_the_same_bits(two_runs: tuple[Path, Path]) -> None:
    plain, moved = (RunDir(folder) for folder in two_runs)
    kept = sorted(path.name for path in plain.checkpoints.iterdir())
    assert kept == sorted(path.name for path in moved.checkpoints.iterdir()) and len(kept) == 3
    for name in kept[1:]:
        one, two = (load_file(run.checkpoints / name / "model.safetensors") for run in (plain, moved))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    rows = [[json.loads(line) for line in run.metrics.read_text().splitlines()] for run in (plain, moved)]
    for one, two in zip(*rows, strict=True):
        assert {name: one[name] for name in one if name not in ("seconds", "speed")} == {
            name: two[name] for name in two if name not in ("seconds", "speed", "offloaded_bytes")}


def test_it_is_a_phase_and_is_counted(two_runs: tuple[Path, Path]) -> None:
    run = RunDir(two_runs[1])
    steps = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    sampling = [step for step in steps if step["kind"] == "grpo"]
    assert all(step["seconds"]["offload"] > 0 for step in sampling)
    assert sampling[0]["offloaded_bytes"] > 0, "masters are there from the start"
    assert sampling[1]["offloaded_bytes"] == 3 * sampling[0]["offloaded_bytes"], "two moments to each master"
    assert '"onload"' in (run.root / "timeline.jsonl").read_text()
    assert all("offload" not in step["seconds"] for step in steps if step["kind"] == "dpo")


def test_a_cpu_is_told_that_it_gains_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from veripo_fast.distributed.world import ONE
    from veripo_fast.stages.memory import check_memory

    with caplog.at_level(logging.WARNING):
        check_memory(runs.config(tmp_path, optimizer__offload=True), ONE)
    assert sum("optimizer.offload frees nothing on a CPU" in line for line in caplog.messages) == 1


def test_deepspeed_has_its_own() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.offload cannot move .*take distributed\.offload cpu"):
        apply_overrides(Config(), {"optimizer.offload": True, "distributed.backend": "deepspeed"})


def test_the_ledger_moves_it(tmp_path: Path) -> None:
    shape = read_shape(runs.model())
    for ranks in (1, 4):
        config = runs.config(tmp_path, model__dtype="bfloat16")
        moved = apply_overrides(config, {"optimizer.offload": True})
        plain, away = (predict(shape, one, ranks, gpu_bytes=80 * GIB)["grpo-1"] for one in (config, moved))
        for one, two in zip(plain, away, strict=True):
            state = one.device.get("masters", 0) + one.device.get("AdamW's moments", 0)
            if one.name == "rollout":
                assert state > 0 and one.device_bytes - two.device_bytes == state == two.host["offloaded AdamW"]
            if one.name == "checkpoint":
                assert one.device == two.device
            assert two.device_bytes <= one.device_bytes
    on_cpu = [phase.device_bytes for phase in predict(shape, moved)["grpo-1"]]
    assert on_cpu == [phase.device_bytes for phase in predict(shape, config)["grpo-1"]]


def test_a_rollout_without_room_is_told_of_it(tmp_path: Path) -> None:
    shape = read_shape(runs.model())
    config = runs.config(tmp_path)
    phase = next(one for one in predict(shape, config, gpu_bytes=80 * GIB)["grpo-1"] if one.name == "rollout")

    def told(place: str, **changes: object) -> str:
        moments = phase.device["AdamW's moments"]
        excess = Excess("grpo-1", phase, place, phase.device_bytes, 1, "AdamW's moments", moments)
        return remedy(excess, apply_overrides(config, changes), shape, 1)

    assert "set optimizer.offload" in told("cuda:0")
    assert "optimizer.offload" not in told("cpu")
    assert "optimizer.offload" not in told("cuda:0", **{"optimizer.offload": True})
    assert "optimizer.offload" not in told("cuda:0", **{"distributed.backend": "deepspeed"})


def test_yaml_round_trip(tmp_path: Path) -> None:
    assert "offload: true" in to_yaml(runs.config(tmp_path, optimizer__offload=True))
