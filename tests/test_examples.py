"""Every file of examples/ runs as its first lines say, on a tiny model. README names it, and the sdist holds it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.paths import REPOSITORY
from tests.support.run_compare import records, written
from veripo_fast.run.folder import RunDir

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.fixture
def example(python: Callable) -> Callable:
    """Runs one, and gives what it wrote."""
    def run(name: str, *arguments: object) -> str:
        done = python(str(REPOSITORY / "examples" / f"{name}.py"), *map(str, arguments))
        assert done.returncode == 0, done.stderr
        return str(done.stdout)
    return run


def tiny_run(folder: Path, stages: str) -> list[str]:
    """Options that make a run of `configs/tiny.yaml` one of seconds, on the corpus of the tests."""
    data = runs.corpus()
    return ["--run-dir", str(folder), "--model.path", str(runs.model()), "--model.device", "cpu", "--threads", "1",
            "--data.train", f"[{data / 'train.jsonl'}]", "--data.eval", "[]", "--stages", stages, "--grpo.steps", "2",
            "--grpo.prompts-per-step", "4", "--rollout.group-size", "4", "--rollout.max-new-tokens", "24",
            "--video.num-frames", "4", "--video.max-pixels", "4096", "--dpo.max-steps", "1"]


def test_own_reward(example: Callable, tmp_path: Path) -> None:
    example("own_reward", *tiny_run(tmp_path / "run", "[{kind: grpo}]"))
    steps = records(RunDir(tmp_path / "run").metrics)
    assert len(steps) == 2 and all(any("weighs_options" in name for name in step["columns"]) for step in steps)


def test_own_reward_says_what_it_says() -> None:
    from types import SimpleNamespace

    from veripo_fast.recipes.own import own_function

    weighs_options = own_function(f"{REPOSITORY / 'examples' / 'own_reward.py'}:weighs_options")
    asked = SimpleNamespace(prompt=SimpleNamespace(options=("left", "right", "up")), completions=[
        SimpleNamespace(think=think) for think in ("A or B. So A.", "so A.", "A, D", None)])
    assert weighs_options(asked) == [1.0, 0.0, 0.0, 0.0] and weighs_options(asked, least=1) == [1.0, 1.0, 0.0, 0.0]


def test_own_judge(example: Callable, tmp_path: Path) -> None:
    """Its verdicts are those of its function on every reasoning that it was sent."""
    example("own_judge", *tiny_run(tmp_path / "run", "[{kind: grpo}, {kind: dpo}]"))
    folder = RunDir(tmp_path / "run").verifier("dpo-1")
    account = json.loads((folder / "account.json").read_text())
    verdicts = [json.loads(line) for file in folder.parent.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert account and len(verdicts) > 3
    assert {verdict["supported_answer"] for verdict in verdicts} - {None} <= {"A", "B", "C", "D", "1", "2", "3", "4",
                                                                             "20", "30", "40", "50"}


def test_own_data(example: Callable, veripo: Callable, tmp_path: Path) -> None:
    data = runs.corpus()
    clip = json.loads((data / "train.jsonl").read_text().splitlines()[0])["path"]
    rows = [{"video": clip, "question": "Which way?", "answer": "B", "A": "left", "B": "right", "C": "", "D": ""},
            {"video": clip, "question": "How many?", "answer": "3", "A": "", "B": "", "C": "", "D": ""},
            {"video": clip, "question": "What moves?", "answer": "a circle", "A": "", "B": "", "C": "", "D": ""},
            {"video": "", "question": "Which way?", "answer": "E", "A": "left", "B": "right", "C": "", "D": ""}]
    with (tmp_path / "questions.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (tmp_path / "clips").symlink_to(data / "clips")
    out = example("own_data", tmp_path / "questions.csv", tmp_path / "questions.jsonl")
    assert out.startswith("3 prompts, 1 skipped\n") and "questions.jsonl:4" in out
    options = tiny_run(tmp_path / "run", "[{kind: grpo}]")
    options[options.index("--data.train") + 1] = f"[{tmp_path / 'questions.jsonl'}]"
    config = written(runs.config(tmp_path / "run"), tmp_path)
    ended = veripo("train", "--config", config, *options, "--grpo.steps", "1", "--grpo.prompts-per-step", "3")
    assert ended.returncode == 0, ended.stderr
    assert len(records(RunDir(tmp_path / "run").metrics)) == 1


def test_trl_kernels(example: Callable, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from veripo_fast.demo.tiny_model import build_tokenizer

    tokenizer = build_tokenizer()
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = example("trl_kernels", tmp_path / "model", tmp_path / "out")
    assert out.count("'grad_norm'") == 5 and "linear_logprobs" in out


def test_each_is_run_named_and_short() -> None:
    readme, own = (REPOSITORY / "README.md").read_text("utf-8"), Path(__file__).read_text("utf-8")
    assert len(EXAMPLES) == 4
    for path in EXAMPLES:
        assert f"examples/{path.name}" in readme and f'example("{path.stem}"' in own
        assert len(path.read_text("utf-8").splitlines()) <= 50
    assert "graft examples" in (REPOSITORY / "MANIFEST.in").read_text("utf-8")
