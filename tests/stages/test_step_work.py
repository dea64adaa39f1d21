"""What counts as work of a step, and as needed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.support import policies
from veripo_fast.cache.loader import VideoWork
from veripo_fast.config.objectives import RolloutConfig
from veripo_fast.distributed.flops import ModelCost, group_flops, tower_flops
from veripo_fast.distributed.world import ONE, World
from veripo_fast.schedule.hardware import H200
from veripo_fast.stages import step_work
from veripo_fast.stages.step_work import StepWork, repeated_flops
from veripo_fast.types import Completion, PreferencePair, RolloutGroup

LENGTHS = [3, 9, 5]


@pytest.fixture(scope="module")
def policy():
    return policies.policy("qwen3_vl", freeze_vision=True)


@pytest.fixture
def loaded(policy):
    return policies.loaded(policy, [("video", 4, 3, 4)])


def group_of(loaded):
    return RolloutGroup(loaded.prompt, [Completion([5] * length, "", [0.0] * length, "stop", 0) for length in LENGTHS])


def test_the_torch_engine_runs_ended_completions_on(policy, loaded):
    work = StepWork(policy, RolloutConfig(engine="torch"), ONE)
    work.sampled([loaded], [group_of(loaded)])
    prompt = len(loaded.encoded.token_ids)
    done = group_flops(policy.text_cost, prompt, [9, 9, 9], backward=False)
    needed = group_flops(policy.text_cost, prompt, LENGTHS, backward=False)
    work.add_seconds("update", 2.0)
    speed = work.metrics()["speed"]
    assert speed["flops"] == done and speed["needed_share"] == pytest.approx(needed / done)
    assert speed["sampled_tokens_per_second"] * speed["step_seconds"] == pytest.approx(sum(LENGTHS))
    assert speed["trained_tokens_per_second"] == 0 and "mfu" not in speed
    work.begin()
    again = work.metrics()
    assert again["seconds"] == {} and again["speed"].keys() == {"step_seconds", "ranks", "flops"}, "a step begins anew"


def test_another_engine_may_run_the_tower_again(policy, loaded):
    work = StepWork(policy, RolloutConfig(engine="vllm"), ONE)
    work.rollout = replace(work.rollout, vision="pixels")
    work.sampled([loaded], [group_of(loaded)])
    needed = group_flops(policy.text_cost, len(loaded.encoded.token_ids), LENGTHS, backward=False)
    tower = tower_flops(policy.cost, loaded.encoded.media.grid_thw.tolist(), backward=False)
    speed = work.metrics()["speed"]
    assert (speed["flops"], speed["needed_share"]) == (needed + tower, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_share_an_engine_count_its_work_once(policy, loaded, rank):
    """Both run the tower over the same media, which is needed once."""
    work = StepWork(policy, RolloutConfig(engine="vllm", tensor_parallel=2), World(rank, 2))
    media = policies.random_media(policy.encoder, [("video", 4, 4, 6)])
    before = policy.passes.copy()
    with work.shared():
        policy.vision_features(media)
    work.sampled([loaded], [group_of(loaded)])
    done = policy.passes.since(before)
    tower = tower_flops(policy.cost, media.grid_thw.tolist(), backward=False)
    rollout = group_flops(policy.text_cost, len(loaded.encoded.token_ids), LENGTHS, backward=False)
    assert (done.flops, done.spare_flops) == ((tower, tower) if rank else (tower + rollout, 0))
    assert work.sampled_tokens == (0 if rank else sum(LENGTHS))


def test_a_device_with_a_known_peak_has_an_mfu(policy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    stand_in = SimpleNamespace(device=torch.device("cuda"), passes=policy.passes, adapters=None)
    work = StepWork(stand_in, RolloutConfig(), ONE)
    policy.passes.flops += 10**12
    speed = work.metrics()["speed"]
    assert speed["mfu"] * speed["step_seconds"] * H200.bf16_flops == pytest.approx(10**12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert step_work._peak(stand_in) is None


def test_pairs_of_a_prompt_repeat_it(loaded):
    """And the completion that both pairs have."""
    policy = policies.policy("qwen3_vl")
    cost = ModelCost.of(policy.model.config, tower_trained=True)
    first, second = pair((1, 2, 3), (4, 5)), pair((1, 2, 3), (6, 7, 8, 9))
    prompt, grids = len(loaded.encoded.token_ids), loaded.encoded.media.grid_thw.tolist()
    done = group_flops(cost, prompt, [3, 2], grids) + group_flops(cost, prompt, [3, 4], grids)
    assert repeated_flops(cost, [(loaded.encoded, first)]) == 0
    assert repeated_flops(cost, [(loaded.encoded, first), (loaded.encoded, second)]) == done - group_flops(
        cost, prompt, [3, 2, 4], grids)
    assert repeated_flops(cost, []) == 0


def pair(chosen, rejected):
    return PreferencePair("one", "accuracy", chosen, rejected, (1,) * len(chosen), (1,) * len(rejected), "", "", 0, 1,
                          "")


def test_media_are_counted(policy):
    work = StepWork(policy, RolloutConfig(), ONE)
    work.loaded(VideoWork(0.5, 3, 2, 1, 0))
    metrics = work.metrics()
    assert {name: metrics[name] for name in metrics if name not in ("speed", "seconds")} == {
        "video_decodes": 3, "tower_runs": 2, "cache_hits": 1, "decoder_fallbacks": 0}
