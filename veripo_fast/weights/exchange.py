"""Sends the messages of a sharded policy from rank to rank, rounded to the engine's dtype before anything moves.

A round packs what the rank sends into one buffer, receives into another, and writes that into the engine; what stays on
the rank is copied meanwhile. The sum of what a sender read must be the sum of what the receiver's engine holds. All
ranks compare all sums, so that all of them stop. Extra memory: the two buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from veripo_kernels import copy_slices

from veripo_fast.errors import TrainingError
from veripo_fast.weights.parts import Part
from veripo_fast.weights.reshard import Message
from veripo_fast.weights.rounds import Round

Held: TypeAlias = Mapping[str, tuple[int, torch.Tensor]]
"""Name -> where in the flattened parameter a rank's elements begin, and those elements, [n] and contiguous."""

Regions: TypeAlias = dict[int, torch.Tensor]
"""Rank -> [n], the part of a buffer that goes there or comes from there."""

_End: TypeAlias = tuple[torch.Tensor, int, int]
"""A tensor, where in it a rectangle begins, and the elements from one row to the next."""


class Exchange:
    """The rounds of one rank. All ranks of the process group have to make it, and to `send`, together."""

    def __init__(self, rounds: Sequence[Round], targets: Mapping[str, torch.Tensor], *, dtype: torch.dtype,
                 device: torch.device) -> None:
        """
        Args:
            rounds: from `rounds_of`. targets: the engine's parameters, contiguous.
            dtype, device: of all engine parameters that are written.
        """
        self.rounds, self.targets, self.dtype, self.device = rounds, targets, dtype, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        dist.all_reduce(torch.zeros(1, device=device))  # NCCL wants all ranks in its first call; rounds may lack some
        self.written_bytes = dtype.itemsize * sum(
            message.source.numel * len(message.targets) for part in rounds for message in part.arriving)

    @torch.no_grad()
    def send(self, held: Held) -> int:
        """Fill the engine of every rank from what the ranks hold.

        Returns:
            Bytes that this rank sent to others.

        Raises:
            TrainingError: an engine does not hold what was sent; on every rank, and names the elements where they are
                known: at both ends.
            ValueError: a tensor that does not have the elements of which the messages were made, by name.
        """
        sums = torch.zeros(len(self.rounds), 2, self.size, dtype=torch.int64, device=self.device)
        buffers = [self._buffer([part.outgoing for part in self.rounds]),
                   self._buffer([part.incoming for part in self.rounds])]
        sent = 0
        for part, pair in zip(self.rounds, sums, strict=True):
            sent += self._run(part, held, buffers, pair)
        self._compare(self._everywhere(sums))
        return sent * self.dtype.itemsize

    def _run(self, part: Round, held: Held, buffers: Sequence[torch.Tensor], sums: torch.Tensor) -> int:
        """One round; adds to sums, int64 [2, size]: of what went to each rank, of what the engine has from each."""
        outgoing = regions(buffers[0], part.outgoing)
        incoming = regions(buffers[1], part.incoming)
        for peer, region in outgoing.items():
            sums[0, peer] += pack(part.outgoing[peer], held, region)
        works = self._start(outgoing, incoming)
        if part.local:
            sums[:, self.rank] += copy_local(part.local, held, self.targets)
        for work in works:
            work.wait()
        for peer, region in incoming.items():
            sums[1, peer] += unpack(part.incoming[peer], region, self.targets)
        if repeated := [message for message in part.arriving if len(message.targets) > 1]:
            sums[:, self.rank] += repeat(repeated, self.targets)
        return sum(region.numel() for region in outgoing.values())

    def _start(self, outgoing: Regions, incoming: Regions) -> list[dist.Work]:
        sends = [dist.P2POp(dist.isend, region.view(torch.uint8), peer) for peer, region in outgoing.items()]
        receives = [dist.P2POp(dist.irecv, region.view(torch.uint8), peer) for peer, region in incoming.items()]
        return dist.batch_isend_irecv(sends + receives) if sends or receives else []

    def _buffer(self, sides: Sequence[Mapping[int, Sequence[Message]]]) -> torch.Tensor:
        """Room for the largest round."""
        most = max((sum(map(_numel, side.values())) for side in sides), default=0)
        return torch.empty(most, dtype=self.dtype, device=self.device)

    def _everywhere(self, sums: torch.Tensor) -> torch.Tensor:
        """int64 [size, rounds, 2, size], on the host: the sums of all ranks."""
        gathered = [torch.empty_like(sums) for _ in range(self.size)]
        dist.all_gather(gathered, sums)
        return torch.stack(gathered).cpu()

    def _compare(self, sums: torch.Tensor) -> None:
        sent, there = sums[:, :, 0], sums[:, :, 1].permute(2, 1, 0)  # both [sender, round, receiver]
        wrong = (sent != there).nonzero().tolist()
        if wrong:
            sender, number, receiver = wrong[0]
            raise TrainingError(f"the engine of rank {receiver} does not hold the weights that rank {sender} sent: "
                                f"{self._named(sender, number, receiver)} the checksum is "
                                f"{there[sender, number, receiver]}, not {sent[sender, number, receiver]}")

    def _named(self, sender: int, number: int, receiver: int) -> str:
        """The messages of a round between two ranks, as far as this rank knows them."""
        part, messages = self.rounds[number], []
        if sender == receiver == self.rank:
            messages = part.local
        elif receiver == self.rank:
            messages = part.incoming[sender]
        elif sender == self.rank:
            messages = part.outgoing[receiver]
        if not messages:
            return f"in round {number + 1} of {len(self.rounds)}"
        first, last = messages[0], messages[-1]
        return (f"from element {first.elements[0]:,} of {first.source.name} to element {last.elements[1] - 1:,} of "
                f"{last.source.name}")


# -- one side of a round ----------------------------------------------------------------------------------------------

def regions(buffer: torch.Tensor, messages: Mapping[int, Sequence[Message]]) -> Regions:
    """Room in a buffer for the messages of each rank, one behind the other."""
    parts, begin = {}, 0
    for peer, own in messages.items():
        parts[peer] = buffer[begin:begin + _numel(own)]
        begin += _numel(own)
    return parts


def pack(messages: Sequence[Message], held: Held, region: torch.Tensor) -> torch.Tensor:
    """Round what the messages need into a region. Returns int64 []: the sum of what was read and rounded."""
    pairs = [_views(_holder(message, held), (region, begin, message.source.shape[1]), message.source.shape)
             for message, begin in _places(messages)]
    return _copy(pairs)[0]


def unpack(messages: Sequence[Message], region: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Write what came into the engine. Returns int64 []: the sum of what it holds there."""
    pairs = [_views((region, begin, message.source.shape[1]), _end(message.targets[0], targets), message.source.shape)
             for message, begin in _places(messages)]
    return _copy(pairs)[1]


def copy_local(messages: Sequence[Message], held: Held, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Write what the rank holds itself. Returns int64 [2]: the sums of what was read and of what the engine holds."""
    return _copy([_views(_holder(message, held), _end(message.targets[0], targets), message.source.shape)
                  for message in messages])


def repeat(messages: Sequence[Message], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Write what the engine has more than once into the other places, from the first. Returns int64 [2], as above."""
    pairs = []
    for message in messages:
        first = _end(message.targets[0], targets)
        pairs += [_views(first, _end(other, targets), message.source.shape) for other in message.targets[1:]]
    return _copy(pairs)


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """int64 [2], on the device of the targets: the sums of `copy_slices`."""
    sources = [_near(source, target) for source, target in pairs]
    return copy_slices(sources, [target for _, target in pairs])


def _near(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The source on the target's device; rounded before it moves there."""
    return source if source.device == target.device else source.to(target.dtype).to(target.device)


def _places(messages: Sequence[Message]) -> Iterator[tuple[Message, int]]:
    begin = 0
    for message in messages:
        yield message, begin
        begin += message.source.numel


def _holder(message: Message, held: Held) -> _End:
    part = message.source
    start, elements = held[part.name]
    first, last = message.elements
    if elements.dim() != 1 or not elements.is_contiguous() or first < start or last > start + len(elements):
        raise ValueError(f"{part.name}: the elements {first:,} to {last:,} must be held in one contiguous dimension, "
                         f"got shape {list(elements.shape)} from element {start:,} on")
    return elements, part.offset - start, part.width


def _end(part: Part, targets: Mapping[str, torch.Tensor]) -> _End:
    target = targets[part.name]
    if not target.is_contiguous():
        raise ValueError(f"the engine's {part.name} must be contiguous, got strides {target.stride()}")
    return target, part.offset, part.width


def _views(source: _End, target: _End, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ends of a copy, [rows, columns]; one row where both lie without gaps."""
    rows, columns = shape
    one_row = rows == 1 or source[2] == target[2] == columns
    size = (1, rows * columns) if one_row else shape
    return _rectangle(source, size, one_row), _rectangle(target, size, one_row)


def _rectangle(end: _End, size: tuple[int, int], one_row: bool) -> torch.Tensor:
    tensor, begin, width = end
    tensor = tensor.detach()
    strides = (size[1], 1) if one_row else (width, 1)
    return tensor.as_strided(size, strides, tensor.storage_offset() + begin)


def _numel(messages: Sequence[Message]) -> int:
    return sum(message.source.numel for message in messages)
