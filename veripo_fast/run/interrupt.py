"""Ctrl-C as a request: the step that runs is finished and saved first."""

from __future__ import annotations

import logging
import signal
from types import FrameType

log = logging.getLogger(__name__)


class InterruptFlag:
    """A context manager. First Ctrl-C: `check` becomes true. Second: KeyboardInterrupt at once."""

    def __enter__(self) -> InterruptFlag:
        self.raised = False
        self.previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def check(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.raised

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
        log.warning("Ctrl-C: finishing this step, then saving; press again to leave at once")
