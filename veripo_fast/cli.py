"""The console script `veripo`: reads the command line, runs a command, and turns what ends it into an exit code.

commands.py holds the table of commands; none is imported before it runs, so `veripo --help` needs no torch. Errors
that a user can mend are one line on stderr and exit code 2. Ctrl-C is exit code 130, SIGTERM 143, train.max_hours 75.
Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from veripo_fast import __version__
from veripo_fast.commands import COMMANDS
from veripo_fast.errors import EXIT_USER, Interrupted, PeerFailed, UserError
from veripo_fast.run.environment import set_environment
from veripo_fast.text import OneLine, one_line, rank_prefix

EXIT_INTERRUPTED, EXIT_PIPE = 130, 141

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""What a write fails with when the disk is full, over quota, read-only, or the file too large for it."""


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
