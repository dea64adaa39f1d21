"""The console script `veripo`: one table of commands, each handing over to the module that does the work.

Handlers import what they need when they run, so that `veripo --help` needs no torch. Errors that a user can mend are
one line on stderr and exit code 2. Ctrl-C is exit code 130, SIGTERM 143, train.max_hours 75. Anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from veripo_fast import __version__
from veripo_fast.errors import EXIT_USER, Interrupted, PeerFailed, UserError
from veripo_fast.run.environment import set_environment
from veripo_fast.text import OneLine, one_line, rank_prefix

if TYPE_CHECKING:
    from veripo_fast.config.schema import Config

EXIT_INTERRUPTED, EXIT_PIPE = 130, 141

BENCH = Path(__file__).resolve().parent.parent / "bench"
"""Scripts and their results, which are no part of the installed package."""
BENCHES = {"kernels": "kernels/bench_kernels.py", "step": "step/bench_full_step.py", "video": "video/bench_video.py"}
"""What `veripo bench` measures -> its script in BENCH."""

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""What a write fails with when the disk is full, over quota, read-only, or the file too large for it."""


@dataclass(frozen=True)
class Command:
    """A subcommand: what runs, its line in the help, its arguments as argparse takes them."""

    run: Callable[[argparse.Namespace, list[str]], None]
    help: str
    arguments: tuple[tuple[str, dict[str, Any]], ...]
    takes_overrides: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user error, 130 after Ctrl-C."""
    set_environment()
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine(rank_prefix()))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("veripo_fast").setLevel(logging.WARNING if rank_prefix() else logging.INFO)
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return 0
    except UserError as error:
        return error.exit_code if isinstance(error, PeerFailed) else _complain(str(error))
    except Interrupted as error:
        return _complain(f"{error}; {error.remedy}", error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED if rank_prefix() else _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away; Python would complain once more while closing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        return _complain(f"cannot write {error.filename or 'a file'}: {error.strerror}")


def _run(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        from veripo_fast.config.describe import hint

        raise UserError(f"unknown command {argv[0]!r}; {hint(argv[0], COMMANDS)}")
    parser, by_name = _parsers()
    overrides: list[str] = []
    if argv and argv[0] in COMMANDS and COMMANDS[argv[0]].takes_overrides:
        from veripo_fast.config.describe import split_options

        argv, overrides = split_options(argv, [flag for flag, _ in COMMANDS[argv[0]].arguments])
    options, unknown = parser.parse_known_args(argv)
    if options.command is None:
        parser.print_help()
        return
    if unknown:
        raise UserError(_unknown_argument(options.command, unknown[0], by_name[options.command].names))
    COMMANDS[options.command].run(options, overrides)


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
    config = _configuration(options, overrides)
    from veripo_fast.evaluation.command import evaluate_command

    evaluate_command(config, options.out)


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


def _report(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.report.page import write_report

    print(write_report(options.run_dir, options.out))


def _synth(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.demo.corpus import write_corpus

    write_corpus(options.out, options.train, options.heldout, options.seed)


def _init_model(options: argparse.Namespace, overrides: list[str]) -> None:
    from veripo_fast.demo.tiny_model import init_model

    init_model(options.out, options.family, options.seed)


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
                             "help": "with --resume, go on although these differ: config,data,media,model,rollouts"}),
    ), takes_overrides=True),
    "eval": Command(_eval, "score a policy on the held-out files, greedy and sampled", (
        _CONFIG_NEEDED,
        ("--out", {"type": Path, "metavar": "DIR", "help": "also write scores and completions there"}),
    ), takes_overrides=True),
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
    "report": Command(_report, "write one self-contained HTML file about a run", (
        ("run_dir", {"type": Path, "metavar": "RUN", "help": "run folder"}),
        ("--out", {"type": Path, "metavar": "FILE", "help": "HTML file (default RUN/report.html)"}),
    )),
    "synth": Command(_synth, "render a corpus of mp4 clips with questions", (
        ("out", {"type": Path, "metavar": "OUT", "help": "new folder"}),
        ("--train", {"type": int, "default": 512, "metavar": "N", "help": "training questions (default 512)"}),
        ("--heldout", {"type": int, "default": 128, "metavar": "N", "help": "held-out questions (default 128)"}),
        _SEED,
    )),
    "init-model": Command(_init_model, "write a tiny, randomly initialised checkpoint folder", (
        ("out", {"type": Path, "metavar": "OUT", "help": "new folder"}),
        ("--family", {"choices": ["qwen3_vl", "qwen2_5_vl"], "default": "qwen3_vl", "help": "(default qwen3_vl)"}),
        _SEED,
    )),
    "bench": Command(_bench, "measure the kernels, a training step or video beside other libraries (in a checkout)", (
        ("name", {"choices": list(BENCHES), "metavar": "|".join(BENCHES), "help": "what to measure"}),
        ("arguments", {"nargs": argparse.REMAINDER, "metavar": "OPTIONS",
                       "help": "options of that bench: veripo bench kernels --help"}),
    )),
    "show-config": Command(_show_config, "print the resolved configuration with a line on every option", (_CONFIG,),
                           takes_overrides=True),
}


# Parsing

class _Parser(argparse.ArgumentParser):
    """Remembers its option names, and hands usage errors to `main` like any other user error."""

    def __init__(self, **options: Any) -> None:
        self.names: list[str] = []
        super().__init__(**options, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self.names += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="veripo", description="GRPO -> verifier -> DPO -> GRPO for Video-LLMs (VerIPO).")
    parser.add_argument("--version", action="version", version=f"veripo-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    by_name: dict[str, _Parser] = {}
    for name, command in COMMANDS.items():
        epilog = "Options of the configuration may follow: --grpo.clip-high 0.28 (veripo show-config lists them)."
        by_name[name] = commands.add_parser(name, help=command.help, description=command.help,
                                            epilog=epilog if command.takes_overrides else None)
        for flag, options in command.arguments:
            by_name[name].add_argument(flag, **options)
    return parser, by_name


def _unknown_argument(command: str, token: str, names: list[str]) -> str:
    if not token.startswith("-"):
        return f"unexpected argument {token!r} (see veripo {command} --help)"
    from veripo_fast.config.describe import hint, option_names

    choices = list(names)
    if COMMANDS[command].takes_overrides:
        choices += [f"--{name.replace('_', '-')}" for name in option_names()]
    return f"unknown option {token.partition('=')[0]}; {hint(token.partition('=')[0], choices)}"


def _complain(sentence: str, code: int = EXIT_USER) -> int:
    label = "error: " if code == EXIT_USER else ""
    print(f"veripo: {label}{rank_prefix()}{one_line(sentence)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
