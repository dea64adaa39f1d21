"""Judges against labelled sets: the shipped set, what is counted, what is refused, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.verifier_groups import group, written
from tests.verifier.test_judge_llm import policies_llama
from veripo_fast.cli import main
from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.errors import ConfigError, DataError, JudgeError
from veripo_fast.report import judge_eval
from veripo_fast.reward.score import answers_equal
from veripo_fast.types import RolloutGroup
from veripo_fast.verifier import calibration, planted
from veripo_fast.verifier.calibration import Calibration, check_judge, groups_of, read_set
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import NO_JUDGEMENT, Judgement, no_progress
from veripo_fast.verifier.proportions import Share
from veripo_fast.verifier.verify import calibrate, verify

SET = read_set("planted")


class Says:
    """Says the same of everything."""

    def __init__(self, verdict: bool | None) -> None:
        self.verdict = Judgement(verdict, "B", None) if verdict is not None else NO_JUDGEMENT

    def judge(self, groups: list[RolloutGroup], progress: object) -> list[list[Judgement]]:
        return [[self.verdict] * len(group.completions) for group in groups]


def calibrated(judge: object, items: list[calibration.Item] = SET) -> Calibration:
    return calibrate(items, lambda groups: judge.judge(groups, no_progress))  # type: ignore[attr-defined]


def item(consistent: bool | None, think: str = "so B", answer: str = "B", kind: str = "k") -> dict[str, object]:
    return {"kind": kind, "question": "Which?", "options": ["left", "right"], "problem_type": "choice", "think": think,
            "answer": answer, "consistent": consistent}


def written_set(path: Path, *items: object) -> str:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in items))
    return str(path)


# -- the shipped set ------------------------------------------------------------------------------------------------


def test_the_script_writes_the_shipped_set() -> None:
    shipped = Path(calibration.__file__).with_name("planted.jsonl").read_bytes()
    assert planted.text().encode() == shipped and len(shipped) < 500_000


def test_the_shipped_set_has_every_defect_and_every_label() -> None:
    labels = [one.consistent for one in SET]
    assert len(SET) > 400 and {one.kind for one in SET} == set(planted.KINDS)
    assert all(labels.count(label) >= 100 for label in (True, False, None))


def test_labels_are_what_the_answers_say() -> None:
    """A consistent item answers what it supports, an inconsistent one something else; both can be read."""
    for record, one in zip(planted.records(), SET, strict=True):
        if one.consistent is None:
            assert record["supported"] is None
        else:
            assert answers_equal(one.answer, one.answer, one.prompt), record
            assert answers_equal(str(record["supported"]), one.answer, one.prompt) is one.consistent, record


def test_the_rules_on_the_shipped_set() -> None:
    """They say nothing without a marker word, in another language and of an elimination; what they say is right."""
    measured = calibrated(RulesJudge())
    assert measured.precision.value == 1 and measured.consistent_precision.value == 1 and measured.invented.value == 0
    silent = {kind for kind, part in measured.by_kind().items() if part.coverage.value == 0 and part.coverage.total}
    assert silent == {"no marker word", "elimination", "other language"}
    assert all(part.agreement.value == 1 for kind, part in measured.by_kind().items() if kind not in silent)
    assert measured.faults(VerifierConfig()) == []


# -- what is counted ------------------------------------------------------------------------------------------------


def test_shares_of_known_verdicts() -> None:
    truths = (True, True, False, False, False, None, None)
    verdicts = (True, False, False, None, True, None, True)
    items = tuple(replace(SET[0], consistent=truth, kind=str(truth)) for truth in truths)
    measured = Calibration(items, tuple(Judgement(verdict, None, None, "" if verdict is not None else "no conclusion")
                                        for verdict in verdicts))
    counts = {name: (share.count, share.total) for name, share in measured.shares().items()}
    assert counts == {"precision of inconsistent": (1, 2), "recall of inconsistent": (1, 3),
                      "precision of consistent": (1, 3), "coverage": (4, 5), "verdicts where none is due": (1, 2),
                      "agreement": (3, 7)}
    assert measured.verdicts() == {"consistent": 3, "inconsistent": 2, "no verdict": 2}
    assert measured.no_verdict() == {"no conclusion": 2}
    assert measured.by_kind()["False"].verdicts() == {"consistent": 1, "inconsistent": 1, "no verdict": 1}


@pytest.mark.parametrize(("count", "total", "low", "high"), [
    (0, 12, 0.0, 0.242494), (12, 12, 0.757506, 1.0), (5, 10, 0.236593, 0.763407), (1, 100, 0.001767, 0.054486),
    (0, 0, 0.0, 1.0)])
def test_intervals_are_wilsons(count: int, total: int, low: float, high: float) -> None:
    """Values of statsmodels 0.14, proportion_confint(method="wilson")."""
    assert Share(count, total).interval == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_a_share_of_nothing_is_no_number() -> None:
    assert Share(0, 0).value is None and str(Share(0, 0)) == "none to count"
    assert str(Share(0, 12)) == "0.0% (0 of 12, 0.0% to 24.2%)"


def test_items_of_one_question_are_one_group() -> None:
    groups, where = groups_of(SET)
    assert len(groups) == len(planted.ASKED)
    assert [groups[number].completions[index].text for number, index in where] == [one.text for one in SET]
    assert all(one.prompt.gold == "" for one in groups), "no judge is shown a gold answer"


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "fault"), [
    (True, "all its verdicts are the same: consistent"), (False, "all its verdicts are the same: inconsistent"),
    (None, "it gives no verdict on any of 478 items")])
def test_a_judge_that_always_says_the_same_is_refused(verdict: bool | None, fault: str) -> None:
    """Also where the floors are 0."""
    floors = VerifierConfig(min_precision=0.0, min_recall=0.0, min_coverage=0.0)
    assert calibrated(Says(verdict)).faults(floors)[0] == fault
    with pytest.raises(JudgeError, match=f"the judge `yes` is refused on 478 labelled items: {fault}"):
        check_judge("yes", calibrated(Says(verdict)), floors)


@pytest.mark.parametrize(("floor", "value"), [("min_recall", 0.8), ("min_coverage", 0.75)])
def test_floors_are_those_of_the_configuration(floor: str, value: float) -> None:
    with pytest.raises(JudgeError, match=rf"its {floor[4:]} is 7\d\.\d% .* and verifier\.{floor} is {value}"):
        check_judge("rules", calibrated(RulesJudge()), replace(VerifierConfig(), **{floor: value}))


def test_a_floor_is_a_share() -> None:
    with pytest.raises(ConfigError, match="min_precision"):
        VerifierConfig(min_precision=90)


def test_a_stage_tries_its_judge_before_it_judges() -> None:
    groups = [group(written("so right", "B"), written("so left", "B"))]

    def verified(judge: object, **options: object) -> object:
        return verify(groups, VerifierConfig(**options), judge, len, lambda text: [1], 0, 0,  # type: ignore[arg-type]
                      progress=False)

    with pytest.raises(JudgeError, match="all its verdicts are the same: consistent"):
        verified(Says(True), calibration="planted")
    assert verified(Says(True)) and verified(RulesJudge(), calibration="planted")


def test_a_trial_with_ranks_is_shared_like_the_judging() -> None:
    shared = []

    def share(groups: list[RolloutGroup], judging: object) -> list[list[Judgement]]:
        shared.append(len(groups))
        return judging(groups)  # type: ignore[operator]

    verify([group(written("so right", "B"))], VerifierConfig(calibration="planted"), RulesJudge(), len,
           lambda text: [1], 0, 0, progress=False, share=share)
    assert shared == [len(planted.ASKED), 1]


# -- sets of one's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "message"), [
    ("{", "is no item"), ("[1]", "is no item"), (item(True, answer=""), "answer must be a text"),
    (item(True) | {"consistent": "yes"}, "consistent must be true, false or null, got 'yes'"),
    (item(True) | {"consistent": 1}, "consistent must be true, false or null, got 1"),
    (item(True) | {"options": "AB"}, "options must be a list of texts"), (item(True) | {"problem_type": "?"}, "'\\?'"),
    (item(True, think="</think>"), "without tags of their own")])
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"own\.jsonl, line 3.*{message}"):
        read_set(written_set(tmp_path / "own.jsonl", item(True), item(False), line))


@pytest.mark.parametrize(("items", "message"), [
    ([item(True)] * 3, "needs consistent and inconsistent items; it has consistent"), ([], "it has no item")])
def test_a_set_needs_both_labels(tmp_path: Path, items: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_set(written_set(tmp_path / "own.jsonl", *items))


def test_a_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the calibration set .*own\.jsonl cannot be read"):
        read_set(str(tmp_path / "own.jsonl"))


def test_a_limit_takes_of_every_kind() -> None:
    few = read_set("planted", 44)
    assert len(few) == 44 and {one.kind for one in few} == set(planted.KINDS)
    assert {one.consistent for one in few} == {True, False, None} and len({one.prompt for one in few}) > 1
    assert sorted(map(id, read_set("planted", 10_000))) and len(read_set("planted", 10_000)) == len(SET)


@pytest.mark.parametrize(("line", "sentence"), [
    ("[" * 100_000, "is no item of a calibration set: RecursionError"),
    (json.dumps({"kind": "k", "question": "q", "think": "t", "answer": "a", "consistent": True, "problem_type": "odd"}),
     "line 1: problem_type 'odd' is not known")])
def test_an_odd_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "set.jsonl").write_text(line)
    with pytest.raises(DataError, match=sentence):
        read_set(str(tmp_path / "set.jsonl"))


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = written_set(tmp_path / "own.jsonl", item(True), item(False, answer="A"), item(None, "Hm", kind="<i>hm</i>"))
    assert main(["judge-eval", "--set", own, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "judge rules on 3 items" in printed and "coverage                     100.0% (2 of 2, 34.2% to" in printed
    written_ = json.loads((tmp_path / "out" / "judge_eval.json").read_text())
    assert written_["verdicts"] == {"consistent": 1, "inconsistent": 1, "no verdict": 1} and written_["refused"] == []
    assert written_["reliability"]["inconsistent"]["value"] == 1
    page = (tmp_path / "out" / "judge_eval.html").read_text()
    assert "A run may use it" in page and "<svg" in page and "&lt;i&gt;hm" in page and "<script" not in page


def test_the_command_refuses_and_still_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["judge-eval", "--out", str(out), "--verifier.min-recall", "0.9"]) == 2
    shown = capsys.readouterr()
    assert "the judge `rules` is refused on 478 labelled items: its recall is" in shown.err
    assert "contradiction" in shown.out and json.loads((out / "judge_eval.json").read_text())["refused"]
    assert "A run refuses it" in (out / "judge_eval.html").read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--limit", "0"], "--limit must be at least 1, got 0"), (["--set", "nowhere"], "set nowhere cannot be read"),
    (["--out", __file__], "is not a folder"), (["--out", __file__ + "/x"], "is not a folder"),
    (["--out", "/proc/veripo"], "--out /proc/veripo cannot be made")])
def test_the_command_names_what_it_cannot_use(arguments: list[str], message: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge-eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_language_model_of_noise_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, with the real engine; replies that cannot be read are counted, and do not end it."""
    assert main(["judge-eval", "--limit", "8", "--verifier.judge", "llm", "--verifier.llm-path",
                 str(policies_llama()), "--model.device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert "no verdict because           no reply 8" in shown.out
    assert "it gives no verdict on any of 8 items" in shown.err


def test_reliability_is_by_score_where_there_is_one() -> None:
    items = tuple(SET[:4])
    judged = tuple(Judgement(verdict, None, score) for verdict, score in (
        (items[0].consistent, 0.1), (not items[1].consistent, -0.2), (items[2].consistent, 9.0), (None, 0.0)))
    shares = judge_eval.reliability(Calibration(items, judged))
    assert (shares["50%"].count, shares["50%"].total) == (1, 2) and (shares["90%"].count, shares["90%"].total) == (1, 1)
    assert shares["70%"].value is None
