"""Columns of a reward: the shipped ones against numbers worked by hand, gates, weights, and every way to be refused."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import policies
from veripo_fast.config.load import load_config
from veripo_fast.config.objectives import GrpoConfig, RewardConfig
from veripo_fast.config.schema import Config
from veripo_fast.config.terms import RewardTerm
from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.recipes.checked import check_functions, own_files
from veripo_fast.recipes.own import own_function
from veripo_fast.recipes.tables import REWARDS
from veripo_fast.reward.groups import StreamedScores, reward_groups
from veripo_fast.stages.rollout_metrics import column_metrics
from veripo_fast.types import Completion, RolloutGroup

ANSWERS = (2, 3, 2, 4)


def group_of(lengths: tuple[int, ...] = (3, 4, 5, 6), answers: tuple[int, ...] = ANSWERS, side: str = "",
             name: str = "p") -> RolloutGroup:
    """A group that is right where its answer is 2."""
    prompt = policies.prompt_of("1+1?", prompt_id=name, problem_type="number", gold="2", side=side)
    return RolloutGroup(prompt, [
        Completion([1] * length, f"<think>so {answer}</think><answer>{answer}</answer>", [-0.5] * length, "stop", 0)
        for length, answer in zip(lengths, answers, strict=True)])


def config_of(*terms: RewardTerm, grpo: GrpoConfig | None = None, **reward: object) -> Config:
    return Config(reward=RewardConfig(terms=terms, **reward), grpo=grpo or GrpoConfig())  # type: ignore[arg-type]


def rewarded(config: Config, **group: object) -> RolloutGroup:
    made = group_of(**group)  # type: ignore[arg-type]
    reward_groups([made], config)
    return made


def rewards(group: RolloutGroup) -> list[float | None]:
    return [completion.reward for completion in group.completions]


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], str]:
    """Writes the body of a function into a file of its own; gives the name for a configuration."""
    def write(body: str, arguments: str = "asked", name: str = "mine", head: str = "") -> str:
        file = tmp_path / f"own_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(f"{head}\ndef {name}({arguments}):\n    {body}\n")
        return f"{file}:{name}"

    return write


# -- the shipped ones -------------------------------------------------------------------------------------------------


def test_the_default_is_accuracy_and_half_the_format() -> None:
    group = rewarded(Config())
    assert rewards(group) == [1.5, 0.5, 1.5, 0.5]
    assert [c.columns for c in group.completions][:2] == [{"accuracy": 1.0, "format": 1.0},
                                                          {"accuracy": 0.0, "format": 1.0}]
    assert column_metrics([group], RewardConfig()) == {}  # they have means of their own


def test_overlong_is_eq_13_of_dapo() -> None:
    """L_max 16 and a buffer of 4: 0 up to 12 tokens, (12 - L) / 4 up to 16, -1 beyond."""
    term = RewardTerm("overlong", options={"longest": 16, "buffer": 4})
    assert rewards(rewarded(config_of(term), lengths=(12, 13, 15, 40))) == [0.0, -0.25, -0.75, -1.0]


@pytest.mark.parametrize("on_error", ["stop", "count"])
def test_options_that_a_shipped_reward_cannot_use(on_error: str) -> None:
    term = RewardTerm("overlong", options={"longest": 16, "buffer": 0})
    with pytest.raises(TrainingError, match="reward overlong failed on prompt p, completion 0 of 4: ZeroDivision"):
        rewarded(config_of(term, on_error=on_error))


def test_the_length_window_of_video_r1() -> None:
    """0.2 for a right completion of 4 to 5 tokens, but only where more than one is right."""
    term = RewardTerm("length_window", weight=0.2, options={"shortest": 4, "longest": 5})
    assert rewards(rewarded(config_of(term), lengths=(4, 4, 5, 5))) == [0.2, 0.0, 0.2, 0.0]
    assert rewards(rewarded(config_of(term), lengths=(4, 4, 6, 5))) == [0.2, 0.0, 0.0, 0.0]
    assert rewards(rewarded(config_of(term), lengths=(4, 4, 5, 5), answers=(2, 3, 1, 4))) == [0.0] * 4


# -- one's own --------------------------------------------------------------------------------------------------------


def test_a_reward_sees_prompt_spans_tokens_logprobs_and_side_data(own: Callable[..., str]) -> None:
    name = own("""c = asked.completions
    assert list(asked.groups) == ["main"] and asked.groups["main"] is c and len(c) == 4
    assert asked.prompt.gold == "2" and asked.side["hint"] == [1, 2] and asked.frame_seconds == ()
    assert asked.embeddings is None and asked.grid_thw is None
    assert c[0].think == "so 2" and c[-1].answer == "4" and c[1:][0].text.startswith("<think>")
    assert c[0].spans == {"think": "so 2", "answer": "2"} and c[0].finished and c[0].format == 1
    return [scale * x.num_tokens + sum(x.logprobs) + x.accuracy for x in c]""", "asked, scale=1.0")
    group = rewarded(config_of(RewardTerm(name, options={"scale": 2.0})), side='{"hint": [1, 2]}')
    assert rewards(group) == [5.5, 6.0, 8.5, 9.0]
    assert group.completions[0].columns == {"mine": 5.5}


@pytest.mark.parametrize("values", ["[1, 2, 3, 4]", "(1.0, 2.0, 3.0, 4.0)", "torch.arange(1, 5)",
                                    "numpy.arange(1.0, 5.0)", "[torch.tensor(float(i)) for i in (1, 2, 3, 4)]"])
def test_a_column_may_be_a_list_a_tensor_or_an_array(own: Callable[..., str], values: str) -> None:
    name = own(f"return {values}", head="import numpy, torch")
    assert rewards(rewarded(config_of(RewardTerm(name)))) == [1.0, 2.0, 3.0, 4.0]


def test_gates_weights_and_normalised_columns(own: Callable[..., str]) -> None:
    name = own("return [4.0, 4.0, 2.0, 8.0]")
    gated = RewardTerm(name, weight=0.5, on="accuracy > 0")
    assert rewards(rewarded(config_of(RewardTerm("accuracy"), gated))) == [3.0, 0.0, 2.0, 0.0]
    assert rewards(rewarded(config_of(RewardTerm("accuracy", weight=-1.0), RewardTerm(name, weight=0.0)))) == [
        -1.0, 0.0, -1.0, 0.0]
    column = [4.0, 0.0, 2.0, 0.0]
    deviation = statistics.stdev(column)
    expected = [(value - statistics.mean(column)) / deviation for value in column]
    both = rewards(rewarded(config_of(RewardTerm(name, on="accuracy > 0", normalise=True))))
    assert both == pytest.approx(expected, abs=1e-5)
    assert rewards(rewarded(config_of(RewardTerm("format", normalise=True)))) == [0.0] * 4  # equal values say nothing


@pytest.mark.parametrize(("on", "open_at"), [("mine >= 3", {2, 3}), ("mine<2", {0}), ("mine != 2", {0, 2, 3}),
                                             ("mine == 2", {1}), ("mine <= 1.5", {0}), ("mine > -1", {0, 1, 2, 3})])
def test_every_comparison_of_a_gate(own: Callable[..., str], on: str, open_at: set[int]) -> None:
    name = own("return [1, 2, 3, 4]")
    group = rewarded(config_of(RewardTerm(name, weight=0.0), RewardTerm("format", on=on)))
    assert {number for number, value in enumerate(rewards(group)) if value} == open_at


def test_columns_are_logged_apart(own: Callable[..., str]) -> None:
    config = config_of(RewardTerm("accuracy"), RewardTerm(own("return [1, 2, 3, 6]"), name="other", weight=0.0))
    assert column_metrics([rewarded(config)], config.reward) == {"columns": {"other": 3.0}}


# -- broken ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "sentence"), [
    ("return [1.0, 2.0]", "on prompt p, returned 2 numbers for 4 completions"),
    ("return [1.0, float('nan'), 1.0, 1.0]", "returned nan for completion 1; it must be finite"),
    ("return [1.0, 1.0, float('inf'), 1.0]", "returned inf for completion 2"),
    ("return [1.0, '2', 1.0, 1.0]", "returned '2' for completion 1; it must be a number"),
    ("return [None] * 4", "returned None for completion 0"),
    ("return None", "returned NoneType; it must return a list"),
    ("return 1.0", "returned float; it must return a list"),
    ("return {0: 1.0}", "returned dict"),
])
@pytest.mark.parametrize("on_error", ["stop", "count"])
def test_what_is_no_column_is_refused_by_name(own: Callable[..., str], body: str, sentence: str, on_error: str) -> None:
    name = own(body)
    with pytest.raises(TrainingError) as caught:
        rewarded(config_of(RewardTerm(name), on_error=on_error))
    assert sentence in str(caught.value) and f"reward {name}" in str(caught.value)


def test_an_exception_names_function_prompt_completion_and_line(own: Callable[..., str]) -> None:
    name = own("return [1 / (2 - float(c.answer)) for c in asked.completions]")
    with pytest.raises(TrainingError) as caught:
        rewarded(config_of(RewardTerm(name)), answers=(3, 4, 2, 3), name="clip 7")
    assert str(caught.value).startswith(
        f"reward {name} failed on prompt clip 7, completion 2 of 4: ZeroDivisionError: ")
    assert "(own_0.py, line 3)" in str(caught.value) and "--allow-changes code" in str(caught.value)
    inside = own("return [c.num_tokens for c in asked.completions] + [random.choice([])]", head="import random")
    with pytest.raises(TrainingError, match=r"completion 3 of 4: IndexError: .* \(own_\d.py, line 3\)"):  # not random's
        rewarded(config_of(RewardTerm(inside)))
    with pytest.raises(TrainingError, match="before it read a completion: KeyError"):
        rewarded(config_of(RewardTerm(own("return asked.side['none']"))))


def test_failures_can_be_counted(own: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    """The column of a prompt whose reward failed is 0, gates on it are closed, and it is said once."""
    name = own("return [1 / (2 - float(c.answer)) for c in asked.completions]")
    config = config_of(RewardTerm("accuracy"), RewardTerm(name), RewardTerm("format", on="mine > -9"),
                       on_error="count")
    groups = [group_of(), group_of(answers=(3, 4, 3, 4)), group_of(name="q")]
    reward_groups(groups, config)
    assert rewards(groups[0]) == [1.0, 0.0, 1.0, 0.0] and rewards(groups[1]) == [0.0, 0.5, 0.0, 0.5]
    assert groups[0].completions[0].columns == {"accuracy": 1.0, "mine": None, "format": 1.0}
    assert column_metrics(groups, config.reward) == {"columns": {"mine": -0.75}, "reward_errors": 2}
    assert caplog.text.count("such a column is 0") == 1


def test_an_error_in_the_thread_reaches_the_caller(own: Callable[..., str]) -> None:
    config = config_of(RewardTerm(own("raise OSError('no judge')")))
    with pytest.raises(TrainingError, match="OSError: no judge"), StreamedScores(config) as scores:
        scores.add(0, group_of())
        scores.wait()


@pytest.mark.parametrize(("terms", "sentence"), [
    ([{"use": "acuracy"}], f"use must be one of {', '.join(REWARDS)}, or a function of your own as "
                           "module:function or path/file.py:function, got 'acuracy'; did you mean accuracy?"),
    ([{}], "got ''"),
    ([], "reward: terms is empty"),
    ([{"use": "format"}, {"use": "format"}], "two terms are named format"),
    ([{"use": "accuracy", "on": "format"}], "on must compare a column with a number"),
    ([{"use": "accuracy", "on": "speed > 1"}], "names none of the columns accuracy, format"),
    ([{"use": "my.py:f", "name": "accuracy"}], "name accuracy is that of a column which every completion has"),
    ([{"use": "accuracy", "weight": float("inf")}], "weight"),
    ([{"use": "accuracy", "option": 1}], "did you mean reward.terms.0.options?"),
])
def test_terms_that_are_refused_when_they_are_read(terms: list, sentence: str, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"reward": {"terms": terms}}))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml")
    assert sentence in str(caught.value)


def test_the_old_key_says_the_new_one() -> None:
    with pytest.raises(ConfigError, match=r"reward.format_weight is now the weight of a term: "
                                          r"`--reward.terms.format.weight 0.5`"):
        load_config(None, ["--reward.format-weight", "0.2"])
    with pytest.raises(ConfigError, match=r"stages.0.set: reward.format_weight is now"):
        load_config(None, ["--stages", "[{set: {reward.format_weight: 0}}]"])


def test_a_term_is_named_by_number_or_name() -> None:
    config = load_config(None, ["--reward.terms.format.weight", "0.2", "--reward.terms.0.weight=3",
                                "--stages", "[{set: {reward.terms.format.weight: 0}}]",
                                "--grpo.advantage-options.eps", "1e-4"])
    assert [term.weight for term in config.reward.terms] == [3.0, 0.2]
    assert config.stages[0].set == {"reward.terms.format.weight": 0.0}
    assert config.grpo.advantage_options == {"eps": 1e-4}
    with pytest.raises(ConfigError, match=r"reward.terms.speed does not exist: reward.terms has 2 entries"):
        load_config(None, ["--reward.terms.speed.weight", "0.2"])


def test_on_is_a_key_and_no_truth_value(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("reward: {terms: [{use: accuracy}, {use: format, on: accuracy > 0}]}\n")
    assert load_config(tmp_path / "run.yaml").reward.terms[1].on == "accuracy > 0"


def test_functions_that_cannot_be_used_are_refused_before_anything_is_loaded(own: Callable[..., str], tmp_path: Path
                                                                            ) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_the_kind\n")
    for name, options, sentence in [
            (f"{tmp_path}/absent.py:f", {}, "absent.py is no file"),
            (f"{broken}:f", {}, "broken.py cannot be imported: ModuleNotFoundError"),
            ("no_such_module:f", {}, "a file is named path/file.py:function"),
            (own("return []").replace(":mine", ":yours"), {}, "has no function yours"),
            (own("return []"), {"alpha": 1}, "cannot be called as mine(asked, alpha=1)"),
            (own("return []", "asked, alpha"), {}, "missing a required argument: 'alpha'"),
            ("overlong", {"longest": 3}, "missing a required argument: 'buffer'")]:
        with pytest.raises(ConfigError) as caught:
            check_functions(config_of(RewardTerm(name, options=options)))
        assert sentence in str(caught.value)
    good = own("return []")
    place = good.rpartition(":")[0]
    assert own_files(config_of(RewardTerm(good), RewardTerm("accuracy"))) == {place: Path(place)}


def test_a_function_may_lie_in_an_installed_module() -> None:
    assert own_function("statistics:mean") is statistics.mean
    check_functions(config_of(RewardTerm("operator:length_hint")))  # written in C, perhaps without a signature


# -- advantages -------------------------------------------------------------------------------------------------------


def test_an_advantage_of_ones_own_gets_the_rewards_of_a_group(own: Callable[..., str]) -> None:
    name = own("return rewards - rewards.median() - shift", "rewards, shift=0.0")
    groups = [group_of(), group_of(answers=(2, 2, 2, 3), name="q")]
    reward_groups(groups, config_of(RewardTerm("accuracy"), grpo=GrpoConfig(
        advantage=name, advantage_options={"shift": 0.25})))
    assert [c.advantage for c in groups[0].completions] == [0.75, -0.25, 0.75, -0.25]
    assert [c.advantage for c in groups[1].completions] == [-0.25, -0.25, -0.25, -1.25]


@pytest.mark.parametrize(("body", "sentence"), [
    ("return rewards[:2]", "on prompt p, returned 2 numbers for 4 completions"),
    ("return rewards / 0", "it must be finite"),
    ("raise KeyError('std')", "failed: KeyError: 'std' (own_0.py, line 3)"),
])
def test_a_broken_advantage_is_named(own: Callable[..., str], body: str, sentence: str) -> None:
    name = own(body, "rewards")
    with pytest.raises(TrainingError) as caught:
        rewarded(config_of(RewardTerm("accuracy"), grpo=GrpoConfig(advantage=name)))
    assert sentence in str(caught.value) and f"advantage {name}" in str(caught.value)


def test_eps_is_an_option() -> None:
    group = rewarded(config_of(RewardTerm("accuracy"), grpo=GrpoConfig(advantage_options={"eps": 1.0})))
    expected = [0.5 / (statistics.stdev([1, 0, 1, 0]) + 1.0)] * 2
    assert [c.advantage for c in group.completions][::2] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ConfigError, match="advantage no_std cannot be called"):
        check_functions(Config(grpo=GrpoConfig(advantage="no_std", advantage_options={"eps": 1.0})))
    with pytest.raises(ConfigError, match="did you mean no_std"):
        GrpoConfig(advantage="nostd")
