"""The commands of `veripo`: each hands over to the module that does the work, and imports it when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veripo_fast.config.families import FAMILIES
from veripo_fast.errors import UserError

if TYPE_CHECKING:
    from veripo_fast.config.schema import Config

BENCH = Path(__file__).resolve().parent.parent / "bench"
"""Scripts and their results, which are no part of the installed package."""
BENCHES = {"kernels": "kernels/bench_kernels.py", "step": "step/bench_full_step.py", "video": "video/bench_video.py"}
"""What `veripo bench` measures -> its script in BENCH."""


@dataclass(frozen=True)
class Command:
    """A subcommand: what runs, its line in the help, its arguments as argparse takes them."""

    run: Callable[[argparse.Namespace, list[str]], None]
    help: str
    arguments: tuple[tuple[str, dict[str, Any]], ...]
    takes_overrides: bool = False


def _configuration(options: argparse.Namespace, overrides: list[str]) -> Config:
    from veripo_fast.config.load import load_config

    return load_config(options.config, overrides)


def _demo(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.demo.run import run_demo

    run_demo(options.out, options.seed, options.quick, overrides)


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configuration(options, overrides)
    from veripo_fast.trainer import train

    train(config, resume=options.resume, allow_changes=[*filter(None, options.allow_changes.split(","))])


def _eval(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.config.suites import suite_named

    config = _configuration(options, [*(suite_named(options.suite).tokens() if options.suite else ()), *overrides])
    from veripo_fast.evaluation.command import evaluate_command

    evaluate_command(config, options.out)


def _compare(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.report.compare import compare_command

    compare_command(options.before, options.after, options.out, options.other_wording)


def _export_lmms_eval(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.evaluation.export import export

    for path in export(options.evaluation, options.out, options.mode, options.task, options.model):
        print(path)


def _inspect(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configuration(options, overrides)
    from veripo_fast.inspect.command import inspect_command

    inspect_command(options.data, config, options.out, options.workers, options.limit)


def _precompute(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configuration(options, overrides)
    from veripo_fast.cache.precompute import precompute_command

    precompute_command(options.data, config, options.rank, options.world, options.limit, options.workers)


def _verify(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configuration(options, overrides)
    from veripo_fast.verifier.store import verify_files

    verify_files(options.rollouts, options.out, config)


def _judge_eval(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configuration(options, overrides)
    from veripo_fast.report.judge_eval import judge_eval_command

    print(judge_eval_command(config, options.set, options.limit, options.out))


def _report(options: argparse.Namespace, overrides: list[str]) -> None:
    if len(options.run_dir) > 1:
        from veripo_fast.report.runs import write_runs

        print(write_runs(options.run_dir, options.out))
        return
    from veripo_fast.report.page import write_report

    print(write_report(options.run_dir[0], options.out))


def _timeline(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.report.trace import timeline_command

    print(timeline_command(options.run_dir, options.out, options.steps))


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configuration(options, overrides)
    from veripo_fast.report.plan import plan_command

    print(plan_command(config, options.gpus, options.hardware, options.from_run, options.search))


def _synth(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.demo.corpus import write_corpus

    write_corpus(options.out, options.train, options.heldout, options.seed)


def _init_model(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.demo.tiny_model import init_model

    init_model(options.out, options.family, options.seed)


def _check_model(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.demo.check_model import check_model

    print(check_model(options.folder, options.device, options.dtype))


def _merge(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.model.merge import merge_command

    print(merge_command(options.adapter, options.out, options.base))


def _show_config(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.config.describe import describe

    print(describe(_configuration(options, overrides)), end="")


def _bench(options: argparse.Namespace, overrides: list[str]) -> None:
    script = BENCH / BENCHES[options.name]
    if not script.exists():
        raise UserError(f"veripo bench needs a checkout of the repository: there is no {script} beside the package")
    import runpy

    sys.argv = [str(script), *options.arguments]
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    runpy.run_path(str(script), run_name="__main__")


_SEED = ("--seed", {"type": int, "default": 0, "metavar": "N", "help": "seed (default 0)"})
_CONFIG = ("--config", {"type": Path, "metavar": "FILE", "help": "YAML file; without it the defaults"})
_CONFIG_NEEDED = ("--config", {"type": Path, "metavar": "FILE", "required": True, "help": "YAML file of the run"})

COMMANDS: dict[str, Command] = {
    "demo": Command(_demo, "the whole loop on rendered clips with a tiny policy, and its report", (
        ("--out", {"type": Path, "default": Path("demo"), "metavar": "DIR", "help": "folder (default demo)"}),
        _SEED,
        ("--quick", {"action": "store_true", "help": "shows that it runs in a minute, not that it learns"}),
    ), takes_overrides=True),
    "train": Command(_train, "run the stages of a configuration", (
        _CONFIG_NEEDED,
        ("--resume", {"action": "store_true", "help": "continue from the newest complete checkpoint of the run"}),
        ("--allow-changes", {"default": "", "metavar": "KINDS",
                             "help": "with --resume, go on although these differ: "
                                     "code,config,data,media,model,rollouts"}),
    ), takes_overrides=True),
    "eval": Command(_eval, "score a policy on the held-out files, greedy and sampled", (
        _CONFIG_NEEDED,
        ("--suite", {"metavar": "NAME", "help": "read data.eval as this suite's records (docs/answers.md)"}),
        ("--out", {"type": Path, "metavar": "DIR",
                   "help": "folder of scores and completions (default eval in the run folder)"}),
    ), takes_overrides=True),
    "compare": Command(_compare, "two evaluations item by item: what flipped, and whether chance explains it", (
        ("before", {"type": Path, "metavar": "A", "help": "folder of `veripo eval`"}),
        ("after", {"type": Path, "metavar": "B", "help": "another one, of the same questions"}),
        ("--out", {"type": Path, "default": Path("compare.html"), "metavar": "FILE",
                   "help": "page, a file or a folder (default compare.html)"}),
        ("--other-wording", {"action": "store_true", "help": "prompts of one id may be worded otherwise"}),
    )),
    "export-lmms-eval": Command(_export_lmms_eval, "an evaluation in the files that lmms-eval writes", (
        ("evaluation", {"type": Path, "metavar": "EVAL", "help": "folder of `veripo eval`"}),
        ("--out", {"type": Path, "required": True, "metavar": "DIR", "help": "folder, as --output_path of lmms-eval"}),
        ("--mode", {"default": "greedy", "metavar": "MODE", "help": "greedy (default) or sampled"}),
        ("--task", {"default": "veripo", "metavar": "NAME", "help": "name of the task (default veripo)"}),
        ("--model", {"required": True, "metavar": "NAME", "help": "name of the model, as the results call it"}),
    )),
    "inspect": Command(_inspect, "probe videos: what they are, what would be skipped, what the contract costs", (
        ("data", {"type": Path, "nargs": "+", "metavar": "DATA", "help": "data files, videos, archives, or folders"}),
        ("--out", {"type": Path, "default": Path("inspect"), "metavar": "DIR", "help": "folder (default inspect)"}),
        ("--workers", {"type": int, "metavar": "N", "help": "media at a time (default one per core)"}),
        ("--limit", {"type": int, "metavar": "N", "help": "only so many media, evenly spread over DATA"}),
        _CONFIG,
    ), takes_overrides=True),
    "precompute": Command(_precompute, "decode videos and run the frozen tower ahead of training, into cache.folder", (
        ("data", {"type": Path, "nargs": "+", "metavar": "DATA", "help": "data files, videos, archives, or folders"}),
        ("--rank", {"type": int, "metavar": "R", "help": "do one share in W (default RANK, as torchrun sets it)"}),
        ("--world", {"type": int, "metavar": "W", "help": "number of shares (default WORLD_SIZE)"}),
        ("--workers", {"type": int, "metavar": "N", "help": "threads that decode (default video.workers)"}),
        ("--limit", {"type": int, "metavar": "N", "help": "only so many media, evenly spread over DATA"}),
        _CONFIG,
    ), takes_overrides=True),
    "verify": Command(_verify, "check stored rollouts and build preference pairs from them", (
        ("rollouts", {"type": Path, "nargs": "+", "metavar": "ROLLOUTS", "help": "Parquet files, or folders of them"}),
        ("--out", {"type": Path, "metavar": "DIR", "help": "folder of the result (default verifier, beside them)"}),
        _CONFIG,
    ), takes_overrides=True),
    "judge-eval": Command(_judge_eval, "measure the verifier's judge on labelled reasonings, and refuse a weak one", (
        ("--set", {"default": "planted", "metavar": "FILE", "help": "JSONL file (default planted, the shipped set)"}),
        ("--limit", {"type": int, "metavar": "N", "help": "only so many items, spread over the kinds"}),
        ("--out", {"type": Path, "metavar": "DIR", "help": "also write judge_eval.json and judge_eval.html there"}),
        _CONFIG,
    ), takes_overrides=True),
    "report": Command(_report, "write one self-contained HTML file about a run, or about several side by side", (
        ("run_dir", {"type": Path, "nargs": "+", "metavar": "RUN", "help": "run folder; several: one page"}),
        ("--out", {"type": Path, "metavar": "FILE", "help": "HTML file (default RUN/report.html, or runs.html)"}),
    )),
    "timeline": Command(_timeline, "where the time of each step went, on every rank, and a trace of it for Perfetto", (
        ("run_dir", {"type": Path, "metavar": "RUN", "help": "run folder"}),
        ("--out", {"type": Path, "metavar": "FILE", "help": "also write the trace, a JSON file"}),
        ("--steps", {"metavar": "A-B", "help": "only these steps (global_step in metrics.jsonl), or one"}),
    )),
    "plan": Command(_plan, "what a run would cost on so many GPUs: memory, seconds per phase, GPU-hours", (
        _CONFIG_NEEDED,
        ("--gpus", {"type": int, "default": 8, "metavar": "N", "help": "ranks, one on each GPU (default 8)"}),
        ("--hardware", {"default": "h100", "metavar": "NAME",
                        "help": "h100, h200, a100, b200, cpu, or a YAML file about another GPU (default h100)"}),
        ("--from", {"dest": "from_run", "type": Path, "metavar": "RUN",
                    "help": "take rates and lengths of a finished run, instead of assumed ones"}),
        ("--search", {"action": "store_true", "help": "propose the options that are quickest and fit"}),
    ), takes_overrides=True),
    "synth": Command(_synth, "render a corpus of mp4 clips with questions", (
        ("out", {"type": Path, "metavar": "OUT", "help": "new folder"}),
        ("--train", {"type": int, "default": 512, "metavar": "N", "help": "training questions (default 512)"}),
        ("--heldout", {"type": int, "default": 128, "metavar": "N", "help": "held-out questions (default 128)"}),
        _SEED,
    )),
    "init-model": Command(_init_model, "write a tiny, randomly initialised checkpoint folder", (
        ("out", {"type": Path, "metavar": "OUT", "help": "new folder"}),
        ("--family", {"choices": list(FAMILIES), "default": "qwen3_vl", "help": "(default qwen3_vl)"}),
        _SEED,
    )),
    "check-model": Command(_check_model, "load a checkpoint, compare it with its plain forward, say what runs", (
        ("folder", {"type": Path, "metavar": "FOLDER", "help": "checkpoint folder"}),
        ("--device", {"choices": ["auto", "cpu", "cuda"], "default": "auto", "help": "(default auto)"}),
        ("--dtype", {"choices": ["float32", "bfloat16"], "default": "float32", "help": "(default float32)"}),
    )),
    "merge": Command(_merge, "LoRA adapters and their base as one checkpoint, which every library loads", (
        ("adapter", {"metavar": "ADAPTER", "help": "folder of adapters, such as RUN/checkpoints/latest"}),
        ("--out", {"type": Path, "required": True, "metavar": "DIR", "help": "new folder"}),
        ("--base", {"default": "", "metavar": "DIR", "help": "the model they belong to (default the one they name)"}),
    )),
    "bench": Command(_bench, "measure the kernels, a training step or video beside other libraries (in a checkout)", (
        ("name", {"choices": list(BENCHES), "metavar": "|".join(BENCHES), "help": "what to measure"}),
        ("arguments", {"nargs": argparse.REMAINDER, "metavar": "OPTIONS",
                       "help": "options of that bench: veripo bench kernels --help"}),
    )),
    "show-config": Command(_show_config, "print the resolved configuration with a line on every option", (_CONFIG,),
                           takes_overrides=True),
}
