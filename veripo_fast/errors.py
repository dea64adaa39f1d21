"""Errors that a user can mend: printed as one sentence without a traceback, exit code 2."""

EXIT_USER = 2


class UserError(Exception):
    """What is wrong, by name and value, and what to do."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, by a signal or by its limit of time; what was done is saved."""

    def __init__(self, reason: str, exit_code: int, remedy: str = "--resume goes on") -> None:
        super().__init__(reason)
        self.exit_code = exit_code
        self.remedy = remedy
        """What goes on from there."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """A data file that cannot be used."""


class MediaError(UserError):
    """A video or image that cannot be decoded; the record is skipped and named in skipped.jsonl."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written."""


class JudgeError(UserError):
    """A judge that cannot give verdicts."""


class TrainingError(UserError):
    """Training that cannot go on (for example NaN in every step)."""


class PeerFailed(UserError):
    """Another rank failed, or speaks for all; this one ends without a word."""

    def __init__(self, reason: str, exit_code: int = EXIT_USER) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
