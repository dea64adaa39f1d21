"""Scores of a held-out evaluation against a calculation by hand, and `veripo eval`."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from tests.support import runs
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.cli import main
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.errors import ConfigError, DataError
from veripo_fast.evaluation import evaluate as module
from veripo_fast.evaluation.evaluate import evaluate, scores
from veripo_fast.evaluation.items import items_of
from veripo_fast.evaluation.progress import Progress
from veripo_fast.model.policy import load_policy
from veripo_fast.rollout.store import read_groups
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.types import Completion, Message, Prompt, RolloutGroup


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(path=str(runs.model()), device="cpu"))


@pytest.fixture
def run(policy, tmp_path):
    """Evaluates into tmp_path/MODE.parquet: `run(**changes, check=...)`."""
    def evaluated(check=lambda: None, **changes):
        config = runs.config(tmp_path, **changes)
        prompts, _ = load_prompts(config.data.eval, config.data)
        loader = PromptLoader(policy, config.video, config.data.max_prompt_tokens, lambda prompt, reason: None)
        try:
            return evaluate(TorchEngine(policy), loader, prompts, config, stage="s", check=check,
                            rows=lambda mode: tmp_path / f"{mode}.parquet")
        finally:
            loader.close()

    return evaluated


def test_scores_are_those_of_the_stored_completions(run, tmp_path):
    greedy, sampled = run(eval__samples=3)
    for record, mode, size in ((greedy, "greedy", 1), (sampled, "sampled", 3)):
        groups = read_groups(tmp_path / f"{mode}.parquet")
        completions = [c for group in groups for c in group.completions]
        by_type = defaultdict(list)
        for group in groups:
            by_type[group.prompt.problem_type].append(mean(c.accuracy for c in group.completions))
        accuracy = [value for values in by_type.values() for value in values]
        assert (record["stage"], record["mode"]) == ("s", mode)
        assert (record["prompts"], record["completions"]) == (runs.HELDOUT, len(completions)) == (4, 4 * size)
        assert record["accuracy"] == pytest.approx(mean(accuracy))
        assert record["by_type"] == pytest.approx({name: mean(values) for name, values in by_type.items()})
        assert record["mra"] == pytest.approx(mean(by_type["estimate"]))
        assert record["format_rate"] == pytest.approx(mean(c.format for c in completions))
        assert record["length_mean"] == pytest.approx(mean(len(c.token_ids) for c in completions))
        assert record["finished_rate"] == pytest.approx(mean(c.finish_reason == "stop" for c in completions))
        assert record["accuracy_low"] <= record["accuracy"] <= record["accuracy_high"]
        assert record["inconsistency_low"] <= record["inconsistency_rate"] <= record["inconsistency_high"]
        assert record["accurate_and_consistent_rate"] <= record["accuracy"] + 1e-12


def prompt(name, kind="number", gold="3"):
    return Prompt(name, (Message("user", ("How many?",)),), kind, gold)


def written(think, answer, accuracy):
    text = f"<think>{think}</think><answer>{answer}</answer>"
    return Completion([5] * len(text), text, [], "stop", 0, accuracy=accuracy, format=1.0)


def test_scores_by_hand(tmp_path):
    unfinished = Completion([5], "<think>", [], "length", 0, accuracy=0.0, format=0.0)
    groups = [
        RolloutGroup(prompt("a"), [written("so 3.", "3", 1.0), written("so 2.", "3", 1.0)]),
        RolloutGroup(prompt("b"), [written("so 1.", "1", 0.0), written("Hm.", "2", 0.0)]),
        RolloutGroup(prompt("c"), [written("so 3.", "3", 1.0), unfinished]),
    ]
    record = scores(groups, runs.config(tmp_path))
    assert record["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert record["inconsistency_rate"] == pytest.approx((0.5 + 0 + 0) / 3)
    assert record["no_verdict_rate"] == pytest.approx(2 / 6)
    assert record["inconsistency_of_verdicts"] == pytest.approx(1 / 4)
    assert record["accurate_and_consistent_rate"] == pytest.approx(2 / 6)
    assert record["accurate_without_verdict_rate"] == 0
    assert record["format_rate"] == record["finished_rate"] == pytest.approx(5 / 6)
    assert record["mra"] is None and record["by_type"] == {"number": pytest.approx(0.5)}
    assert "MRA" not in module.summary({"stage": "s", "mode": "greedy", **record})


def test_a_completion_that_nobody_scored_is_not_taken_for_a_wrong_one(tmp_path):
    groups = [RolloutGroup(prompt("a"), [written("so 3.", "3", 1.0), Completion([5], "x", [], "stop", 0)])]
    with pytest.raises(ValueError, match="completion 1 of prompt a has no accuracy: it is not scored"):
        scores(groups, runs.config(tmp_path))


def test_the_seed_decides(run):
    def without_times(records):
        return [{key: value for key, value in record.items() if key != "seconds"} for record in records]

    first, same, other = (without_times(run(seed=seed)) for seed in (0, 0, 1))
    assert first == same
    assert first[0]["accuracy"] == other[0]["accuracy"] and first[1] != other[1]  # greedy draws nothing


def test_limit_and_greedy_only(run, tmp_path):
    [record] = run(eval__limit=2, eval__samples=0)
    assert (record["mode"], record["prompts"]) == ("greedy", 2)
    assert not (tmp_path / "sampled.parquet").exists()


def test_an_interrupted_evaluation_stops_and_records_nothing(run, tmp_path):
    batches = []

    def check():
        batches.append(1)
        if len(batches) == 3:  # two batches of three and one prompt per mode
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(check)
    assert (tmp_path / "greedy.parquet").exists() and not (tmp_path / "sampled.parquet").exists()


def test_nothing_to_evaluate(run, tmp_path):
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "e.jsonl").write_text(json.dumps({"problem": "What?", "answer": "yes", "path": "page.mp4"}) + "\n")
    with pytest.raises(DataError, match=r"no evaluation prompt could be loaded; skipped.jsonl says why for each"):
        run(data__eval=[str(tmp_path / "e.jsonl")])


# -- veripo eval ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path):
    def make(**changes):
        path = tmp_path / "eval.yaml"
        path.write_text(to_yaml(runs.config(tmp_path / "run", **changes)))
        return str(path)

    return make


def test_the_command_prints_a_line_per_mode(config_file, tmp_path, capsys):
    lines = (runs.corpus() / "heldout.jsonl").read_text().splitlines()
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(runs.corpus() / "clips", data / "clips")
    (data / "empty.mp4").touch()
    lines += [json.dumps({"problem": "What?", "answer": "yes", "path": name}) for name in ("missing.mp4", "empty.mp4")]
    (data / "e.jsonl").write_text("\n".join(lines))
    assert main(["eval", "--config", config_file(data__eval=[str(data / "e.jsonl")]),
                 "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in (tmp_path / "out" / "evals.jsonl").read_text().splitlines()]
    assert [record["mode"] for record in records] == ["greedy", "sampled"]
    for line, record in zip(out, records, strict=False):
        assert f"{record['mode']}: accuracy {record['accuracy']:.3f} [" in line
        assert len(read_groups(tmp_path / "out" / f"{record['mode']}.parquet")) == record["prompts"] == 4
    why = tmp_path / "out" / "skipped.jsonl"
    assert out[2:] == [f"skipped: 1 records at load, 1 while decoding; {why} says why",
                       f"completions and scores: {tmp_path / 'out'}"]
    rows = [json.loads(line) for line in why.read_text().splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["missing.mp4", "empty.mp4"] and all(
        row["reason"] for row in rows)
    assert not (tmp_path / "run").exists()


def test_the_command_without_files(config_file, capsys):
    assert main(["eval", "--config", config_file(data__eval=[])]) == 2
    assert capsys.readouterr().err == "veripo: error: data.eval names no files to evaluate on\n"


# -- an evaluation that is stopped ------------------------------------------------------------------------------------

LINES = ("greedy.jsonl", "sampled.jsonl")


def command(config_file, out, monkeypatch=None, stop_after=None, **changes):
    """`veripo eval`, stopped after so many batches."""
    options = {"eval__prompts_per_batch": 1, "eval__samples": 2} | changes
    kept = Progress.keep
    if stop_after is not None:
        calls = []

        def keep(self, *arguments):
            kept(self, *arguments)
            calls.append(1)
            if len(calls) == stop_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(Progress, "keep", keep)
    code = main(["eval", "--config", config_file(**options), "--out", str(out)])
    monkeypatch.undo() if monkeypatch else None
    return code


def result(out):
    """What an evaluation leaves, times aside."""
    records = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    rows = [[replace(group, completions=[vars(c) for c in group.completions])
             for group in read_groups(out / f"{record['mode']}.parquet")] for record in records]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records], rows, [
        (out / name).read_text() for name in LINES]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_it_goes_on_where_it_was(config_file, tmp_path, monkeypatch, stop_after):
    """Four prompts, one a batch, in two modes: nothing is sampled twice, and the result is that of one go."""
    assert command(config_file, tmp_path / "whole") == 0
    assert command(config_file, tmp_path / "out", monkeypatch, stop_after) == 130
    sampled = []
    generate = TorchEngine.generate
    monkeypatch.setattr(TorchEngine, "generate", lambda self, prompts, *arguments, **options: (
        sampled.extend(item.prompt.prompt_id for item in prompts), generate(self, prompts, *arguments, **options))[1])
    assert command(config_file, tmp_path / "out") == 0
    assert len(sampled) == 8 - stop_after
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert not (tmp_path / "out" / "parts").exists()
    assert len(json.loads((tmp_path / "out" / "inputs.json").read_text())["commands"]) == 2


def test_a_part_of_another_evaluation_is_not_taken(config_file, tmp_path, monkeypatch, capsys):
    assert command(config_file, tmp_path / "out", monkeypatch, 2) == 130
    capsys.readouterr()
    assert command(config_file, tmp_path / "out", rollout__temperature=0.5, seed=9) == 2
    error = capsys.readouterr().err
    assert "holds a part of another evaluation (options: rollout.temperature has changed; options: seed has" in error
    other = tmp_path / "other.jsonl"
    other.write_text((runs.corpus() / "heldout.jsonl").read_text())
    assert command(config_file, tmp_path / "out", data__eval=[str(other)], data__media_root=str(runs.corpus())) == 2
    assert "data: " in capsys.readouterr().err
    assert command(config_file, tmp_path / "other", rollout__temperature=0.5) == 0
    assert command(config_file, tmp_path / "other") == 0  # what is whole is replaced


def test_nothing_that_can_be_decoded_leaves_the_reasons_and_no_part(config_file, tmp_path, capsys):
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "e.jsonl").write_text(json.dumps({"problem": "What?", "answer": "yes", "path": "page.mp4"}) + "\n")
    out = tmp_path / "out"
    assert command(config_file, out, data__eval=[str(tmp_path / "e.jsonl")]) == 2
    assert "skipped.jsonl says why for each" in capsys.readouterr().err
    assert "page.mp4" in (out / "skipped.jsonl").read_text() and not (out / "parts").exists()
    assert command(config_file, out) == 0  # another evaluation finds no part of this one
    assert not (out / "skipped.jsonl").exists()


def test_a_part_that_says_of_nothing_is_begun_anew(config_file, tmp_path, monkeypatch):
    assert command(config_file, tmp_path / "out", monkeypatch, 2) == 130
    (tmp_path / "out" / "inputs.json").write_text("torn")
    assert command(config_file, tmp_path / "out") == 0
    assert command(config_file, tmp_path / "whole") == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_folder_with_other_files_is_left_alone(config_file, tmp_path, capsys):
    """`parts` is a common name: what is in it and is none of an evaluation's must not be deleted."""
    own = tmp_path / "out" / "parts" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert command(config_file, tmp_path / "out") == 2
    assert "parts holds notes.txt, which is no part of an evaluation; name another folder" in capsys.readouterr().err
    assert own.read_text() == "mine" and not (tmp_path / "out" / "inputs.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/"])
def test_the_folder_of_a_run_is_not_written_over(config_file, tmp_path, capsys, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).mkdir() if name.endswith("/") else (run / name).touch()
    (run / "inputs.json").write_text("the run's")
    assert command(config_file, run) == 2
    assert "is the folder of a run, whose evals.jsonl and inputs.json an evaluation would replace" in (
        capsys.readouterr().err)
    assert (run / "inputs.json").read_text() == "the run's"


def test_out_that_cannot_be_made(config_file, tmp_path, capsys):
    """It is said before the policy is loaded."""
    (tmp_path / "file").touch()
    assert command(config_file, tmp_path / "file" / "out", model__path="nowhere") == 2
    assert f"out cannot be made: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err
    assert command(config_file, Path("/proc/veripo")) == 2
    assert "--out /proc/veripo cannot be made" in capsys.readouterr().err


def test_parts_of_another_process_are_not_taken(config_file, tmp_path, monkeypatch):
    """One that began behind our look at the folder, and died."""
    assert command(config_file, tmp_path / "out", monkeypatch, 2) == 130
    now = json.loads((tmp_path / "out" / "inputs.json").read_text())
    with pytest.raises(ConfigError, match="seed has changed"):
        Progress(tmp_path / "out", now | {"options": now["options"] | {"seed": "9"}})


def test_a_damaged_part_is_named(config_file, tmp_path, monkeypatch, capsys):
    assert command(config_file, tmp_path / "out", monkeypatch, 2) == 130
    part = tmp_path / "out" / "parts" / "greedy-00000001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    capsys.readouterr()
    assert command(config_file, tmp_path / "out") == 2
    assert f"{part} is not a rollout file of veripo" in capsys.readouterr().err


def test_lines_of_prompts(config_file, tmp_path):
    assert command(config_file, tmp_path / "out") == 0
    for mode, size in (("greedy", 1), ("sampled", 2)):
        items = [json.loads(line) for line in (tmp_path / "out" / f"{mode}.jsonl").read_text().splitlines()]
        groups = read_groups(tmp_path / "out" / f"{mode}.parquet")
        assert [item["prompt_id"] for item in items] == [group.prompt.prompt_id for group in groups]
        for item, group in zip(items, groups, strict=True):
            assert item["accuracy"] == [c.accuracy for c in group.completions] and len(item["answers"]) == size
            assert item["media"][0].endswith(".mp4") and len(item["consistent"]) == len(item["tokens"]) == size


def test_majority_and_pass_rate(tmp_path):
    groups = [
        RolloutGroup(prompt("a"), [written("", "2", 0.0), written("", "3", 1.0), written("", " 3. ", 1.0)]),
        RolloutGroup(prompt("b"), [written("", "2", 0.0), written("", "2", 0.0), written("", "3", 1.0)]),
        RolloutGroup(prompt("c"), [Completion([5], "x", [], "length", 0, accuracy=0.0, format=0.0)])]
    record = scores(groups, runs.config(tmp_path))
    assert record["majority_accuracy"] == pytest.approx(1 / 3) and record["pass_rate"] == pytest.approx(2 / 3)
    assert record["by_source"] == {"": pytest.approx((2 / 3 + 1 / 3 + 0) / 3)}
    assert [item["answers"] for item in items_of(groups)] == [["2", "3", "3."], ["2", "2", "3"], [None]]


def test_tasks_by_hand(tmp_path):
    """Grades of a task are averaged first; numbers count as VSI-Bench counts them in the official mean."""
    def group(task, accuracy, kind="choice", answer="A", gold="A"):
        side = json.dumps({"question_type": task} if task else {})
        asked = replace(prompt(f"{task}{accuracy}", kind, gold), side=side)
        return RolloutGroup(asked, [written("", answer, accuracy)])

    groups = [group("direction_easy", 1.0), group("direction_easy", 1.0), group("direction_hard", 0.0),
              group("count", 1.0, "estimate", "about 4", "4"), group("", 0.0)]
    config = runs.config(tmp_path, data__keep_keys=["question_type"], eval__task_key="question_type")
    record = scores(groups, config)
    assert record["by_task"] == {"count": 1.0, "direction": 0.5, "no task": 0.0}
    assert record["accuracy_of_tasks"] == pytest.approx(0.5)
    assert record["by_task_official"]["count"] == 0.0 and record["accuracy_of_tasks_official"] == pytest.approx(0.5 / 3)
    assert "mean of tasks 0.500" in module.summary({"stage": "s", "mode": "greedy", **record})
    assert "by_task" not in scores(groups, runs.config(tmp_path))


def test_a_suite_by_its_name(config_file, tmp_path, capsys):
    data = tmp_path / "data"
    rows = [json.loads(line) for line in (runs.corpus() / "heldout.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        (data / "scannet").mkdir(parents=True, exist_ok=True)
        shutil.copy(runs.corpus() / row.pop("path"), data / "scannet" / f"scene{number}.mp4")
        row |= {"dataset": "scannet", "scene_name": f"scene{number}", "question_type": f"task_{number % 2}"}
    (data / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--config", config_file(data__eval=[str(data / "test.jsonl")]), "--out", str(tmp_path / "out")]
    assert main(["eval", "--suite", "vsi-bench", *arguments, "--eval.samples", "0"]) == 0
    [record] = [json.loads(line) for line in (tmp_path / "out" / "evals.jsonl").read_text().splitlines()]
    assert record["prompts"] == 4 and set(record["by_task"]) == {"task_0", "task_1"}
    assert "mean of tasks" in capsys.readouterr().out
    assert main(["eval", "--suite", "vsi", *arguments]) == 2
    assert "there is no suite 'vsi'" in capsys.readouterr().err
