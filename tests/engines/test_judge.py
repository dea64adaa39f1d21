"""The judge `llm` on the real vLLM: a second engine in the process of the policy's, which it leaves as it was."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import judges, policies, ranks, runs
from tests.support.engine_runs import SAMPLED, completions, prompts_of
from tests.support.run_compare import records, written
from tests.support.verifier_groups import group
from tests.support.verifier_groups import written as answered
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.rollout import vllm_library
from veripo_fast.rollout.local_texts import LocalTexts, make_texts
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.run.folder import RunDir
from veripo_fast.verifier.judges import no_progress
from veripo_fast.verifier.verify import make_judge

from .conftest import policy_of

EXPECTED = [(False, "A"), (True, "B"), (False, "C"), (None, None)]


def judged(config: Config, texts: LocalTexts) -> list[tuple[bool | None, str | None]]:
    judge = make_judge(config.verifier, texts=texts)
    [row] = judge.judge([group(*(answered(think, "B") for think in judges.THINKS.values()))], no_progress)
    return [(item.consistent, item.supported_answer) for item in row]


def config() -> Config:
    return apply_overrides(Config(), {
        "verifier.judge": "llm", "verifier.llm_path": str(judges.judge_folder()), "model.device": "cpu",
        "rollout.engine": "vllm", "rollout.max_sequences": 4})


def test_two_engines_in_one_process(engine_of: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge starts, works and ends beside the policy's engine, whose completions stay bitwise the same; then again,
    and alone when the policy's engine is gone. Of each judge's model nothing is left."""
    models: list[weakref.ref[torch.nn.Module]] = []
    build = vllm_library.build_texts

    def noting(*arguments: Any, **options: Any) -> Any:
        made = build(*arguments, **options)
        models.append(weakref.ref(vllm_library.runner_of(made).model))
        return made

    monkeypatch.setattr(vllm_library, "build_texts", noting)
    policy = policy_of(policies.checkpoint("qwen3_vl"))
    engine = engine_of(policy)
    prompts = prompts_of(policy)
    before = completions(engine.generate(prompts, SAMPLED))
    slept: list[bool] = []

    def sleep() -> None:
        engine.sleep()
        slept.append(True)

    texts = LocalTexts(config(), before=sleep)
    for _ in range(2):
        assert judged(config(), texts) == EXPECTED
        assert completions(engine.generate(prompts, SAMPLED)) == before
    assert [model() for model in models] == [None, None]
    assert len(slept) == 2 and torch.distributed.is_initialized()
    engine.close()
    assert judged(config(), LocalTexts(config())) == EXPECTED
    assert not torch.distributed.is_initialized(), "the last engine ends what it has made"


def test_a_judge_that_vllm_cannot_run_is_refused(tmp_path: Path) -> None:
    folder = judges.spoiled(judges.judge_folder(), tmp_path / "judge", architectures=["NobodysForCausalLM"])
    broken = apply_overrides(config(), {"verifier.llm_path": str(folder)})
    with pytest.raises(ConfigError, match="cannot run the judge"):
        make_texts(broken, 512, 1)
    assert judged(config(), LocalTexts(config())) == EXPECTED, "nothing of the attempt is left"


def test_the_loop(tmp_path: Path) -> None:
    """GRPO -> judge -> DPO -> GRPO: every verdict is counted, and the policy's engine agrees with the trainer after."""
    run = runs.config(tmp_path / "run", rollout__engine="vllm", data__max_prompt_tokens=512, verifier__judge="llm",
                      verifier__llm_path=str(judges.judge_folder()), verifier__llm_max_failures=1.0,
                      rollout__parity_every=1, eval__at="never")
    ended = runs.forks().run("train", "--config", written(run, tmp_path))
    assert ended.code == 0, ended.output
    folder = RunDir(tmp_path / "run")
    account = json.loads((folder.verifier("dpo-1") / "account.json").read_text())
    assert sum(account["verdicts"].values()) == account["completions"] == 32
    assert sum(account["no_verdict"].values()) == account["verdicts"]["unknown"] < 32
    steps = [step for step in records(folder.metrics) if step["stage"] == "grpo-2"]
    assert len(steps) == 2 and all(step["engine_parity_max"] < 5e-5 for step in steps)


def test_a_judge_on_each_of_two_ranks(tmp_path: Path) -> None:
    """Beside an engine on each; they judge their shares, and go on to align."""
    run = runs.config(tmp_path / "run", rollout__engine="vllm", data__max_prompt_tokens=512, verifier__judge="llm",
                      verifier__llm_path=str(judges.judge_folder()), verifier__llm_max_failures=1.0, grpo__steps=1,
                      stages=[{"kind": "grpo"}, {"kind": "dpo"}], eval__at="never")
    ended = ranks.train(2, written(run, tmp_path))
    assert ranks.codes(ended) == [0, 0], ended
    folder = RunDir(tmp_path / "run").verifier("dpo-1")
    account = json.loads((folder / "account.json").read_text())
    assert sum(account["verdicts"].values()) == account["completions"] == 16
    assert {path.name for path in folder.glob("judge_cache*")} == {"judge_cache.jsonl", "judge_cache_1.jsonl"}
