"""What users get wrong, through the trainer and the command line: always one clear sentence, and nothing is lost."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from bench.video import clips
from tests.support import runs
from tests.support.paths import REPOSITORY
from veripo_fast.cli import main
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.schema import StageConfig
from veripo_fast.errors import TrainingError
from veripo_fast.model import step
from veripo_fast.rollout.store import read_groups
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train

GRPO_ONLY = {"stages": [{"kind": "grpo"}], "eval__at": "never"}


@pytest.fixture
def veripo_train(tmp_path, capsys):
    """`veripo train` in this process -> (exit code, last line of stderr); the run folder is tmp_path/run."""
    def command(*arguments: str, **changes) -> tuple[int, str]:
        path = tmp_path / "run.yaml"
        path.write_text(to_yaml(runs.config(tmp_path / "run", **changes)))
        capsys.readouterr()
        code = main(["train", "--config", str(path), *arguments])
        return code, capsys.readouterr().err.splitlines()[-1]

    return command


# -- data -------------------------------------------------------------------------------------------------------------


def bad_videos(folder: Path) -> dict[str, str]:
    """Make one file of every bad kind; name -> what is said about it."""
    (folder / "empty.mp4").touch()
    (folder / "page.mp4").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    clips.make_audio(folder / "audio.mp4")
    good = clips.make_clip(folder / "good.mp4", frames=60)
    clips.truncated(good, folder / "half.mp4", 0.5)
    with av.open(str(folder / "none.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return {"missing.mp4": "does not exist", "empty.mp4": "is empty (0 bytes)", "page.mp4": "is a web page",
            "audio.mp4": "has no video stream", "half.mp4": "is truncated", "none.mp4": "holds no video frame"}


def record(path: str, **more) -> str:
    return json.dumps({"problem_id": path, "problem": "How many?", "path": path, "problem_type": "numerical",
                       "solution": "2", **more})


def test_bad_records_and_videos_are_skipped_counted_and_named(tmp_path, caplog):
    reasons = bad_videos(tmp_path)
    shutil.copytree(runs.corpus() / "clips", tmp_path / "clips")
    lines = (runs.corpus() / "train.jsonl").read_text().splitlines()[:4]
    lines += [record(name) for name in reasons]
    lines += ['{"problem": "half a line', record("good.mp4", colour="red", solution="many")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    config = runs.config(tmp_path / "run", data__train=[str(tmp_path / "train.jsonl")], grpo__prompts_per_step=3,
                         grpo__steps=6, **GRPO_ONLY)
    with caplog.at_level(logging.WARNING):
        train(config)
    run = RunDir(config.run_dir)
    skipped = {Path(row["path"]).name: row["reason"] for row in read_records(run.skipped)}
    assert len(read_records(run.skipped)) == len(reasons) + 2  # each once, though drawn twice
    for name, reason in reasons.items():
        assert reason in skipped[name], name
    in_the_file = [row["record"] for row in read_records(run.skipped) if row["path"].endswith("train.jsonl")]
    assert sorted(name.split(":")[-1] for name in in_the_file) == ["11", "12 (good.mp4)"]
    told = " ".join(row["reason"] for row in read_records(run.skipped))
    assert "is not valid JSON" in told and "'many' cannot be read as number" in told
    assert "keys not used: colour" in caplog.text
    assert "3 of 12 records" in caplog.text  # the line that is no JSON, the gold, and the missing file
    records = read_records(run.metrics)
    assert sum(row["prompts"] for row in records) == 2 * 4  # two epochs of nine prompts, four of them good
    drawn = [group.prompt.prompt_id for path in run.rollout_files("grpo-1") for group in read_groups(path)]
    assert sorted(drawn) == sorted(2 * [json.loads(line)["problem_id"] for line in lines[:4]])
    assert sum(row["updates"] for row in records) > 0


def test_a_step_may_be_without_prompts(tmp_path):
    """One video of three is broken, one prompt is drawn per step: that step trains nothing and is stored as empty."""
    shutil.copytree(runs.corpus() / "clips", tmp_path / "clips")
    (tmp_path / "empty.mp4").touch()
    lines = (runs.corpus() / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([lines[0], record("empty.mp4"), lines[-1]]))
    (tmp_path / "held.jsonl").write_text("\n".join([lines[-1], record("empty.mp4", problem_id="x"),
                                                    record("empty.mp4", problem_id="y")]))
    config = runs.config(tmp_path / "run", data__train=[str(tmp_path / "train.jsonl")],
                         data__eval=[str(tmp_path / "held.jsonl")], eval__samples=0, eval__at="ends",
                         grpo__prompts_per_step=1, grpo__steps=3, stages=[{"kind": "grpo"}, {"kind": "dpo"}])
    train(config)
    run = RunDir(config.run_dir)
    assert sorted(row["prompts"] for row in read_records(run.metrics) if row["kind"] == "grpo") == [0, 1, 1]
    assert sorted(len(read_groups(path)) for path in run.rollout_files("grpo-1")) == [0, 1, 1]


def test_a_bad_held_out_video_and_a_good_one_under_the_same_id(tmp_path):
    """Both files number their records alike; only the bad one is skipped."""
    shutil.copytree(runs.corpus() / "clips", tmp_path / "clips")
    (tmp_path / "empty.mp4").touch()
    good = [json.loads(line) for line in (runs.corpus() / "train.jsonl").read_text().splitlines()[:3]]
    good = [json.dumps(row | {"problem_id": str(number)}) for number, row in enumerate(good)]
    (tmp_path / "train.jsonl").write_text("\n".join(good))
    (tmp_path / "held.jsonl").write_text("\n".join([good[0], record("empty.mp4", problem_id="1")]))
    config = runs.config(tmp_path / "run", data__train=[str(tmp_path / "train.jsonl")],
                         data__eval=[str(tmp_path / "held.jsonl")], eval__samples=0, eval__at="ends",
                         grpo__prompts_per_step=3, grpo__steps=1, stages=[{"kind": "grpo"}])
    train(config)
    assert [row["prompts"] for row in read_records(RunDir(config.run_dir).metrics)] == [3]
    assert [row["prompts"] for row in read_records(RunDir(config.run_dir).evals)] == [1, 1]


def test_media_that_are_gone_when_pairs_are_trained(tmp_path):
    shutil.copytree(runs.corpus() / "clips", tmp_path / "clips")
    (tmp_path / "train.jsonl").write_text("\n".join((runs.corpus() / "train.jsonl").read_text().splitlines()[:4]))
    config = runs.config(tmp_path / "run", data__train=[str(tmp_path / "train.jsonl")], eval__at="never",
                         stages=[{"kind": "grpo"}])
    both = replace(config, stages=(*config.stages, StageConfig("dpo", rollouts_from="grpo-1")))
    train(config)
    (tmp_path / "clips").rename(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match="no pair of stage dpo-1 has a finite reference log-prob"):
        train(both, resume=True)
    assert "No such file" in RunDir(config.run_dir).skipped.read_text()
    (tmp_path / "elsewhere").rename(tmp_path / "clips")
    train(both, resume=True)
    kinds = [row["kind"] for row in read_records(RunDir(config.run_dir).metrics)]
    assert kinds[:2] == ["grpo", "grpo"]
    assert set(kinds[2:]) == {"dpo"}


@pytest.mark.parametrize(("lines", "sentence"), [
    ([], "no prompts: {data} given, without a single record"),
    (["{"], "all 1 records of {data} were skipped; the first, {data}:1: is not valid JSON"),
    ([record("missing.mp4"), record("gone.mp4")], "all 2 records of {data} were skipped; the first, {data}:1 "
     "(missing.mp4): media file {folder}/missing.mp4 does not exist"),
    ([record("empty.mp4"), record("empty.mp4", problem_id="b")],
     "none of the 2 prompts of stage grpo-1 could be loaded; {folder}/run/skipped.jsonl says why for each"),
])
def test_no_usable_prompt(veripo_train, tmp_path, lines, sentence):
    (tmp_path / "empty.mp4").touch()
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(lines))
    code, said = veripo_train(data__train=[str(data)], **GRPO_ONLY)
    assert code == 2
    assert said.startswith("veripo: error: " + sentence.format(data=data, folder=tmp_path))


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (["--video.fps", "2"], "video: exactly one of fps and num_frames must be set, got fps=2.0, num_frames=4"),
    (["--grpo.stepps", "3"], "unknown option grpo.stepps; did you mean grpo.steps?"),
    (["--grpo.prompts-per-step", "5", "--grpo.updates-per-rollout", "2"],
     "grpo: prompts_per_step 5 must be divisible by"),
    (["--verifier.judge", "endpoint"], "verifier: judge `endpoint` needs endpoint_url and endpoint_model"),
    (["--model.path", "nowhere"], "model.path nowhere is not a folder"),
    (["--model.path", str(REPOSITORY / "tests")], "tests is not a checkpoint folder: it has no config.json"),
])
def test_options_that_conflict_or_do_not_exist(veripo_train, arguments, words):
    code, said = veripo_train(*arguments)
    assert code == 2 and said.startswith("veripo: error: ") and words in said


def test_a_run_folder_in_use(veripo_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, said = veripo_train()
    assert (code, said) == (2, f"veripo: error: run_dir {tmp_path}/run exists already; resume it with --resume or name "
                               "another folder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """The policy in several weight files."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(runs.model(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_pretrained(runs.model()).save_pretrained(tmp_path / "model", max_shard_size="1MB")
    return tmp_path / "model"


def test_a_checkpoint_folder_with_a_missing_shard(veripo_train, sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    code, said = veripo_train(model__path=str(sharded), **GRPO_ONLY)
    assert (code, said) == (2, f"veripo: error: {sharded} lacks the weight file {shards[1].name}")


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("config.json", b'{"model_type": "qwen3_vl", "quantization_config": {"quant_method": "awq"}}',
     "{file} describes quantised weights (quantization_config, awq)"),
    ("config.json", b'{"model_type": "qwen3_vl", "text_config": 3}', "{file} cannot be used: Validation error"),
    ("generation_config.json", b"{", "{file} cannot be read"),
    ("preprocessor_config.json", b"[]", "{file} must hold a JSON object, not []"),
    ("tokenizer.json", b'{"added_tokens": [], "model": {"type": "BPE", "vocab": 3}}',
     "the tokenizer of {folder} cannot be loaded from tokenizer.json"),
    ("model.safetensors.index.json", b'{"weight_map": []}', "{file} has no weight_map"),
    ("chat_template.jinja", b"", "{folder} has no chat template")])
def test_a_broken_checkpoint_is_one_sentence(veripo_train, tmp_path, name, content, sentence):
    shutil.copytree(runs.model(), tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(content)
    code, said = veripo_train(model__path=str(tmp_path / "model"), **GRPO_ONLY)
    assert code == 2
    assert said.startswith("veripo: error: " + sentence.format(file=file, folder=tmp_path / "model"))


def test_weights_that_are_not_finite(veripo_train, tmp_path):
    shutil.copytree(runs.model(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    code, said = veripo_train(model__path=str(tmp_path / "model"), **GRPO_ONLY)
    assert code == 2
    assert said.startswith("veripo: error: the policy after 0 optimizer steps gives logits that are not finite")


def poison(monkeypatch, module, name, calls):
    """The loss function gives NaN in the calls (counted from 0) for which `calls` says so."""
    real, made = getattr(module, name), []

    def poisoned(*arguments, **options):
        result = real(*arguments, **options)
        made.append(1)
        return (result[0] * float("nan"), *result[1:]) if calls(len(made) - 1) else result

    monkeypatch.setattr(module, name, poisoned)


@pytest.mark.parametrize(("name", "lines"), [("linear_policy_loss", slice(0, 2)), ("linear_dpo_loss", slice(2, 4))])
def test_a_loss_that_is_nan_once_is_skipped_and_counted(tmp_path, monkeypatch, caplog, name, lines):
    poison(monkeypatch, step, name, lambda call: call == 0)
    train(runs.config(tmp_path / "run", eval__at="never", stages=[{"kind": "grpo"}, {"kind": "dpo"}]))
    run = RunDir(tmp_path / "run")
    records = read_records(run.metrics)
    assert [row["skipped_updates"] for row in records[lines]] == [1, 0]
    assert sum(row["skipped_updates"] for row in records) == 1
    assert "optimizer step skipped: loss nan" in caplog.text
    weights = load_file(run.checkpoints / "step_000004" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert json.loads((run.checkpoints / "step_000004" / "trainer" / "state.json").read_text())["policy_version"] == 3


@pytest.mark.parametrize(("name", "steps"), [("linear_policy_loss", 1), ("linear_dpo_loss", 3)])
def test_a_loss_that_stays_nan_stops_the_run(tmp_path, monkeypatch, name, steps):
    """One good step of the stage, then NaN: the checkpoint of the good step is intact, and the run goes on from it."""
    config = runs.config(tmp_path / "run", eval__at="never", grpo__steps=4 if steps == 1 else 2, dpo__max_steps=4,
                         optimizer__max_bad_steps=2, stages=[{"kind": "grpo"}, {"kind": "dpo"}])
    with monkeypatch.context() as patch:
        poison(patch, step, name, lambda call: call > 0)
        with pytest.raises(TrainingError, match="2 optimizer steps in a row had a loss or gradient that is not finite"):
            train(config)
    run = RunDir(config.run_dir)
    assert [row["skipped_updates"] for row in read_records(run.metrics)[-2:]] == [0, 1]
    assert (run.checkpoints / "latest").read_text() == f"step_{steps + 1:06d}\n"
    train(config, resume=True)
    records = read_records(run.metrics)
    assert sum(row["skipped_updates"] for row in records) == 1  # the one in the checkpoint
    assert [row["global_step"] for row in records] == list(range(1, len(records) + 1))
    assert records[-1]["stage"] == "dpo-1"


# -- the judge --------------------------------------------------------------------------------------------------------


def test_a_judge_that_is_down_and_then_mended(veripo_train, tmp_path):
    """The GRPO stage is not repeated."""
    options = {"eval__at": "never", "verifier__endpoint_url": "http://127.0.0.1:9/v1", "verifier__endpoint_model": "m",
               "verifier__endpoint_retries": 0, "stages": [{"kind": "grpo"}, {"kind": "dpo"}]}
    code, said = veripo_train(verifier__judge="endpoint", **options)
    assert code == 2 and "error: the judge endpoint http://127.0.0.1:9/v1" in said
    run = RunDir(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rollout_files("grpo-1")}
    metrics = run.metrics.read_text()
    assert len(before) == 2 and not (run.verifier("dpo-1") / "pairs.parquet").exists()
    code, said = veripo_train("--resume", **options)
    assert code == 2 and "begun with another config: verifier.judge was 'endpoint', is 'rules'" in said
    code, said = veripo_train("--resume", "--allow-changes", "config", **options)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in run.rollout_files("grpo-1")} == before
    assert run.metrics.read_text().startswith(metrics)
    assert [row["kind"] for row in read_records(run.metrics)] == ["grpo", "grpo", "dpo", "dpo"]


def test_pairs_that_are_built_again_get_their_own_reference(tmp_path):
    """Someone deletes the pairs of a stage to have them judged anew."""
    config = runs.config(tmp_path / "run", eval__at="never", stages=[{"kind": "grpo"}])
    train(config)
    folder = RunDir(config.run_dir).verifier("dpo-1")
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"ref_logprobs": [[0.0, 0.0]]}), folder / "ref_logprobs.parquet")
    train(runs.config(tmp_path / "run", eval__at="never", stages=[{"kind": "grpo"}, {"kind": "dpo"}]), resume=True)
    assert read_records(RunDir(config.run_dir).metrics)[2]["chosen_drift"] == 0


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk(tmp_path):
    """No file may grow beyond a limit, as on a disk or quota that is full; then there is room again."""
    config = tmp_path / "run.yaml"
    run = RunDir(tmp_path / "run")
    config.write_text(to_yaml(runs.config(run.root, eval__at="never", grpo__steps=3, stages=[{"kind": "grpo"}])))
    forks = runs.forks()
    assert forks.run("train", "--config", config, at=r"mkdir .*\.tmp-step_000002$").code == -9
    model = (run.checkpoints / "step_000001" / "model.safetensors").stat().st_size
    ended = forks.run("train", "--config", config, "--resume", limits={"RLIMIT_FSIZE": model // 2})
    said = ended.output.splitlines()[-1]
    assert ended.code == 2, ended.output
    assert said.startswith(f"veripo: error: cannot save the checkpoint {run.checkpoints}/step_000002: ")
    assert said.endswith(f"; the earlier checkpoint {run.checkpoints}/step_000001 is intact")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["latest", "step_000001"]
    ended = forks.run("train", "--config", config, "--resume", limits={"RLIMIT_FSIZE": 2000})
    assert ended.code == 2, ended.output
    assert ended.output.splitlines()[-1].startswith("veripo: error: cannot write ")
    assert "Traceback" not in ended.output
    assert forks.run("train", "--config", config, "--resume").code == 0
    assert [row["global_step"] for row in read_records(run.metrics)] == [1, 2, 3]
