"""The endpoint judge: the model that reads stands behind an OpenAI-compatible server."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.text import hidden, printable
from veripo_fast.verifier.endpoint_client import EndpointClient, read_key
from veripo_fast.verifier.judge_reading import Item, NoReply, ReadingJudge, Replies, messages_of, reply_schema
from veripo_fast.verifier.judges import Progress

_WAKE_SECONDS = 0.5
"""How often the caller is asked whether to go on while no reply comes."""


class EndpointJudge(ReadingJudge):
    """Asks a server, with several requests in flight."""

    def __init__(self, config: VerifierConfig, cache_path: Path | None = None, backoff_seconds: float = 0.5) -> None:
        super().__init__(config.endpoint_model, cache_path, config.endpoint_max_failures)
        self._config = config
        self._backoff_seconds = backoff_seconds

    def _replies(self, items: list[Item], progress: Progress) -> Replies:
        if not items:
            return
        client = EndpointClient(self._config, self._backoff_seconds)
        pool = ThreadPoolExecutor(self._config.endpoint_concurrency, thread_name_prefix="judge")
        try:
            futures = {pool.submit(_ask, client, item): item for item in items}
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=_WAKE_SECONDS, return_when=FIRST_COMPLETED)
                progress(0)
                for future in done:
                    yield futures[future], future.result()
        finally:
            client.stop()
            pool.shutdown(cancel_futures=True)

    def _shown(self, text: str) -> str:
        return printable(hidden(text, read_key(self._config.endpoint_key_env)))

    def too_many(self, failed: str, last: NoReply) -> str:
        config = self._config
        return (f"the judge endpoint {config.endpoint_url} gave no verdict for {failed} (endpoint_max_failures is "
                f"{config.endpoint_max_failures:g}); the last problem was: {last}; where the server is slow, lower "
                f"endpoint_concurrency ({config.endpoint_concurrency}) or raise endpoint_timeout_seconds "
                f"({config.endpoint_timeout_seconds:g})")


def _ask(client: EndpointClient, item: Item) -> str | NoReply:
    """The reply's text as the server sent it."""
    try:
        return client.ask(messages_of(*item), reply_schema(item[0]))
    except NoReply as error:
        return NoReply(client.hide(str(error)), error.refused)
