"""Every shipped YAML file loads, and configs/tiny.yaml is the demo's configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from veripo_fast.config.load import load_config
from veripo_fast.demo.run import demo_config

CONFIGS = REPOSITORY / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path).stages


def test_tiny_yaml_is_the_demo() -> None:
    shipped, demo = load_config(CONFIGS / "tiny.yaml"), demo_config(Path("anywhere"), seed=0, quick=False)
    assert replace(shipped, run_dir=demo.run_dir, data=demo.data) == demo
