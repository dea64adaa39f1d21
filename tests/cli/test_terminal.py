"""What others wrote reaches the terminal on one line and visibly: file names, servers' texts, checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from veripo_fast.text import hidden, one_line, printable

FORGED = "x\x1b]0;title\x07\x1b[2J\nveripo: error: forged\r\u202egnp.exe\x9b31m"


def test_only_what_cannot_be_seen_is_escaped() -> None:
    plain = "Größe ½ 视频 1.mp4 – \N{IDEOGRAPHIC SPACE}🎬\N{NO-BREAK SPACE}é"
    assert printable(plain) == plain == one_line(plain)
    assert printable("a\x1b[31m\r\n\t\x00\x7f\x9b\u202e\u2028\udcff") == (
        r"a\x1b[31m\r\n\t\x00\x7f\x9b\u202e\u2028\udcff")
    assert one_line("first\n  second\r\nthird\u2028fourth\x0bfifth") == "first second third fourth fifth"
    assert printable("") == one_line("") == ""


def test_every_form_of_a_secret_is_hidden() -> None:
    secret = 'a/b"c+d e12'
    for form in (secret, r'a/b\"c+d e12', r'a\/b\"c+d e12', "a%2Fb%22c%2Bd%20e12"):
        assert hidden(f"it is {form}.", secret) == "it is ***."
    assert hidden("none of it", "none") == "none of it" and hidden("text", "") == "text"


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-m", "veripo_fast.cli", *arguments], capture_output=True, check=False,
                          env=os.environ | environment)
    assert done.returncode == 2, done.stderr
    return done.stderr.decode()


def seen(text: str) -> list[str]:
    """The lines, after a check that nothing in them acts on a terminal."""
    assert all(character == "\n" or character.isprintable() for character in text), repr(text)
    return text.splitlines()


def test_an_error_about_a_file_with_such_a_name() -> None:
    lines = seen(run("train", "--config", FORGED))
    assert len(lines) == 1 and lines[0].startswith("veripo: error: ") and r"\x1b[2J" in lines[0]


def test_a_log_line_about_a_record_with_such_a_name(tmp_path: Path) -> None:
    """Through the real logging of the command."""
    script = ("import logging, sys\nfrom veripo_fast import cli\n"
              "cli._run = lambda argv: (logging.getLogger('veripo_fast.x').warning('skipped %s', sys.argv[1]),\n"
              "                         logging.getLogger('other').error('a\\nb'), 1 / 0)\n"
              "try:\n    cli.main([])\nexcept ZeroDivisionError:\n"
              "    logging.getLogger('veripo_fast.x').exception('bad')\n")
    done = subprocess.run([sys.executable, "-c", script, FORGED], capture_output=True, check=True, text=True)
    lines = seen(done.stderr)
    assert lines[0].startswith(r"veripo: skipped x\x1b]0;title\x07\x1b[2J veripo: error: forged")
    assert lines[1:3] == ["veripo: a b", "veripo: bad"] and lines[3].startswith("Traceback")


@pytest.mark.parametrize("name", ["sta\x1b[31mge"])
def test_the_line_of_an_evaluation(name: str) -> None:
    from veripo_fast.evaluation.evaluate import summary

    record = {"stage": name, "mode": "greedy", "accuracy": 0.0, "accuracy_low": 0.0, "accuracy_high": 0.0, "mra": None,
              "format_rate": 0.0, "inconsistency_rate": 0.0, "length_mean": 0.0}
    assert seen(summary(record)) == [summary(record)]
