"""`veripo plan`: costs from shapes, whether a run fits, and predictions from a run that is finished."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.schedule.test_admission import seven_billion
from tests.support import policies, runs
from veripo_fast.cli import main
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.distributed.flops import TowerCost, group_flops
from veripo_fast.errors import ConfigError, UserError
from veripo_fast.report.plan import GLOO, as_text, hardware_named, measure, plan_command
from veripo_fast.run.metrics import read_records
from veripo_fast.schedule.costs import (
    dpo_work,
    grpo_work,
    model_cost,
    read_numbers,
    seconds,
    tower_cost,
)
from veripo_fast.schedule.hardware import H100_SXM, Hardware
from veripo_fast.schedule.planner import plan, search
from veripo_fast.schedule.rates import Lengths, Rates
from veripo_fast.schedule.shapes import ModelShape, read_shape
from veripo_fast.trainer import train

LENGTHS = Lengths(3000, 8000, 300, 900, spread=0.6)
LOOP = {"stages": [{"kind": "grpo"}, {"kind": "dpo"}], "grpo.steps": 10, "grpo.prompts_per_step": 64,
        "model.dtype": "bfloat16", "model.gradient_checkpointing": True, "rollout.engine": "vllm",
        "data.max_prompt_tokens": 4096}


@cache
def seven(folder: Path) -> ModelShape:
    return read_shape(seven_billion(folder))


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Qwen2.5-VL-7B with a small tower."""
    return seven(tmp_path_factory.mktemp("plan") / "7b")


def config(**changes: Any) -> Config:
    return apply_overrides(Config(), LOOP | {name.replace("__", "."): value for name, value in changes.items()})


# -- costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_shapes_cost_what_the_model_does(family: str) -> None:
    policy = policies.policy(family)
    made = read_shape(policies.checkpoint(family))
    assert model_cost(made) == replace(policy.text_cost, tower=None)
    assert tower_cost(made) == TowerCost.of(policy.model.config.vision_config)


def test_the_work_of_one_rank_is_all_of_it(shape: ModelShape) -> None:
    even = replace(LENGTHS, spread=0.0, live_share=0.5)
    work = grpo_work(shape, config(), 1, even)
    group = group_flops(model_cost(shape), 3000, [300] * 8)
    assert work.update_flops == pytest.approx(32 * group * 4 / 3) and work.idle_share == 0
    assert work.prefill_flops + work.decode_flops == 64 * group_flops(model_cost(shape), 3000, [300] * 8,
                                                                      backward=False)
    assert work.tokens == 64 * 8 * 300


def test_a_batch_without_a_signal_has_no_update(shape: ModelShape) -> None:
    work = grpo_work(shape, config(), 8, replace(LENGTHS, live_share=0.0))
    assert work.update_flops == work.idle_share == 0 and work.decode_flops > 0
    assert work.link_bytes == 0


def test_lengths_that_vary_cost_what_their_mean_does(shape: ModelShape) -> None:
    whole = [grpo_work(shape, config(rollout__max_new_tokens=8192), 1, replace(LENGTHS, spread=spread)).update_flops
             for spread in (0.0, 0.3, 0.9)]
    assert whole == pytest.approx([whole[0]] * 3, rel=0.02)


def test_what_costs_more(shape: ModelShape) -> None:
    plain = grpo_work(shape, config(), 8, LENGTHS)
    once = grpo_work(shape, config(model__gradient_checkpointing=False), 8, LENGTHS)
    assert plain.update_flops == pytest.approx(once.update_flops * 4 / 3)
    assert grpo_work(shape, config(grpo__kl_coef=0.1), 8, LENGTHS).update_flops == pytest.approx(
        once.update_flops * 5 / 3)
    assert grpo_work(shape, config(model__freeze_vision=False), 8, LENGTHS).update_flops > plain.update_flops
    halved = grpo_work(shape, config(rollout__tensor_parallel=2), 8, LENGTHS)
    assert halved.decode_flops == plain.decode_flops and halved.sync_bytes == plain.sync_bytes / 2
    assert halved.decode_bytes < plain.decode_bytes
    assert plain.link_bytes > 0 == grpo_work(shape, config(), 1, LENGTHS).link_bytes


def test_more_ranks_take_less_until_each_has_one_group(shape: ModelShape) -> None:
    works = [grpo_work(shape, config(), ranks, LENGTHS) for ranks in (1, 2, 8, 64, 256)]
    flops = [work.update_flops for work in works]
    assert flops == sorted(flops, reverse=True) and flops[3] == flops[4]
    assert works[4].idle_share > 0.75 > works[1].idle_share


def test_decoding_reads_the_experts_that_are_passed_and_the_states() -> None:
    mixed = read_shape(policies.checkpoint("qwen3_5_moe"))
    assert mixed.experts is not None and mixed.delta is not None
    whole = mixed.experts.layers * mixed.experts.experts * 3 * mixed.hidden * mixed.experts.intermediate
    passed = mixed.experts.chosen / mixed.experts.experts
    assert read_numbers(mixed, 1) == pytest.approx(mixed.language_numbers - (1 - passed) * whole)
    assert read_numbers(mixed, 10_000) == pytest.approx(mixed.language_numbers)
    dense = read_shape(policies.checkpoint("qwen3_vl"))
    assert read_numbers(dense, 1) == dense.language_numbers
    options = config(grpo__prompts_per_step=1, rollout__group_size=2, model__dtype="float32")
    stateless = replace(mixed, delta=replace(mixed.delta, key_dim=0))
    delta = mixed.delta
    states = 2 * 2 * 300 * delta.layers * delta.value_heads * delta.key_dim * delta.value_dim * 4
    assert grpo_work(mixed, options, 1, LENGTHS).decode_bytes == pytest.approx(
        grpo_work(stateless, options, 1, LENGTHS).decode_bytes + states)


def test_a_dpo_step(shape: ModelShape) -> None:
    work = dpo_work(shape, config(dpo__pairs_per_step=16), 4, LENGTHS)
    pair = group_flops(model_cost(shape), 3000, [300, 300])
    assert work.update_flops == pytest.approx(4 * pair * (4 / 3 + 1 / 3)) and work.decode_flops == 0


def test_a_phase_takes_the_longer_of_arithmetic_and_traffic(shape: ModelShape) -> None:
    work = grpo_work(shape, config(), 8, LENGTHS)
    rates = Rates(1e14, 1e14, 1e12, 1e11)
    quick = seconds(work, replace(rates, memory=1e30, link=1e30))
    assert quick["rollout"] == pytest.approx((work.prefill_flops + work.decode_flops) / 1e14)
    assert quick["update"] == pytest.approx(work.update_flops / 1e14)
    slow = seconds(work, replace(rates, memory=1e9, link=1e6))
    assert slow["rollout"] == pytest.approx(work.prefill_flops / 1e14 + work.decode_bytes / 1e9)
    assert slow["update"] == pytest.approx(work.link_bytes / 1e6)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_thousand_gpus_are_planned_in_seconds(shape: ModelShape) -> None:
    started = time.process_time()
    made = plan(shape, config(grpo__prompts_per_step=4096), 1024, H100_SXM, Rates.assumed(H100_SXM), {"grpo": LENGTHS})
    assert time.process_time() - started < 10
    assert made.fits and len(made.stages) == 2 and 0 < made.seconds < float("inf")
    assert made.stages[0].work.idle_share < 0.05


def test_what_does_not_fit_names_the_option(shape: ModelShape) -> None:
    made = plan(shape, config(model__dtype="float32"), 1, H100_SXM, Rates.assumed(H100_SXM), {})
    assert not made.fits
    text = as_text(made, shape, None)
    assert "does not fit: grpo-1, " in text and "distributed.backend" in text
    fitting = plan(shape, config(), 64, H100_SXM, Rates.assumed(H100_SXM), {})
    assert fitting.fits and "fits; what breaks first" in as_text(fitting, shape, None)


def test_a_search_gives_what_fits_the_quickest_first(shape: ModelShape) -> None:
    small = Hardware("small", 1e15, 40 << 30, 3e12, 9e11)
    asked = config(optimizer__max_tokens=1 << 17)
    assert not plan(shape, asked, 8, small, Rates.assumed(small), {"grpo": LENGTHS}).fits
    found = search(shape, asked, 8, small, Rates.assumed(small), {"grpo": LENGTHS})
    assert found and all(made.fits for _, made in found)
    times = [made.seconds for _, made in found]
    assert times == sorted(times)
    for options, made in found[:3]:
        assert apply_overrides(asked, options) == made.config


def test_ranks_that_fit_no_engine(shape: ModelShape) -> None:
    with pytest.raises(ConfigError, match=r"6 GPUs cannot be shared out to engines of rollout\.tensor_parallel 4"):
        plan(shape, config(rollout__tensor_parallel=4), 6, H100_SXM, Rates.assumed(H100_SXM), {})


# -- from a run --------------------------------------------------------------------------------------------------------


def written_run(folder: Path, made: Config, rows: list[Mapping[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(made))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(number: int, lengths: Lengths, parts: Mapping[str, float], ranks: int, stage: str = "grpo-1") -> dict[str, Any]:
    return {"global_step": number, "stage": stage, "kind": "grpo", "step": number - 1,
            "length_mean": lengths.completion_tokens, "length_max": lengths.longest,
            "zero_variance_share": 1 - lengths.live_share,
            "speed": {"step_seconds": sum(parts.values()), "ranks": ranks, "prompt_tokens_mean": lengths.prompt_tokens,
                      "patches_mean": lengths.patches},
            "seconds": {name: value for name, value in parts.items() if name != "rest"}}


def test_a_run_predicts_itself_and_its_kind(tmp_path: Path) -> None:
    """Rates that made the seconds of a run are found again, and foretell other configurations."""
    path = str(policies.checkpoint("qwen3_vl"))
    small = read_shape(Path(path))
    base = apply_overrides(Config(), {"model.path": path, "stages": [{"kind": "grpo"}], "grpo.prompts_per_step": 16})
    lengths = Lengths(700, 2000, 90, 120, live_share=0.75)
    true = Rates(3e10, 1e10, 0.0, 0.0, load_seconds=0.02, reward_seconds=0.001, step_seconds=0.3)
    parts = seconds(grpo_work(small, base, 1, lengths), true)
    run = written_run(tmp_path / "run", base, [row(number, lengths, parts, 1) for number in range(1, 5)])
    found = measure(run, None)
    assert found.lengths == lengths and found.ranks == 1
    for name in ("train", "decode", "load_seconds", "reward_seconds", "step_seconds"):
        assert getattr(found.rates, name) == pytest.approx(getattr(true, name), rel=1e-6), name
    other = apply_overrides(base, {"rollout.group_size": 4, "grpo.prompts_per_step": 32})
    told = plan(small, other, 2, None, found.rates, {"grpo": lengths}).stages[0].step_seconds
    work = grpo_work(small, other, 2, lengths)
    assert told == pytest.approx(sum(seconds(work, replace(true, link=GLOO)).values()), rel=1e-6)
    assert seconds(work, replace(true, link=GLOO))["update"] == pytest.approx(
        seconds(work, true)["update"] + work.link_bytes / GLOO), "a CPU sends in place of computing"
    parts = seconds(grpo_work(small, other, 2, lengths), replace(true, link=GLOO))
    run = written_run(tmp_path / "two", other, [row(number, lengths, parts, 2) for number in range(1, 5)])
    assert measure(run, None).rates.train == pytest.approx(true.train, rel=1e-6)


def test_a_gpu_run_says_which_bound_holds(tmp_path: Path, shape: ModelShape) -> None:
    """Decoding that reads weights all the time gives a rate of bytes, not of FLOPs."""
    base = config(model__path=str(tmp_path / "7b"))
    seven_billion(tmp_path / "7b")
    true = replace(Rates.assumed(H100_SXM), memory=1.5e12)
    parts = seconds(grpo_work(shape, base, 8, LENGTHS), true)
    lengths = replace(LENGTHS, spread=0.5)
    parts = seconds(grpo_work(shape, base, 8, lengths), true)
    run = written_run(tmp_path / "run", base, [row(number, lengths, parts, 8) for number in range(1, 4)])
    rates = measure(run, H100_SXM).rates
    assert rates.memory == pytest.approx(1.5e12, rel=0.02)
    assert rates.decode == Rates.assumed(H100_SXM).decode


def test_plan_from_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = runs.config(tmp_path / "run", stages=[{"kind": "grpo"}], grpo__steps=4, eval__at="never")
    train(made)
    (tmp_path / "plan.yaml").write_text(to_yaml(made))
    arguments = ["plan", "--config", str(tmp_path / "plan.yaml"), "--hardware", "cpu", "--gpus", "1"]
    assert main([*arguments, "--from", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "measured on 1 rank" in text and "grpo-1: 4 steps" in text
    rows = read_records(tmp_path / "run" / "metrics.jsonl")[1:]
    steps = [entry["speed"]["step_seconds"] + entry["seconds"]["checkpoint"] for entry in rows]
    found = measure(tmp_path / "run", None)
    told = plan(read_shape(Path(made.model.path)), made, 1, None, found.rates, {"grpo": found.lengths})
    assert min(steps) / 2 < told.stages[0].step_seconds < max(steps) * 2
    assert main(arguments) == 2 and "--from RUN" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [
    (None, "is not a run folder"), ([], "no two GRPO steps"),
    ([{"global_step": 1, "kind": "grpo", "stage": "grpo-1", "seconds": {}}] * 3, "no two GRPO steps")])
def test_a_run_that_tells_nothing(tmp_path: Path, content: list[dict[str, Any]] | None, message: str) -> None:
    if content is not None:
        written_run(tmp_path, config(), content)
    with pytest.raises(UserError, match=message):
        measure(tmp_path, None)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [0, -1, 1 << 20])
def test_a_number_of_gpus_that_nobody_has(gpus: int) -> None:
    with pytest.raises(ConfigError, match="--gpus must be between 1 and 16,384"):
        plan_command(config(), gpus, "h100", None, False)


def test_hardware_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("bf16_flops: 1.5e+15\nmemory_bytes: 100e9\nmemory_bandwidth: 4e12\nnvlink_bandwidth: 9e11\n")
    assert hardware_named(str(path)) == Hardware("mine", 1.5e15, 100_000_000_000, 4e12, 9e11)
    assert hardware_named("H100") == H100_SXM and hardware_named("cpu") is None


@pytest.mark.parametrize("text", ["bf16_flops: 1e15", "bf16_flops: much", "- 1", "bf16_flops: -1", ": :", "unknown: 1"])
def test_a_file_that_describes_no_gpu(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml must give name, bf16_flops"):
        hardware_named(str(path))


def test_a_gpu_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'rtx' is not known; take h100, h200, a100, b200, cpu, or a YAML file"):
        hardware_named("rtx")
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        hardware_named(str(tmp_path / "none.yaml"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                          python: Callable[..., Any]) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(config(model__path=str(seven_billion(tmp_path / "7b")))))
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), "--gpus", "64", "--search"]) == 0
    text = capsys.readouterr().out
    for part in ("on 64 x H100 SXM", "rates: assumed", "grpo-1: 10 steps", "memory of a GPU: load", "GPU-hours",
                 "without dpo-1", "quickest options that fit"):
        assert part in text, text
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), "--model.path", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
