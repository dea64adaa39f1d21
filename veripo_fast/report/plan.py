"""`veripo plan`: what a configuration would cost, as text. Rates and lengths are assumed, or a finished run's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from veripo_fast.config.load import apply_overrides, load_config
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError, UserError
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.schedule.admission import Excess, remedy
from veripo_fast.schedule.costs import Work, grpo_work
from veripo_fast.schedule.hardware import A100_80GB, B200, H100_SXM, H200, Hardware
from veripo_fast.schedule.judge import judge_shapes
from veripo_fast.schedule.planner import RunPlan, StagePlan, plan, search
from veripo_fast.schedule.rates import Lengths, Rates
from veripo_fast.schedule.shapes import ModelShape, read_shape
from veripo_fast.text import duration, memory, number, plural

GPUS = {"h100": H100_SXM, "h200": H200, "a100": A100_80GB, "b200": B200}
MOST_GPUS = 1 << 14
SHOWN = 5
"""Proposals of a search."""


class Measured(NamedTuple):
    """What a finished run tells."""

    rates: Rates
    lengths: Lengths
    ranks: int


def plan_command(config: Config, gpus: int, hardware: str, run: Path | None, proposals: bool) -> str:
    """The plan of a configuration as text.

    Args:
        hardware: a name in `GPUS`, a YAML file with the fields of `Hardware`, or `cpu`.
        run: a run folder whose rates and lengths are taken.
        proposals: whether other options are tried too.

    Raises:
        UserError: an argument that cannot be used, by name.
    """
    if not 1 <= gpus <= MOST_GPUS:
        raise ConfigError(f"--gpus must be between 1 and {MOST_GPUS:,}, got {gpus}")
    device = hardware_named(hardware)
    shape = read_shape(resolve_path(config.model.path))
    measured = measure(run, device) if run is not None else None
    if measured is None and device is None:
        raise ConfigError("nothing is assumed of a CPU; --from RUN takes the rates of a finished run")
    if measured is None:
        assert device is not None
        rates, lengths = Rates.assumed(device), {}
    else:
        rates, lengths = measured.rates, {"grpo": measured.lengths, "dpo": measured.lengths}
    judges = judge_shapes(config)
    made = plan(shape, config, gpus, device, rates, lengths, judges)
    text = as_text(made, shape, measured)
    if not proposals:
        return text
    if device is None:
        raise ConfigError("--search weighs the memory of GPUs; name them by --hardware")
    return f"{text}\n\n{proposed(search(shape, config, gpus, device, rates, lengths, judges), made)}"


def hardware_named(name: str) -> Hardware | None:
    """A GPU by its short name or from a YAML file; None: `cpu`. Raises ConfigError."""
    if name.lower() == "cpu":
        return None
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    if not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"--hardware {name!r} is not known; take {', '.join(GPUS)}, cpu, or a YAML file with "
                          f"{', '.join(field.name for field in fields(Hardware))}")
    try:
        tree = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        called = str(tree.pop("name", Path(name).stem))
        return Hardware(called, **{key: _positive(value) for key, value in tree.items()})
    except OSError as error:
        raise ConfigError(f"--hardware {name} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        wanted = ", ".join(field.name for field in fields(Hardware))
        raise ConfigError(f"--hardware {name} must give {wanted}, as numbers: {error}") from error


def _positive(value: Any) -> Any:
    number_of = float(value)
    if not 0 < number_of < float("inf"):
        raise ValueError(f"{value!r} is not a positive number")
    return int(number_of) if number_of.is_integer() else number_of


# -- a finished run ----------------------------------------------------------------------------------------------------

GLOO = 0.5e9
"""Bytes per second that a rank on a CPU receives through gloo, with the copies that FSDP2 makes of them; fitted to two
ranks of one machine (bench/bench_plan.py)."""


def measure(run: Path, hardware: Hardware | None) -> Measured:
    """Rates and lengths of the GRPO steps of a run, but for the first after each start.

    Raises:
        UserError: no run folder, or one without two GRPO steps that say what they worked on.
    """
    folder = RunDir(str(run))
    if not folder.config.is_file():
        raise UserError(f"{run} is not a run folder: there is no {folder.config.name}")
    config = load_config(folder.config)
    rows = [row for row in read_records(folder.metrics)
            if row.get("kind") == "grpo" and "prompt_tokens_mean" in row.get("speed", {})]
    if len(rows) < 2:
        raise UserError(f"--from {run}: it has no two GRPO steps with `speed` in their metrics; a run of this version "
                        "writes them")
    rows = rows[1:]
    shape = read_shape(resolve_path(config.model.path))
    ranks = int(rows[-1]["speed"].get("ranks", 1))
    stages = {stage.name: apply_overrides(config, stage.set) for stage in config.stages}
    works = [grpo_work(shape, stages[row["stage"]], ranks, lengths_of([row])) for row in rows]
    return Measured(_rates(rows, works, hardware), lengths_of(rows), ranks)


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> Lengths:
    """Means over steps."""
    def mean(values: list[float]) -> float:
        return statistics.fmean(values)

    return Lengths(mean([row["speed"]["prompt_tokens_mean"] for row in rows]),
                   mean([row["speed"]["patches_mean"] for row in rows]), mean([row["length_mean"] for row in rows]),
                   mean([row["length_max"] for row in rows]), 1 - mean([row["zero_variance_share"] for row in rows]))


def _rates(rows: Sequence[Mapping[str, Any]], works: Sequence[Work], hardware: Hardware | None) -> Rates:
    """What the device reached, as medians over steps."""
    steps = list(zip([row["seconds"] for row in rows], works, strict=True))

    def median(values: list[float]) -> float:
        return statistics.median(values) if values else 0.0

    def computing(update: float, work: Work) -> float:
        """Of an update: at least half, whatever GLOO says of its exchanges; all of it on a GPU, which hides them."""
        return update if hardware else max(update - work.link_bytes / GLOO, update / 2)

    train = median([work.update_flops / computing(seconds["update"], work) for seconds, work in steps
                    if seconds.get("update") and work.update_flops])
    if not train:
        raise UserError("the run has no step with an update, so nothing is known of its speed")
    decoding = [max(seconds.get("rollout", 0.0) - work.prefill_flops / train, 1e-9) for seconds, work in steps]
    decode = median([work.decode_flops / seconds for seconds, (_, work) in zip(decoding, steps, strict=True)])
    read = median([work.decode_bytes / seconds for seconds, (_, work) in zip(decoding, steps, strict=True)])
    link = GLOO
    if hardware is not None:
        assumed = Rates.assumed(hardware)
        link = assumed.link
        bound_by_memory = read / assumed.memory > decode / assumed.decode
        decode, read = (assumed.decode, read) if bound_by_memory else (decode, assumed.memory)
    else:
        read = 0.0
    loading = [max(seconds.get("decode", 0.0) + seconds.get("vision", 0.0) - work.encode_flops / train, 0.0)
               / work.prompts for seconds, work in steps]
    reward = [seconds.get("reward", 0.0) / work.completions for seconds, work in steps]
    known = ("vision", "decode", "rollout", "reward", "reference", "update")
    rest = [max(row["speed"]["step_seconds"] - sum(row["seconds"].get(name, 0.0) for name in known), 0.0)
            + row["seconds"].get("checkpoint", 0.0) for row in rows]
    return Rates(train, decode, read, link, median(loading), median(reward), statistics.fmean(rest))


# -- text --------------------------------------------------------------------------------------------------------------


def as_text(made: RunPlan, shape: ModelShape, measured: Measured | None) -> str:
    """The plan as lines of text."""
    device = made.hardware.name if made.hardware else "CPU"
    weights = shape.language_numbers + shape.vision_numbers
    lines = [f"{shape.family}, {weights / 1e9:.2f} B weights, on {made.gpus:,} x {device}",
             f"rates: {_rates_text(made, measured)}"]
    for stage in made.stages:
        lines += ["", *_stage_lines(made, stage)]
    hours = made.seconds * made.gpus / 3600
    unknown = [stage.name for stage in made.stages if stage.steps is None]
    lines += ["", f"together {duration(made.seconds)}, {number(round(hours, 1))} GPU-hours" + (
        f", without {', '.join(unknown)}: how much they train on is not known before" if unknown else "")]
    excess = [(stage.excess, stage.config) for stage in made.stages if stage.excess]
    if excess:
        worst, config = max(excess, key=lambda pair: pair[0].needed - pair[0].free)
        option = remedy(worst, config, shape, made.gpus)
        lines.append(f"does not fit: {worst.stage}, {worst.phase.name} takes {memory(worst.needed)} of "
                     f"{memory(worst.free)}; most of it is {worst.largest} ({memory(worst.largest_bytes)}): {option}")
    elif made.hardware is not None:
        stage = max(made.stages, key=lambda part: part.tightest.device_bytes)
        tightest = stage.tightest
        free = made.hardware.memory_bytes
        first = Excess(stage.name, tightest, made.hardware.name, tightest.device_bytes, free, tightest.largest,
                       tightest.device[tightest.largest])
        lines.append(f"fits; what breaks first: {stage.name}, {tightest.name} with {memory(tightest.device_bytes)} of "
                     f"{memory(free)}, most of it {tightest.largest}: "
                     f"{remedy(first, stage.config, shape, made.gpus)}")
    return "\n".join(lines)


def _rates_text(made: RunPlan, measured: Measured | None) -> str:
    if measured is not None:
        return (f"measured on {plural(measured.ranks, 'rank')}: {number(made.rates.train / 1e12)} TFLOP/s in updates, "
                f"{number(made.rates.decode / 1e12)} TFLOP/s while writing")
    assert made.hardware is not None
    return (f"assumed, {made.rates.train / made.hardware.bf16_flops:.0%} of the peak in updates and "
            f"{made.rates.memory / made.hardware.memory_bandwidth:.0%} of the bandwidth while writing; every prompt "
            "and completion as long as the configuration lets it be; --from RUN takes what a run has reached")


def _stage_lines(made: RunPlan, stage: StagePlan) -> list[str]:
    lengths, work = stage.lengths, stage.work
    steps = f"{plural(stage.steps, 'step')}, " if stage.steps else ""
    shares = ", ".join(f"{name} {duration(value)}" for name, value in stage.seconds.items())
    lines = [f"{stage.name}: {steps}{duration(stage.step_seconds)} a step ({shares})",
             f"  prompts of {lengths.prompt_tokens:.0f} tokens, completions of {lengths.completion_tokens:.0f}; "
             f"{number(round(work.tokens / stage.step_seconds))} tokens/s; ranks wait for the fullest one "
             f"{work.idle_share:.1%} of an update"]
    peaks = ", ".join(f"{phase.name} {memory(phase.device_bytes)}" for phase in stage.phases)
    if made.hardware is not None:
        lines.append(f"  memory of a GPU: {peaks}")
    return lines


def proposed(found: Sequence[tuple[dict[str, object], RunPlan]], made: RunPlan) -> str:
    """The quickest of a search as text."""
    if not found:
        return "no other options fit; take more GPUs or a smaller model"
    lines, seen = ["quickest options that fit:"], set[str]()
    for options, other in found:
        changes = " ".join(f"--{name} {str(value).lower() if isinstance(value, bool) else value}"
                           for name, value in options.items())
        gain = f"{other.seconds / made.seconds:.2f} of the time" if made.fits else duration(other.seconds)
        if gain not in seen and len(seen) < SHOWN:  # of those that take as long the first changes least
            lines.append(f"  {gain}: {changes or 'as it is'}")
        seen.add(gain)
    return "\n".join(lines)
