"""What cannot fit is refused by `veripo train` before anything large is made; what grows is named."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import policies, runs
from veripo_fast.cli import main
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.distributed.world import ONE
from veripo_fast.errors import ConfigError
from veripo_fast.run.folder import RunDir
from veripo_fast.run.memory import HighWater
from veripo_fast.schedule.admission import Room, as_tree, refusal, worst_excess
from veripo_fast.schedule.ledger import predict
from veripo_fast.schedule.phase import Phase
from veripo_fast.schedule.shapes import ModelShape, read_shape
from veripo_fast.stages import memory as module
from veripo_fast.stages.memory import Growth, MemoryBooks, check_memory
from veripo_fast.trainer import train

SEVEN = {"hidden": 3584, "intermediate": 18944, "layers": 28, "queries": 3584, "keys": 512, "vocabulary": 152064}
"""Qwen2.5-VL-7B."""
GIB = 1 << 30


def seven_billion(folder: Path) -> Path:
    """A checkpoint of Qwen2.5-VL-7B's shapes, whose weights are a hole in a file."""
    policies.checkpoint("qwen2_5_vl")
    start = policies.untied_checkpoint("qwen2_5_vl")
    folder.mkdir()
    for file in start.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((start / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": SEVEN["hidden"], "intermediate_size": SEVEN["intermediate"], "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": SEVEN["vocabulary"],
        "max_position_embeddings": 128000, "layer_types": ["full_attention"] * 28}
    config["vision_config"] |= {"out_hidden_size": SEVEN["hidden"]}
    (folder / "config.json").write_text(json.dumps(config))
    write_hollow(folder / "model.safetensors", tensors_of(start))
    return folder


def tensors_of(start: Path) -> dict[str, tuple[int, ...]]:
    hidden, inner, keys, words = SEVEN["hidden"], SEVEN["intermediate"], SEVEN["keys"], SEVEN["vocabulary"]
    layer = {"self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
             "self_attn.k_proj.weight": (keys, hidden), "self_attn.k_proj.bias": (keys,),
             "self_attn.v_proj.weight": (keys, hidden), "self_attn.v_proj.bias": (keys,),
             "self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (inner, hidden),
             "mlp.up_proj.weight": (inner, hidden), "mlp.down_proj.weight": (hidden, inner),
             "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    with (start / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tower = {name: tuple(entry["shape"]) for name, entry in header.items() if name.startswith("visual.")}
    named = {f"model.layers.{number}.{name}": shape for number in range(28) for name, shape in layer.items()}
    return {**tower, **named, "model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,),
            "lm_head.weight": (words, hidden)}


def write_hollow(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        count = 2
        for side in shape:
            count *= side
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_seven_billion_weights_are_refused_within_seconds_and_unread(
        tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    config = runs.config(tmp_path / "run", model__path=str(seven_billion(tmp_path / "7b")), eval__at="never",
                         model__dtype="float32", stages=[{"kind": "grpo"}])
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    shape = read_shape(tmp_path / "7b")
    assert 7.0e9 < shape.language_numbers < 7.7e9
    code = ("import sys, time\nfrom veripo_fast.cli import main\nfrom veripo_fast.run.memory import status_bytes\n"
            f"code = main(['train', '--config', {str(tmp_path / 'run.yaml')!r}])\n"
            "print(status_bytes('VmHWM') >> 20, round(time.process_time()))\nsys.exit(code)")
    done = python("-c", code)
    assert done.returncode == 2, done.stderr
    peak_mib, cpu_seconds = map(int, done.stdout.split())
    assert cpu_seconds < 20, "most of it are imports; on shared cores CPU time varies too"
    assert peak_mib < 1500, "the weights alone would be 30,000"
    said = done.stderr.splitlines()[-1]
    assert re.search(r"stage grpo-1 would take 1\d\d(\.\d)? GB of memory in its phase update, and .* can be had on cpu;"
                     r" most of it, \d+(\.\d)? GB, is AdamW's moments: .*share it out over several ranks", said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"optimizer__max_tokens": 10_000_000, "grpo__prompts_per_step": 4096, "data__max_prompt_tokens": 4000,
      "rollout__engine": "vllm"}, "in its phase update.*is activations: lower optimizer.max_tokens"),
    ({"rollout__engine": "vllm", "rollout__kv_cache_gb": 4000.0},
     r"in its phase rollout.*is key/value cache: lower rollout.kv_cache_gb \(now 4000\)"),
    ({"rollout__group_size": 500_000}, r"lower .*rollout.group_size \(now 500000\)"),
    ({"grpo__prompts_per_step": 100_000_000}, "in its phase rollout.*lower grpo.prompts_per_step"),
])
def test_the_option_is_that_of_the_largest_owner(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, object], words: str) -> None:
    config = runs.config(tmp_path / "run", eval__at="never", stages=[{"kind": "grpo"}], **changes)
    with pytest.raises(ConfigError, match=words) as error:
        train(config)
    assert str(error.value).count(". ") == 0, "one sentence"
    assert not (tmp_path / "run").exists()


def test_it_can_be_told_to_start_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = runs.config(tmp_path / "run", stages=[{"kind": "grpo"}])
    monkeypatch.setattr(module, "free_host_bytes", lambda: 1 << 20)
    monkeypatch.setattr(module, "status_bytes", lambda key: 0)
    with pytest.raises(ConfigError, match=r"train\.check_memory false starts it all the same"):
        check_memory(config, ONE)
    plan = check_memory(replace(config, train=replace(config.train, check_memory=False)), ONE)
    assert list(plan) == ["grpo-1"]


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = runs.config(tmp_path / "run", stages=[{"kind": "grpo"}])
    monkeypatch.setattr(module, "free_host_bytes", lambda: GIB)
    check_memory(config, ONE)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    monkeypatch.setattr(module, "status_bytes", lambda key: 0)
    with pytest.raises(ConfigError, match=r"67\.1 MB can be had on cpu"):
        check_memory(config, ONE)


def test_a_run_says_what_it_will_take_and_notes_what_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = runs.config(tmp_path / "run", eval__at="never", stages=[{"kind": "grpo"}])
    with caplog.at_level(logging.INFO, "veripo_fast"):
        train(config)
    assert re.search(r"memory of grpo-1, predicted: load [\d.]+ MB, vision [\d.]+ MB, rollout [\d.]+ MB, update",
                     caplog.text)
    run = RunDir(config.run_dir)
    plan = json.loads(run.memory_plan.read_text())
    [line] = [json.loads(text) for text in run.memory.read_text().splitlines()]
    assert line["predicted"] == plan["grpo-1"] and line["ranks"] == 1
    assert {"load", "vision", "rollout", "update"} <= line["peak_bytes"].keys() & line["predicted"].keys()
    owners = plan["grpo-1"]["update"]["device"]
    assert line["owner_bytes"] == {"weights": owners["weights"] + owners["tower"],
                                   "AdamW's moments": owners["AdamW's moments"]}


# -- pure -------------------------------------------------------------------------------------------------------------


def shape() -> ModelShape:
    return read_shape(policies.checkpoint("qwen2_5_vl"))


def test_overrides_of_a_stage_count() -> None:
    stages = (StageConfig("grpo"), StageConfig("grpo", set={"rollout.group_size": 64}), StageConfig("dpo"))
    small, large, dpo = predict(shape(), Config(stages=stages)).values()
    assert large[3].device["activations"] > small[3].device["activations"]
    assert [phase.name for phase in dpo] == ["load", "vision", "reference", "update", "checkpoint"]


def test_before_the_first_step_adamw_holds_nothing() -> None:
    """A stage of one step has its moments in the step and the checkpoint behind it, nowhere else."""
    def held(steps: int) -> dict[str, int]:
        config = apply_overrides(Config(stages=[StageConfig(kind="grpo")]), {"grpo.steps": steps})
        return {phase.name: phase.device.get("AdamW's moments", 0) for phase in predict(shape(), config)["grpo-1"]}

    one, many = held(1), held(2)
    assert one["vision"] == one["rollout"] == one["update"] == 0 < one["checkpoint"] == many["checkpoint"]
    assert many["vision"] == many["rollout"] == many["update"] == many["checkpoint"]


def test_a_gpu_keeps_the_process_on_the_host() -> None:
    config = Config(stages=(StageConfig("grpo"),))
    for phase in predict(shape(), config, gpu_bytes=80 * GIB)["grpo-1"]:
        assert "process" in phase.host or (phase.name == "load" and phase.host)
        assert "process" not in phase.device and "allocator" not in phase.device


def test_the_cache_of_an_engine_is_a_quarter_of_a_gpu_or_what_is_asked() -> None:
    config = apply_overrides(Config(stages=(StageConfig("grpo"),)), {"rollout.engine": "vllm"})
    asked = apply_overrides(config, {"rollout.kv_cache_gb": 3.0})

    def cache(config: Config, gpu_bytes: int) -> int:
        return predict(shape(), config, gpu_bytes=gpu_bytes)["grpo-1"][2].device["key/value cache"]

    assert (cache(config, 80 * GIB), cache(config, 0), cache(asked, 80 * GIB)) == (20 * GIB, GIB, 3 * GIB)


def test_a_planner_asks_in_milliseconds() -> None:
    config = Config(stages=(StageConfig("grpo"), StageConfig("dpo")))
    config = apply_overrides(config, {"rollout.engine": "vllm", "distributed.backend": "fsdp"})
    known = shape()
    predict(known, config, 1024, gpu_bytes=80 * GIB)
    started = time.perf_counter()
    for ranks in (8, 64, 512, 1024):
        predict(known, config, ranks, gpu_bytes=80 * GIB)
    assert (time.perf_counter() - started) / 4 < 0.1


def test_more_of_each_takes_more() -> None:
    def peak(name: str, **changes: object) -> int:
        base: dict[str, object] = {"data.max_prompt_tokens": 1000, "grpo.prompts_per_step": 8}
        config = apply_overrides(Config(stages=(StageConfig("grpo"),)),
                                 base | {key.replace("__", "."): value for key, value in changes.items()})
        return next(phase.device_bytes for phase in predict(shape(), config)["grpo-1"] if phase.name == name)

    assert peak("update", grpo__kl_coef=0.1) - peak("update") == 4 * (
        shape().language_numbers + shape().vision_numbers)
    assert peak("update", model__gradient_checkpointing=True) < peak("update")
    assert peak("update", model__freeze_vision=False) > peak("update")
    many = {"optimizer__max_tokens": 65536}
    assert peak("update", model__dtype="bfloat16", **many) < peak("update", **many)
    assert peak("rollout", grpo__prompts_per_step=16) > peak("rollout")
    assert peak("update", optimizer__max_tokens=65536) > peak("update", optimizer__max_tokens=20000)


def test_host_memory_of_a_gpu_counts_apart() -> None:
    phase = Phase("update", {"weights": 10}, {"process": 100})
    stages = {"grpo-1": [phase]}
    assert worst_excess(stages, Room("cuda:0", 10, 100)) is None
    excess = worst_excess(stages, Room("cuda:0", 10, 90))
    assert excess is not None and excess.place == "the host" and excess.largest == "process"
    assert worst_excess(stages, Room("cuda:0", 10, 90, held_bytes=10)) is None
    device = worst_excess(stages, Room("cuda:0", 9, 100))
    assert device is not None and device.place == "cuda:0"
    assert "share it out over several ranks" in refusal(device, Config(), shape(), 1)
    assert as_tree(stages) == {"grpo-1": {"update": {"device": {"weights": 10}, "host": {"process": 100}}}}


def test_a_pair_that_is_too_large_names_no_group_size() -> None:
    config = apply_overrides(Config(stages=(StageConfig("grpo"), StageConfig("dpo"))), {"optimizer.max_tokens": 64})
    owners = {"activations": 100}
    for stage, words in (("grpo-1", "one group alone is .* lower rollout.group_size"),
                         ("dpo-1", r"one pair alone is [\d,]+ tokens, so lower rollout.max_new_tokens")):
        excess = worst_excess({stage: [Phase("update", owners)]}, Room("cpu", 1))
        assert excess is not None and re.search(words, refusal(excess, config, shape(), 1))


# -- growth -----------------------------------------------------------------------------------------------------------

STEP = 1 << 20


def test_what_grows_is_named_once() -> None:
    growth = Growth(steps=20)
    named = [growth.observe({"update": number * STEP, "rollout": 7}) for number in range(60)]
    assert named[20] == ["update"] and sum(map(len, named)) == 1
    assert growth.span("update") == (0, 59 * STEP)


def test_noise_a_rest_and_known_growth_are_no_leak() -> None:
    noisy = [(number % 19) * STEP for number in range(100)]
    slow = [number * 1000 for number in range(100)]
    for peaks in (noisy, slow, [5 * STEP] * 100):
        growth = Growth(steps=20)
        assert not any(growth.observe({"update": peak}) for peak in peaks)
    growth = Growth(steps=20)
    assert not any(growth.observe({"update": number * STEP}, known_bytes=number * STEP) for number in range(100))


def test_growth_is_a_warning_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    high_water = HighWater(torch.device("cpu"))
    books = MemoryBooks(RunDir(tmp_path), high_water, ONE)
    for number in range(30):
        high_water.latest = {"update": number * STEP, "vision": 3}
        books.step_done(0)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("memory: phase update held more in each of the last 20 steps, from 0 B to 21 MB")


def test_help_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config"]) == 0
    assert "check_memory: true" in capsys.readouterr().out
    assert sys.version_info >= (3, 11)
