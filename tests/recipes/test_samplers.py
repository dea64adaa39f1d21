"""Order of the prompts: today's, that of the files, and one's own; which references there are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support import policies
from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.config.schema import Config
from veripo_fast.data.order import PromptOrder, prompt_order
from veripo_fast.errors import ConfigError
from veripo_fast.recipes.tables import REFERENCES
from veripo_fast.stages.reference import reference_folder

PROMPTS = [policies.prompt_of("?", prompt_id=f"p{number}", side=f'{{"pass_rate": {number % 3}}}')
           for number in range(7)]


def own(folder: Path, body: str, arguments: str = "prompts, epoch, seed", head: str = "import random, json") -> str:
    file = folder / f"order_{len(list(folder.iterdir()))}.py"
    file.write_text(f"{head}\ndef order({arguments}):\n    {body}\n")
    return f"{file}:order"


def test_the_default_is_the_order_that_always_was() -> None:
    order, before = prompt_order(PROMPTS, GrpoConfig(), 3), PromptOrder(7, 3)
    assert order.take(5, 20) == before.take(5, 20)


def test_the_order_of_the_files() -> None:
    assert prompt_order(PROMPTS, GrpoConfig(sampler="sequential"), 3).take(5, 5) == ([5, 6, 0, 1, 2], 10)


def test_an_order_of_ones_own_may_repeat_and_leave_out(tmp_path: Path) -> None:
    name = own(tmp_path, "return [i for i, p in enumerate(prompts) if json.loads(p.side)['pass_rate'] < most][:4] + "
                         "[epoch]", "prompts, epoch, seed, most=3")
    order = prompt_order(PROMPTS, GrpoConfig(sampler=name, sampler_options={"most": 2}), 0)
    assert order.take(0, 12) == ([0, 1, 3, 4, 0, 0, 1, 3, 4, 1, 0, 1], 12)
    assert order.take(7, 5)[0] == order.take(0, 12)[0][7:]  # a resume knows the position alone


def test_randomness_from_the_seed_is_the_same_again(tmp_path: Path) -> None:
    name = own(tmp_path, "return random.Random(f'{seed}/{epoch}').sample(range(len(prompts)), 5)")
    taken = [prompt_order(PROMPTS, GrpoConfig(sampler=name), seed).take(0, 10)[0] for seed in (1, 1, 2)]
    assert taken[0] == taken[1] != taken[2] and taken[0][:5] != taken[0][5:]


@pytest.mark.parametrize(("body", "sentence"), [
    ("return random.sample(range(7), 7)", "gave two orders for epoch 0 and seed 5"),
    ("return []", "gave no prompts for epoch 0"),
    ("return [7]", "gave 7 in epoch 0; it must give numbers of prompts, from 0 to 6"),
    ("return [-1]", "gave -1 in epoch 0"),
    ("return [1.0]", "gave 1.0 in epoch 0"),
    ("return list(prompts)", "it must give numbers of prompts"),
    ("return list(range(epoch + 1))", "gave 2 prompts in epoch 1 and 1 in epoch 0"),
    ("return None", "failed in epoch 0: TypeError"),
    ("raise KeyError('pass_rate')", "failed in epoch 0: KeyError: 'pass_rate' (order_0.py, line 3)"),
])
def test_a_broken_sampler_is_named(tmp_path: Path, body: str, sentence: str) -> None:
    name = own(tmp_path, body)
    random.seed(0)
    with pytest.raises(ConfigError) as caught:
        prompt_order(PROMPTS, GrpoConfig(sampler=name), 5).take(0, 20)
    assert sentence in str(caught.value) and f"sampler {name}" in str(caught.value)


def test_references(tmp_path: Path) -> None:
    model, started_from = tmp_path / "model", tmp_path / "step_000002"
    assert {name: function(model, started_from) for name, function in REFERENCES.items()} == {
        "stage_start": started_from, "base": model, "ema": started_from}
    teacher = own(tmp_path, "return model.parent / 'teacher'", "model, started_from")
    assert reference_folder(teacher, model, started_from) == tmp_path / "teacher"
    with pytest.raises(ConfigError, match="names no folder: TypeError"):
        reference_folder(own(tmp_path, "return None", "model, started_from"), model, started_from)
    with pytest.raises(ConfigError, match=r"grpo.reference changes nothing while"):
        Config(grpo=GrpoConfig(reference="base"))
    with pytest.raises(ConfigError, match="change nothing while reference is stage_start"):
        GrpoConfig(reference_decay=0.9)
