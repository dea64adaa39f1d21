"""The table of GPUs: found by the whole name that torch gives, and by no name of a GPU with another peak."""

import pytest

from veripo_fast.schedule.hardware import A100_80GB, B200, DEVICE_NAMES, H100_SXM, H200, hardware_of


@pytest.mark.parametrize(("name", "hardware"), [
    ("NVIDIA H100 80GB HBM3", H100_SXM), ("NVIDIA H200", H200), ("NVIDIA A100-SXM4-80GB", A100_80GB),
    ("NVIDIA B200", B200)])
def test_a_device_is_found_by_its_name(name, hardware):
    assert hardware_of(name) is hardware


@pytest.mark.parametrize("name", ["", "cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB",
                                  "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA B200 MIG 1g.23gb", "NVIDIA H200 NVL"])
def test_a_device_with_another_peak_is_not_known(name):
    assert hardware_of(name) is None


def test_units():
    """FLOPs and bytes per second, not tera and giga."""
    for gpu in DEVICE_NAMES.values():
        assert 1e14 < gpu.bf16_flops < 1e16
        assert 70 * 2**30 < gpu.memory_bytes < 200 * 2**30
        assert gpu.nvlink_bandwidth < gpu.memory_bandwidth < gpu.bf16_flops
