"""YAML and command-line options into a Config and back; every refusal is one sentence that names what is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from veripo_fast.config.describe import describe, to_yaml
from veripo_fast.config.load import apply_overrides, check_stages, load_config, split_overrides, with_options
from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.errors import ConfigError

LOOP = """
run_dir: runs/loop
grpo: {steps: 4, learning_rate: 1e-6, clip_high: 1}
data:
  train: [a.jsonl, b.parquet]
stages:
  - kind: grpo
  - kind: dpo
    set: {dpo.learning_rate: 5e-7, verifier: {judge: likelihood, families: [accuracy]}}
  - kind: grpo
    set: {grpo.drop_easy: 0.8}
"""


def load(text: str, folder: Path, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def sentence(text: str, folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, folder, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


def test_file_gives_typed_fields(tmp_path):
    config = load(LOOP, tmp_path)
    assert config.grpo == GrpoConfig(steps=4, learning_rate=1e-6, clip_high=1.0)
    assert isinstance(config.grpo.clip_high, float)
    assert config.data.train == ("a.jsonl", "b.parquet")
    assert [stage.name for stage in config.stages] == ["grpo-1", "dpo-1", "grpo-2"]


def test_stage_sets_are_flattened_and_typed(tmp_path):
    dpo = load(LOOP, tmp_path).stages[1]
    assert dpo.set == {"dpo.learning_rate": 5e-7, "verifier.judge": "likelihood", "verifier.families": ["accuracy"]}
    changed = apply_overrides(load(LOOP, tmp_path), dpo.set)
    assert (changed.dpo.learning_rate, changed.verifier.families) == (5e-7, ("accuracy",))


def test_no_file_gives_the_defaults():
    assert load_config(None) == Config()


def test_empty_section_is_its_defaults(tmp_path):
    assert load("grpo:\nseed: 3\n", tmp_path) == Config(seed=3)


@pytest.mark.parametrize(("tokens", "name", "value"), [
    (["--grpo.clip-high", "0.28"], "grpo.clip_high", 0.28),
    (["--grpo.clip_high=0.28"], "grpo.clip_high", 0.28),
    (["--grpo.learning-rate", "5e-7"], "grpo.learning_rate", 5e-7),
    (["--grpo.learning-rate=1"], "grpo.learning_rate", 1.0),
    (["--grpo.dual-clip", "3"], "grpo.dual_clip", 3.0),
    (["--dpo.max-steps", "null"], "dpo.max_steps", None),
    (["--threads", "None"], "threads", None),
    (["--model.gradient-checkpointing"], "model.gradient_checkpointing", True),
    (["--model.freeze-vision", "false"], "model.freeze_vision", False),
    (["--data.template", "none"], "data.template", "none"),
    (["--data.train", "a.jsonl, b.jsonl"], "data.train", ("a.jsonl", "b.jsonl")),
    (["--data.train", "[a.jsonl, 'b,c.jsonl']"], "data.train", ("a.jsonl", "b,c.jsonl")),
    (["--data.train="], "data.train", ()),
    (["--optimizer.betas", "0.8,0.9"], "optimizer.betas", (0.8, 0.9)),
    (["--run-dir", "2024"], "run_dir", "2024"),
    (["--seed", "-1"], "seed", -1),
    (["--grpo", "{steps: 7}"], "grpo.steps", 7),
    (["--stages.0.name", "warm-up"], "stages.0.name", "warm-up"),
    (["--stages.1.rollouts-from", "grpo-1"], "stages.1.rollouts_from", "grpo-1"),
    (["--stages.2.set.grpo.steps", "9"], "stages.2.set", {"grpo.drop_easy": 0.8, "grpo.steps": 9}),
    (["--stages.1.set", "{dpo.dpo_beta: 0.2}"], "stages.1.set", {"dpo.dpo_beta": 0.2}),
])
def test_option_on_the_command_line(tmp_path, tokens, name, value):
    found: object = load(LOOP, tmp_path, *tokens)
    for part in name.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value and type(found) is type(value)


def test_later_option_wins(tmp_path):
    assert load(LOOP, tmp_path, "--seed", "1", "--seed=2").seed == 2


def test_renaming_a_stage_carries_to_the_stage_that_follows_it(tmp_path):
    assert load(LOOP, tmp_path, "--stages.0.name", "first").stages[1].rollouts_from == "first"


def test_option_mends_a_file_that_alone_conflicts(tmp_path):
    assert load("video: {num_frames: 8}", tmp_path, "--video.fps", "null").video.num_frames == 8


def test_names_of_data_keep_their_dashes_and_dots(tmp_path):
    """Of data sources, on the command line, in a stage, and in the file that a resume reads."""
    weights = {"a.b-c": 1, "synth-count": 1}
    base = Config(grpo=GrpoConfig(sampler="mixed", sampler_options={"weights": weights}))
    changed = with_options(base, ["--grpo.sampler-options.weights.a.b-c", "5",
                                  "--grpo.sampler-options.weights.synth-count=7"])
    assert changed.grpo.sampler_options == {"weights": {"a.b-c": 5, "synth-count": 7}}
    for changes in ({"grpo": {"sampler": "mixed", "sampler_options": {"weights": {"x.y-z": 2, "w": 3}}}},
                  {"grpo.sampler": "mixed", "grpo.sampler_options.weights": {"x.y-z": 2, "w": 3}}):
        for config in (Config(), base):
            staged = check_stages(replace(config, stages=(StageConfig("grpo", set=changes),)))
            (tmp_path / "config.yaml").write_text(to_yaml(staged))
            for read in (staged, load_config(tmp_path / "config.yaml")):
                (stage,) = read.stages
                assert apply_overrides(read, stage.set).grpo.sampler_options == {"weights": {"x.y-z": 2, "w": 3}}
    staged = check_stages(replace(base, stages=(StageConfig("grpo", set={"grpo.sampler_options.weights.a.b-c": 4}),)))
    assert apply_overrides(staged, staged.stages[0].set).grpo.sampler_options["weights"] == weights | {"a.b-c": 4}


def test_split_overrides():
    assert split_overrides(["--a.b-c", "1", "--d=x=y", "--e", "--f", "-2"]) == [
        ("a.b_c", "1"), ("d", "x=y"), ("e", None), ("f", "-2")]


@pytest.mark.parametrize(("text", "words"), [
    ("grpo: {clip_hgh: 1}", "unknown option grpo.clip_hgh; did you mean grpo.clip_high?"),
    ("grppo: {}", "unknown option grppo; did you mean grpo?"),
    ("clip_high: 1", "unknown option clip_high; did you mean grpo.clip_high?"),
    ("learning-rate: 1", "unknown option learning-rate; did you mean grpo.learning_rate or dpo.learning_rate or "
     "sft.learning_rate?"),
    ("qqqq: 1", "unknown option qqqq; options here: run_dir, seed"),
    ("1: 2", "unknown option 1;"),
    ("grpo: {steps: 1.5}", "grpo.steps must be a whole number, got 1.5"),
    ("grpo: {steps: true}", "grpo.steps must be a whole number, got true"),
    ("grpo: {steps: '5'}", "grpo.steps must be a whole number, got '5'"),
    ("grpo: {steps: null}", "grpo.steps must be a whole number, got null"),
    ("grpo: {clip_high: yes}", "grpo.clip_high must be a number, got true"),
    ("grpo: {clip_high: '0.2'}", "grpo.clip_high must be a number, got '0.2'"),
    ("grpo: {clip_high: .inf}", "grpo.clip_high must be a number, got inf"),
    ("grpo: {clip_high: .nan}", "grpo.clip_high must be a number, got nan"),
    ("grpo: {learning_rate: 1e999}", "grpo.learning_rate must be a number, got '1e999'"),
    ("grpo: {dual_clip: high}", "grpo.dual_clip must be a number or null, got 'high'"),
    ("model: {freeze_vision: 1}", "model.freeze_vision must be true or false, got 1"),
    ("model: {device: cdua}", "model.device must be one of auto, cpu, cuda, got 'cdua'; did you mean cuda?"),
    ("model: {device: [cpu]}", "model.device must be one of auto, cpu, cuda, got ['cpu']"),
    ("run_dir: 2024", "run_dir must be text, got 2024 (in quotes it is text)"),
    ("data: {train: a.jsonl}", "data.train must be a list, each text, got 'a.jsonl'"),
    ("data: {train: [a, 5]}", "data.train.1 must be text, got 5"),
    ("optimizer: {betas: [0.9]}", "optimizer.betas must be a list of 2, each a number, got [0.9]"),
    ("verifier: {families: [acuracy]}", "verifier.families.0 must be one of"),
    ("grpo: 5", "grpo must be a mapping of options, got 5"),
    ("grpo: {clip_low: 1.5}", "grpo: clip_low must be in [0, 1], got 1.5"),
    ("video: {num_frames: 8}", "video: exactly one of fps and num_frames must be set"),
    ("stages: [{kind: ppo}]", "stages.0.kind must be one of grpo, dpo, sft, got 'ppo'"),
    ("stages: [{}, {kid: dpo}]", "unknown option stages.1.kid; did you mean stages.1.kind?"),
    ("stages: [{set: {grpo.lerning_rate: 1}}]",
     "stages.0.set: unknown option grpo.lerning_rate; did you mean grpo.learning_rate?"),
    ("stages: [{set: {grpo.steps: x}}]", "stages.0.set: grpo.steps must be a whole number, got 'x'"),
    ("stages: [{set: {grpo.steps: 0}}]", "stages.0.set: grpo: steps must be greater than 0, got 0"),
    ("stages: [{set: {dpo.dpo_beta: 1.0}}]", "stages.0.set: dpo.dpo_beta cannot be set for one grpo stage"),
    ("stages: [{set: {seed: 1}}]", "stages.0.set: seed cannot be set for one grpo stage"),
    ("stages: [{set: [1]}]", "stages.0.set must be a mapping, got [1]"),
    ("", "config.yaml must hold a mapping of options (name: value), got nothing"),
    ("- a\n- b\n", "config.yaml must hold a mapping of options (name: value), got list"),
    ("seed: 1\ngrpo: {steps: 3\nrun_dir: x\n", "config.yaml, line 3: "),
    ("seed: 1\nrun_dir: x\nseed: 2\n", "config.yaml, line 3: seed is given twice (first in line 1)"),
    ("grpo:\n  steps: 1\n  steps: 2\n", "config.yaml, line 3: steps is given twice (first in line 2)"),
    ("a: !!python/object:os.system {}", "config.yaml, line 1: could not determine a constructor"),
    ("run_dir: 2024-13-45", "config.yaml is not YAML text: month must be in 1..12"),
    ("run_dir: \x01", "config.yaml is not YAML text: "),
])
def test_refusals_of_a_file(tmp_path, text, words):
    assert sentence(text, tmp_path).startswith(words)


@pytest.mark.parametrize(("tokens", "words"), [
    (["--grpo.clip-hgh", "1"], "unknown option grpo.clip_hgh; did you mean grpo.clip_high?"),
    (["--grpo.steps"], "--grpo.steps needs a value: a whole number"),
    (["--grpo.steps", "many"], "grpo.steps must be a whole number, got 'many'"),
    (["--grpo.steps", "[1"], "grpo.steps must be a whole number, got '[1'"),
    (["--model.freeze-vision", "2"], "model.freeze_vision must be true or false, got 2"),
    (["--grpo.kl-kind", "k4"], "grpo.kl_kind must be one of k1, k2, k3, got 'k4'"),
    (["--grpo.steps.x", "1"], "grpo.steps.x does not exist: grpo.steps takes one value, a whole number"),
    (["--stages.3.name", "x"], "stages.3 does not exist: stages has 3 entries, counted from 0"),
    (["--stages.first.name", "x"], "stages.first does not exist: stages has 3 entries"),
    (["--stages.0.set.grpo.stps", "1"], "unknown option grpo.stps; did you mean grpo.steps?"),
    (["steps=3"], "unexpected argument 'steps=3'; options are written --name value"),
])
def test_refusals_of_an_option(tmp_path, tokens, words):
    assert words in sentence(LOOP, tmp_path, *tokens)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not YAML text: "):
        load_config(tmp_path / "latin.yaml")


def test_anchors_and_merges_may_repeat_a_key(tmp_path):
    text = ("stages:\n- &a {set: &s {grpo.steps: 1, grpo.clip_low: 0.1}}\n"
            "- set: {<<: *s, grpo.steps: 2}\n")
    assert load(text, tmp_path).stages[1].set == {"grpo.steps": 2, "grpo.clip_low": 0.1}


def test_apply_overrides_leaves_the_original(tmp_path):
    config = load(LOOP, tmp_path)
    changed = apply_overrides(config, {"grpo.learning_rate": 5e-7, "optimizer.betas": (0.5, 0.6)})
    assert (changed.grpo.learning_rate, changed.optimizer.betas) == (5e-7, (0.5, 0.6))
    assert replace(changed, grpo=config.grpo, optimizer=config.optimizer) == config == load(LOOP, tmp_path)


@pytest.mark.parametrize(("changes", "words"), [
    ({"grpo.lr": 1.0}, "unknown option grpo.lr"),
    ({"grpo.steps": "3"}, "grpo.steps must be a whole number, got '3'"),
    ({"grpo.prompts_per_step": 10, "grpo.updates_per_rollout": 3}, "grpo: prompts_per_step 10 must be divisible"),
])
def test_apply_overrides_refuses(changes, words):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), changes)
    assert str(caught.value).startswith(words)


def test_check_stages_of_a_tree_built_in_code():
    config = Config(stages=(StageConfig(set={"grpo": {"learning_rate": "1e-5"}}),))
    assert check_stages(config).stages[0].set == {"grpo.learning_rate": 1e-5}


@pytest.mark.parametrize("write", [to_yaml, describe])
def test_round_trip(tmp_path, write):
    config = load(LOOP, tmp_path, "--video.fps", "null", "--video.num-frames", "8")
    assert load(write(config), tmp_path) == config
    assert load(write(Config()), tmp_path) == Config()


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1), st.floats(1e-12, 1e12), st.lists(st.text()))
@example("0", 1.0, ["\n", "\U00010000"])  # a line break and a character of two UTF-16 units
@example("0", 1.0, ["a\x85b"])
def test_round_trip_of_any_text_and_number(tmp_path_factory, run_dir, rate, files):
    folder = tmp_path_factory.getbasetemp()
    config = apply_overrides(Config(), {"run_dir": run_dir, "grpo.learning_rate": rate, "data.train": files})
    for write in (to_yaml, describe):
        (folder / "any.yaml").write_text(write(config), encoding="utf-8")
        assert load_config(folder / "any.yaml") == config


def test_describe_puts_the_docstring_above_the_field():
    lines = describe(Config()).splitlines()
    at = lines.index("  clip_high: 0.2")
    assert lines[at - 1] == "  # Ratio is clipped above 1 + clip_high (DAPO: 0.28)."
    assert lines[lines.index("grpo:") - 1].startswith("# Group-relative policy optimisation")


def test_dots_reach_into_a_mapping_that_a_function_takes() -> None:
    config = apply_overrides(Config(), {"grpo.sampler": "mixed", "grpo.sampler_options.weights.STAR": 2})
    assert config.grpo.sampler_options == {"weights": {"STAR": 2}}
    config = Config(grpo=GrpoConfig(sampler="mixed", sampler_options={
        "weights": {"NeXT.QA": 1, "STAR": 2}, "length": 8}))
    for name in ("weights.STAR", "weights.NeXT.QA"):
        config = with_options(config, [f"--grpo.sampler-options.{name}", "5"])
    assert config.grpo.sampler_options == {"weights": {"NeXT.QA": 5, "STAR": 5}, "length": 8}
    with pytest.raises(ConfigError, match=r"sampler_options.length.x does not exist: .*length is 8"):
        with_options(config, ["--grpo.sampler-options.length.x", "5"])
