"""Plain text through a second vLLM engine of this process, beside the policy's, which sleeps meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.rollout import vllm_library as library
from veripo_fast.rollout.texts import Tokens, until_end
from veripo_fast.rollout.vllm_hooks import EngineFailure, guarded
from veripo_fast.run.memory import return_all_freed_memory


class VllmTexts:
    """Of a folder's own weights; nothing of it is shared with another engine but vLLM's process groups.

    Raises:
        ConfigError: no vLLM, a version that was not tested, or one that cannot run the folder.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, context_tokens: int, sequences: int, cache_bytes: int,
                 device: torch.device) -> None:
        version = library.check_version()
        self.device = device
        self.engine: Any = None
        self._requests = 0
        try:
            with guarded(self.close):
                self.engine = library.build_texts(str(folder), dtype, context_tokens, sequences, cache_bytes,
                                                  gpu=device.type == "cuda")
        except EngineFailure as error:
            raise ConfigError(f"{version} cannot run the judge {folder}: {error}") from error

    def generate(self, prompts: Sequence[Tokens], max_new_tokens: int, end_ids: Sequence[int],
                 pause: Callable[[], None]) -> Iterator[tuple[int, Tokens]]:
        """See `TextEngine`.

        Raises:
            TrainingError: the engine failed.
        """
        numbers: dict[str, int] = {}
        try:
            with guarded(lambda: self.engine.abort_request(list(numbers))):
                for number, prompt in enumerate(prompts):
                    name = f"veripo-text-{self._requests}"
                    self._requests += 1
                    numbers[name] = number
                    self.engine.add_request(name, library.rendered(prompt, ()),
                                            library.greedy_parameters(max_new_tokens, end_ids))
            while self.engine.has_unfinished_requests():
                pause()
                with guarded(lambda: self.engine.abort_request(list(numbers))):
                    outputs = self.engine.step()
                for output in outputs:
                    if output.finished:
                        yield numbers[output.request_id], until_end(output.outputs[0].token_ids, end_ids)
        except EngineFailure as error:
            raise TrainingError(f"the engine of the judge failed: {error}; --resume goes on, with the verdicts that "
                                "were kept") from error

    def close(self) -> None:
        """See `TextEngine`."""
        if self.engine is not None:
            library.shut_down_texts(self.engine)
        self.engine = None
        return_all_freed_memory(self.device)
