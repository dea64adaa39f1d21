"""Whether two run folders hold the same run, bitwise."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bench.compare_runs import PER_PROCESS
from tests.support.forks import forks
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.schema import Config
from veripo_fast.run.folder import RunDir


def written(config: Config, folder: Path | str) -> Path:
    """The configuration as a file."""
    path = Path(folder) / "run.yaml"
    path.write_text(to_yaml(config))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file without `PER_PROCESS`; none when there is no file."""
    if not path.exists():
        return []
    return [{name: value for name, value in json.loads(line).items() if name not in PER_PROCESS}
            for line in path.read_text().splitlines()]


def tree(folder: Path) -> list[str]:
    """Everything below a folder, by name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same(run_folder: Path, other_folder: Path) -> None:
    """Everything that a run leaves, bitwise, but wall times and TensorBoard's files."""
    run, other = RunDir(run_folder), RunDir(other_folder)
    assert records(run.metrics) == records(other.metrics)
    assert records(run.evals) == records(other.evals)
    for folder in ("rollouts", "contrasts", "verifier", "eval"):
        assert tree(run.root / folder) == tree(other.root / folder)
        for path in (run.root / folder).rglob("*.parquet"):
            same = pq.read_table(path).equals(pq.read_table(other.root / path.relative_to(run.root)))
            assert same, path
    assert tree(run.checkpoints) == tree(other.checkpoints)
    for weights in run.checkpoints.glob("*/*model.safetensors"):
        assert weights.read_bytes() == (other.checkpoints / weights.relative_to(run.checkpoints)).read_bytes()


def assert_resumes(folder: Path, moment: str, config_of: Callable[[Path], Config]) -> tuple[Path, str]:
    """A run that is killed at a moment (`forks.Job.at`) and resumed is the uninterrupted one, bitwise.

    Args:
        config_of: makes the configuration of a run folder.

    Returns:
        the folder of the uninterrupted run, and what the resumed one said.
    """
    files = {}
    for name in ("whole", "killed"):
        (folder / name).mkdir()
        files[name] = written(config_of(folder / name / "run"), folder / name)
    ended = forks().run("train", "--config", files["whole"])
    assert ended.code == 0, ended.output
    ended = forks().run("train", "--config", files["killed"], at=moment)
    assert ended.code == -signal.SIGKILL, ended.output
    ended = forks().run("train", "--config", files["killed"], "--resume")
    assert ended.code == 0, ended.output
    assert_same(folder / "killed" / "run", folder / "whole" / "run")
    return folder / "whole" / "run", ended.output
