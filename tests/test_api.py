"""The front door: what `import veripo_fast` offers, when it is loaded, and that it is what the modules hold."""

import subprocess
from collections.abc import Callable

import pytest
import veripo_kernels

import veripo_fast

HOMES = {"Config": "veripo_fast.config.schema", "load_config": "veripo_fast.config.load",
         "load_policy": "veripo_fast.model.policy", "train": "veripo_fast.trainer",
         "evaluate": "veripo_fast.evaluation.command"}


def test_names_are_those_of_their_modules():
    assert sorted(veripo_fast.__all__) == sorted(HOMES) and set(HOMES) <= set(dir(veripo_fast))
    assert {name: getattr(veripo_fast, name).__module__ for name in HOMES} == HOMES


def test_every_kernel_name_can_be_had():
    assert {name for name in veripo_kernels.__all__ if getattr(veripo_kernels, name) is None} == set()
    assert set(veripo_kernels.__all__) <= set(dir(veripo_kernels))


@pytest.mark.parametrize("package", [veripo_fast, veripo_kernels])
def test_a_wrong_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018  the access is what is tested


def test_the_configuration_can_be_read_without_torch(python: Callable[..., subprocess.CompletedProcess[str]]):
    code = ("import sys, veripo_fast; config = veripo_fast.load_config(None, ['--grpo.steps', '3'])\n"
            "assert isinstance(config, veripo_fast.Config) and config.grpo.steps == 3; print('torch' in sys.modules)")
    assert python("-c", code, check=True).stdout == "False\n"
