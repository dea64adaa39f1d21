"""A checkpoint is a stranger's folder: its code is not run, nobody is asked, and its template ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import CheckpointError
from veripo_fast.model import template_check
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.policy import load_policy
from veripo_fast.model.template_check import template_problem
from veripo_fast.model.tower import load_tower
from veripo_fast.types import Video

CODE = "import pathlib\npathlib.Path(r'{proof}').touch()\nclass Config: pass\nModel = Tokenizer = Config\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(policies.checkpoint("qwen3_vl"), copy)
    (copy / "code.py").write_text(CODE.format(proof=tmp_path / "proof"))
    return copy


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


OWN_TOKENIZER = {"AutoTokenizer": ["code.Tokenizer", None]}
MAP = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model", **OWN_TOKENIZER}


@pytest.mark.parametrize("answer", ["", "y\n" * 20])
def test_another_family_with_code_is_refused_without_asking(folder: Path, answer: str) -> None:
    """In a process of its own, whose standard input says yes to everything."""
    change(folder / "config.json", auto_map=MAP, model_type="strange")
    script = ("import sys\nfrom veripo_fast.errors import CheckpointError\n"
              "from veripo_fast.model.encoding import PromptEncoder\n"
              "try:\n    PromptEncoder(sys.argv[1])\nexcept CheckpointError as error:\n    print('refused:', error)\n")
    done = subprocess.run([sys.executable, "-c", script, str(folder)], input=answer, capture_output=True, text=True,
                          check=True)
    assert done.stdout == f"refused: {folder} is a 'strange' checkpoint; veripo trains qwen2_5_vl and qwen3_vl\n"
    assert not (folder.parent / "proof").exists()


def test_code_beside_a_known_family_is_named_and_not_run(folder: Path, caplog: pytest.LogCaptureFixture,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder / "config.json", auto_map=MAP)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    config = ModelConfig(path=str(folder), device="cpu")
    load_policy(config)
    load_tower(config)
    assert "names code of its own (auto_map); it is not run" in caplog.text
    assert not (folder.parent / "proof").exists()


def test_a_tokenizer_that_is_code_is_named_and_not_run(folder: Path, caplog: pytest.LogCaptureFixture,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    change(folder / "tokenizer_config.json", tokenizer_class="Strange", auto_map=OWN_TOKENIZER)
    text = "How many red squares move?"
    plain = PromptEncoder(policies.checkpoint("qwen3_vl"))
    assert PromptEncoder(folder).encode_completion(text) == plain.encode_completion(text)
    assert f"the tokenizer of {folder} names code of its own (auto_map); it is not run" in caplog.text
    assert not (folder.parent / "proof").exists()


def test_a_tokenizer_that_cannot_be_loaded(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .*checkpoint cannot be loaded"):
        PromptEncoder(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\xff", '{"model_type": ["qwen3_vl"]}', '"qwen3_vl"'])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read|is a .* checkpoint"):
        PromptEncoder(folder)


ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "problem"), [
    (ENDLESS, "takes more than 1 s"),
    ("{{ 9 ** (9 ** 9) }}", "takes more than 1 s"),
    ("{% if messages[1].content | length > 3 %}" + ENDLESS + "{% endif %}", "takes more than 1 s"),
    ("{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
     "takes more than 1 GiB of memory"),
    ("{{ 'a' * 2000000 }}", "writes more than 1048576 characters"),
    ("{% generation %}{% for i in range(9) %}{% break %}{% endfor %}{% endgeneration %}{{ messages | tojson }}", ""),
    ("{{ raise_exception('no video here') }}", ""),
    ("{% if %}", ""),
])
def test_a_templates_bounds(template: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With less time and memory than users have: the child reads its limits from the file that it runs."""
    child = tmp_path / "child.py"
    text = Path(template_check.__file__).read_text()
    child.write_text(text.replace("CPU_SECONDS = 5", "CPU_SECONDS = 1").replace("= 1 << 30", "= 1 << 28"))
    monkeypatch.setattr(template_check, "__file__", str(child))
    monkeypatch.setattr(template_check, "CPU_SECONDS", 1)
    template_problem.cache_clear()
    found = template_problem(template)
    assert found.startswith(problem) if problem else found == ""


def test_a_checkpoint_whose_template_never_ends_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(ENDLESS + "{{ messages }}")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"the chat template of .*checkpoint takes more than 5 s for a prompt"):
        PromptEncoder(folder)
    assert time.monotonic() - began < 100


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_the_templates_of_the_families_pass(family: str) -> None:
    encoder = PromptEncoder(policies.checkpoint(family))
    assert template_problem(encoder.tokenizer.chat_template) == ""
    assert "What moves?" in encoder.chat_text(policies.prompt_of(Video("a.mp4"), "What moves?"))
