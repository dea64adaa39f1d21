"""The loop on real mp4 files: what a run does, writes and leaves, stage by stage."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.support import runs
from veripo_fast.config.load import load_config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.errors import ConfigError, DataError, UserError
from veripo_fast.model import encoding
from veripo_fast.rollout.store import read_groups, write_groups
from veripo_fast.run.folder import RunDir
from veripo_fast.run.interrupt import Request, StopRequests
from veripo_fast.run.metrics import MetricsLog, read_records
from veripo_fast.stages import grpo
from veripo_fast.stages.session import Session
from veripo_fast.trainer import evaluate_stage, run_stages, train
from veripo_fast.types import Completion, Image, Prompt, RolloutGroup, Video
from veripo_fast.verifier.store import read_pairs

STAGES = ["grpo-1", "grpo-1", "dpo-1", "dpo-1", "grpo-2", "grpo-2"]
STATE = {"global_step", "stage", "kind", "step", "seconds", "speed", "video_decodes", "tower_runs", "cache_hits",
         "decoder_fallbacks"}
GRPO = STATE | {"reward_mean", "accuracy_mean", "format_mean", "length_mean", "length_max", "finished_share",
                "zero_variance_share", "prompts", "updates", "loss", "kl", "clip_share", "ratio_max", "parity_max",
                "grad_norm", "learning_rate", "skipped_updates", "packed_tokens", "zero_reward_steps",
                "steps_without_signal", "collapsed_steps"}
DPO = STATE | {"loss", "preference_accuracy", "margin", "chosen_logprobs_mean", "rejected_logprobs_mean",
               "chosen_drift", "grad_norm", "learning_rate", "skipped_updates", "pairs"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    """GRPO -> DPO -> GRPO on videos, an image and a text."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    train(runs.config(folder))
    return RunDir(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def without_times(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in ("seconds", "speed")} for record in records]


@pytest.fixture
def session(tmp_path):
    """A Session that has not begun, with one override by dotted name after another."""
    made = []

    def make(run: Path = tmp_path / "run", requests=None, **changes) -> Session:
        made.append(Session(runs.config(run, **changes), RunDir(run), MetricsLog(RunDir(run).metrics),
                            requests or StopRequests()))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_metrics_line_per_step(run):
    records = read_records(run.metrics)
    assert [record["global_step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["stage"] for record in records] == STAGES
    assert [record["step"] for record in records] == [0, 1, 0, 1, 0, 1]
    for record in records:
        assert set(record) == (GRPO if record["kind"] == "grpo" else DPO)
        assert {"decode", "vision", "update"} <= set(record["seconds"])
    assert records[2]["loss"] == pytest.approx(math.log(2))  # policy and reference are still the same
    assert records[2]["chosen_drift"] == 0


def test_an_evaluation_before_and_after_every_stage(run):
    records = read_records(run.evals)
    stages = ("start", "grpo-1", "dpo-1", "grpo-2")
    assert [(r["stage"], r["mode"]) for r in records] == [(s, m) for s in stages for m in ("greedy", "sampled")]
    for record in records:
        groups = read_groups(run.eval_rows(record["stage"], record["mode"]))
        assert len(groups) == record["prompts"] == runs.HELDOUT


@pytest.mark.parametrize(("at", "stages"), [("ends", ["start", "grpo-2"]), ("never", [])])
def test_fewer_evaluations(session, at, stages):
    one = session(eval__at=at, eval__samples=0, stages=[{"kind": "grpo"}, {"kind": "grpo"}])
    one.run.root.mkdir()
    for finished in range(3):
        one.state.stage = finished
        evaluate_stage(one)
    assert [record["stage"] for record in read_records(one.run.evals)] == stages


def test_every_prompt_is_drawn_once_per_epoch(run):
    prompts, _ = load_prompts([str(runs.corpus() / "train.jsonl")], runs.config(run.root).data)
    for stage in ("grpo-1", "grpo-2"):
        drawn = [group.prompt for path in run.rollout_files(stage) for group in read_groups(path)]
        assert len(drawn) == 8 and set(drawn) <= set(prompts)
        assert stage == "grpo-2" or set(drawn) == set(prompts)  # grpo-2 may leave out easy ones
        assert {type(medium) for prompt in drawn for medium in prompt.media} == {Video, Image}
        assert any(not prompt.media for prompt in drawn)


def test_stages_continue_from_the_last(run):
    """policy_version counts the optimizer steps behind the rollouts."""
    version, steps = 0, {"grpo-1": 0, "grpo-2": 0}
    for record in read_records(run.metrics):
        if record["kind"] == "grpo":
            groups = read_groups(run.rollouts(record["stage"], record["step"]))
            assert {c.policy_version for group in groups for c in group.completions} == {version}
            steps[record["stage"]] += 1
        version += record["updates"] if record["kind"] == "grpo" else 1
    assert steps == {"grpo-1": 2, "grpo-2": 2} and version >= 5
    state = json.loads((run.checkpoints / "step_000006" / "trainer" / "state.json").read_text())
    assert state == {"stage": 3, "step": 0, "global_step": 6, "position": 0, "policy_version": version,
                     "stage_start": "", "moments": {}, "best": "", "best_score": None, "stage_best": None, "stale": 0}


def test_rollouts_hold_scored_groups(run):
    groups = read_groups(run.rollouts("grpo-1", 0))
    assert [len(group.completions) for group in groups] == [4] * 4
    completions = [c for group in groups for c in group.completions]
    assert all(len(c.token_ids) == len(c.rollout_logprobs) <= 24 for c in completions)
    record = read_records(run.metrics)[0]
    assert record["reward_mean"] == pytest.approx(sum(c.reward for c in completions) / 16)
    assert len({c.reward for c in completions}) > 1, "the policy of the tests must earn rewards that vary"
    for group in groups:
        assert sum(c.advantage for c in group.completions) == pytest.approx(0, abs=1e-6)


def test_verdicts_and_pairs_are_on_disk(run):
    import pyarrow.parquet as pq

    folder = run.verifier("dpo-1")
    verdicts = pq.read_table(folder / "verdicts.parquet").to_pylist()
    pairs = read_pairs(folder / "pairs.parquet")
    account = json.loads((folder / "account.json").read_text())
    assert len(verdicts) == 2 * 4 * 4 and account["completions"] == 32
    assert len(pairs) == sum(account["kept"].values()) > 0
    trained = {group.prompt.prompt_id for path in run.rollout_files("grpo-1") for group in read_groups(path)}
    assert {pair.prompt_id for pair in pairs} <= trained
    assert len(pq.read_table(folder / "ref_logprobs.parquet")) == len(pairs)


def test_the_last_checkpoints_are_kept_and_load(run):
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["latest", "step_000005", "step_000006"]
    final = run.checkpoints / "step_000006"
    model = AutoModelForImageTextToText.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final)("so 3.")["input_ids"]
    before, after = weights(runs.model()), weights(final)
    assert before.keys() == after.keys() == {*model.state_dict()} - {"lm_head.weight"}
    changed = {name for name in after if not torch.equal(after[name], before[name].float())}
    assert changed and not any("visual" in name for name in changed)  # the tower is frozen
    assert all(value.isfinite().all() for value in after.values())


def test_tensorboard_and_the_configuration(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("reward_mean")] == [1, 2, 5, 6]
    assert [event.step for event in board.Scalars("preference_accuracy")] == [3, 4]
    assert load_config(run.config) == runs.config(run.root)


def test_the_same_seed_gives_the_same_run(run, tmp_path):
    for seed in (0, 1):
        train(runs.config(tmp_path / str(seed), seed=seed, eval__at="never",
                          stages=[{"kind": "grpo"}, {"kind": "dpo"}]))
    first, same, other = (without_times(read_records(RunDir(path).metrics)[:4])
                          for path in (run.root, tmp_path / "0", tmp_path / "1"))
    assert first == same != other


def test_the_reference_of_the_kl_is_the_start_of_the_stage(session):
    """So the KL is 0 in the first step of each stage, also in one that begins from a checkpoint of the run."""
    one = session(grpo__kl_coef=0.1, grpo__learning_rate=1e-3, eval__at="never", checkpoint__keep=1,
                  stages=[{"kind": "grpo"}, {"kind": "grpo"}])
    one.requests.request = lambda: Request("stopped", 130) if one.state.global_step == 3 else None
    with pytest.raises(KeyboardInterrupt):
        run_stages(one)
    records = read_records(one.run.metrics)
    assert [record["kl"] > 1e-6 for record in records] == [False, True, False]
    kept = sorted(path.name for path in one.run.checkpoints.glob("step_*"))
    assert kept == ["step_000002", "step_000003"]  # the newest, and the start of the stage
    resumed = session(grpo__kl_coef=0.1)
    start = weights(one.run.checkpoints / "step_000002")
    reference = grpo.stage_reference(resumed)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(reference.model.get_parameter(name), start[name])
    assert not torch.equal(resumed.policy.model.get_parameter(name), start[name])
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_qwen2_5_vl_with_a_likelihood_judge_and_a_trained_tower(tmp_path):
    train(runs.config(tmp_path / "run", model__path=str(runs.model("qwen2_5_vl")), model__freeze_vision=False,
                      grpo__steps=1, dpo__max_steps=1, eval__limit=2, eval__samples=0,
                      stages=[{"kind": "grpo"}, {"kind": "dpo", "set": {"verifier.judge": "likelihood"}}]))
    import pyarrow.parquet as pq

    run = RunDir(tmp_path / "run")
    verdicts = pq.read_table(run.verifier("dpo-1") / "verdicts.parquet").to_pylist()
    assert sum(verdict["judge_score"] is not None for verdict in verdicts) > len(verdicts) / 2
    before, after = weights(runs.model("qwen2_5_vl")), weights(run.checkpoints / "step_000002")
    assert any("visual" in name and not torch.equal(after[name], before[name].float()) for name in after)
    assert len(read_records(run.metrics)) == 2


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="flash3"):
            train(runs.config(tmp_path / "run", model__attention="flash3"))
        assert not (tmp_path / "run").exists()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match="flash3"):
        train(runs.config(tmp_path / "link", model__attention="flash3"))
    assert list((tmp_path / "link").iterdir()) == []
    with pytest.raises(DataError, match="mistyped"):
        train(runs.config(tmp_path / "run", data__train=("mistyped.jsonl",)))
    with pytest.raises(ConfigError, match=r"video\.decoder dali needs a GPU"):
        train(runs.config(tmp_path / "run", video__decoder="dali", model__device="cpu"))
    assert not (tmp_path / "run").exists()


def test_the_likelihood_judge_decodes_no_video_again(tmp_path, monkeypatch):
    decoded = []
    decode = encoding.decode
    monkeypatch.setattr(encoding, "decode", lambda video, *rest: decoded.append(video) or decode(video, *rest))
    train(runs.config(tmp_path / "run", grpo__steps=1, dpo__max_steps=1, eval__at="never", stages=[
        {"kind": "grpo"}, {"kind": "dpo", "set": {"verifier.judge": "likelihood"}}]))
    assert (RunDir(tmp_path / "run").verifier("dpo-1") / "verdicts.parquet").is_file()
    assert 0 < len(decoded) == len(set(decoded))


def test_a_dpo_stage_without_pairs_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(runs.config(tmp_path / "run", eval__at="never", grpo__steps=1, stages=[
            {"kind": "grpo", "name": "explore"},
            {"kind": "dpo", "name": "align", "set": {"verifier.families": ["repetition"]}},
            {"kind": "grpo", "name": "again", "data": [str(runs.corpus() / "heldout.jsonl")]}]))
    run = RunDir(tmp_path / "run")
    assert "align: the verifier built no pairs from explore" in caplog.text
    assert [record["stage"] for record in read_records(run.metrics)] == ["explore", "again"]
    heldout, _ = load_prompts([str(runs.corpus() / "heldout.jsonl")], runs.config(tmp_path).data)
    assert {group.prompt for group in read_groups(run.rollouts("again", 0))} == set(heldout)


# -- easy prompts -----------------------------------------------------------------------------------------------------


def rollout(prompt: Prompt, *accuracies: float) -> RolloutGroup:
    return RolloutGroup(prompt, [Completion([5], "x", [0.0], "stop", 0, accuracy=value) for value in accuracies])


@pytest.fixture
def explored(session):
    """A Session before its second GRPO stage; the first one found prompts 0 to 5 easy and 6 and 7 not."""
    def make(**changes) -> tuple[Session, list[Prompt]]:
        one = session(stages=[{"kind": "grpo"}, {"kind": "dpo"}, {"kind": "grpo"}], **changes)
        prompts = one.load_prompts(one.config.data.train)
        one.state.stage = 2
        first = [rollout(prompt, 1.0, 1.0) for prompt in prompts[:7]] + [rollout(prompts[7], 1.0, 0.9)]
        write_groups(one.run.rollouts("grpo-1", 0), first, "grpo-1", 0)
        write_groups(one.run.rollouts("grpo-1", 1), [rollout(prompts[6], 1.0, 0.0)], "grpo-1", 1)  # the latest counts
        return one, prompts

    return make


def test_easy_prompts_are_left_out_at_a_rate(explored):
    one, prompts = explored()
    stage = one.config.stages[2]
    assert grpo.stage_prompts(one, stage, one.config) == prompts  # drop_easy is 0
    for rate, least, most in ((1.0, 6, 6), (0.5, 1, 5)):
        config = runs.config(one.run.root, grpo__drop_easy=rate)
        kept = grpo.stage_prompts(one, stage, config)
        assert least <= 8 - len(kept) <= most
        assert kept == [prompt for prompt in prompts if prompt in kept] and set(prompts[6:]) <= set(kept)
        assert kept == grpo.stage_prompts(one, stage, config)  # decided by the seed
    one.state.stage = 0
    assert grpo.stage_prompts(one, one.config.stages[0], runs.config(one.run.root, grpo__drop_easy=1.0)) == prompts


def test_an_easy_prompt_is_another_one_under_the_same_id_elsewhere(explored):
    one, prompts = explored()
    other = runs.corpus().parent / "other.jsonl"
    other.write_text(json.dumps({"problem_id": prompts[0].prompt_id, "problem": "What?", "answer": "yes",
                                 "data_type": "text"}) + "\n")
    stage = runs.config(one.run.root, stages=[{"kind": "grpo", "data": [str(other)]}]).stages[0]
    assert len(grpo.stage_prompts(one, stage, runs.config(one.run.root, grpo__drop_easy=1.0))) == 1


def test_nothing_left_to_train_on(explored):
    one, prompts = explored()
    write_groups(one.run.rollouts("grpo-1", 2), [rollout(p, 1.0, 1.0) for p in prompts], "grpo-1", 2)
    with pytest.raises(DataError, match=r"stage grpo-2 would leave out all 8 prompts; lower grpo\.drop_easy"):
        grpo.stage_prompts(one, one.config.stages[2], runs.config(one.run.root, grpo__drop_easy=1.0))


# -- what cannot begin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "words"), [
    ({"stages": []}, "stages is empty: the configuration says nothing to train"),
    ({"model__path": "nowhere"}, "model.path nowhere is not a folder"),
    ({"data__train": []}, "data.train names no files"),
])
def test_configurations_that_cannot_begin(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        train(runs.config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_a_kill_left_without_a_configuration_is_free(tmp_path):
    (tmp_path / ".tmp-config.yaml-1").write_text("run_d")
    with pytest.raises(DataError, match="does not exist"):
        train(runs.config(tmp_path, data__train=["none.jsonl"], eval__at="never"))


def test_an_evaluation_that_was_asked_for_inside_a_stage_waits_for_its_end(session):
    """The policy inside a stage is not the one that an evaluation `start` would be about."""
    one = session(eval__at="never", stages=[{"kind": "grpo"}])
    one.requests.request = lambda: Request("stopped", 130) if one.state.global_step == 1 else None
    with pytest.raises(KeyboardInterrupt):
        run_stages(one)
    resumed = session(eval__samples=0, stages=[{"kind": "grpo"}])
    run_stages(resumed)
    assert [record["stage"] for record in read_records(resumed.run.evals)] == ["grpo-1"]
