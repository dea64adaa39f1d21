"""Rewards that are told a reference's log-probs, and a reference that follows the policy (GRPO-CARE)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import policies, ranks, runs
from tests.support.paths import REPOSITORY
from tests.support.ranks import assert_close, codes
from tests.support.run_compare import assert_resumes, written
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.load import apply_overrides, load_config
from veripo_fast.config.objectives import GrpoConfig, RewardConfig
from veripo_fast.config.schema import Config
from veripo_fast.config.terms import RewardTerm
from veripo_fast.distributed.state_files import read_state
from veripo_fast.distributed.world import ONE
from veripo_fast.errors import ConfigError
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.recipes.likely import likely_answer
from veripo_fast.recipes.view import MAIN, Completions, CompletionView, PromptView
from veripo_fast.reward.spans import answer_bounds
from veripo_fast.run.folder import RunDir
from veripo_fast.stages.moving_reference import answer_tokens
from veripo_fast.trainer import train
from veripo_fast.types import THINK_ANSWER, Form

CARE = {"stages": [{"kind": "grpo"}], "eval__at": "never", "grpo__steps": 3, "grpo__reference": "ema",
        "grpo__reference_every": 2, "grpo__reference_decay": 0.75, "reward__reference_logprobs": True,
        "reward__terms": [{"use": "accuracy"}, {"use": "format", "weight": 0.5}, {"use": "likely_answer"}]}
ASSERTING = '''
def told(asked):
    """The first step's reference is the policy: its log-probs are the engine's, up to rounding."""
    for completion in asked.completions:
        pairs = zip(completion.reference_logprobs, completion.logprobs, strict=True)
        assert max(abs(one - other) for one, other in pairs) < 1e-4
        assert (completion.answer is None) == (completion.answer_tokens is None)
    return [0.0] * len(asked.completions)
'''


# -- the bonus ------------------------------------------------------------------------------------------------------


def view_of(rows: list[tuple[float, list[float] | None]]) -> PromptView:
    """Completions of two reasoning tokens and an answer with these log-probs, by accuracy."""
    completions = [CompletionView("", {}, [0] * 9, [], True, accuracy, 1.0,
                                  None if answer is None else [-9.0, -9.0, *answer],
                                  None if answer is None else (2, 2 + len(answer))) for accuracy, answer in rows]
    return PromptView(policies.prompt_of("1+1?"), {MAIN: Completions(completions)})


def log(*values: float) -> list[float]:
    return [math.log(value) for value in values]


@pytest.mark.parametrize(("rows", "options", "expected"), [
    # p 0.8 and 0.4, mean 0.6; the third is wrong, however likely
    ([(1, log(0.8)), (1, log(0.4)), (0, log(0.9))], {}, [0.5, 0, 0]),
    # the geometric mean of two tokens: 0.6; both are at the mean
    ([(1, log(0.9, 0.4)), (1, log(0.6)), (0, None)], {"share": 1.0, "margin": 1e-9}, [1, 1, 0]),
    # 0.99 and 0.96 are both 0.95
    ([(1, log(0.99)), (1, log(0.96))], {}, [0.5, 0.5]),
    ([(1, log(0.61)), (1, log(0.59))], {"margin": 0.01}, [0.5, 0.5]),
    # eligible: above 0.1 and at least the mean 0.5
    ([(0.9, log(0.3)), (0.4, log(0.8)), (0.2, log(0.9))], {}, [0.45, 0, 0]),
    ([(0.1, log(0.3)), (0.1, log(0.8))], {}, [0, 0]),
    ([(1, None), (1, log(0.2))], {}, [0, 0.5]),
])
def test_the_bonus_by_hand(rows: list, options: dict[str, float], expected: list[float]) -> None:
    assert likely_answer(view_of(rows), **options) == pytest.approx(expected)


# -- where an answer lies among the tokens ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(ModelConfig(path=str(runs.model()), device="cpu"))


@pytest.mark.parametrize(("text", "form", "answer"), [
    ("<think>so 3.</think><answer>3</answer>", THINK_ANSWER, "3"),
    ("<think>so.</think><answer> the red box \n</answer>", THINK_ANSWER, "the red box"),
    ("<think>so \U0001f600 and 三.</think><answer>\U0001f600三 über</answer>", THINK_ANSWER, "\U0001f600三 über"),
    ("<think>so.</think> it is \\boxed{\\frac{1}{2}}.", Form(("think", "boxed")), "\\frac{1}{2}"),
])
def test_tokens_of_an_answer(policy: Policy, text: str, form: Form, answer: str) -> None:
    encoder = policy.encoder
    ids = [*encoder.encode_completion(text), encoder.eos_id]
    text = encoder.decode_completion(ids)
    place = answer_bounds(text, form)
    assert place is not None and text[slice(*place)] == answer
    found = answer_tokens(encoder, ids, text, form)
    assert found is not None
    begin, end = found
    tokens = encoder.tokenizer
    assert answer in tokens.decode(ids[begin:end])
    for narrower in ((begin + 1, end), (begin, end - 1)):
        assert answer not in tokens.decode(ids[slice(*narrower)])


def test_no_answer_has_no_tokens(policy: Policy) -> None:
    ids = policy.encoder.encode_completion("<think>so <answer>3</answer> <answer>4</answer>")
    assert answer_tokens(policy.encoder, ids, policy.encoder.decode_completion(ids), THINK_ANSWER) is None


# -- runs -----------------------------------------------------------------------------------------------------------


def test_rewards_are_told_what_the_reference_says(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(ASSERTING)
    terms = [{"use": "accuracy"}, {"use": f"{own}:told"}, {"use": "likely_answer"}]
    train(runs.config(tmp_path / "run", **CARE | {"grpo__steps": 1, "reward__terms": terms}))


def test_the_mean_by_hand(tmp_path: Path) -> None:
    """Every second step: 0.75 of what it was and 0.25 of the policy, in float32, from the start of the stage."""
    train(runs.config(tmp_path / "run", **CARE | {"grpo__steps": 4, "checkpoint__keep": 9}))
    checkpoints = RunDir(tmp_path / "run").checkpoints
    weights = {step: load_file(checkpoints / f"step_00000{step}" / "model.safetensors") for step in (1, 2, 3)}
    start = load_file(runs.model() / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    first = start[name].float()
    assert torch.equal(mean_of(checkpoints / "step_000001", name, first), first)
    moved = first.lerp(weights[2][name], 0.25)
    assert not torch.equal(moved, first)
    for step in (2, 3):
        torch.testing.assert_close(mean_of(checkpoints / f"step_00000{step}", name, first), moved, rtol=0, atol=1e-8)


def mean_of(checkpoint: Path, name: str, like: torch.Tensor) -> torch.Tensor:
    state = {f"reference/{name}": torch.zeros_like(like)}
    read_state(checkpoint / "trainer" / "optimizer", state, ONE)
    return state[f"reference/{name}"]


def test_in_bfloat16_the_mean_moves_too(tmp_path: Path) -> None:
    """By 0.5 % of a change, which bfloat16 mostly cannot hold."""
    options = CARE | {"model__dtype": "bfloat16", "grpo__reference_decay": 0.995, "grpo__reference_every": 1,
                      "checkpoint__keep": 9}
    train(runs.config(tmp_path / "run", **options))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    checkpoints = RunDir(tmp_path / "run").checkpoints
    start = load_file(runs.model() / "model.safetensors")[name]
    expected, coarse = start.float(), start
    for step in (1, 2):
        policy = load_file(checkpoints / f"step_00000{step}" / "model.safetensors")[name]
        expected, coarse = expected.lerp(policy.float(), 0.005), coarse.lerp(policy, 0.005)
    mean = mean_of(checkpoints / "step_000002", name, expected)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-8)
    assert (mean != start.float()).float().mean() > 0.5 and (coarse == start).float().mean() > 0.9


@pytest.mark.parametrize("moment", ["rename .*tmp-step_000002", "doing in reference of step 2"])
def test_killed_and_resumed_it_is_bitwise_the_same(tmp_path: Path, moment: str) -> None:
    assert_resumes(tmp_path, moment, lambda run: runs.config(run, **CARE))


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_two_ranks_give_what_one_process_gives(tmp_path: Path, backend: str) -> None:
    """Three prompts of two ranks: one of them has a pass of the reference less."""
    runs_of = {}
    for size in (1, 2):
        own = tmp_path / str(size)
        own.mkdir()
        config = runs.config(own / "run", **CARE | {"grpo__prompts_per_step": 3, "grpo__reference_every": 1,
                                                    "distributed__backend": backend if size == 2 else "auto"})
        ended = ranks.train(size, written(config, own))
        assert codes(ended) == [0] * size, ended
        runs_of[size] = own / "run"
    assert_close(runs_of[2], runs_of[1])


# -- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set reward.reference_logprobs to true"):
        Config(reward=RewardConfig(terms=(RewardTerm("likely_answer"),)))
    with pytest.raises(ConfigError, match=r"grpo.reference changes nothing"):
        Config(grpo=GrpoConfig(reference="ema"))
    with pytest.raises(ConfigError, match=r"reference_decay must be in \[0, 1\)"):
        GrpoConfig(reference="ema", reference_decay=1.0)
    with pytest.raises(ConfigError, match="cannot be combined with plan"):
        apply_overrides(Config(), {"reward.reference_logprobs": True, "plan.wordings": 2, "plan.pairing": "all",
                                   "data.keep_keys": ["new_questions", "problem"]})


def test_the_recipe_has_all_of_it() -> None:
    config: Any = load_config(REPOSITORY / "configs" / "recipes" / "grpo_care.yaml")
    assert config.grpo.reference == "ema" and config.needs_reference and config.reward.needs_reference
