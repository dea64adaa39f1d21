"""Answers whose right score is evident to a person: per class what must count, and what must not."""

from __future__ import annotations

import pytest

from tests.support.verifier_groups import prompt, written
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


# Numbers

@pytest.mark.parametrize(("gold", "answers"), [
    ("7", ["7", "7.0", "seven", "七", "⑦", "Ⅶ", "７", "(7)", "**7**", "7 apples", "seven apples.", "about 7",
    "~7", "≈ 7", "7°",
           "The answer is 7", "3 + 4 = 7", "n = 7", "seven (7)", "14/2", "答案是7", "一共七个", "7个",
    "I see 7 of them", "$7", "7 cm"]),
    ("4200000", ["4 200 000", "4.200.000", "42,00,000", "4,200,000", "4.2 million", "4200k", "4.2e6",
    "4.2 × 10⁶"]),
    ("3.5", ["3,5", "3½", "3 1/2", "three and a half", "3 and a half", "7/2", "3.50", "3.5m", "+3.5"]),
    ("-6", ["-6", "–6", "−6", "‒6", "minus six", "negative 6", "x = –6"]),
    ("3.5 m", ["350 cm", "3.5 meters", "3500mm", "0.0035 km", "3.5", "3,5 m", "3.5米"]),
    ("2 hours", ["120 min", "2h", "7200 s", "2"]), ("40 km/h", ["40 km/h", "40 kph"]), ("9 m^2", ["9 m²",
    "9 square meters", "9m2"]),
    ("0.75", ["75%", "3/4", "¾", "three quarters", "75 percent"]), ("75%", ["75%", "75", "0.75", "７５％",
    "3/4"]),
    ("0.04", ["4%", "4/100"]), ("2/3", ["⅔", "two thirds", "2/3"]), ("0.5", ["half", "one half", "a half",
    "½"]),
])
def test_number_counts(gold, answers):
    assert [answer for answer in answers if accuracy(answer, "number", gold) != 1] == []


@pytest.mark.parametrize(("gold", "answers"), [
    ("7", ["7x", "7 x", "x7", "7²", "√7", "7√2", "2√7", "not 7", "isn't 7", "less than 7",
    "fewer than seven", "more than 7", "at least 7",
           "at most seven", "≠7", "≥ 7", "<7", "> 7", "±7", "7π", "7!", "7'", "7^2", "|7", "7+", "no 7",
    "under 7", "over seven",
           "before 7", "7 squared", "seven squared", "7 dozen", "twice 7", "half of 7", "log 7",
    "root of 7", "7 or so", "either 7",
           "3 = 7", "7 = 3", "7%", "-7", "7 8", "2(7)", "(7)(7)", "7k", "7 hundred", "不是7", "少于7", "7α",
    "7ab", "anything except 7",
           "7 times 2", "7 and a half", "the root of seven", "neither 7"]),
    ("3.5 m", ["3.5 km", "3.5 cm", "3.5 s", "3.5 kg", "350", "3.5 m²", "3.5 m/s", "3.5%"]),
    ("2 hours", ["2 minutes", "120", "2 m"]), ("4", ["4%", "4000%"]), ("0.04", ["4", "0.04%"]), ("0.5%",
    ["0.5", "50%"]),
])
@pytest.mark.parametrize("problem_type", ["number", "estimate", "math"])
def test_number_does_not_count(gold, answers, problem_type):
    assert [answer for answer in answers if accuracy(answer, problem_type, gold) > 0.9] == []


# Text

def test_a_letter_is_no_article():
    assert accuracy("protein", "text", "Protein A") < 1
    assert accuracy("Exit door", "text", "Exit A door") < 1
    for answer in ("an exit door", "the Exit door", "a exit door", "Exit door!"):
        assert accuracy(answer, "text", "Exit door") == 1


# Mathematics

@pytest.mark.parametrize(("gold", "answers"), [
    (r"$3\sqrt{2}$", [r"\sqrt{18}", "3√2", "√18", "3√(2)", r"The result is $3\sqrt{2}$.",
    r"$3\sqrt{2}$ cm", r"x = 3\sqrt{2}"]),
    ("$y^2-4$", ["y²-4", "(y-2)(y+2)", "y² − 4", "$y^{2}-4$"]), (r"$\frac{3}{4}$", ["¾", "three quarters",
    "75%", "0.75", "3/4"]),
    (r"$30^\circ$", ["30°", "30 degrees", "30", r"30^\circ", r"$30^{\circ}$"]), (r"$2\pi$", ["2π", r"2\pi",
    "2 π"]),
    ("20", ["20", "twenty", "4 × 5", r"4 \cdot 5", r"\sqrt{400}", "400^{1/2}", "20.0"]),
])
def test_mathematics_counts(gold, answers):
    assert [answer for answer in answers if accuracy(answer, "math", gold) != 1] == []


@pytest.mark.parametrize(("gold", "answers"), [
    (r"$3\sqrt{2}$", [r"not $3\sqrt{2}$", r"less than $3\sqrt{2}$", r"2 $3\sqrt{2}$", r"$3\sqrt{2}$ x",
    r"√$3\sqrt{2}$",
                      r"$3\sqrt{2}$^2", r"-$3\sqrt{2}$", r"$3\sqrt{2}$, $4$", r"\neq 3\sqrt{2}", r"≠3√2",
    "3√3"]),
    ("$y^2-4$", ["y²+4", "not y²-4", "y-4"]), (r"$30^\circ$", ["30'", "30 rad", "60°", "30²"]),
    ("20", ["20π", "20y", "20'", "4 = 20", "20 = 4", r"\sqrt{20}", "√20", "20²", r"\neq 20", "> 20",
    r"\le 20", "20i"]),
    ("New York", ["york", "New", "the York"]),
])
def test_mathematics_does_not_count(gold, answers):
    assert [answer for answer in answers if accuracy(answer, "math", gold) > 0] == []
