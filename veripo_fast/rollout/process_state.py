"""What an engine of this process changes of it, put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def group_kept() -> Iterator[None]:
    """vLLM ends torch's process group with its engine, whoever made it."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: None
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextmanager
def process_kept() -> Iterator[None]:
    """vLLM seeds every generator, binds threads, and on a CPU replaces `torch.set_num_threads`."""
    set_threads = torch.set_num_threads
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
