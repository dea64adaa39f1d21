"""ZeRO on two ranks with experts and recurrent layers, whose towers train too: zero_family_ranks.py measures once."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from tests.distributed.test_zero import ROUNDING
from tests.support import policies
from tests.support.children import run
from tests.support.paths import PYTHONPATH
from veripo_fast.demo import tiny_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("zero-families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "TEXT_STD", 0.02)
        for family in policies.NEW_FAMILIES:
            tiny_model.init_model(out / family, family, seed=1)
    named = [f"{family}={out / family}" for family in policies.NEW_FAMILIES]
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "tests.distributed.zero_family_ranks", out, *named, cwd=out,
               env={**os.environ, "PYTHONPATH": PYTHONPATH, "HOME": str(out)})
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", policies.NEW_FAMILIES)
def test_uneven_updates(measured: dict, family: str, stage: int) -> None:
    found = measured[f"updates {stage} {family} trained"]
    assert found["loss"] < ROUNDING and found["norm"] < ROUNDING and found["weights"] < 1e-4
