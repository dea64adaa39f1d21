"""Which experts an engine chose for each token of a request, gathered from the steps of vLLM's V1 runner.

vLLM's own `enable_return_routed_experts` needs its V2 runner, which its build for CPUs does not have. What it gathers
is gathered here: each step the routers tell what they chose for the rows of the step, and the batch says whose rows
these are. A request that starts behind a prefix from the cache has not run it. Equal hashes of blocks mean equal keys
and values, so the experts of such a block are those of the request that ran it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from veripo_fast.model.replay import UNKNOWN


class ExpertRecorder:
    """Experts of every request that runs.

    Args:
        layers: decoder layers, also those without experts, whose columns stay unknown.
        top_k: experts that a token takes.
        block_tokens: tokens that one hash of a request stands for.
    """

    def __init__(self, layers: int, top_k: int, block_tokens: int) -> None:
        self.layers, self.top_k, self.block_tokens = layers, top_k, block_tokens
        self._step: dict[int, torch.Tensor] = {}
        self._requests: dict[str, _Rows] = {}
        self._blocks: dict[Any, np.ndarray] = {}

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """What a router chose in a step, integers [rows, k]; vLLM calls it."""
        self._step[layer_id] = topk_ids

    def read_step(self, requests: Sequence[tuple[Any, int, int]]) -> None:
        """Take the rows of a step apart.

        Args:
            requests: in the order of their rows: the request (`request_id`, `block_hashes`, `num_tokens`,
                `num_prompt_tokens`), its first token in the step, and how many.
        """
        total = sum(count for _, _, count in requests)
        rows = np.full((total, self.layers, self.top_k), UNKNOWN, np.int16)
        for layer, chosen in self._step.items():
            assert len(chosen) >= total, "a router saw fewer tokens than the step has"
            rows[:, layer] = chosen[:total].cpu().numpy()
        self._step.clear()
        start = 0
        for request, first, count in requests:
            known = self._requests.setdefault(request.request_id, _Rows(request, first, -(-first // self.block_tokens)))
            known.add(first, rows[start:start + count])
            self._keep_blocks(known)
            start += count

    def finished(self, request_id: str) -> np.ndarray:
        """int16 [tokens read, layers, k] of a request that has ended: all but its last token; below 0 what no request
        has run."""
        known = self._requests.pop(request_id)
        read = known.request.num_tokens - 1
        parts = [known.first_rows(self._blocks, self.block_tokens, (self.layers, self.top_k)), *known.parts]
        rows = np.concatenate(parts)[:read]
        assert len(rows) == read, f"request {request_id} read {read} tokens, and the experts of {len(rows)} are known"
        return rows

    def forget(self) -> None:
        """What the prefix cache has forgotten, and requests that were aborted."""
        self._blocks.clear()
        self._requests.clear()

    def _keep_blocks(self, known: _Rows) -> None:
        """Whole blocks of the prompt may start other requests."""
        size, hashes = self.block_tokens, known.request.block_hashes
        whole = min(min(known.end, known.request.num_prompt_tokens) // size, len(hashes))
        if known.kept >= whole:
            return
        rows = np.concatenate(known.parts)
        for number in range(known.kept, whole):
            start = number * size - known.first
            self._blocks.setdefault(hashes[number], rows[start:start + size])
        known.kept = whole


class _Rows:
    """What is known of a request that runs, from its token `first` on."""

    def __init__(self, request: Any, first: int, kept: int) -> None:
        self.request, self.first = request, first
        self.parts: list[np.ndarray] = []
        self.end = first
        """Behind its last known token."""
        self.kept = kept
        """Blocks whose experts other requests can find."""

    def add(self, first: int, rows: np.ndarray) -> None:
        """Rows from the token `first` on. What a request that was preempted runs again is known: the log-probs of its
        tokens are of the first run."""
        assert first <= self.end, "a step skipped tokens of a request"
        new = rows[self.end - first:]
        if len(new):
            self.parts.append(new)
            self.end += len(new)

    def first_rows(self, blocks: dict[Any, np.ndarray], size: int, shape: tuple[int, int]) -> np.ndarray:
        """int16 [first, layers, k] of the prefix that came from the cache."""
        rows = np.full((self.first, *shape), UNKNOWN, np.int16)
        for number in range(-(-self.first // size)):
            block = blocks.get(self.request.block_hashes[number])
            if block is not None:
                rows[number * size:(number + 1) * size] = block[:self.first - number * size]
        return rows


def record(runner: Any, scheduler: Any, bind: Callable[[torch.nn.Module, ExpertRecorder], None]) -> None:
    """Let finished requests of an engine have `routed_experts`, as vLLM's own option gives them on its V2 runner.

    Args:
        runner, scheduler: of the engine, the runner a V1 one.
        bind: vLLM's `bind_routed_experts_capturer`; routers then tell which experts they chose, before the choice of a
            replica of each.
    """
    config = runner.model_config
    recorder = ExpertRecorder(config.get_total_num_hidden_layers(), config.get_num_experts_per_tok(),
                              scheduler.hash_block_size)
    bind(runner.model, recorder)
    run, update, reset = runner.execute_model, scheduler.update_from_output, scheduler.reset_prefix_cache

    def execute_model(step: Any, *others: Any, **named: Any) -> Any:
        output = run(step, *others, **named)
        if step.total_num_scheduled_tokens:
            batch, counts = runner.input_batch, step.num_scheduled_tokens
            recorder.read_step([(scheduler.requests[name], int(batch.num_computed_tokens_cpu[row]), counts[name])
                                for row, name in enumerate(batch.req_ids)])
        return output

    def update_from_output(*arguments: Any, **named: Any) -> Any:
        outputs = update(*arguments, **named)
        for client in outputs.values():
            for output in client.outputs:
                if output.finish_reason is not None:
                    output.routed_experts = recorder.finished(output.request_id)
        return outputs

    def reset_prefix_cache(*arguments: Any, **named: Any) -> Any:
        forgotten = reset(*arguments, **named)
        if forgotten:
            recorder.forget()
        return forgotten

    runner.execute_model, scheduler.update_from_output = execute_model, update_from_output
    scheduler.reset_prefix_cache = reset_prefix_cache
