"""`veripo export-lmms-eval`: names, keys, hashes and numbers of what lmms-eval would have written."""

import hashlib
import json
from statistics import stdev

import pytest

from tests.evaluation.test_compare import folder, item
from tests.support import runs
from tests.support.run_compare import written
from veripo_fast.cli import main
from veripo_fast.evaluation.export import model_folder
from veripo_fast.rollout.store import read_groups

SAMPLE = ["doc_id", "target", "resps", "filtered_resps", "doc_hash", "prompt_hash", "target_hash", "veripo_accuracy",
          "veripo_format", "veripo_inconsistent", "input"]
"""Keys of a line at the commit that export.py names, but for the metrics."""


def exported(evaluation, out, *more):
    return main(["export-lmms-eval", str(evaluation), "--out", str(out), "--model", "org/deep/Qwen2.5-VL:7B", *more])


def test_a_real_evaluation(tmp_path, capsys):
    config = written(runs.config(tmp_path / "run", eval__samples=3), tmp_path)
    evaluation = tmp_path / "eval"
    assert main(["eval", "--config", str(config), "--out", str(evaluation)]) == 0
    capsys.readouterr()
    assert exported(evaluation, tmp_path / "out", "--mode", "sampled", "--task", "demo_val") == 0
    results_file, samples_file = sorted((tmp_path / "out" / "deep__Qwen2.5-VL__7B").iterdir())
    assert capsys.readouterr().out.splitlines() == [str(results_file), str(samples_file)]
    stamp = results_file.name.removesuffix("_results.json")
    assert samples_file.name == f"{stamp}_samples_demo_val.jsonl" and len(stamp) == len("20250310_103000")
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    groups = read_groups(evaluation / "sampled.parquet")
    assert [list(sample) for sample in samples] == [SAMPLE] * len(groups)
    for number, (sample, group) in enumerate(zip(samples, groups, strict=True)):
        assert sample["doc_id"] == number and sample["target"] == group.prompt.gold
        assert sample["resps"] == [[c.text for c in group.completions]] and len(sample["filtered_resps"]) == 3
        assert sample["input"] == group.prompt.text
        assert sample["prompt_hash"] == hashlib.sha256(group.prompt.text.encode()).hexdigest()
        assert sample["veripo_accuracy"] == pytest.approx(sum(c.accuracy for c in group.completions) / 3)
    results = json.loads(results_file.read_text())
    record = json.loads((evaluation / "evals.jsonl").read_text().splitlines()[1])
    scores = results["results"]["demo_val"]
    assert scores["veripo_accuracy,none"] == pytest.approx(record["accuracy"])
    assert scores["veripo_inconsistent,none"] == pytest.approx(record["inconsistency_rate"])
    values = [sample["veripo_accuracy"] for sample in samples]
    assert scores["veripo_accuracy_stderr,none"] == pytest.approx(stdev(values) / len(values) ** 0.5)
    assert results["n-samples"]["demo_val"] == {"original": 4, "effective": 4}
    assert results["task_hashes"]["demo_val"] == hashlib.sha256("".join(
        f"sample_{number}{sample['doc_hash']}" for number, sample in enumerate(samples)).encode()).hexdigest()
    assert results["config"]["gen_kwargs"]["max_new_tokens"] == "24" and results["n-shot"] == {"demo_val": 0}
    assert results["model_name"] == "org/deep/Qwen2.5-VL:7B"
    assert results["higher_is_better"]["demo_val"]["veripo_inconsistent"] is False


def test_what_is_refused(tmp_path, capsys):
    whole = folder(tmp_path / "a", greedy=[item("x", 1)])
    for more, sentence in ((["--mode", "sampled"], "has greedy, and no mode sampled"),
                           (["--task", "a/b"], "--task a/b may hold letters, digits and _ alone"),
                           ([], "greedy.parquet is missing: it holds the completions; evaluate again")):
        assert exported(whole, tmp_path / "out", *more) == 2
        assert sentence in capsys.readouterr().err
    assert exported(tmp_path / "gone", tmp_path / "out") == 2
    assert "holds no finished evaluation" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "expected"), [
    ("runs/one/checkpoints/step_000010/", "checkpoints__step_000010"), ("tiny", "tiny"),
    ("org/name", "org__name"), ('a<b>"c|d?', "a__b__c__d__")])
def test_names_of_models_as_lmms_eval_writes_them(name, expected):
    assert model_folder(name) == expected
