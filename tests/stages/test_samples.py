"""The table of two samples: which they are, and that what others wrote moves no cursor."""

from __future__ import annotations

from tests.support import policies
from veripo_fast.stages.samples import WIDTH, samples_of, table
from veripo_fast.types import Completion, RolloutGroup


def group(rewards: list[float], text: str = "<think>a</think>") -> RolloutGroup:
    completions = [Completion([1, 2], f"{text} {number}", [0.0, 0.0], "stop", 0,
                              accuracy=reward / 2, format=0.5, reward=reward, advantage=0.0)
                   for number, reward in enumerate(rewards)]
    return RolloutGroup(policies.prompt_of("Which way?", gold="left"), completions)


def test_the_best_and_the_worst() -> None:
    one, two = group([0.5, 0.2]), group([0.2, 1.5, 1.5])
    assert samples_of([one, two]) == [(two, 1), (one, 1)]
    assert len(samples_of([group([1.0, 1.0])])) == 1
    assert samples_of([]) == []


def test_the_table() -> None:
    lines = table("grpo-1, step 3", [group([0.25, 1.5], "\x1b[2J" + "long " * 200)]).split("\n")
    assert lines[0] == "grpo-1, step 3"
    assert len({len(line) for line in lines[1:]}) == 1 and len(lines[1]) == WIDTH + 17
    text = "\n".join(lines)
    assert "\x1b" not in text and "\\x1b[2J" in text
    assert "| gold       | left " in text and "reward 1.5, accuracy 0.75, format 0.5; 2 tokens, stop" in text
    assert sum(line.startswith("| question ") for line in lines) == 2
    assert all(line.rstrip("| ").endswith("...") for line in lines if "long long" in line and "..." in line)
