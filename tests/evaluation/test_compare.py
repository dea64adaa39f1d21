"""`veripo compare`: the numbers by hand, what is refused, and the page of two real evaluations in a browser."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support import runs
from veripo_fast.cli import main
from veripo_fast.config.describe import to_yaml
from veripo_fast.errors import UserError
from veripo_fast.evaluation.compare import compare, mcnemar
from veripo_fast.report.compare import lines_of
from veripo_fast.rollout.store import read_groups, write_groups
from veripo_fast.types import Completion, Message, Prompt, RolloutGroup


def item(name: str, *accuracy: float, consistent: bool | None = True, **other: object) -> dict[str, object]:
    return {"prompt_id": name, "question": f"{name}?", "gold": "3", "media": [], "problem_type": "number",
            "accuracy": list(accuracy), "consistent": [consistent] * len(accuracy), **other}


def folder(path: Path, **modes: list[dict[str, object]]) -> Path:
    path.mkdir()
    (path / "evals.jsonl").write_text("".join(json.dumps({"mode": mode}) + "\n" for mode in modes))
    for mode, items in modes.items():
        (path / f"{mode}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    return path


def test_by_hand(tmp_path: Path) -> None:
    before = folder(tmp_path / "a", greedy=[item("x", 1), item("y", 0), item("z", 0, consistent=False),
                                            item("only", 1)])
    after = folder(tmp_path / "b", greedy=[item("z", 1), item("y", 1, consistent=None), item("x", 0)], sampled=[])
    (one,) = compare(before, after)
    assert one.mode == "greedy" and one.alone == (1, 0)
    assert [pair.before["prompt_id"] for pair in one.pairs] == ["x", "y", "z"]
    assert (one.gained, one.lost) == (2, 1) and one.accuracy.mean == pytest.approx(1 / 3)
    assert one.inconsistency.mean == pytest.approx(-1 / 3)
    assert [pair.before["prompt_id"] for pair in one.flipped] == ["x", "y", "z"]  # losses first among equals
    assert one.p_value == 1.0


def test_two_judges_are_named(tmp_path: Path) -> None:
    before, after = (folder(tmp_path / name, greedy=[item("x", 1)]) for name in ("a", "b"))
    (after / "evals.jsonl").write_text(json.dumps({"mode": "greedy", "judge": "llm big"}) + "\n")
    [one] = compare(before, after)
    said = "  inconsistent is what a judge that is not named says before and llm big after, so its change says little"
    assert one.judges == ("", "llm big") and said in lines_of(one)
    assert not any("says little" in line for line in lines_of(compare(after, after)[0]))


def test_other_words_are_compared_only_when_asked_for(tmp_path: Path) -> None:
    before = folder(tmp_path / "a", greedy=[item("x", 1)])
    after = folder(tmp_path / "b", greedy=[item("x", 0, question="X, please?")])
    with pytest.raises(UserError, match="1 prompt of both ask in other words in each, x: these are other data, or"):
        compare(before, after)
    [one] = compare(before, after, other_wording=True)
    assert one.lost == 1
    old = folder(tmp_path / "old", greedy=[{key: value for key, value in item("x", 1).items() if key != "question"}])
    with pytest.raises(UserError, match="holds no questions: evaluate again, earlier versions wrote none"):
        compare(old, before)


@pytest.mark.parametrize(("gained", "lost", "expected"), [
    (0, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (1, 8, 2 * 10 / 512), (8, 1, 2 * 10 / 512), (1, 0, 1.0)])
def test_mcnemar_by_hand(gained: int, lost: int, expected: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(expected)


def test_mcnemar_of_many_against_the_normal_law() -> None:
    """2,000 discordant prompts: within 3 % of the normal approximation with continuity correction."""
    z = (1060 - 940 - 1) / math.sqrt(2000)
    assert mcnemar(1060, 940) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.03)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"gold": "4"}, "1 prompt of both ask for another answer in each, x"), ({"problem_type": "text"}, "other data")])
def test_other_questions_are_not_compared(tmp_path: Path, change: dict[str, str], sentence: str) -> None:
    before = folder(tmp_path / "a", greedy=[item("x", 1)])
    after = folder(tmp_path / "b", greedy=[item("x", 1, **change)])
    with pytest.raises(UserError, match=sentence):
        compare(before, after)


def test_refusals(tmp_path: Path) -> None:
    whole = folder(tmp_path / "a", greedy=[item("x", 1)])
    for other, sentence in (
            (folder(tmp_path / "b", sampled=[item("x", 1)]), "no mode is in both"),
            (folder(tmp_path / "c", greedy=[item("y", 1)]), "have no prompt in common"),
            (tmp_path / "none", "holds no finished evaluation")):
        with pytest.raises(UserError, match=sentence):
            compare(whole, other)
    (whole / "greedy.jsonl").write_text('{"torn')
    with pytest.raises(UserError, match="is damaged: 1 line cannot be read"):
        compare(whole, whole)
    (whole / "greedy.jsonl").unlink()
    with pytest.raises(UserError, match=r"greedy.jsonl is missing: evaluate again"):
        compare(whole, whole)


@pytest.mark.parametrize("line", [
    {"a": 1}, item("x"), item("x", 1) | {"consistent": []}, item("x", 1) | {"accuracy": ["1"]}, item("x", 2)])
def test_a_line_that_is_none_of_an_evaluation(tmp_path: Path, line: dict[str, object]) -> None:
    whole, other = folder(tmp_path / "a", greedy=[item("x", 1)]), folder(tmp_path / "b", greedy=[line])
    with pytest.raises(UserError, match=r"greedy.jsonl is damaged: prompt 1 is no line of an evaluation"):
        compare(whole, other)


@pytest.mark.parametrize(("text", "sentence"), [("", "evals.jsonl is empty"), ('{"stage": "x"}', "names no mode")])
def test_an_account_that_names_no_mode(tmp_path: Path, text: str, sentence: str) -> None:
    whole = folder(tmp_path / "a", greedy=[item("x", 1)])
    (whole / "evals.jsonl").write_text(text)
    with pytest.raises(UserError, match=sentence):
        compare(whole, whole)


def test_a_folder_in_which_another_evaluation_was_stopped(tmp_path: Path) -> None:
    """Its evals.jsonl is of the one before, and greedy.parquet may be of the new one."""
    whole = folder(tmp_path / "a", greedy=[item("x", 1)])
    (whole / "parts").mkdir()
    with pytest.raises(UserError, match="it was stopped; the same `veripo eval` goes on"):
        compare(whole, whole)


def test_completions_that_are_not_those_of_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (folder(tmp_path / name, greedy=[item("x", score)]) for name, score in (("a", 1), ("b", 0)))
    assert main(["compare", str(one), str(other), "--out", str(tmp_path / "page")]) == 2
    assert f"{one}/greedy.parquet is missing: it holds the completions" in capsys.readouterr().err
    for path in (one, other):
        prompt = Prompt("x", (Message("user", ("?",)),), "number", "3")
        write_groups(path / "greedy.parquet", [RolloutGroup(prompt, [Completion([1], "3", [0.0], "stop", 0, 1.0)])],
                     "eval", 0)
    assert main(["compare", str(one), str(other), "--out", str(tmp_path / "page")]) == 2
    assert f"{other}/greedy.parquet and greedy.jsonl are of two evaluations" in capsys.readouterr().err
    (one / "inputs.json").write_text('{"options": {"a": "no JSON"}}')
    assert main(["compare", str(one), str(one), "--out", str(tmp_path / "page")]) == 2
    assert f"{one}/inputs.json is damaged" in capsys.readouterr().err


def test_two_real_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two seeds: greedy completions are equal, sampled ones are not all."""
    for seed in (0, 1):
        config = tmp_path / f"{seed}.yaml"
        config.write_text(to_yaml(runs.config(tmp_path / "run", seed=seed, eval__samples=4)))
        assert main(["eval", "--config", str(config), "--out", str(tmp_path / str(seed))]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert "greedy: 4 prompts in both\n" in out and "right after and wrong before: 0; the reverse: 0;" in out
    html = (tmp_path / "page").read_text()
    assert "No prompt has another accuracy." in html
    same = json.loads((tmp_path / "0" / "greedy.jsonl").read_text().splitlines()[0])
    moved = same | {"accuracy": [1 - same["accuracy"][0]]}
    rest = (tmp_path / "1" / "greedy.jsonl").read_text().splitlines()[1:]
    (tmp_path / "1" / "greedy.jsonl").write_text("\n".join([json.dumps(moved), *rest]))
    first, *others = read_groups(tmp_path / "1" / "greedy.parquet")
    first.completions[0].accuracy = moved["accuracy"][0]
    write_groups(tmp_path / "1" / "greedy.parquet", [first, *others], "eval", 0)
    assert main(["compare", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path)]) == 0
    html = (tmp_path / "compare.html").read_text()
    assert html.count("data:image/jpeg;base64,") >= 4 and same["prompt_id"] in html and "Gold answer:" in html
    assert main(["compare", str(tmp_path / "0"), str(tmp_path / "gone")]) == 2
    assert "holds no finished evaluation" in capsys.readouterr().err
