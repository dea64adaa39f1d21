"""A checkpoint is a stranger's folder: its code is not run, nobody is asked, and its template ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import policies
from veripo_fast.config.families import names
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import CheckpointError, DataError
from veripo_fast.model import template_check
from veripo_fast.model.checkpoint_files import JSON_FILES
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.policy import load_policy, save_policy
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
    assert done.stdout == (f"refused: {folder} is a 'strange' checkpoint; veripo trains {names()}; its own code "
                           "(auto_map in config.json) is never run\n")
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


BROKEN = [b'{"a": [1, ', b"[]", b"3", b"null", b'{"a": "\xff"}', b"", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
"""Truncated, no object, not UTF-8, empty, nested too deeply, a number that Python does not read."""


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_broken_json_file_is_named(folder: Path, name: str) -> None:
    for content in BROKEN:
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(folder / name))):
            PromptEncoder(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        PromptEncoder(folder)


TYPES = ("x", [], {}, -1, 1.5, None, True)
PLACES = {"config.json": ["vision_config.patch_size", "vision_config.spatial_merge_size", "text_config.hidden_size",
                          "vision_config", "image_token_id", "vision_start_token_id", "text_config.layer_types",
                          "dtype"],
          "generation_config.json": ["eos_token_id", "temperature"],
          "preprocessor_config.json": ["image_mean", "image_std"],
          "video_preprocessor_config.json": ["image_mean", "image_std"],
          "model.safetensors.index.json": ["weight_map"],
          "tokenizer.json": ["model", "model.vocab", "added_tokens", "pre_tokenizer", "decoder"],
          "tokenizer_config.json": ["tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "eos_token"]}
HARMLESS = {"config.json": {"dtype": ({}, -1, 1.5, None, True)},
            "generation_config.json": {"eos_token_id": ([], None), "temperature": TYPES},
            "tokenizer_config.json": {"tokenizer_class": ("x", {}, None), "eos_token": ("x", None),
                                      "extra_special_tokens": ([], {}, None), "added_tokens_decoder": ({},)},
            "tokenizer.json": {"added_tokens": ([],), "pre_tokenizer": (None,), "decoder": (None,)}}
"""What transformers takes, or what nothing here depends on."""


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in PLACES.items() for place in places])
def test_a_value_of_a_wrong_type_is_named_with_its_file(folder: Path, name: str, place: str) -> None:
    original = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    for value in TYPES:
        stored = json.loads(json.dumps(original))
        *above, last = place.split(".")
        inner = stored
        for key in above:
            inner = inner[key]
        inner[last] = value
        (folder / name).write_text(json.dumps(stored))
        harmless = value in HARMLESS.get(name, {}).get(place, ())
        try:
            load_policy(ModelConfig(path=str(folder), device="cpu"))
        except CheckpointError as error:
            assert name in str(error), value
            harmless = True
        assert harmless, value


@pytest.mark.parametrize("values", [[0.5, 0.5], [0.5, 0.5, "x"], [0.5, 0.5, float("nan")], [0.5, 0, 0.5]])
def test_colours_that_are_not_three_numbers(folder: Path, values: list) -> None:
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        change(folder / name, image_std=values)
        with pytest.raises(CheckpointError, match=f"{name} has image_std"):
            PromptEncoder(folder)
        change(folder / name, image_std=[0.5, 0.5, 0.5])
    PromptEncoder(folder)


@pytest.mark.parametrize("place", [(), ("text_config",)])
@pytest.mark.parametrize("settings", [{"quant_method": "awq", "bits": 4}, {"load_in_4bit": True}, "fp8"])
def test_quantised_weights_are_refused_by_name(folder: Path, place: tuple[str, ...], settings: object) -> None:
    stored = json.loads((folder / "config.json").read_text())
    (stored[place[0]] if place else stored)["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"config\.json describes quantised weights \(quantization_config, "):
        load_tower(ModelConfig(path=str(folder), device="cpu"))


@pytest.mark.parametrize(("template", "words"), [
    (None, "has no chat template"), (b"", "has no chat template"),
    (b"\xff{{ messages }}", "chat_template.jinja cannot"),
    (b"{% if %}", "cannot ask a question: the chat template fails: Expected an expression"),
    (b"{{ raise_exception('not today') }}", "cannot ask a question: the chat template fails: not today"),
    (b"{{ 1 / 0 }}", "cannot ask a question: the chat template fails: division by zero")])
def test_a_chat_template_that_cannot_be_used(folder: Path, template: bytes | None, words: str) -> None:
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        PromptEncoder(folder)


def test_a_prompt_that_the_chat_template_refuses_is_a_bad_prompt(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text("{% if messages[0].content | length > 1 %}{{ raise_exception('no media') }}{% endif %}"
                        + template.read_text())
    with pytest.raises(DataError, match="the chat template fails: no media"):
        PromptEncoder(folder).chat_text(policies.prompt_of(Video("a.mp4"), "What?"))


def test_special_tokens_that_the_tokenizer_does_not_have(folder: Path) -> None:
    change(folder / "config.json", video_token_id=10**6)
    with pytest.raises(CheckpointError, match=r"config\.json has video_token_id 1000000, which is no token"):
        PromptEncoder(folder)


def test_a_generation_config_that_transformers_will_not_write_is_kept(folder: Path, tmp_path: Path) -> None:
    """transformers reads a temperature without do_sample and refuses to write it: a run would end at a checkpoint."""
    change(folder / "generation_config.json", do_sample=False, temperature=0.0)
    save_policy(load_policy(ModelConfig(path=str(folder), device="cpu")), tmp_path / "saved")
    kept = [(path / "generation_config.json").read_bytes() for path in (folder, tmp_path / "saved")]
    assert kept[0] == kept[1]


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


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_the_templates_of_the_families_pass(family: str) -> None:
    encoder = PromptEncoder(policies.checkpoint(family))
    assert template_problem(encoder.tokenizer.chat_template) == ""
    assert "What moves?" in encoder.chat_text(policies.prompt_of(Video("a.mp4"), "What moves?"))
