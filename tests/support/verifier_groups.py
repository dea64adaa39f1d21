"""Small groups for the tests of the verifier: one character is one token, 0 is the end of turn."""

from __future__ import annotations

from veripo_fast.config.objectives import RewardConfig
from veripo_fast.reward.score import score
from veripo_fast.types import Completion, Message, ProblemType, Prompt, RolloutGroup

DIRECTIONS = ("left", "right", "up", "down")


def prompt(problem_type: ProblemType = "choice", gold: str = "B", options: tuple[str, ...] = DIRECTIONS,
           prompt_id: str = "p0") -> Prompt:
    return Prompt(prompt_id, (Message("user", ("Which way does it move?",)),), problem_type, gold,
                  options if problem_type == "choice" else ())


def written(think: str, answer: str) -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def completion(text: str, to: Prompt, version: int = 0) -> Completion:
    """A scored completion; one that does not end in </answer> was cut off."""
    finished = text.endswith("</answer>")
    scored = score(text, to, RewardConfig())
    return Completion(encode(text) + ([0] if finished else []), text, [], "stop" if finished else "length", version,
                      scored.accuracy, scored.format)


def group(*texts: str, to: Prompt | None = None, version: int = 0) -> RolloutGroup:
    to = to or prompt()
    return RolloutGroup(to, [completion(text, to, version) for text in texts])
