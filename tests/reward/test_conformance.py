"""Answers whose right score is evident to a person: per class what must count, and what must not."""

from __future__ import annotations

import pytest
from verifier_groups import prompt, written

from veripo_fast.config.objectives import RewardConfig
from veripo_fast.reward.choice_answers import read_choice
from veripo_fast.reward.score import score

ROOM = ("Window", "Lamp", "Carpet", "Floor lamp")
STEPS = ("opens the box", "opens the box and waits", "closes the box", "leaves")
LETTERED = ("X", "Q", "B", "K")
ABOUT = ("Both B and C", "B only", "Neither", "C only")
MANY = tuple(f"picture {number}" for number in range(1, 15))


def accuracy(answer, problem_type, gold, options=()):
    asked = prompt(problem_type, gold, options)
    return score(written("why", answer), asked, RewardConfig()).accuracy


# Choices

@pytest.mark.parametrize("answer", [
    "B", "b", "[B]", "{B}", "<B>", "（Ｂ）", "B。", "*B*", "__B__", "B!", "B\u200b", "\u200eB", "B;",
    r"\text{(B)}",
    "B. Lamp", "B Lamp", "B = Lamp", "Lamp (B)", "the lamp (B).", "B) the lamp", "B. A lamp.",
    "It is a lamp", "This is the lamp.",
    "It is B", "It's B.", "I pick B", "I would go with B", "I think it is (B)", "so B",
    "The best option is B",
    "The right choice is: B", "ans. B", "B is correct", "B is the right answer.", "答案是B", "正确答案为：B", "选B",
    "我选择 B。",
    "所以选B", "答え：B", "La respuesta correcta es B", "La réponse est B", "Antwort: B", "A resposta é B",
    "B because a cable leads to it", "B, since it shines", "B. Lamp, because the carpet lies below it",
    "B. Lamp. It stands in front of the window.", "B - the one that shines", "B. Not the carpet.",
    "B, not A", "B rather than C",
    "Not the window but the lamp", "Not C, but B", "B because A is wrong",
    "(B) since it isn't moved (A is not either)",
])
def test_choice_counts(answer):
    assert accuracy(answer, "choice", "B", ROOM) == 1


@pytest.mark.parametrize("answer", [
    "A. Lamp", "A: lamp", "A) The lamp", "**A** lamp", "$A$ Lamp", r"\boxed{A} Lamp", "(A) lamp",
    "D. Lamp", "C. a lamp",
    "B. Window", "B. Actually C", "B, or rather C", "B. Wait, A", "B. No, it is C", "B or the window",
    "B. Lamp or window",
    "B. Lamp, carpet", "B; C", "b, c", "b/c", "B & D", "B\nC", "B\nB\nB\nB", "B C", "BC", "[B-D]", "B=C=A",
    "B, maybe", "B?",
    "B. Possibly the carpet", "not B", "不是B", "B is wrong", "B. Incorrect", "B, but not B", "Not B, but B",
    "all except B", "anything but B",
    "It could be B or A", "B might be wrong", "Β", "В", "B-52", "B's", "none", "B. Lamp and C. Carpet",
    "B because of the light or the carpet",
    "A, B, C, D", "Window Lamp Carpet", "It is B or C", "选B或C", "E", "B. Lamp (C)", "B (A)", "floor lamp",
])
def test_choice_does_not_count(answer):
    assert accuracy(answer, "choice", "B", ROOM) == 0


@pytest.mark.parametrize(("answer", "options", "letter"), [
    ("A. opens the box and waits", STEPS, None), ("B. opens the box and waits", STEPS, "B"),
    ("A. opens the box", STEPS, "A"),
    ("A. Opens the box, since it is heavy", STEPS, "A"), ("Opens the box, and waits", STEPS, "B"),
    ("B. Opens the box", STEPS, None),
    ("K", LETTERED, "D"), ("Q", LETTERED, "B"), ("B", LETTERED, "B"), ("D. K", LETTERED, "D"), ("A. Q",
    LETTERED, None),
    ("A. Both B and C", ABOUT, "A"), ("B. Both B and C", ABOUT, None), ("(B) B only", ABOUT, "B"),
    ("M", MANY, "M"), ("M. picture 13", MANY, "M"), ("The answer is n", MANY, "N"), ("B. or K",
    MANY, None), ("B. Actually N", MANY, None),
    ("(K) or (L)", MANY, None), ("O", MANY, None), ("M. picture 12", MANY, None), ("A I", MANY, None),
    ("I think it is K", MANY, "K"),
    ("P", (), "P"), ("P.", (), "P"), ("P or Q", (), None), ("D. A loss of heat", (), "D"),
    ("D. Both A and C", (), "D"),
    ("D. Actually, C", (), None), ("D, A", (), None), ("D. I see a loss of heat", (), "D"), ("D. 5 kg", (),
    "D"),
    ("A. 3", ("2", "3"), None), ("(B) 3", ("2", "3"), "B"), ("3", ("2", "3"), "B"),
])
def test_choice_among(answer, options, letter):
    assert read_choice(answer, options) == letter
