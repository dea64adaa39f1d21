"""A phase of a stage as the memory ledger has it: who owns how many bytes in its largest moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from veripo_fast.schedule.placement import Owners


@dataclass(frozen=True)
class Phase:
    """The largest moment of a phase, on one rank."""

    name: str
    device: Owners
    """Owner -> bytes on the device that trains; on a CPU everything."""
    host: Owners = field(default_factory=dict)
    """Of a GPU: the same in host memory."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def largest(self) -> str:
        """The owner with most bytes on the device."""
        return max(self.device, key=lambda owner: self.device[owner])


def largest(moments: Iterable[Phase]) -> Phase:
    """The moment that takes most of the device."""
    return max(moments, key=lambda phase: phase.device_bytes)
