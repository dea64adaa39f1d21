"""The judge that reports: its settings, whether it also chose pairs, and an evaluation judged by a language model."""

import json

import pytest

from tests.support import judges, runs
from tests.support.run_compare import written
from veripo_fast.cli import main
from veripo_fast.config.judges import judge_name
from veripo_fast.errors import ConfigError
from veripo_fast.evaluation.evaluate import summary
from veripo_fast.evaluation.judging import judge_fields
from veripo_fast.rollout.texts import TorchTexts

DPO = [{"kind": "grpo"}, {"kind": "dpo"}]
SERVER = {"verifier.judge": "endpoint", "verifier.endpoint_url": "http://127.0.0.1:1/v1",
          "verifier.endpoint_model": "big"}


@pytest.mark.parametrize(("changes", "name", "chose"), [
    ({"stages": DPO}, "rules", True),
    ({"stages": [{"kind": "grpo"}]}, "rules", None),
    ({"stages": [{"kind": "grpo", "set": {"grpo.dpo_rate": 0.5}}]}, "rules", True),
    ({"stages": [{"kind": "grpo"}, {"kind": "dpo", "set": {"verifier.judge": "likelihood"}}]}, "rules", False),
    ({"stages": DPO, **SERVER}, "rules", False),
    ({"stages": DPO, **SERVER, "eval.judge": "endpoint"}, "endpoint big", True),
    ({"stages": DPO, **SERVER, "eval.judge": "endpoint",
      "eval.judge_options": {"endpoint_url": "http://127.0.0.1:2/v1"}}, "endpoint big", True),
    ({"stages": DPO, **SERVER, "eval.judge": "endpoint", "eval.judge_options": {"endpoint_model": "other"}},
     "endpoint other", False),
    ({"stages": DPO, **SERVER, "eval.judge": "llm", "eval.judge_options": {"llm_path": "models/small/"}}, "llm small",
     False),
    ({"stages": DPO, "verifier.judge": "llm", "verifier.llm_path": "models/small", "eval.judge": "llm"}, "llm small",
     True)])
def test_a_result_says_whether_its_judge_chose_pairs(tmp_path, changes, name, chose):
    config = runs.config(tmp_path, **changes)
    assert judge_fields(config) == {"judge": name, "judge_chose_pairs": chose}
    assert judge_name(config.reporting_judge) == name


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"eval.judge_options": {"llm_path": "x"}}, "eval.judge_options: the judge `rules` has no options"),
    ({"eval.judge": "llm"}, "judge `llm` needs llm_path"),
    ({"eval.judge": "llm", "eval.judge_options": {"path": "x"}}, "path is no option of the judge"),
    ({"eval.judge": "endpoint", "eval.judge_options": {"calibration": "planted"}}, "calibration is no option of the"),
    ({"eval.judge": "likelihood"}, "eval.judge must be")])
def test_judges_that_cannot_report(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        runs.config(tmp_path, **changes)


def test_the_line_names_a_judge_that_chose_the_pairs():
    record = {"stage": "dpo-1", "mode": "greedy", "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6,
              "mra": None, "format_rate": 1.0, "inconsistency_rate": 0.1, "length_mean": 30.0, "judge": "rules"}
    line = summary(record | {"judge_chose_pairs": True})
    assert "inconsistent 0.100 by rules, which also chose the pairs, 30 tokens" in line
    for other in (False, None):
        assert "inconsistent 0.100, 30 tokens" in summary(record | {"judge_chose_pairs": other})


def test_an_evaluation_by_a_language_model(tmp_path, monkeypatch):
    """Its verdicts are in the result, and are asked for once: sampled completions repeat greedy ones."""
    asked = []
    generate = TorchTexts.generate
    monkeypatch.setattr(TorchTexts, "generate", lambda self, prompts, *rest: (asked.append(len(prompts)), generate(
        self, prompts, *rest))[1])
    options = {"eval__judge": "llm", "eval__judge_options": {"llm_path": str(judges.judge_folder()),
                                                              "llm_max_failures": 1.0}}
    config = written(runs.config(tmp_path / "run", **options), tmp_path)
    for name in ("one", "two"):
        assert main(["eval", "--config", str(config), "--out", str(tmp_path / name)]) == 0
    one, two = ([json.loads(line) for line in (tmp_path / name / "evals.jsonl").read_text().splitlines()]
                for name in ("one", "two"))
    assert [row["judge"] for row in one] == ["llm judge"] * 2 and one[0]["judge_chose_pairs"] is False
    assert [row["inconsistency_rate"] for row in one] == [row["inconsistency_rate"] for row in two]
    kept = (tmp_path / "one" / "judge_cache.jsonl").read_text().splitlines()
    assert kept and asked[0] >= 1
    inputs = json.loads((tmp_path / "one" / "inputs.json").read_text())
    assert judges.judge_folder().name in inputs["options"]["eval.judge_settings"]
