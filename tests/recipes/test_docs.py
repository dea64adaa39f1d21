"""docs/recipes.md: its Python is one file, and each of its YAML blocks trains with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import runs
from tests.support.paths import REPOSITORY
from veripo_fast.config.load import apply_overrides
from veripo_fast.recipes.checked import check_functions
from veripo_fast.recipes.own import own_function
from veripo_fast.recipes.tables import ADVANTAGES, REFERENCES, REWARDS, SAMPLERS
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train

TEXT = (REPOSITORY / "docs" / "recipes.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """`{"grpo": {"steps": 1}}` -> `{"grpo.steps": 1}`, one level deep, as sections have options."""
    return {f"{section}.{name}": value for section, options in tree.items() for name, value in options.items()}


@pytest.mark.parametrize("block", YAML, ids=range(len(YAML)))
def test_a_block_trains(block: str, tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    file.write_text("\n\n".join(PYTHON))
    for name in re.findall(r"\w+\.jsonl", block):  # of records that name no source
        rows = [json.loads(line) for line in (runs.corpus() / "train.jsonl").read_text().splitlines()]
        unnamed = [json.dumps({key: value for key, value in row.items() if key != "data_source"}) for row in rows[:6]]
        (tmp_path / name).write_text("\n".join(unnamed))
        block = block.replace(name, str(tmp_path / name))
    options = flat(yaml.safe_load(block.replace("my.py", str(file)).replace(", on:", ", 'on':")))
    config = apply_overrides(runs.config(tmp_path / "run", grpo__steps=1, stages=[{"kind": "grpo"}], eval__at="never",
                                         data__media_root=str(runs.corpus())), options)
    check_functions(config)
    train(config)
    assert len(read_records(RunDir(tmp_path / "run").metrics)) == 1


def test_every_function_is_used_and_has_ten_lines(tmp_path: Path) -> None:
    functions = re.findall(r"^def (\w+)\(.*?(?=\Z|^\S)", "\n".join(PYTHON), re.DOTALL | re.MULTILINE)
    assert len(functions) == 4 and all(f"my.py:{name}" in "".join(YAML) for name in functions)
    assert all(len(block.strip().splitlines()) <= 10 for block in PYTHON)


def test_what_the_functions_of_the_page_say(tmp_path: Path) -> None:
    """One value each, worked by hand."""
    import torch

    file = tmp_path / "my.py"
    file.write_text("\n\n".join(PYTHON))
    best = own_function(f"{file}:best_only")(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), eps=0.0)
    assert best.tolist() == [1.0, 0.0, 0.0]  # (1 - 0.5) / 0.5


def test_the_table_names_what_is_shipped() -> None:
    for table in (REWARDS, ADVANTAGES, SAMPLERS, REFERENCES):
        assert ", ".join(f"`{name}`" for name in table) in TEXT
    for recipe in sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml")):
        assert f"`{recipe.stem}`" in TEXT
