"""The controls of an evaluation: what a policy reads without media and with shuffled frames, and the paired numbers."""

import json

import pytest
import torch

from tests.support import runs
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.cli import main
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.errors import ConfigError
from veripo_fast.evaluation.controls import control_lines, control_scores, controlled
from veripo_fast.evaluation.items import items_of
from veripo_fast.evaluation.progress import Progress
from veripo_fast.model.policy import load_policy
from veripo_fast.rollout.store import read_groups
from veripo_fast.types import Completion, Message, Prompt, RolloutGroup, Video

CONTROLS = {"eval__controls": ["blind", "shuffled"], "eval__samples": 2, "eval__prompts_per_batch": 1}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The training prompts of a run (videos, a picture and a text), loaded; and the encoder."""
    policy = load_policy(ModelConfig(path=str(runs.model()), device="cpu"))
    config = runs.config(tmp_path_factory.mktemp("controls"))
    prompts, _ = load_prompts(config.data.train, config.data)
    loader = PromptLoader(policy, config.video, config.data.max_prompt_tokens, lambda prompt, reason: None)
    items = loader.load(prompts)
    loader.close()
    return dict(enumerate(items)), policy.encoder


def test_blind_prompts_are_their_text_alone(loaded):
    items, encoder = loaded
    blind = controlled(encoder, items, "blind", 0)
    assert set(items) - set(blind) == {number for number, item in items.items() if not item.prompt.media} != set()
    for number, item in blind.items():
        text = encoder.tokenizer.decode(item.encoded.token_ids)
        assert item.encoded.media is None and item.features is None and item.prompt == items[number].prompt
        assert not any(int(pad) in item.encoded.token_ids for pad in encoder.pad_ids.values())
        assert item.prompt.text.strip() in text and len(item.encoded.token_ids) < len(items[number].encoded.token_ids)


def test_shuffled_prompts_hold_the_same_tokens_in_another_order(loaded):
    items, encoder = loaded
    shuffled = controlled(encoder, items, "shuffled", 0)
    videos = {number for number, item in items.items() if any(isinstance(m, Video) for m in item.prompt.media)}
    assert set(shuffled) == videos and videos < set(items)
    for number, item in shuffled.items():
        before, after = items[number].features.embeddings, item.features.embeddings
        assert torch.equal(items[number].encoded.token_ids, item.encoded.token_ids)
        assert not torch.equal(before, after)
        assert torch.equal(before.sort(0).values, after.sort(0).values)
    again = controlled(encoder, items, "shuffled", 0)
    assert all(torch.equal(again[n].features.embeddings, shuffled[n].features.embeddings) for n in shuffled)


def group(name, kind, *accuracy, options=(), video="v.mp4"):
    prompt = Prompt(name, (Message("user", (Video(video), "?")),), kind, "A", options)
    texts = [(f"<think>.</think><answer>{score:g}</answer>", score) for score in accuracy]
    return RolloutGroup(prompt, [Completion([1], text, [], "stop", 0, score, 1.0) for text, score in texts])


def test_the_numbers_by_hand():
    whole = [group("a", "choice", 1, 1, options=("x", "y", "z", "u")), group("b", "number", 1, 0, video="w.mp4"),
             group("c", "boolean", 0, 0, video="u.mp4"), group("text", "number", 1, 1)]
    blind = [group("a", "choice", 1, 0, options=("x", "y", "z", "u")), group("b", "number", 0, 1, video="w.mp4"),
             group("c", "boolean", 0, 0, video="u.mp4")]
    found = control_scores(whole, blind, 500, 0)
    assert found["prompts"] == 3 and found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_whole"] == pytest.approx(1 / 2) and found["gain"] == pytest.approx(1 / 6)
    assert found["gain_low"] == 0 and 1 / 6 < found["gain_high"] <= 0.5
    assert found["as_well_rate"] == pytest.approx(1 / 3)  # b; c is never answered, which is no answer from the text
    assert found["format_rate"] == 1
    assert found["chance"] == pytest.approx((1 / 4 + 0 + 1 / 2) / 3)
    [line] = control_lines({"blind": found})
    assert "without the media: accuracy 0.333 of 3 prompts, format 1.000, the media add +0.167 [+0.000, +0." in line
    assert line.endswith("]; 33% are answered as well, guesses are right in 25%")
    assert "their order adds +0.167" in control_lines({"shuffled": found})[0]
    items = items_of(whole, None, {"blind": blind})
    assert [item["controls"].get("blind", {}).get("as_well") for item in items] == [False, True, False, None]
    assert items[1]["controls"]["blind"] == {"answers": ["0", "1"], "accuracy": [0, 1], "as_well": True}


def evaluated(tmp_path, name, **changes):
    config = tmp_path / f"{name}.yaml"
    config.write_text(to_yaml(runs.config(tmp_path / "run", **changes)))
    return main(["eval", "--config", str(config), "--out", str(tmp_path / name)])


def records(folder):
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_controls_change_nothing_else_and_an_evaluation_goes_on_with_them(tmp_path, monkeypatch, capsys):
    assert evaluated(tmp_path, "plain", eval__samples=2, eval__prompts_per_batch=1) == 0
    capsys.readouterr()
    assert evaluated(tmp_path, "whole", **CONTROLS) == 0
    assert "with shuffled frames: accuracy" in capsys.readouterr().out
    for plain, whole in zip(records(tmp_path / "plain"), records(tmp_path / "whole"), strict=True):
        found = whole.pop("controls")
        assert plain == whole and set(found) == {"blind", "shuffled"}
        assert all(one["prompts"] == 4 and one["gain_low"] <= one["gain"] <= one["gain_high"] for one in found.values())
        blind = read_groups(tmp_path / "whole" / f"{whole['mode']}_blind.parquet")
        assert [g.prompt for g in blind] == [g.prompt for g in read_groups(
            tmp_path / "whole" / f"{whole['mode']}.parquet")]
    kept, calls = Progress.keep, []

    def keep(self, *arguments):
        kept(self, *arguments)
        calls.append(arguments[0])
        if len(calls) == 5:  # the blind part of the second batch is there, the batch itself is not
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "keep", keep)
    assert evaluated(tmp_path, "stopped", **CONTROLS) == 130
    assert calls == ["greedy_blind", "greedy_shuffled", "greedy", "greedy_blind", "greedy_shuffled"]
    monkeypatch.undo()
    assert evaluated(tmp_path, "stopped", **CONTROLS) == 0
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    for name in ("greedy.jsonl", "sampled.jsonl"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_controls_that_cannot_be_made(tmp_path, capsys):
    text = {"problem": "Which is up?", "problem_type": "multiple choice", "data_type": "text",
            "options": ["A. top", "B. left"], "solution": "A"}
    (tmp_path / "t.jsonl").write_text(json.dumps(text) + "\n")
    for control, sentence in (("blind", "none shows anything"), ("shuffled", "none shows a video of two temporal")):
        assert evaluated(tmp_path, control, data__eval=[str(tmp_path / "t.jsonl")], eval__controls=[control]) == 2
        assert f"eval.controls {control} can be made of none of the 1 prompts: {sentence}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="controls names one twice: blind, blind"):
        runs.config(tmp_path, eval__controls=["blind", "blind"])
