"""The table of families, and what only some families have: recurrent layers, experts."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import policies
from tests.support.paths import REPOSITORY
from veripo_fast.config.families import FAMILIES, closest, names
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.schema import Config
from veripo_fast.errors import CheckpointError, ConfigError
from veripo_fast.model.families import balance_loss
from veripo_fast.model.packing import pack
from veripo_fast.model.plain import plain_logits
from veripo_fast.model.policy import Policy, load_policy, save_policy
from veripo_fast.rollout.engine import make_engine

HYBRID = [name for name, family in FAMILIES.items() if family.delta_class]
MIXED = [name for name, family in FAMILIES.items() if family.router_class]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_names_what_transformers_has(family: str) -> None:
    entry = FAMILIES[family]
    module = importlib.import_module(entry.module)
    for name in filter(None, (entry.tower_class, entry.model_class, entry.delta_class, entry.router_class)):
        assert hasattr(module, name), name
    assert getattr(transformers, entry.config_class).model_type == family
    policy = policies.policy(family)
    assert type(policy.visual).__name__ == entry.tower_class and type(policy.model).__name__ == entry.model_class
    kinds = {type(layer).__name__ for layer in policy.model.model.language_model.modules()}
    assert {entry.delta_class, entry.router_class} - {""} <= kinds


def test_the_table_is_the_one_place_that_names_families() -> None:
    """Else a new one would be a change in many files; the demo's own policy and a default of a command aside."""
    package = REPOSITORY / "veripo_fast"
    for path in package.rglob("*.py"):
        if path.name in ("commands.py", "pretrain.py") or path == package / "config" / "families.py":
            continue
        named = [family for family in FAMILIES if f'"{family}"' in path.read_text("utf-8")]
        assert not named, (path, named)


def test_every_family_is_tested() -> None:
    assert set(policies.ALL_FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize(("name", "like"), [("qwen2_vl", "qwen2_5_vl"), ("qwen3_5_omni", "qwen3_5_moe"), ("llava", "")])
def test_the_closest_family(name: str, like: str) -> None:
    assert closest(name) == like


def test_names() -> None:
    assert names({"a": FAMILIES["qwen3_vl"]}) == "a"
    assert names().endswith("qwen3_5 and qwen3_5_moe")


def copy_of(family: str, folder: Path, **changes: object) -> Path:
    """A checkpoint with other options in its config.json."""
    shutil.copytree(policies.checkpoint(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# -- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", policies.NEW_FAMILIES)
def test_quantised_weights_are_refused(family: str, tmp_path: Path) -> None:
    folder = copy_of(family, tmp_path / "quantised", quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"quantised weights .*fp8"):
        load_policy(ModelConfig(str(folder), device="cpu"))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MIXED])
def test_balance_without_experts_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=f"{family} has none; qwen3_vl_moe and qwen3_5_moe have"):
        load_policy(ModelConfig(str(policies.checkpoint(family)), device="cpu", router_balance=0.1))


def test_vllm_without_places_for_the_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a family that is new in the table."""
    policy = policies.policy("qwen3_5")
    monkeypatch.setattr(policy.encoder, "family", replace(policy.encoder.family, engine_rules={}))
    config = replace(Config(), rollout=replace(Config().rollout, engine="vllm"))
    with pytest.raises(ConfigError, match=r"weights of qwen3_5 cannot be handed over yet; .*engine to torch"):
        make_engine(config, policy)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MIXED])
def test_router_replay_without_experts_is_refused(family: str) -> None:
    config = replace(Config(), rollout=replace(Config().rollout, engine="vllm", router_replay=True))
    with pytest.raises(ConfigError, match=f"{family} has none; qwen3_vl_moe and qwen3_5_moe have; set it to false"):
        make_engine(config, policies.policy(family))


def test_square_experts_are_refused(tmp_path: Path) -> None:
    """Transformers would load them transposed, or not, without a word."""
    folder = copy_of("qwen3_vl_moe", tmp_path / "square")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = config["text_config"]["hidden_size"] // 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="whether the file holds such matrices transposed"):
        load_policy(ModelConfig(str(folder), device="cpu"))


@pytest.mark.parametrize("family", HYBRID)
def test_layers_that_draft_are_named(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of(family, tmp_path / "drafting")
    weights = load_file(folder / "model.safetensors") | {"mtp.norm.weight": torch.ones(128)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load_policy(ModelConfig(str(folder), device="cpu"))
    assert "draft several tokens (mtp.*)" in caplog.text


# -- no leak ----------------------------------------------------------------------------------------------------------

def logprobs(policy: Policy, rows: list) -> list[torch.Tensor]:
    """Of each completion of a packed row."""
    batch = pack(rows)
    features = [None if prompt.media is None else policy.vision_features(prompt.media) for prompt, _ in rows]
    with torch.no_grad():
        found = policy.completion_logprobs(batch, features)
    return list(found.split(batch.cu_seqlens.diff().tolist()))


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_a_completion_does_not_see_the_others(family: str) -> None:
    """To the last bit; with experts the tokens of one are multiplied together with others, which rounds otherwise."""
    policy = policies.policy(family)
    rows = [(policies.encoded(policy.encoder, [("video", 4, 2, 2)], seed),
             policies.random_completions([5, 70, 1, 9], seed)) for seed in range(2)]
    before = logprobs(policy, rows)
    rows[0][1][1] = policies.random_completions([70], 7)[0]
    after = logprobs(policy, rows)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        if number == 1:
            assert (one - other).abs().max() > 0.1
        elif FAMILIES[family].router_class:
            assert (one - other).abs().max() < 1e-4
        else:
            assert torch.equal(one, other), number


@pytest.mark.parametrize("family", HYBRID)
def test_a_prompt_shorter_than_the_convolution(family: str) -> None:
    policy = policies.policy(family)
    prompt = policies.encoded(policy.encoder, [])
    short = replace(prompt, token_ids=prompt.token_ids[:2], positions=prompt.positions[:, :2], next_position=2)
    completions = policies.random_completions([6, 3, 1])
    packed = logprobs(policy, [(short, completions)])
    with torch.no_grad():
        for ours, completion in zip(packed, completions, strict=True):
            plain = torch.log_softmax(plain_logits(policy, short, completion)[:-1], -1)
            assert (ours - plain.gather(-1, torch.tensor(completion)[:, None])[:, 0]).abs().max() < 1e-4


@pytest.mark.parametrize("family", policies.NEW_FAMILIES)
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    folder = str(policies.checkpoint(family))
    balance = 0.1 if family in MIXED else 0.0
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(ModelConfig(folder, device="cpu", gradient_checkpointing=checkpointing,
                                         router_balance=balance))
        rows = [(policies.encoded(policy.encoder, []), policies.random_completions([5, 70, 1]))]
        policy.forward(pack(rows), [None], supervised(76)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in policy.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


# -- experts ----------------------------------------------------------------------------------------------------------

def supervised(tokens: int):
    from veripo_fast.model.step import SupervisedLossInputs

    return SupervisedLossInputs(torch.ones(tokens), tokens)


@pytest.mark.parametrize("family", MIXED)
def test_the_load_of_experts_is_that_of_transformers(family: str) -> None:
    """Against transformers' own loss of a plain forward, whose prompt is there once; and its weight in the loss."""
    policy = load_policy(ModelConfig(str(policies.checkpoint(family)), device="cpu"))
    prompt, completion = policies.encoded(policy.encoder, []), policies.random_completions([9])[0]
    ids = torch.cat([prompt.token_ids, torch.tensor(completion[:-1])])
    positions = torch.cat([prompt.positions, (torch.arange(8) + prompt.next_position).expand(3, -1)], 1)
    with torch.no_grad():
        theirs = policy.model(input_ids=ids[None], position_ids=positions[:, None], output_router_logits=True,
                              groups=pack([(prompt, [completion])]).groups).aux_loss
        losses = []
        for weight in (0.0, 0.5):
            balanced = Policy(policy.model, policy.encoder, freeze_vision=True, router_balance=weight)
            losses.append(balanced.forward(pack([(prompt, [completion])]), [None], supervised(9)).loss)
    assert float(losses[1] - losses[0]) == pytest.approx(0.5 * float(theirs), rel=1e-5)


def test_an_even_load_is_one_per_chosen_expert() -> None:
    config = policies.policy("qwen3_5_moe").model.config
    even = torch.zeros(60, config.text_config.num_experts)
    assert float(balance_loss(config, (even, even))) == pytest.approx(config.text_config.num_experts_per_tok)


@pytest.mark.parametrize("family", MIXED)
def test_routers_choose_in_float32(family: str) -> None:
    """Two experts that bfloat16 cannot tell apart: the better one is chosen."""
    policy = load_policy(ModelConfig(str(policies.checkpoint(family)), device="cpu", dtype="bfloat16"))
    router = next(layer for layer in policy.model.modules() if type(layer).__name__ == FAMILIES[family].router_class)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, :2] = torch.tensor([1.0, 0.0])
        router.weight[3, :2] = torch.tensor([1.0, 2.0 ** -10])
    hidden = torch.zeros(1, router.hidden_dim, dtype=torch.bfloat16)
    hidden[0, :2] = 1.0
    logits, weights, chosen = router(hidden)
    assert logits.dtype == torch.float32 and weights.dtype == torch.bfloat16
    assert int(chosen[0, 0]) == 3


@pytest.mark.parametrize("family", policies.NEW_FAMILIES)
def test_a_saved_policy_is_loaded_again(family: str, tmp_path: Path) -> None:
    policy = policies.policy(family)
    save_policy(policy, tmp_path / "saved")
    again = load_policy(ModelConfig(str(tmp_path / "saved"), device="cpu"))
    for (name, one), (other_name, other) in zip(policy.all_parameters(), again.all_parameters(), strict=True):
        assert name == other_name and torch.equal(one, other), name
