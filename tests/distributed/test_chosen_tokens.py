"""What is chosen or sorted over a whole step is the same however many ranks share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import ranks, runs
from tests.support.ranks import assert_close, codes
from tests.support.run_compare import written

OPTIONS: dict[str, dict[str, object]] = {
    "clip and weights": {"grpo__tokens__covariance": "clip", "grpo__tokens__covariance_share": 0.2,
                         "grpo__tokens__covariance_range": [-50.0, 50.0], "grpo__tokens__weights": "divergence"},
    "kl": {"grpo__tokens__covariance": "kl", "grpo__tokens__covariance_share": 0.2, "grpo__loss": "gpg",
           "grpo__loss_options": {"squared_coef": 0.1}},
    "aot": {"stages": [{"kind": "grpo"}, {"kind": "dpo"}], "dpo__match": "aot"}}


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_give_what_one_process_gives(name: str, tmp_path: Path) -> None:
    folders = {}
    for size in (1, 2):
        own = tmp_path / str(size)
        own.mkdir()
        options = {"stages": [{"kind": "grpo"}], "eval__at": "never", "grpo__updates_per_rollout": 2,
                   "grpo__learning_rate": 1e-4} | OPTIONS[name]  # at 1e-3 rounding may change a token of the next step
        ended = ranks.train(size, written(runs.config(own / "run", **options), own))
        assert codes(ended) == [0] * size, ended
        folders[size] = own / "run"
    assert_close(folders[2], folders[1])
