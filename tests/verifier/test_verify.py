"""The verifier as one step, its files, and `veripo verify`."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from tests.support.verifier_groups import encode, group, prompt, written
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.config.schema import Config
from veripo_fast.errors import DataError, JudgeError
from veripo_fast.rollout.store import write_groups
from veripo_fast.verifier.judge_endpoint import EndpointJudge
from veripo_fast.verifier.judge_likelihood import LikelihoodJudge
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.store import read_pairs, verify_files, write_result
from veripo_fast.verifier.verify import make_judge, verify

CONFIG = VerifierConfig(families=("accuracy", "consistency", "reflection", "repetition"))
RIGHT, WRONG, LUCKY = (written(f"0s left. so {side}.", letter)
                       for side, letter in (("right", "B"), ("left", "A"), ("left", "B")))


def scores_b(to, prefixes, continuations):
    return [-1.0 if continuation == "B</answer>" else -2.0 for continuation in continuations]


def groups():
    return [group(RIGHT, WRONG, LUCKY, "<think>cut"), group(WRONG, WRONG, to=prompt(prompt_id="p1")), group()]


def verified(config=CONFIG, judge=None):
    return verify(groups(), config, judge or RulesJudge(), lambda text: len(text.split()), encode, 0, seed=0,
                  progress=False)


def test_verify():
    result = verified()
    assert [len(row) for row in result.verdicts] == [4, 2, 0]
    assert [verdict.consistent for verdict in result.verdicts[0]] == [True, True, False, None]
    assert {pair.family for pair in result.pairs} == {"accuracy", "consistency", "reflection"}
    assert result.account.to_json()["completions"] == 6


def test_progress_counts_every_completion(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **options):
            self.total, self.n, self.options = total, 0, options
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            self.n += count

    monkeypatch.setattr("veripo_fast.verifier.verify.tqdm", Bar)
    verified()
    assert [(bar.total, bar.n, bar.options["disable"]) for bar in bars] == [(6, 6, True)]


def test_files_round_trip(tmp_path):
    result = verified()
    write_result(tmp_path / "out", result)
    assert read_pairs(tmp_path / "out" / "pairs.parquet") == result.pairs
    rows = pq.read_table(tmp_path / "out" / "verdicts.parquet").to_pylist()
    assert [(row["group"], row["index"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert rows[2]["consistent"] is False and rows[3]["consistent"] is None and rows[3]["flags"] == [
        "format", "unfinished", "wrong"]
    assert json.loads((tmp_path / "out" / "account.json").read_text())["pairs"] == len(result.pairs)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "account.json", "pairs.parquet", "verdicts.parquet"]


def test_no_pairs_is_a_file_too(tmp_path):
    write_result(tmp_path, replace(verified(), pairs=[], verdicts=[]))
    assert read_pairs(tmp_path / "pairs.parquet") == []


def test_pairs_are_written_last(tmp_path, monkeypatch):
    write_result(tmp_path, verified())

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("veripo_fast.verifier.store.atomic_write_text", full)
    with pytest.raises(OSError, match="disk full"):
        write_result(tmp_path, verified())
    assert not (tmp_path / "pairs.parquet").exists()


def test_read_pairs_refuses_other_files(tmp_path):
    (tmp_path / "text").write_text("no")
    write_groups(tmp_path / "rollouts", groups(), "grpo-1", 0)
    for name in ("text", "rollouts", "missing"):
        with pytest.raises(DataError, match=name):
            read_pairs(tmp_path / name)


def test_make_judge(tmp_path):
    assert isinstance(make_judge(CONFIG), RulesJudge)
    assert isinstance(make_judge(VerifierConfig(judge="likelihood"), scorer=lambda: scores_b), LikelihoodJudge)
    endpoint = VerifierConfig(judge="endpoint", endpoint_url="http://127.0.0.1:9/v1", endpoint_model="m")
    assert isinstance(make_judge(endpoint, cache_path=tmp_path / "cache"), EndpointJudge)
    with pytest.raises(JudgeError, match="likelihood"):
        make_judge(VerifierConfig(judge="likelihood"))


def test_likelihood_margin_comes_from_the_configuration():
    for margin, expected in ((0.5, True), (1.5, None)):
        judge = make_judge(VerifierConfig(judge="likelihood", likelihood_margin=margin), scorer=lambda: scores_b)
        assert verified(judge=judge).verdicts[0][0].consistent is expected


@pytest.fixture
def fake_model(monkeypatch):
    """Stands in for the tokenizer and the model: these tests are about files."""
    used = []
    encoder = SimpleNamespace(encode_completion=encode, eos_id=0)
    loader = SimpleNamespace(load_one="load", close=lambda: used.append("closed"))
    patches = {"model.encoding.PromptEncoder": lambda path: encoder,
               "model.checkpoint_files.resolve_path": lambda path: used.append(path) or path,
               "model.policy.load_policy": lambda config: ("policy", config.path),
               "model.scorer.answer_scorer": lambda policy, load: used.append((policy, load)) or scores_b,
               "cache.loader.PromptLoader": lambda *_: loader}
    for name, value in patches.items():
        monkeypatch.setattr(f"veripo_fast.{name}", value)
    return used


def test_verify_files_reads_files_and_folders(tmp_path, fake_model, capsys):
    first, second, third = groups()[:1], groups()[1:], [group(RIGHT, to=prompt(prompt_id="p9"))]
    write_groups(tmp_path / "in" / "step_000000.parquet", first, "grpo-1", 0)
    write_groups(tmp_path / "in" / "step_000001.parquet", second, "grpo-1", 1)
    write_groups(tmp_path / "one.parquet", third, "grpo-1", 2)
    config = Config(verifier=CONFIG, model=ModelConfig(path="some-model"))
    one = tmp_path / "one.parquet"
    result = verify_files([tmp_path / "in", one, one], tmp_path / "out", config)
    assert [row[0].prompt_id for row in result.verdicts] == ["p0", "p1", "p9"]
    assert read_pairs(tmp_path / "out" / "pairs.parquet") == result.pairs == verified().pairs
    assert fake_model == ["some-model"] and "7 completions" in capsys.readouterr().out


def test_verify_files_with_the_likelihood_judge(tmp_path, fake_model):
    write_groups(tmp_path / "step_000000.parquet", groups(), "grpo-1", 0)
    config = Config(verifier=VerifierConfig(judge="likelihood"))
    result = verify_files([tmp_path], None, config, model_path="other")
    assert [verdict.consistent for verdict in result.verdicts[0]] == [True, False, True, None]
    assert fake_model == ["other", (("policy", "other"), "load"), "closed"]
    assert (tmp_path / "verifier" / "pairs.parquet").exists()


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_verify_files_names_what_is_missing(tmp_path, fake_model, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=missing):
        verify_files([tmp_path / missing], None, Config())
