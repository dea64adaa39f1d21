"""Whole runs with adapters, through the command line: what they save, resume, compare with, and give to others."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.run.test_metric_names import demonstrations
from tests.support import policies, ranks, runs
from tests.support.run_compare import assert_same, records, written
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.lora import LoraConfig
from veripo_fast.errors import CheckpointError, ConfigError
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy, save_policy
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.stages.reference import EarlierAdapters

LORA = {"model__lora__rank": 4, "grpo__kl_coef": 0.05, "grpo__learning_rate": 1e-2}
STAGES = {"stages": [{"kind": "grpo"}, {"kind": "dpo"}, {"kind": "grpo"}]}


@pytest.fixture(scope="module")
def forks() -> runs.Forks:
    return runs.forks()


@pytest.fixture(scope="module")
def whole(forks: runs.Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    ended = forks.run("train", "--config", written(config(folder / "run"), folder))
    assert ended.code == 0, ended.output
    return folder / "run"


def config(run: Path, **changes: object) -> runs.Config:
    return runs.config(run, **LORA | STAGES | {"model__lora__dropout": 0.1} | changes)


def test_a_run_trains_and_saves_adapters_alone(whole: Path) -> None:
    steps = records(RunDir(whole).metrics)
    assert {"grpo", "dpo"} == {step["kind"] for step in steps}
    assert any(step.get("grad_norm", 0) > 0 for step in steps)
    newest = whole / "checkpoints" / (whole / "checkpoints" / "latest").read_text().strip()
    assert not list(newest.glob("model*")) and (newest / "adapter_config.json").is_file()
    stored = load_file(newest / "adapter_model.safetensors")
    assert max(float(value.abs().max()) for name, value in stored.items() if "lora_B" in name) > 1e-3
    saved = sum(path.stat().st_size for path in newest.glob("*"))
    assert saved < 0.5 * (runs.model() / "model.safetensors").stat().st_size
    card = (newest / "README.md").read_text()
    for line in ("library_name: peft", "- lora", "model = PeftModel.from_pretrained(model, FOLDER)"):
        assert f"\n{line}\n" in card


@pytest.mark.parametrize("moment", [r"mkdir .*\.tmp-step_000001$", "rename .*ref_logprobs", "rename .*tmp-step_000003",
                                    "rename .*rollouts/grpo-2/step_000001"])
def test_killed_and_resumed(moment: str, forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    path = written(config(tmp_path / "run"), tmp_path)
    assert forks.run("train", "--config", path, at=moment).code == -signal.SIGKILL
    ended = forks.run("train", "--config", path, "--resume")
    assert ended.code == 0, ended.output
    assert_same(tmp_path / "run", whole)


def test_the_ledger_counts_the_smaller_optimizer(whole: Path) -> None:
    """What is predicted of AdamW's moments is what the run holds of them."""
    held = next(line for line in read_records(RunDir(whole).memory) if "update" in line["predicted"])
    predicted = held["predicted"]["update"]["device"]
    assert predicted["AdamW's moments"] == held["owner_bytes"]["AdamW's moments"]
    assert predicted["weights"] + predicted["tower"] == held["owner_bytes"]["weights"]


def test_merged_and_evaluated(forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    """`veripo merge` gives a checkpoint that scores what the run itself scored greedily."""
    ended = forks.run("merge", whole / "checkpoints" / "latest", "--out", tmp_path / "merged")
    assert ended.code == 0, ended.output
    options = runs.config(tmp_path / "run", model__path=str(tmp_path / "merged"), eval__samples=0)
    ended = forks.run("eval", "--config", written(options, tmp_path), "--out", tmp_path / "eval")
    assert ended.code == 0, ended.output
    [theirs] = [row for row in read_records(tmp_path / "eval" / "evals.jsonl") if row["mode"] == "greedy"]
    ours = [row for row in read_records(RunDir(whole).evals) if row["mode"] == "greedy"][-1]
    assert {name: theirs[name] for name in ("accuracy", "length_mean", "format_rate")} == {
        name: ours[name] for name in ("accuracy", "length_mean", "format_rate")}


def test_a_second_run_begins_with_the_adapters_of_the_first(forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    options = config(tmp_path / "run", model__lora__adapter=str(whole / "checkpoints" / "latest"),
                     stages=[{"kind": "grpo"}])
    ended = forks.run("train", "--config", written(options, tmp_path))
    assert ended.code == 0, ended.output
    start = [row for row in read_records(RunDir(tmp_path / "run").evals) if row["stage"] == "start"]
    end = [row for row in read_records(RunDir(whole).evals) if row["stage"] == "grpo-2"]
    assert [row["accuracy"] for row in start] == [row["accuracy"] for row in end]


def test_a_resume_without_adapters_is_refused(forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    """A checkpoint of adapters is no model: the option that makes it one is named."""
    options = runs.config(tmp_path / "run", model__path=str(whole / "checkpoints" / "latest"))
    ended = forks.run("train", "--config", written(options, tmp_path))
    assert ended.code == 2 and "model.lora.adapter" in ended.output, ended.output


# -- the reference ----------------------------------------------------------------------------------------------------

def with_adapters(folder: Path, *, filled: float) -> Policy:
    policy = load_policy(ModelConfig(path=str(runs.model()), device="cpu", lora=LoraConfig(rank=4)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.adapters.parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * filled)
    save_policy(policy, folder)
    return policy


def test_earlier_adapters_are_a_second_model(tmp_path: Path) -> None:
    """A policy that has moved gives the log-probs of its start to the last bit, and is what it was behind them."""
    with_adapters(tmp_path / "start", filled=0.05)
    second = load_policy(ModelConfig(path=str(runs.model()), device="cpu", lora=LoraConfig(rank=4)), tmp_path / "start")
    base = load_policy(ModelConfig(path=str(runs.model()), device="cpu"))
    policy = with_adapters(tmp_path / "now", filled=0.2)
    prompt = policy.idle_inputs()[0].groups
    assert prompt
    encoded = policy.encoder.encode(runs.load_prompts([str(runs.corpus() / "train.jsonl")], runs.DataConfig(
        text_only=True))[0][-1], None)
    batch = pack([(encoded, [[20, 21, 22], [30, 31]])])
    with torch.no_grad():
        now = policy.completion_logprobs(batch, [None])
        earlier = EarlierAdapters(policy, tmp_path / "start").completion_logprobs(batch, [None])
        off = EarlierAdapters(policy, None).completion_logprobs(batch, [None])
        assert torch.equal(earlier, second.completion_logprobs(batch, [None]))
        assert torch.equal(off, base.completion_logprobs(batch, [None]))
        assert torch.equal(policy.completion_logprobs(batch, [None]), now)
    assert (now - earlier).abs().max() > 1e-3


def test_a_reference_that_cannot_be(tmp_path: Path) -> None:
    policy = with_adapters(tmp_path / "now", filled=0.1)
    with pytest.raises(ConfigError, match=r"a whole model; with model\.lora it is the base"):
        EarlierAdapters(policy, runs.model("qwen2_5_vl"))
    text = json.loads((tmp_path / "now" / "adapter_config.json").read_text())
    (tmp_path / "now" / "adapter_config.json").write_text(json.dumps(text | {"r": 8}))
    with pytest.raises(CheckpointError, match="have rank 8"):
        EarlierAdapters(policy, tmp_path / "now")


# -- ranks ------------------------------------------------------------------------------------------------------------

def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    """FSDP2 on gloo: adapters of both are the same up to rounding, and each reads what the other saved."""
    ends = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        options = runs.config(folder / "run", **LORA | STAGES | {"model__lora__targets": ["language"]})
        ended = ranks.train(size, written(options, folder))
        assert ranks.codes(ended) == [0] * size, ended
        root = folder / "run" / "checkpoints"
        ends.append(load_file(root / (root / "latest").read_text().strip() / "adapter_model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-3
    one, two = (records(RunDir(tmp_path / size / "run").metrics) for size in ("1", "2"))
    kl = {(row["stage"], row["step"]): row["kl"] for row in one if "kl" in row}
    firsts = [value for (_, step), value in kl.items() if step == 0]
    assert firsts and firsts == pytest.approx([0] * len(firsts), abs=1e-6)
    assert max(kl.values()) > 1e-5  # to what the stage began with, which the policy leaves behind
    assert [row.get("reward_mean") for row in one] == [row.get("reward_mean") for row in two]
    assert [row["kl"] for row in two if "kl" in row] == pytest.approx([row["kl"] for row in one if "kl" in row],
                                                                     rel=1e-2, abs=1e-6)


def test_two_ranks_resume_bitwise(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    path = written(config(tmp_path / "whole" / "run"), tmp_path / "whole")
    assert ranks.codes(ranks.train(2, path)) == [0, 0]
    path = written(config(tmp_path / "killed" / "run"), tmp_path / "killed")
    ended = ranks.train(2, path, faults=[ranks.Fault(0, r"mkdir .*\.tmp-step_000002$")])
    assert ranks.codes(ended)[0] == -signal.SIGKILL
    assert ranks.codes(ranks.train(2, path, "--resume")) == [0, 0]
    assert_same(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


def test_ranks_that_cannot_be(tmp_path: Path) -> None:
    options = runs.config(tmp_path / "run", model__lora__rank=4, rollout__engine="vllm")
    ended = ranks.train(2, written(options, tmp_path))
    assert ended[0].code == 2 and "cannot be merged into vllm" in ended[0].output, ended


def test_two_ranks_train_mergers_and_head(tmp_path: Path) -> None:
    """Adapters outside of FSDP2's layers: those of the head in its root, those of mergers whole on each rank."""
    shown = demonstrations(tmp_path / "shown.jsonl")
    ends = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        options = runs.config(
            folder / "run", model__path=str(policies.untied_checkpoint("qwen3_vl")), model__freeze_vision=False,
            model__lora__rank=4, model__lora__targets=["language", "merger", "head"], sft__epochs=1,
            sft__learning_rate=1e-2, eval__at="never", stages=[{"kind": "sft", "data": [str(shown)]}])
        ended = ranks.train(size, written(options, folder))
        assert ranks.codes(ended) == [0] * size, ended
        root = folder / "run" / "checkpoints"
        ends.append(load_file(root / (root / "latest").read_text().strip() / "adapter_model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], atol=1e-3), name
        assert "lora_B" not in name or value.abs().max() > 1e-3, name
