"""Messages in rounds, the same on every rank: in none does a rank send or receive more than a bucket.

A message goes into the first round that has room at both of its ends. Messages that stay on a rank need no buffer;
their rounds only say how much one checksum covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from veripo_fast.weights.reshard import Message

_FULL = 64
"""A round with less than one part in so many left is looked at no more."""


@dataclass
class Round:
    """What one rank does in a round."""

    local: list[Message] = field(default_factory=list)
    outgoing: dict[int, list[Message]] = field(default_factory=dict)
    """Receiver -> messages, in the order in which they lie in the buffer."""
    incoming: dict[int, list[Message]] = field(default_factory=dict)
    """Sender -> messages, in that order."""

    @property
    def arriving(self) -> list[Message]:
        """All that the rank's engine gets."""
        return list(chain(self.local, *self.incoming.values()))


class _Room:
    """Elements for which each round still has room, at one end of one rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.left: list[int] = []
        self.first = 0
        """All rounds before it are as good as full."""

    def holds(self, number: int, count: int) -> bool:
        return number >= len(self.left) or self.left[number] >= count

    def take(self, number: int, count: int) -> None:
        self.left.extend([self.size] * (number + 1 - len(self.left)))
        self.left[number] -= count
        while self.first < len(self.left) and self.left[self.first] * _FULL < self.size:
            self.first += 1


def rounds_of(messages: Sequence[Message], rank: int, *, size: int, most: int) -> list[Round]:
    """What a rank does in each round; the number of rounds is that of all ranks.

    Args:
        messages: of all ranks, from `reshard`, none of more than `most` elements.
        size: number of ranks. most: elements that a rank sends, and that it receives, in a round.
    """
    outgoing, incoming, local = ([_Room(most) for _ in range(size)] for _ in range(3))
    rounds: list[Round] = []
    for message in messages:
        stays = message.sender == message.receiver
        ends = [local[message.sender]] if stays else [outgoing[message.sender], incoming[message.receiver]]
        number = _first_round(ends, message.source.numel)
        rounds.extend(Round() for _ in range(number + 1 - len(rounds)))
        _add(rounds[number], message, rank)
    return rounds


def _first_round(ends: Sequence[_Room], count: int) -> int:
    """The first round with room at all ends, where the room is taken."""
    number = max(end.first for end in ends)
    while not all(end.holds(number, count) for end in ends):
        number += 1
    for end in ends:
        end.take(number, count)
    return number


def _add(part: Round, message: Message, rank: int) -> None:
    if message.sender == message.receiver == rank:
        part.local.append(message)
    elif message.sender == rank:
        part.outgoing.setdefault(message.receiver, []).append(message)
    elif message.receiver == rank:
        part.incoming.setdefault(message.sender, []).append(message)
