"""Steps with contrast groups, with several rounds of sampling and with other wordings, in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support import policies, runs
from tests.support.run_compare import assert_resumes
from veripo_fast.cache.contrasts import contrast_by_frame
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.inputs import DataConfig
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.plans import PlanConfig
from veripo_fast.config.schema import Config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.errors import ConfigError, DataError
from veripo_fast.model.tower import Tower
from veripo_fast.reward.groups import has_signal
from veripo_fast.rollout.store import read_groups
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.stages.batches import Sampler
from veripo_fast.trainer import train
from veripo_fast.types import Completion, RolloutGroup

TEMPORAL = [{"use": "accuracy"}, {"use": "format"}, {"use": "temporal", "weight": 0.3}]
CONTRAST = {"plan__contrast": "shuffle", "plan__contrast_size": 2, "reward__terms": TEMPORAL}
REFILL = {"plan__refill": 2, "grpo__steps": 3, "grpo__prompts_per_step": 4, "rollout__group_size": 2}


def one_stage(run: Path, **changes: Any) -> Config:
    return runs.config(run, **({"stages": [{"kind": "grpo"}], "eval__at": "never"} | changes))


def trained(run: Path, **changes: Any) -> tuple[RunDir, list[dict[str, Any]]]:
    train(one_stage(run, **changes))
    return RunDir(run), read_records(RunDir(run).metrics)


def test_a_contrast_costs_no_run_of_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where the tower runs, in the updates too; and what is sampled with the frames in order stays bitwise."""
    runs.model()  # taught before anything is counted
    calls: list[int] = []
    plain = Tower.vision_features_of
    monkeypatch.setattr(Tower, "vision_features_of", lambda *given: (calls.append(len(given[1])), plain(*given))[1])
    counts, firsts, towers = [], [], []
    for name, changes in (("plain", {}), ("contrast", CONTRAST)):
        run, records = trained(tmp_path / name, model__freeze_vision=True, **changes)
        counts.append(sum(calls))
        towers.append([record["tower_runs"] for record in records])
        firsts.append([[row.token_ids for row in group.completions]
                       for group in read_groups(run.rollouts("grpo-1", 0))])
        calls.clear()
    assert counts[0] == counts[1] > 0 and towers[0] == towers[1] and firsts[0] == firsts[1]
    for step, record in enumerate(records):
        assert record["contrast"]["tower_runs"] == 0 and record["contrast"]["groups"] > 0
        assert 0 <= record["contrast"]["open_share_by_chance"] <= 1
        contrasts = read_groups(run.contrasts("grpo-1", step))
        assert len(contrasts) == record["contrast"]["groups"]
        assert all(len(group.completions) == 2 and group.prompt.media for group in contrasts)
        assert all(row.accuracy is not None and row.reward is None for group in contrasts for row in group.completions)
        accuracies = [row.accuracy for group in contrasts for row in group.completions]
        assert record["contrast"]["accuracy_mean"] == pytest.approx(sum(accuracies) / len(accuracies))
        for group in read_groups(run.rollouts("grpo-1", step)):
            for row in group.completions:
                assert row.reward == row.accuracy + row.format + 0.3 * row.columns["temporal"]


def test_single_frames_are_decoded_and_encoded_anew(tmp_path: Path) -> None:
    policy = policies.policy("qwen3_vl", freeze_vision=True)
    prompts, _ = load_prompts((str(runs.corpus() / "train.jsonl"),), DataConfig())
    loader = PromptLoader(policy, runs.VIDEO, 4096, lambda prompt, reason: None)
    item = loader.load(prompts[:1])[0]
    before = loader.work
    other = contrast_by_frame(loader, item, "reverse", 0)
    assert (loader.work - before).tower_runs == (loader.work - before).video_decodes == 1
    assert other is not None and other.features is not None and item.features is not None
    frames = [(kind, pixels.flip(0), seconds) for kind, pixels, seconds in loader.frames_of(item.prompt)]
    assert (loader.tower_output(frames, "x")[1].embeddings == other.features.embeddings).all()
    assert not (other.features.embeddings == item.features.embeddings).all()
    loader.close()
    _, records = trained(tmp_path / "run", grpo__steps=1, model__freeze_vision=True,
                         **CONTRAST | {"plan__contrast_by": "frame"})
    assert records[0]["contrast"]["tower_runs"] == records[0]["contrast"]["groups"] > 0


def test_a_batch_is_refilled_until_it_has_signal(tmp_path: Path) -> None:
    run, records = trained(tmp_path / "run", **REFILL)
    for step, record in enumerate(records):
        groups = read_groups(run.rollouts("grpo-1", step))
        live = sum(map(has_signal, groups))
        refill = record["refill"]
        assert (refill["groups"], refill["live"]) == (len(groups), live) == (record["prompts"], live)
        assert refill["surplus"] == max(live - 4, 0) and refill["missing"] == max(4 - live, 0)
        assert 1 <= refill["rounds"] <= 3 and (refill["rounds"] == 3 or live >= 4)
    assert any(record["refill"]["rounds"] > 1 for record in records)


def test_the_cap_holds_where_nothing_ever_has_signal(tmp_path: Path) -> None:
    terms = [{"use": "accuracy", "weight": 0.0}]
    _, records = trained(tmp_path / "run", grpo__steps=1, plan__refill=2, plan__oversample=1.5, reward__terms=terms)
    assert records[0]["refill"] == {"rounds": 3, "groups": 18, "live": 0, "surplus": 0, "missing": 4}
    assert records[0]["updates"] == 0


@pytest.mark.parametrize("changes", [CONTRAST, CONTRAST | REFILL], ids=["contrast", "refill"])
def test_killed_and_resumed_it_is_bitwise_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    _, said = assert_resumes(tmp_path, "rename .*tmp-step_000002",
                             lambda run: one_stage(run, **({"grpo__steps": 3} | changes)))
    assert changes is not CONTRAST or said.count("are used again") == 2, said  # the contrast's too


def test_every_completion_trains_under_every_wording(tmp_path: Path) -> None:
    """Old log-probs of later updates are the trainer's, under the wording that is trained."""
    rows = [json.loads(line) for line in (runs.corpus() / "train.jsonl").read_text().splitlines()]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row | {"new_questions": [f"Say: {row['problem']}"]}) + "\n" for row in rows))
    run, records = trained(
        tmp_path / "run", data__train=[str(file)], data__media_root=str(runs.corpus()), plan__wordings=2,
        plan__pairing="all", data__keep_keys=["problem", "new_questions"], grpo__updates_per_rollout=2,
        grpo__learning_rate=1e-5)
    for step, record in enumerate(records):
        groups = read_groups(run.rollouts("grpo-1", step))
        assert len(groups) == 8 and record["prompts_without_pairs"] == 0 and "parity_max" not in record
        for one, other in zip(groups[::2], groups[1::2], strict=True):
            assert other.prompt.prompt_id == f"{one.prompt.prompt_id}/wording-1"
            assert other.prompt.text.startswith("Say: ") or "\nSay: " in other.prompt.text
    assert any(record.get("grad_norm", 0) > 0 for record in records)
    assert all(record.get("ratio_max", 1) < 1.1 for record in records)  # under another wording it would be far off


def test_unfinished_completions_do_not_enter_the_loss() -> None:
    rows = [Completion([1], "", [0.0], reason, 0, advantage=1.0) for reason in ("stop", "length", "stop")]
    group = RolloutGroup(policies.prompt_of("?"), rows)
    entering = Sampler._entering(SimpleNamespace(plan=PlanConfig(mask_unfinished=True)), group)
    assert entering.completions == [rows[0], rows[2]] and len(group.completions) == 3
    assert Sampler._entering(SimpleNamespace(plan=PlanConfig()), group) is group


def test_masked_and_cut_everywhere_nothing_is_learnt(tmp_path: Path) -> None:
    _, records = trained(tmp_path / "run", grpo__steps=1, plan__mask_unfinished=True, rollout__max_new_tokens=2,
                         reward__terms=[{"use": f"{_length(tmp_path)}"}])
    assert records[0]["finished_share"] == 0 and records[0]["updates"] == 0


def _length(folder: Path) -> str:
    file = folder / "own.py"
    file.write_text("def place(asked):\n    return list(range(len(asked.completions)))\n")
    return f"{file}:place"


def test_a_contrast_needs_a_video(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    record = {"problem": "Up?", "data_type": "text", "problem_type": "free-form", "solution": "A"}
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=r"has plan.contrast shuffle, and none of its 1 prompts shows a video"):
        train(one_stage(tmp_path / "run", data__train=[str(file)], plan__contrast="shuffle"))


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"plan.contrast": "shuffle", "rollout.engine": "vllm", "rollout.vision": "pixels", "model.freeze_vision": False},
     "plan.contrast needs rollout.vision output"),
    ({"plan.contrast": "shuffle", "plan.wordings": 2}, "contrast and wordings cannot be combined"),
    ({"plan.refill": 1, "plan.wordings": 2}, "cannot be combined with wordings"),
    ({"plan.wordings": 2}, "plan.wordings reads problem and new_questions of the records; name them in data.keep_keys"),
    ({"plan.pairing": "all"}, "pairing all needs wordings of at least 2"),
    ({"plan.wordings": 2, "plan.pairing": "all", "data.keep_keys": ["problem", "new_questions"],
      "grpo.importance": "token_mask"}, "grpo.importance cannot be combined with plan.pairing all"),
    ({"plan.wordings": 2, "plan.pairing": "all", "data.keep_keys": ["problem", "new_questions"],
      "grpo.advantage": "my.py:own"}, "plan.pairing all takes the advantage over two kinds of groups"),
    ({"plan.contrast_size": 2}, "contrast_size changes nothing while contrast is none"),
    ({"plan.contrast_by": "frame"}, "contrast_by changes nothing while contrast is none"),
    ({"plan.oversample": 0.5}, "oversample must be at least 1, got 0.5"),
    ({"plan.refill": -1}, "refill must be 0 or larger, got -1"),
])
def test_what_a_plan_refuses(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        apply_overrides(Config(), changes)


def test_the_groups_of_a_contrast_file_are_plain_rollouts(tmp_path: Path) -> None:
    """For a reader without this package."""
    run, _ = trained(tmp_path / "run", grpo__steps=1, **CONTRAST)
    table = pq.read_table(run.contrasts("grpo-1", 0))
    assert set(table["reward"].to_pylist()) == {None} and len(set(table["group"].to_pylist())) > 1
