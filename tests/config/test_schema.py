"""The configuration tree itself: documented fields, refusals, names of stages."""

from typing import get_args, get_type_hints

import pytest
from veripo_kernels import options

from veripo_fast.config import alignment, inputs, objectives, plans, schema, terms, tokens
from veripo_fast.config.alignment import DpoConfig
from veripo_fast.config.describe import _docs, is_section, kinds
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.config.objectives import GrpoConfig, RolloutConfig, VerifierConfig
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.errors import ConfigError
from veripo_fast.recipes import tables

MODULES = (alignment, inputs, objectives, plans, schema, terms, tokens)
SECTIONS = [value for module in MODULES for value in vars(module).values()
            if isinstance(value, type) and is_section(value) and value.__module__ == module.__name__]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_docstring(section):
    undocumented = [name for name, kind in kinds(section).items()
                    if not is_section(kind) and not _docs(section).get(name, "").endswith(".")]
    assert undocumented == []


@pytest.mark.parametrize(("section", "options", "sentence"), [
    (VideoConfig, {"num_frames": 8}, "exactly one of fps and num_frames must be set, got fps=2.0, num_frames=8"),
    (VideoConfig, {"min_frames": 65}, "min_frames 65 is larger than max_frames 64"),
    (GrpoConfig, {"prompts_per_step": 6, "updates_per_rollout": 4}, "must be divisible by updates_per_rollout 4"),
    (GrpoConfig, {"learning_rate": 0.0}, "learning_rate must be greater than 0, got 0.0"),
    (GrpoConfig, {"dual_clip": 1.1}, "dual_clip must be at least 1 + clip_high = 1.2, got 1.1"),
    (DpoConfig, {"divergence_alpha": 0.3}, "divergence_alpha changes nothing unless divergence is alpha"),
    (DpoConfig, {"loss": "bco", "divergence": "js"}, "loss 'bco' has no divergence 'js'"),
    (DpoConfig, {"dpo_beta": 0.0}, "dpo_beta must be greater than 0, got 0.0"),
    (GrpoConfig, {"clip_high": -0.1}, "clip_high must be 0 or larger, got -0.1"),
    (DpoConfig, {"ld_alpha": 1.5}, "ld_alpha must be in [0, 1], got 1.5"),
    (DpoConfig, {"label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5), got 0.5"),
    (DpoConfig, {"loss": "ipo", "label_smoothing": 0.1}, "loss 'ipo' does not use label_smoothing"),
    (DpoConfig, {"loss": "exo"}, "loss 'exo' needs label_smoothing above 0"),
    (RolloutConfig, {"group_size": 1}, "group_size must be at least 2, got 1"),
    (DpoConfig, {"match": "aot", "loss": "ipo"}, "match aot is a loss of sorted differences: it takes loss sigmoid"),
    (DpoConfig, {"match": "aot", "weights": "wpo"}, "weights wpo are of pairs, which match aot takes apart"),
    (DpoConfig, {"match": "aot_unpaired", "ld_alpha": 0.5}, "ld_alpha compares the lengths of a pair"),
    (Config, {"dpo": DpoConfig(weights="wpo"), "grpo": GrpoConfig(dpo_rate=0.1)},
     "dpo.match and dpo.weights are of dpo stages; grpo.dpo_rate takes pairs as they are"),
    (DpoConfig, {"max_steps": 0}, "max_steps must be greater than 0, got 0"),
    (VerifierConfig, {"judge": "endpoint"}, "needs endpoint_url and endpoint_model"),
])
def test_refusal_names_the_field_and_the_value(section, options, sentence):
    with pytest.raises(ConfigError) as caught:
        section(**options)
    assert sentence in str(caught.value)


def test_stages_are_named_and_linked():
    stages = tuple(StageConfig(kind=kind) for kind in ("grpo", "dpo", "grpo", "dpo"))
    assert [(stage.name, stage.rollouts_from) for stage in Config(stages=stages).stages] == [
        ("grpo-1", ""), ("dpo-1", "grpo-1"), ("grpo-2", ""), ("dpo-2", "grpo-2")]


@pytest.mark.parametrize(("stages", "sentence"), [
    ([{"kind": "dpo"}], "no grpo stage comes before it"),
    ([{}, {"kind": "dpo", "rollouts_from": "grpo-9"}], "'grpo-9', which is not an earlier grpo stage (grpo-1)"),
    ([{"name": "a"}, {"name": "a"}], "two stages are named 'a'"),
    ([{"rollouts_from": "x"}], "takes no rollouts_from"),
])
def test_stages_that_do_not_fit(stages, sentence):
    with pytest.raises(ConfigError) as caught:
        Config(stages=tuple(StageConfig(**stage) for stage in stages))
    assert sentence in str(caught.value)


def test_losses_are_those_of_the_kernels():
    """Names and rules stand once, in veripo_kernels.options."""
    hints, pair_hints = get_type_hints(GrpoConfig), get_type_hints(DpoConfig)
    assert hints["loss"] is options.PolicyLossName and hints["kl_kind"] is options.KlKind
    assert pair_hints["loss"] is options.PreferenceLossName
    assert hints["aggregation"] == options.Aggregation | None


def test_the_tables_hold_what_a_configuration_can_name():
    assert tuple(tables.ADVANTAGES) == get_args(options.AdvantageKind) + get_args(objectives.BatchAdvantage)
    assert tuple(tables.MOVING_ADVANTAGES) == get_args(objectives.MovingAdvantage)
    assert tuple(tables.REWARDS) == get_args(terms.RewardName)
    assert tuple(tables.SAMPLERS) == get_args(objectives.SamplerName)
    assert tuple(tables.REFERENCES) == get_args(objectives.ReferenceName)
