"""How all ranks of a run end together when one of them was asked to stop."""

from __future__ import annotations

from veripo_fast.distributed.world import World
from veripo_fast.errors import Interrupted, PeerFailed
from veripo_fast.run.interrupt import Request, StopRequests


def request_of_any(requests: StopRequests, world: World) -> Request | None:
    """The first request of any rank: their clocks differ, and a signal may come to one alone. Collective."""
    return next(filter(None, world.gather(requests.request())), None)


def end_all(request: Request, world: World) -> None:
    """End on every rank, with the same exit code.

    Raises:
        Interrupted: on rank 0, which says why; PeerFailed on others.
    """
    world.part()
    if not world.main:
        raise PeerFailed(request.reason, request.exit_code)
    raise Interrupted(*request)
