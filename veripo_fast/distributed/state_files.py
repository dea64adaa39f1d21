"""The optimizer's state on disk, by torch.distributed.checkpoint: any number of ranks and any backend read it back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from veripo_fast.distributed.world import World
from veripo_fast.errors import CheckpointError, PeerFailed


def write_state(folder: Path, state: dict[str, Any], world: World) -> None:
    """Write tensors, each rank its own rows of those that are DTensors. Collective.

    Raises:
        OSError, RuntimeError: what the first rank that could not write met, on rank 0; PeerFailed on others.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _quiet():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, overwrite=True),
                     process_group=world.group, no_dist=world.size == 1)
    except CheckpointException as error:  # all ranks get it, and it is no Exception
        rank, (cause, _) = min(error.failures.items())
        if not world.main:
            raise PeerFailed(f"rank {rank} could not write") from error
        raise cause from None


def read_state(folder: Path, state: dict[str, Any], world: World) -> None:
    """Fill tensors of `state` in place, whatever ranks wrote them. Collective.

    Raises:
        CheckpointError: the folder holds no such state, or not all of it.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder} holds no optimizer state that this version reads; another version of "
                              "veripo-fast may have written the checkpoint (inputs.json in the run folder says which)")
    try:
        with _quiet():
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=world.size == 1)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the optimizer state in {folder} is not that of this model: {_reason(error)}"
                              ) from error


def _reason(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def on_host(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A copy of a state in host memory."""
    return None if state is None else {name: _copied(value) for name, value in state.items()}


def _copied(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    from veripo_fast.distributed.rows import by_rows

    if not isinstance(value, DTensor):
        return value.detach().to("cpu", copy=True)
    return by_rows(value.to_local().to("cpu", copy=True), _host_mesh(), value.shape)


@cache
def _host_mesh() -> Any:
    """All ranks in host memory: a DTensor moves its rows to the device of its mesh. Collective when it is new."""
    import torch

    from veripo_fast.distributed.rows import all_ranks

    return all_ranks(torch.device("cpu"))


@contextmanager
def _quiet() -> Iterator[None]:
    """It warns that one process is one process, and of tensors that it copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (UserWarning, FutureWarning))
        yield
