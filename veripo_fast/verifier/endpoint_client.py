"""One OpenAI-compatible /chat/completions server: retries, back-off, time-outs, structured output with a fallback."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.errors import JudgeError

log = logging.getLogger(__name__)

_MAX_REPLY_TOKENS = 512
_LONGEST_BACKOFF_SECONDS = 30.0
_LONGEST_RETRY_AFTER_SECONDS = 300.0
_RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
_HOPELESS = frozenset((401, 403, 404, 405))


class NoReply(Exception):
    """The server gave no usable reply to one request; `refused` when it could not even be reached."""

    def __init__(self, problem: str, refused: bool = False) -> None:
        super().__init__(problem)
        self.refused = refused


class EndpointClient:
    """Sends chat requests; safe to use from several threads."""

    def __init__(self, config: VerifierConfig, backoff_seconds: float = 0.5) -> None:
        self.url = config.endpoint_url.rstrip("/") + "/chat/completions"
        self._model = config.endpoint_model
        self._retries = config.endpoint_retries
        self._backoff_seconds = backoff_seconds
        key = os.environ.get(config.endpoint_key_env, "")
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=config.endpoint_timeout_seconds,
            limits=httpx.Limits(max_connections=config.endpoint_concurrency))
        self._structured = True
        self._reached = False
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End all waiting; requests in flight end with NoReply."""
        self._stopped.set()
        self._http.close()

    def ask(self, messages: list[dict[str, str]], schema: dict[str, Any]) -> str:
        """The text of the reply to `messages`, asked for as JSON of this schema.

        Raises:
            NoReply: after all attempts, or when the server rejects this request.
            JudgeError: the server has never been reached and cannot be, or rejects every request (key, address).
        """
        problem = NoReply("stopped")
        for attempt in range(self._retries + 1):
            try:
                response = self._send(messages, schema)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                problem = self._unreachable(error)
                self._wait(attempt, None)
                continue
            if response.is_success:
                return _content(response)
            problem = NoReply(f"HTTP {response.status_code}: {_excerpt(response)}")
            if response.status_code in _HOPELESS:
                raise JudgeError(f"the judge endpoint {self.url} answers {problem}; check endpoint_url, endpoint_model "
                                 "and the key in endpoint_key_env")
            if response.status_code not in _RETRIED:
                raise problem
            self._wait(attempt, response.headers.get("Retry-After"))
        raise problem

    def _send(self, messages: list[dict[str, str]], schema: dict[str, Any]) -> httpx.Response:
        """One request; when structured output is rejected (HTTP 400), the same one without it."""
        if self._stopped.is_set():
            raise NoReply("stopped")
        body = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": _MAX_REPLY_TOKENS}
        structured = body | {"response_format": {"type": "json_schema", "json_schema": {
            "name": "verdict", "strict": True, "schema": schema}}}
        response = self._http.post(self.url, json=structured if self._structured else body)
        self._reached = True
        if response.status_code == 400 and self._structured:
            plain = self._http.post(self.url, json=body)
            if plain.is_success:
                log.warning("the judge endpoint %s rejects response_format; replies are read as plain JSON", self.url)
                self._structured = False
            return plain
        return response

    def _unreachable(self, error: httpx.TransportError | httpx.InvalidURL) -> NoReply:
        if isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol | httpx.InvalidURL) and not self._reached:
            raise JudgeError(f"the judge endpoint {self.url} cannot be reached: {error}; start the server or correct "
                             "endpoint_url") from error
        return NoReply(f"{type(error).__name__}: {error}", refused=isinstance(error, httpx.ConnectError))

    def _wait(self, attempt: int, retry_after: str | None) -> None:
        if attempt < self._retries:
            self._stopped.wait(pause_seconds(attempt, retry_after, self._backoff_seconds))


def pause_seconds(attempt: int, retry_after: str | None, backoff_seconds: float) -> float:
    """Seconds before the next attempt: what Retry-After says (seconds or a date), or backoff * 2^attempt; jittered."""
    asked = _retry_after_seconds(retry_after)
    if asked is not None:
        return min(asked, _LONGEST_RETRY_AFTER_SECONDS) + random.uniform(0, backoff_seconds)
    return min(backoff_seconds * 2**attempt, _LONGEST_BACKOFF_SECONDS) * random.uniform(0.5, 1.5)


def _retry_after_seconds(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _content(response: httpx.Response) -> str:
    """The message text of a chat completion; NoReply when the body is something else."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NoReply(f"not a chat completion: {_excerpt(response)}") from error
    if not isinstance(content, str):
        raise NoReply("the reply has no text")
    return content


def _excerpt(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:200]
