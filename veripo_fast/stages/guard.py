"""Chosen completions that become less likely: DPO may widen the gap of a pair by pushing both of its sides down.

The difference alone is what a preference loss sees ("likelihood displacement", Razin et al. 2024, arXiv 2410.08847).
The last recorded `chosen_drift` decides about the next step, so that a resumed run decides alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from veripo_fast.config.schema import Config
from veripo_fast.distributed.world import ONE, World
from veripo_fast.errors import TrainingError

log = logging.getLogger(__name__)


class ChosenGuard:
    """Watches the chosen side of one stage (`dpo.guard`).

    Args:
        stage: its name, for what is said.
        records: metrics of the steps that are done; the same on all ranks.
    """

    def __init__(self, stage: str, config: Config, records: Sequence[Mapping[str, Any]], world: World = ONE) -> None:
        self.stage, self.config, self.dpo, self.world = stage, config, config.dpo, world
        drifts = [record["chosen_drift"] for record in records if isinstance(record.get("chosen_drift"), float)]
        self._fallen = bool(drifts) and self._is_low(drifts[-1])
        self._said = any(map(self._is_low, drifts))

    def of_step(self) -> Config:
        """The configuration of the next step: with a likelihood term while the chosen side lies low."""
        if not (self._fallen and self.dpo.guard == "nll"):
            return self.config
        return replace(self.config, dpo=replace(self.dpo, nll_coef=self.dpo.nll_coef + self.dpo.guard_nll))

    def observe(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Look at the metrics of a step; returns one more, where the guard adds a term. Collective.

        Raises:
            TrainingError: the chosen side lies too low, and the guard is to stop.
        """
        added = {"guarded": float(self._fallen)} if self.dpo.guard == "nll" else {}
        drift = values.get("chosen_drift")
        if drift is None:
            return added
        self._fallen = self._is_low(drift)
        if self._fallen and self.dpo.guard == "stop":
            self.world.agreed(lambda: self._give_up(drift))
        if self._fallen and not self._said:
            self._said = True
            if self.world.main:
                log.warning("%s: %s; %s", self.stage, self._what(drift), _REMEDIES[self.dpo.guard])
        return added

    def _is_low(self, drift: float) -> bool:
        return drift < -self.dpo.guard_drift

    def _what(self, drift: float) -> str:
        return (f"chosen completions have become less likely than under the reference, by {-drift:.3g} nats per token "
                f"(dpo.guard_drift {self.dpo.guard_drift:g})")

    def _give_up(self, drift: float) -> None:
        raise TrainingError(f"{self.stage}: {self._what(drift)}, and dpo.guard is stop. The last checkpoint is "
                            "untouched; lower dpo.learning_rate, raise dpo.dpo_beta, or take dpo.guard nll")


_REMEDIES = {"none": "lower dpo.learning_rate, raise dpo.dpo_beta or dpo.nll_coef, or take dpo.guard nll",
             "nll": "dpo.guard_nll is added to dpo.nll_coef until they are back"}
