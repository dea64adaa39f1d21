"""What GPUs can do, as data: peak arithmetic, memory, and the two bandwidths that decide how a step is scheduled.

Peaks are the vendor's, dense (no 2:4 sparsity), at the vendor's power limit; what is reached in practice lies below.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One GPU."""

    name: str
    bf16_flops: float
    """Dense bfloat16 FLOPs per second of the tensor cores, accumulated in float32."""
    memory_bytes: int
    """What nvidia-smi gives as memory.total. A process gets about 1 % less: the driver and a context hold some."""
    memory_bandwidth: float
    """Bytes per second between the memory and the chip."""
    nvlink_bandwidth: float
    """Bytes per second to all other GPUs of a machine, both directions together; half of it is what one can send."""


MIB = 1 << 20

# H100 SXM, 80 GB HBM3. FLOP/s and bandwidths: NVIDIA H100 Tensor Core GPU datasheet (1,979 TFLOP/s with sparsity).
H100_SXM = Hardware("H100 SXM", 989.4e12, 81559 * MIB, 3.35e12, 900e9)
# H200 SXM, 141 GB HBM3e. NVIDIA H200 Tensor Core GPU datasheet: the arithmetic of the H100 SXM.
H200 = Hardware("H200", 989.4e12, 143771 * MIB, 4.8e12, 900e9)
# A100 SXM, 80 GB HBM2e. NVIDIA A100 Tensor Core GPU datasheet.
A100_80GB = Hardware("A100 80GB", 312e12, 81920 * MIB, 2.039e12, 600e9)
# B200 in an HGX at 1,000 W. FLOP/s and NVLink: NVIDIA HGX B200 datasheet (36 PFLOP/s with sparsity on 8 GPUs). The
# datasheet's "8 TB/s" is rounded up: a bus of 7,680 bits at 3,996 MHz, read from the driver, moves 7.67 TB/s
# (github.com/pytorch/ao/pull/4002).
B200 = Hardware("B200", 2250e12, 183359 * MIB, 7.67e12, 1800e9)

DEVICE_NAMES = {
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H200": H200,
    "NVIDIA A100-SXM4-80GB": A100_80GB,
    "NVIDIA B200": B200,
}
"""What `torch.cuda.get_device_name` says -> the GPU.

Whole names: "NVIDIA H100 PCIe", "NVIDIA H100 NVL" and slices ("NVIDIA H100 80GB HBM3 MIG 1g.10gb") have other peaks.
"""


def hardware_of(device_name: str) -> Hardware | None:
    """The GPU of a device name, as `torch.cuda.get_device_name` gives it; None: not known, or no GPU."""
    return DEVICE_NAMES.get(device_name)
