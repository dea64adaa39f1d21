"""No verdict counts neither as consistent nor as inconsistent, in scores and in the account of pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import runs
from tests.support.verifier_groups import prompt, written
from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.evaluation.evaluate import scores
from veripo_fast.types import Completion, RolloutGroup
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.verify import verify


def completion(think: str, answer: str, accuracy: float) -> Completion:
    text = written(think, answer)
    return Completion(list(text.encode()), text, [0.0] * len(text.encode()), "stop", 0, accuracy, 1.0, accuracy, 0.0)


def test_an_accurate_answer_without_a_verdict_is_not_counted_as_consistent(tmp_path: Path) -> None:
    to = prompt("number", "3")
    groups = [RolloutGroup(to, [completion("so 3.", "3", 1.0), completion("so 2.", "3", 1.0)]),
              RolloutGroup(to, [completion("Hm.", "3", 1.0), completion("Hm.", "1", 0.0)])]
    record = scores(groups, runs.config(tmp_path))
    assert record["accuracy"] == pytest.approx(3 / 4)
    assert record["accurate_and_consistent_rate"] == pytest.approx(1 / 4)
    assert record["accurate_without_verdict_rate"] == pytest.approx(1 / 4)
    assert record["no_verdict_rate"] == pytest.approx(2 / 4)
    assert record["inconsistency_of_verdicts"] == pytest.approx(1 / 2)
    silent = scores([groups[1]], runs.config(tmp_path))
    assert silent["accurate_and_consistent_rate"] == 0 and silent["inconsistency_of_verdicts"] is None


@pytest.mark.parametrize(("think", "without"), [("It moves to the side I name below, slowly", 1), ("so 3.", 0)])
def test_a_pair_whose_chosen_side_has_no_verdict_is_counted_apart(think: str, without: int) -> None:
    to = prompt("number", "3")
    loop = "I look at it once more and think " * 20 + "so 3."
    groups = [RolloutGroup(to, [completion(think, "3", 1.0), completion(loop, "3", 1.0)])]
    result = verify(groups, VerifierConfig(families=("repetition",), max_length_ratio=100.0, min_length_ratio=0.0),
                    RulesJudge(), len, lambda text: list(text.encode()), 0, 0, progress=False)
    account = result.account.to_json()
    assert account["kept"] == {"repetition": 1} and account["kept_without_verdict"] == {"repetition": without}
