"""Rewards and samplers of other systems against numbers worked by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support import policies
from veripo_fast.config.objectives import GrpoConfig, RewardConfig
from veripo_fast.config.plans import PlanConfig
from veripo_fast.config.schema import Config
from veripo_fast.config.terms import RewardTerm
from veripo_fast.data.order import prompt_order
from veripo_fast.data.wordings import worded
from veripo_fast.errors import ConfigError, DataError
from veripo_fast.recipes.boxes import iou
from veripo_fast.recipes.maps import likeness
from veripo_fast.recipes.pass_rates import curriculum, prioritized
from veripo_fast.recipes.temporal import chance, opens
from veripo_fast.reward.groups import reward_groups
from veripo_fast.rollout.store import write_groups
from veripo_fast.stages.plan_metrics import contrast_metrics
from veripo_fast.types import Completion, Form, RolloutGroup


def group_of(texts: list[str], lengths: list[int] | None = None, gold: str = "2", kind: str = "number", side: str = "",
             contrast: list[str] | None = None, **fields: object) -> RolloutGroup:
    prompt = policies.prompt_of("1+1?", problem_type=kind, gold=gold, side=side, **fields)

    def rows(given: list[str]) -> list[Completion]:
        sizes = lengths or [3] * len(given)
        return [Completion([1] * size, text, [-0.5] * size, "stop", 0)
                for size, text in zip(sizes, given, strict=True)]

    other = None if contrast is None else RolloutGroup(prompt, rows(contrast))
    return RolloutGroup(prompt, rows(texts), contrast=other)


def said(answer: object, think: str = "so") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def column(group: RolloutGroup, use: str, **options: object) -> list[float | None]:
    plan = PlanConfig(contrast="shuffle") if use == "temporal" else PlanConfig()
    reward_groups([group], Config(reward=RewardConfig(terms=(RewardTerm(use, options=options),)), plan=plan))
    return [completion.columns[use] for completion in group.completions]


# -- T-GRPO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("contrast", "share", "bonus"), [
    ([2, 2, 3, 3], 0.8, [1, 0, 1, 0]),   # 0.5 against 0.8 * 0.5
    ([2, 2, 2, 3], 0.8, [0, 0, 0, 0]),   # 0.5 against 0.6
    ([2, 2, 2, 3], 0.6, [1, 0, 1, 0]),   # 0.5 against 0.45
    ([3, 3, 3, 3], 1.0, [1, 0, 1, 0]),
])
def test_the_temporal_bonus(contrast: list[int], share: float, bonus: list[float]) -> None:
    group = group_of([said(2), said(3), said(2), said(4)], contrast=[said(answer) for answer in contrast])
    assert column(group, "temporal", share=share) == bonus
    assert [row.accuracy for row in group.contrast.completions] == [float(answer == 2) for answer in contrast]
    assert [row.reward for row in group.contrast.completions] == [None] * 4


def test_without_a_contrast_there_is_no_bonus() -> None:
    assert column(group_of([said(2), said(3)]), "temporal") == [0.0, 0.0]
    with pytest.raises(ConfigError, match=r"reward temporal compares with a contrast group; set plan.contrast"):
        Config(reward=RewardConfig(terms=(RewardTerm("temporal"),)))


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_chance_counts_every_division_of_both_groups(share: float) -> None:
    for main, contrast in (([1, 0, 0, 1, 1], [0, 1, 0]), ([0.25, 0.5, 1.0, 0.0], [0.75, 0.5])):
        pooled = [*main, *contrast]
        found = []
        for held in itertools.combinations(range(len(pooled)), len(contrast)):
            rest = [value for place, value in enumerate(pooled) if place not in held]
            found.append(opens(rest, [pooled[place] for place in held], share))
        assert chance(main, contrast, share) == pytest.approx(sum(found) / len(found), abs=1e-12)


def test_the_gate_is_logged_beside_chance() -> None:
    """Of two gates one is open. Of 6 divisions into 2 and 2: with 1 right of 4 half are open; with 3 right those where
    main has 2 right (half of them) and, at share 0.4, those where it has 1."""
    groups = [group_of([said(2), said(3)], contrast=[said(3), said(3)]),
              group_of([said(2), said(3)], contrast=[said(2), said(2)])]
    terms = (RewardTerm("accuracy"), RewardTerm("temporal", options={"share": 0.8}))
    config = Config(reward=RewardConfig(terms=terms), plan=PlanConfig(contrast="shuffle", contrast_size=2))
    reward_groups(groups, config)
    assert contrast_metrics(groups, config, 0) == {"contrast": {
        "groups": 2, "tower_runs": 0, "accuracy_mean": 0.5, "accuracy_mean_in_order": 0.5, "open_share": 0.5,
        "open_share_by_chance": 0.5}}
    assert contrast_metrics(groups, Config(), 0) == {}


# -- other rewards ----------------------------------------------------------------------------------------------------


def test_kimis_length_reward() -> None:
    """Lengths 2 to 6: 0.5, 0.25, 0 and -0.5; wrong ones have at most 0."""
    group = group_of([said(2), said(3), said(2), said(2)], lengths=[2, 3, 4, 6])
    assert column(group, "shortness") == [0.5, 0.0, 0.0, -0.5]
    assert column(group_of([said(2), said(3)]), "shortness") == [0.0, 0.0]


def test_a_map_is_as_good_as_its_cells_are_near() -> None:
    far = 1 - 5 / (10 * 2 ** 0.5)
    assert likeness({"a": [(0, 0)]}, {"a": [(0, 0)]}) == 1.0
    assert likeness({"a": [(3, 4)]}, {"a": [(0, 0)]}) == pytest.approx(far)
    assert likeness({"a": [(0, 0), (9, 9)]}, {"a": [(0, 0)]}) == 0.5  # one too many
    assert likeness({"a": [(0, 0)], "c": [(1, 1)]}, {"a": [(0, 0)], "b": [(1, 1), (2, 2)]}) == pytest.approx(1 / 3)
    assert likeness({}, {}) == 1.0 and likeness({"a": [(1, 1)]}, {}) == 0.0


def test_a_map_counts_for_right_answers_and_a_useless_one_takes_them_back() -> None:
    maps = ['{"sofa": [[1, 2]]}', '{"chair": [[1, 2]]}', "no map", '{"sofa": [[1, 2]]}']
    texts = [f"<think>so</think><map>{drawn}</map><answer>{answer}</answer>"
             for drawn, answer in zip(maps, (2, 2, 2, 3), strict=True)]
    group = group_of([*texts, said(2)], side='{"cognitive_map": {"sofa": [[1, 2]]}}',
                     form=Form(("think", "map?", "answer")))
    assert column(group, "spatial_map") == [1.0, -1.0, -1.0, 0.0, 0.0]
    assert column(group_of([said(2), said(2)]), "spatial_map") == [0.0, 0.0]


def test_numbers_beyond_all_floats_earn_nothing_and_stop_nothing() -> None:
    """A policy may write any number of digits; a run must not end by it."""
    huge = "9" * 400
    group = group_of([f'<think>so</think><map>{{"sofa": [[{huge}, 2]]}}</map><answer>2</answer>', said(2)],
                     side='{"cognitive_map": {"sofa": [[1, 2]]}}', form=Form(("think", "map?", "answer")))
    assert column(group, "spatial_map") == [-1.0, 0.0]
    box = f"[0, 0, {huge}, {huge}]"
    assert column(group_of([said(box, box), said("[0, 0, 1, 1]", "[0, 0, 1, 1]")], kind="box", gold="[0, 0, 1, 1]"),
                  "agreement") == [0.0, 1.0]


def test_reasoning_that_agrees_with_its_answer() -> None:
    choice = group_of([said("A", "not B but A"), said("A", "A, no, B"), said("A", "hm")], gold="A", kind="choice",
                      options=("x", "y"))
    assert column(choice, "agreement") == [1.0, 0.0, 0.0]
    assert column(group_of([said(2, "3 then 2.0"), said(2, "2 then 3")]), "agreement") == [1.0, 0.0]
    assert column(group_of([said("a red  car", "I see A red car."), said("a bus", "a car")], kind="text", gold="a bus"),
                  "agreement") == [1.0, 0.0]
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0 and iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    boxes = group_of([said("[0, 0, 2, 2]", "at [9, 9, 9, 9], no, [1, 0, 3, 2]")], kind="box", gold="[0, 0, 2, 2]")
    assert column(boxes, "agreement") == [pytest.approx(1 / 3)]


# -- samplers ---------------------------------------------------------------------------------------------------------


RATES = (0.5, 0.0, 1.0, 0.25, 0.5)
PROMPTS = [policies.prompt_of("?", prompt_id=f"p{number}", side=f'{{"pass_rate": {rate}}}')
           for number, rate in enumerate(RATES)]


def test_a_curriculum_goes_from_easy_to_hard() -> None:
    assert curriculum(PROMPTS, 0, 0) == curriculum(PROMPTS, 3, 1) == [2, 0, 4, 3]
    assert curriculum(PROMPTS, 0, 0, above=0.1, below=0.9) == [0, 4, 3]
    order = prompt_order(PROMPTS, GrpoConfig(sampler="curriculum"), 0)
    assert order.take(0, 6)[0] == [2, 0, 4, 3, 2, 0]


def test_hard_prompts_are_drawn_more_often() -> None:
    drawn = [number for epoch in range(400) for number in prioritized(PROMPTS, epoch, 7)]
    assert prioritized(PROMPTS, 1, 7) == prioritized(PROMPTS, 1, 7) != prioritized(PROMPTS, 2, 7)
    total = sum(1 - rate for rate in RATES)
    for number, rate in enumerate(RATES):
        assert drawn.count(number) / len(drawn) == pytest.approx((1 - rate) / total, abs=0.03)
    assert 2 in {number for epoch in range(50) for number in prioritized(PROMPTS, epoch, 7, floor=0.5)}


def test_measured_pass_rates(tmp_path: Path) -> None:
    groups = [group_of([said(2), said(3)], prompt_id="p0"), group_of([said(2), said(2)], prompt_id="p1")]
    reward_groups(groups, Config())
    write_groups(tmp_path / "step_000000.parquet", groups, "grpo-1", 0)
    prompts = [policies.prompt_of("?", prompt_id=name) for name in ("p0", "p1")]
    assert curriculum(prompts, 0, 0, measured=str(tmp_path)) == [1, 0]
    order = GrpoConfig(sampler="curriculum", sampler_options={"measured": str(tmp_path)})
    with pytest.raises(ConfigError, match="curriculum failed in epoch 0: ValueError: prompt p9 has no pass rate"):
        prompt_order([policies.prompt_of("?", prompt_id="p9")], order, 0)
    with pytest.raises(ConfigError, match="prompt p0 has no pass rate in its record under pass_rate"):
        prompt_order(prompts, GrpoConfig(sampler="curriculum"), 0)
    with pytest.raises(ConfigError, match="holds no rollouts; name a folder as RUN/rollouts/STAGE"):
        prompt_order(prompts, GrpoConfig(sampler="prioritized", sampler_options={"measured": "nowhere"}), 0)


# -- wordings ---------------------------------------------------------------------------------------------------------


def test_other_wordings_of_a_question() -> None:
    plan = PlanConfig(wordings=2)
    side = '{"problem": "How many?", "new_questions": ["What number?", "Count."]}'
    prompt = policies.prompt_of("How many?\nThink first.", side=side)
    one, other = worded([prompt], plan)
    assert one is prompt and other.text == "What number?\nThink first." and other.prompt_id == "p/wording-1"
    with pytest.raises(DataError, match="needs 3 texts under new_questions"):
        worded([prompt], PlanConfig(wordings=4))
    with pytest.raises(DataError, match="its question stands 2 times"):
        worded([policies.prompt_of("How many? How many?", side=side)], plan)
    with pytest.raises(DataError, match=r"plan.question_key problem is no text"):
        worded([policies.prompt_of("How many?")], plan)
