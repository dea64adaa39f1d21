"""Samplers by how often a prompt is answered right: a number in its record, or measured in rollouts of another run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from veripo_fast.recipes.view import side_of
from veripo_fast.types import Prompt


def curriculum(prompts: Sequence[Prompt], epoch: int, seed: int, key: str = "pass_rate", measured: str = "",
               above: float = 0.0, below: float = 1.0) -> Sequence[int]:
    """From easy to hard, in every epoch alike: prompts with a pass rate above `above` and at most `below`, the highest
    first; equal ones as in the files (SARI, arXiv 2504.15900, drops those that are never right).

    `measured` is a folder of rollouts, RUN/rollouts/STAGE; empty: the rate is what the record says under `key`, which
    is named in data.keep_keys.
    """
    rates = pass_rates(prompts, key, measured)
    kept = [number for number, rate in enumerate(rates) if above < rate <= below]
    return sorted(kept, key=lambda number: -rates[number])


def prioritized(prompts: Sequence[Prompt], epoch: int, seed: int, key: str = "pass_rate", measured: str = "",
                floor: float = 0.0) -> Sequence[int]:
    """As many draws as there are prompts, with replacement, each with a chance in proportion to 1 - pass rate and at
    least `floor` (Kimi k1.5, arXiv 2501.12599). `key` and `measured` as for `curriculum`."""
    weights = [max(1.0 - rate, floor) for rate in pass_rates(prompts, key, measured)]
    if not any(weights):
        raise ValueError("every prompt has pass rate 1, so none would be drawn; set floor")
    return random.Random(f"{seed}/{epoch}").choices(range(len(prompts)), weights, k=len(prompts))


def pass_rates(prompts: Sequence[Prompt], key: str, measured: str) -> list[float]:
    """The pass rate of each prompt, in [0, 1].

    Raises:
        ValueError: a prompt has none, by name.
    """
    known = _measured(measured) if measured else {}
    rates: list[float] = []
    for prompt in prompts:
        rate = known.get(prompt.prompt_id) if measured else side_of(prompt).get(key)
        where = f"the rollouts in {measured}" if measured else f"its record under {key} (named in data.keep_keys?)"
        if type(rate) not in (int, float):
            raise ValueError(f"prompt {prompt.prompt_id} has no pass rate in {where}")
        assert rate is not None
        if not 0 <= rate <= 1:
            raise ValueError(f"prompt {prompt.prompt_id} has pass rate {rate} in {where}; it must be 0 to 1")
        rates.append(float(rate))
    return rates


@lru_cache(maxsize=4)
def _measured(folder: str) -> dict[str, float]:
    """Prompt id -> mean accuracy of all completions in the rollout files of a folder."""
    import pyarrow.parquet as pq

    files = sorted(Path(folder).glob("step_*.parquet"))
    if not files:
        raise ValueError(f"measured {folder} holds no rollouts; name a folder as RUN/rollouts/STAGE")
    sums: dict[str, tuple[float, int]] = {}
    for file in files:
        for row in pq.read_table(file, columns=["prompt_id", "accuracy"]).to_pylist():
            total, count = sums.get(row["prompt_id"], (0.0, 0))
            sums[row["prompt_id"]] = (total + row["accuracy"], count + 1)
    return {name: total / count for name, (total, count) in sums.items()}
