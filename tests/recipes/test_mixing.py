"""Mixing weights: the shares of an epoch, which prompts it takes, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import policies
from veripo_fast.config.inputs import DataConfig
from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.data.order import PromptOrder, prompt_order
from veripo_fast.data.prompts import load_prompts
from veripo_fast.errors import ConfigError
from veripo_fast.recipes.mixing import mixed


def prompts_of(**counts: int):
    return [policies.prompt_of("?", prompt_id=f"{source}{number}", data_source=source)
            for source, count in counts.items() for number in range(count)]


PROMPTS = prompts_of(video=30, image=5, text=5)


def order_of(weights: dict[str, float], **options: int) -> PromptOrder:
    return prompt_order(PROMPTS, GrpoConfig(sampler="mixed", sampler_options={"weights": weights, **options}), 3)


def sources(numbers: list[int]) -> Counter[str]:
    return Counter(PROMPTS[number].data_source for number in numbers)


def test_an_epoch_has_the_shares_and_so_has_each_part_of_it() -> None:
    order = order_of({"video": 2, "image": 1, "text": 1})
    assert sources(order.take(0, 40)[0]) == {"video": 20, "image": 10, "text": 10}
    for start in range(0, 80, 8):
        counts = sources(order.take(start, 8)[0])
        assert 2 <= counts["video"] <= 6 and counts["image"] <= 4 and counts["text"] <= 4
    assert order.take(0, 40)[0] != order.take(40, 40)[0]


def test_a_source_is_gone_through_before_it_comes_again() -> None:
    """20 of 30 videos an epoch: three epochs hold each of them twice; images come eight times in two."""
    taken = order_of({"video": 2, "image": 1, "text": 1}).take(0, 120)[0]
    counts = Counter(taken)
    assert {counts[number] for number in range(30)} == {2}
    assert {counts[number] for number in range(30, 40)} == {6}


def test_a_weight_of_0_leaves_out_and_a_length_is_kept() -> None:
    taken = order_of({"video": 0.3, "image": 0.1, "text": 0}, length=10).take(0, 10)[0]
    assert sources(taken) == {"video": 8, "image": 2} or sources(taken) == {"video": 7, "image": 3}
    assert len(set(taken)) == 10


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 100)), min_size=1, max_size=5), st.integers(0, 3),
       st.integers(1, 60))
def test_shares_are_within_one_of_the_weights(groups, epoch: int, length: int) -> None:
    prompts = prompts_of(**{f"s{number}": count for number, (count, _) in enumerate(groups)})
    weights = {f"s{number}": weight for number, (_, weight) in enumerate(groups)}
    taken = mixed(prompts, epoch, 0, weights, length)
    counts = Counter(prompts[number].data_source for number in taken)
    assert len(taken) == length
    for source, weight in weights.items():
        assert abs(counts[source] - length * weight / sum(weights.values())) < 1


def test_a_source_whose_prompts_are_all_dropped_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    """grpo.drop_easy decides in the middle of a run; a source that is misspelt is refused all the same."""
    def order(**weights: float) -> PromptOrder:
        config = GrpoConfig(sampler="mixed", drop_easy=1.0, sampler_options={"weights": weights})
        return prompt_order(PROMPTS, config, 3)

    with_gone = order(video=1, image=1, text=1, gone=5).take(0, 30)
    assert with_gone == order_of({"video": 1, "image": 1, "text": 1}).take(0, 30)
    assert "no prompt is left of data_source 'gone'" in caplog.text
    with pytest.raises(ConfigError, match="weights leave out text"):
        order(video=1, image=1, texxt=1)


def test_a_source_that_never_comes_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Its share of an epoch is below a prompt, and every epoch has the same shares."""
    order_of({"video": 1000, "image": 1000, "text": 1}, length=7).take(0, 40)
    (record,) = caplog.records
    assert "the weight of text is too small for an epoch of 7 prompts, so none of its prompts" in record.getMessage()


@pytest.mark.parametrize(("weights", "sentence"), [
    ({"video": 1, "image": 1}, "weights leave out text; a weight of 0 leaves its prompts out"),
    ({"video": 1, "image": 1, "text": 1, "audio": 1}, "no prompt has the data_source 'audio'; there are image, text, "
     "video"),
    ({"video": -1, "image": 1, "text": 1}, "the weight of video must be a number of at least 0, got -1"),
    ({"video": float("nan"), "image": 1, "text": 1}, "got nan"),
    ({"video": True, "image": 1, "text": 1}, "got True"),
    ({"video": 0, "image": 0, "text": 0}, "no weight is above 0"),
    ([1, 2], "weights must be NAME: NUMBER"),
])
def test_weights_that_mean_nothing(weights, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        order_of(weights)
    assert sentence in str(error.value)


def test_a_file_names_the_records_that_name_no_source(tmp_path: Path) -> None:
    """So weights can be given to files, which is what most people have."""
    rows = [{"problem": "Why?", "solution": "<answer>4</answer>", "data_type": "text"},
            {"problem": "How?", "solution": "<answer>5</answer>", "data_type": "text", "data_source": "STAR"},
            {"problem": "Who?", "solution": "<answer>6</answer>", "data_type": "text", "data_source": None}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, skipped = load_prompts([str(file)], DataConfig(text_only=True))
    assert not skipped and [prompt.data_source for prompt in prompts] == ["questions", "STAR", "questions"]
