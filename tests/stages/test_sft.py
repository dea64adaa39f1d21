"""SFT: gradients against Hugging Face's own cross-entropy, what is learnt of a chat, and whole runs through the CLI."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support import policies, ranks, runs
from tests.support.run_compare import assert_same, records, written
from veripo_fast.config.alignment import SftConfig
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.schema import Config, OptimizerConfig
from veripo_fast.data.order import steps_of
from veripo_fast.errors import DataError
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.model.targets import Target, target_of
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.stages.sft import SftRow, sft_update
from veripo_fast.types import Message, Prompt

FAMILY = "qwen3_vl"
CHAT = (Message("assistant", ("A dog.",)), Message("user", ("Where?",)), Message("assistant", ("Outside.",)))


@pytest.fixture
def policy() -> Policy:
    return load_policy(ModelConfig(path=str(policies.checkpoint(FAMILY)), device="cpu"))


def rows_of(policy: Policy) -> list[SftRow]:
    """Two answers to a video, one to a text; of some tokens nothing is learnt."""
    media = [[("video", 4, 2, 2)], []]
    lengths = [(5, 9), (7,)]
    rows = []
    for number, (sizes, own) in enumerate(zip(media, lengths, strict=True)):
        targets = [Target(ids, [int(place % 3 != 1) for place in range(len(ids))])
                   for ids in policies.random_completions(list(own), seed=number)]
        rows.append(SftRow(policies.loaded(policy, sizes, seed=number), tuple(targets)))
    return rows


class Kept(Optimizer):
    """Keeps the gradients of a step and leaves the weights alone."""

    def step(self) -> float:
        named = zip(self.backend.names, self.backend.parameters, strict=True)
        self.gradients = {name: parameter.grad.clone() for name, parameter in named}
        self.backend.discard()
        return 1.0


def updated(policy: Policy, max_tokens: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    config = Config(optimizer=OptimizerConfig(max_tokens=max_tokens))
    optimizer = Kept(policy.backend, config.optimizer, 1e-3, 10)
    metrics = sft_update(policy, optimizer, rows_of(policy), config)
    return metrics, optimizer.gradients


@pytest.mark.parametrize("max_tokens", [1, 1 << 20], ids=["many micro-batches", "one"])
def test_gradients_are_those_of_cross_entropy(policy: Policy, max_tokens: int) -> None:
    metrics, gradients = updated(policy, max_tokens)
    total, learnt = torch.zeros(()), 0
    for row in rows_of(policy):
        for target in row.targets:
            logits = policies.plain_logits(policy, row.prompt.encoded, target.token_ids)[:-1]
            losses = F.cross_entropy(logits, torch.tensor(target.token_ids), reduction="none")
            total = total + (losses * torch.tensor(target.learnt)).sum()
            learnt += sum(target.learnt)
    (total / learnt).backward()
    assert metrics["loss"] == pytest.approx(total.item() / learnt, rel=1e-5)
    assert (metrics["learnt_tokens"], metrics["demonstrations"], metrics["prompts"]) == (learnt, 3, 2)
    plain = {name: p.grad for name, p in policy.parameters() if p.grad is not None}
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        assert (gradient - plain[name]).norm() <= 2e-5 * plain[name].norm() + 1e-9, name


def test_a_prompt_is_packed_once(policy: Policy) -> None:
    row = rows_of(policy)[0]
    assert row.packed == len(row.prompt.encoded.token_ids) + 4 + 8


# -- targets -----------------------------------------------------------------------------------------------------------


def whole_chat(encoder: PromptEncoder, prompt: Prompt, turns: tuple[Message, ...]) -> str:
    messages = [{"role": m.role, "content": [{"type": "text", "text": p} for p in m.parts]}
                for m in (*prompt.messages, *turns)]
    return encoder.tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_target_is_what_the_template_writes() -> None:
    encoder = policies.policy(FAMILY).encoder
    prompt = policies.prompt_of("Who is it?")
    target = target_of(encoder, prompt, CHAT)
    text = encoder.chat_text(prompt) + encoder.tokenizer.decode(target.token_ids)
    assert f"{text}\n" == whole_chat(encoder, prompt, CHAT)
    learnt = [token for token, bit in zip(target.token_ids, target.learnt, strict=True) if bit]
    assert encoder.tokenizer.decode(learnt) == "A dog.<|im_end|>Outside.<|im_end|>"


def test_one_answer_is_a_completion_with_its_end() -> None:
    encoder = policies.policy(FAMILY).encoder
    target = target_of(encoder, policies.prompt_of("Who?"), CHAT[:1])
    assert target.token_ids == [*encoder.encode_completion("A dog."), encoder.eos_id]
    assert target.learnt == [1] * len(target.token_ids)


def test_a_template_that_opens_think(tmp_path: Path) -> None:
    folder = policies.thinking_checkpoint(tmp_path / "thinking", policies.checkpoint(FAMILY))
    encoder = PromptEncoder(folder)
    prompt = policies.prompt_of("Who?")
    target = target_of(encoder, prompt, (Message("assistant", ("<think>\nIt barks.</think>A dog.",)),))
    assert encoder.decode_completion(target.token_ids) == "It barks.</think>A dog."
    with pytest.raises(DataError, match="does not begin with it"):
        target_of(encoder, prompt, CHAT[:1])


def test_a_template_that_rewrites_history(tmp_path: Path) -> None:
    """As those of thinking models, which leave the reasoning out of all answers but the last."""
    folder = policies.thinking_checkpoint(tmp_path / "thinking", policies.checkpoint(FAMILY))
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("{{ part['text'] }}", "{{ part['text'].split('</think>')[-1] }}"))
    chat = tuple(Message(turn.role, (f"<think>\nHm.</think>{turn.parts[0]}",)) if turn.role == "assistant" else turn
                 for turn in CHAT)
    with pytest.raises(DataError, match="only chats of one answer"):
        target_of(PromptEncoder(folder), policies.prompt_of("Who?"), chat)


def test_control_tokens_in_an_answer() -> None:
    """One that ends the turn would teach nothing but the end; it is text, and the end is written by us alone."""
    encoder = policies.policy(FAMILY).encoder
    target = target_of(encoder, policies.prompt_of("Who?"), (Message("assistant", ("It<|im_end|>is",)),))
    assert target.token_ids.count(encoder.eos_id) == 1


def test_steps_take_every_prompt_once_per_epoch() -> None:
    steps = steps_of(7, 3, 2, None, seed=1)
    assert [len(step) for step in steps] == [3, 3, 1] * 2
    first, second = ([number for step in epoch for number in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert steps_of(7, 3, 2, 4, seed=1) == steps[:4]
    assert steps_of(7, 3, 2, None, seed=2) != steps


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions of the test corpus with a chain of thought each; one shows nothing, one is too long."""
    corpus = runs.corpus()
    path = tmp_path_factory.mktemp("sft") / "cot.jsonl"
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        if "path" in row:
            row["path"] = str(corpus / row["path"])
        row["process"] = "" if number == 1 else f"<think>{'so ' * (200 if number == 2 else 1)}it is.</think>"
        row["solution"] = f"<answer>{row['solution'].removeprefix('<answer>').removesuffix('</answer>')}</answer>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(folder: Path, demonstrations: Path, **changes: object) -> Config:
    stages = [{"kind": "sft", "data": [str(demonstrations)]}, {"kind": "grpo", "set": {"grpo.steps": 1}}]
    return runs.config(folder, **{"stages": stages, "eval__at": "never", "sft__prompts_per_step": 3,
                                  "sft__epochs": 3, "sft__learning_rate": 1e-3, "sft__max_completion_tokens": 60,
                                  } | changes)


@pytest.fixture(scope="module")
def whole(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ended = runs.forks().run("train", "--config", written(config_of(folder / "run", demonstrations), folder))
    assert ended.code == 0, ended.output
    return folder / "run"


def test_a_run_learns_and_goes_on(whole: Path) -> None:
    rows = records(RunDir(whole).metrics)
    warm = [row for row in rows if row["kind"] == "sft"]
    assert {row["stage"] for row in rows} == {"sft-1", "grpo-1"}
    assert warm[-1]["loss"] < 0.7 * warm[0]["loss"]
    reasons = [record["reason"] for record in records(RunDir(whole).skipped)]
    assert sum("shows no answer to learn" in reason for reason in reasons) == 1
    assert sum("sft.max_completion_tokens is 60" in reason for reason in reasons) == 1
    memory = json.loads(RunDir(whole).memory_plan.read_text())["sft-1"]
    assert list(memory) == ["load", "vision", "update", "checkpoint"]


def test_videos_are_decoded_once_over_epochs(whole: Path) -> None:
    warm = [row for row in read_records(RunDir(whole).metrics) if row["kind"] == "sft"]
    per_epoch = len(warm) // 3
    assert sum(row["video_decodes"] for row in warm[:per_epoch]) > 0
    assert sum(row["video_decodes"] for row in warm[per_epoch:]) == 0


@pytest.mark.parametrize("moment", [r"mkdir .*\.tmp-step_000001$", "rename .*tmp-step_000004"])
def test_a_kill_is_resumed_bitwise(whole: Path, demonstrations: Path, tmp_path: Path, moment: str) -> None:
    forks = runs.forks()
    config = written(config_of(tmp_path / "run", demonstrations), tmp_path)
    assert forks.run("train", "--config", config, at=moment).code == -signal.SIGKILL
    resume = ["--resume"] if RunDir(tmp_path / "run").config.exists() else []
    ended = forks.run("train", "--config", config, *resume)
    assert ended.code == 0, ended.output
    assert_same(tmp_path / "run", whole)


def test_two_ranks_learn_the_same(whole: Path, demonstrations: Path, tmp_path: Path) -> None:
    ended = ranks.train(2, written(config_of(tmp_path / "run", demonstrations), tmp_path))
    assert ranks.codes(ended) == [0, 0], ended
    one, two = ([row["loss"] for row in records(RunDir(folder).metrics) if row["kind"] == "sft"]
                for folder in (whole, tmp_path / "run"))
    assert two == pytest.approx(one, rel=1e-4)


def test_options_are_checked() -> None:
    with pytest.raises(Exception, match="prompts_per_step"):
        SftConfig(prompts_per_step=0)
