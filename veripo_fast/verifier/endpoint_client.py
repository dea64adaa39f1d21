"""One OpenAI-compatible /chat/completions server: retries, back-off, time-outs, structured output with a fallback.

A request has one deadline, from looking up the host to the last byte, and one size, also after decompression: a server
that sends a byte now and then, or without end, holds nobody. The requests of all threads run in one event loop, because
only there can a request be ended from outside at any point.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import random
import threading
import time
import zlib
from collections.abc import Coroutine
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.errors import JudgeError
from veripo_fast.text import hidden, printable
from veripo_fast.verifier.judge_reading import MAX_REPLY_TOKENS, NoReply

log = logging.getLogger(__name__)

MAX_REPLY_BYTES = 1 << 20
"""Of one body, as sent and decompressed; a verdict of 512 tokens has a few kilobytes."""
_LONGEST_BACKOFF_SECONDS = 30.0
_LONGEST_RETRY_AFTER_SECONDS = 300.0
_RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
_HOPELESS = frozenset((401, 403, 404, 405))
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""What zlib is told of each encoding that is read; none is asked for, but a proxy may compress all the same."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reply:
    """A whole answer of the server."""

    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300


class EndpointClient:
    """Sends chat requests; safe to use from several threads.

    Raises:
        JudgeError: the key cannot be sent.
    """

    def __init__(self, config: VerifierConfig, backoff_seconds: float = 0.5) -> None:
        self.url = config.endpoint_url.rstrip("/") + "/chat/completions"
        self._model = config.endpoint_model
        self._retries = config.endpoint_retries
        self._timeout_seconds = config.endpoint_timeout_seconds
        self._backoff_seconds = backoff_seconds
        self._key = read_key(config.endpoint_key_env)
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._http = _http_client(headers, config.endpoint_concurrency)
        self._structured = True
        self._reached = False
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge-http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all waiting; requests in flight end with NoReply."""
        with self._lock:
            if self._stopped.is_set():
                return
            self._stopped.set()
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def hide(self, text: str) -> str:
        """A server's text as it may be shown and kept: without the key, and without control characters."""
        return printable(hidden(text, self._key))

    def ask(self, messages: list[dict[str, str]], schema: dict[str, Any]) -> str:
        """The text of the reply to `messages`, asked for as JSON of this schema.

        Raises:
            NoReply: after all attempts, or when the server rejects this request.
            JudgeError: the server has never been reached and cannot be, or rejects every request (key, address).
        """
        problem = NoReply("stopped")
        for attempt in range(self._retries + 1):
            try:
                reply = self._send(messages, schema)
            except TimeoutError:
                problem = NoReply(f"no whole reply within {self._timeout_seconds:g} s")
                self._wait(attempt, None)
                continue
            except (httpx.TransportError, httpx.InvalidURL) as error:
                problem = self._unreachable(error)
                self._wait(attempt, None)
                continue
            if reply.good:
                return self._content(reply)
            problem = NoReply(f"HTTP {reply.status}: {self._excerpt(reply)}")
            self._check_hope(reply, problem)
            if reply.status not in _RETRIED:
                raise problem
            self._wait(attempt, reply.headers.get("Retry-After"))
        raise problem

    def _check_hope(self, reply: Reply, problem: NoReply) -> None:
        """Raises JudgeError for an answer that every request would get."""
        if 300 <= reply.status < 400:
            raise JudgeError(f"the judge endpoint {self.url} answers HTTP {reply.status} and sends requests on to "
                             f"{self._target(reply)}; that is not followed, so correct endpoint_url")
        if reply.status in _HOPELESS:
            raise JudgeError(f"the judge endpoint {self.url} answers {problem}; check endpoint_url, endpoint_model "
                             "and the key in endpoint_key_env")

    def _target(self, reply: Reply) -> str:
        """Host of a redirect: the rest of its address may hold secrets of the server."""
        try:
            host = urlsplit(reply.headers.get("Location", "")).netloc.rpartition("@")[2]
        except ValueError:
            host = ""
        return self.hide(host)[:200] or "another address"

    def _send(self, messages: list[dict[str, str]], schema: dict[str, Any]) -> Reply:
        """One request; when structured output is rejected (HTTP 400), the same one without it."""
        body = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": MAX_REPLY_TOKENS}
        structured = body | {"response_format": {"type": "json_schema", "json_schema": {
            "name": "verdict", "strict": True, "schema": schema}}}
        reply = self._post(structured if self._structured else body)
        self._reached = True
        if reply.status == 400 and self._structured:
            plain = self._post(body)
            if plain.good:
                log.warning("the judge endpoint %s rejects response_format; replies are read as plain JSON", self.url)
                self._structured = False
            return plain
        return reply

    def _post(self, body: dict[str, Any]) -> Reply:
        """One HTTP request. Raises TimeoutError, httpx's errors, and NoReply."""
        return self._run(self._exchange(json.dumps(body).encode("ascii")))

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for work in the event loop; NoReply when it was stopped."""
        with self._lock:
            if self._stopped.is_set():
                work.close()
                raise NoReply("stopped")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise NoReply("stopped") from error

    async def _end_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    async def _exchange(self, content: bytes) -> Reply:
        async with asyncio.timeout(self._timeout_seconds), self._http.stream("POST", self.url,
                                                                             content=content) as response:
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise NoReply(f"the reply is larger than {MAX_REPLY_BYTES} bytes")
            return Reply(response.status_code, response.headers,
                         decompressed(bytes(body), response.headers.get("Content-Encoding", "")))

    def _unreachable(self, error: httpx.TransportError | httpx.InvalidURL) -> NoReply:
        problem = self.hide(f"{error}")[:200]
        if isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol | httpx.InvalidURL) and not self._reached:
            raise JudgeError(f"the judge endpoint {self.url} cannot be reached: {problem}; start the server or correct "
                             "endpoint_url") from error
        return NoReply(f"{type(error).__name__}: {problem}", refused=isinstance(error, httpx.ConnectError))

    def _wait(self, attempt: int, retry_after: str | None) -> None:
        if attempt < self._retries:
            self._stopped.wait(pause_seconds(attempt, retry_after, self._backoff_seconds))

    def _content(self, reply: Reply) -> str:
        """The message text of a chat completion; NoReply when the body is something else."""
        try:
            content = json.loads(reply.body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise NoReply(f"not a chat completion: {self._excerpt(reply)}") from error
        if not isinstance(content, str):
            raise NoReply("the reply has no text")
        return content

    def _excerpt(self, reply: Reply) -> str:
        return self.hide(" ".join(reply.body.decode("utf-8", "replace").split()))[:200]


def _http_client(headers: dict[str, str], concurrency: int) -> httpx.AsyncClient:
    """A client that follows no redirect: another host must get neither the key nor the question.

    Raises:
        JudgeError: the environment asks for a proxy or certificates that cannot be used.
    """
    try:
        return httpx.AsyncClient(headers=headers, timeout=None, follow_redirects=False,
                                 limits=httpx.Limits(max_connections=concurrency))
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        raise JudgeError("the environment asks for a proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) or certificates "
                         "(SSL_CERT_FILE, SSL_CERT_DIR) that cannot be used; correct or unset them") from error


def read_key(variable: str) -> str:
    """The key in an environment variable, "" when there is none; a line break around it is no part of it.

    Raises:
        JudgeError: no HTTP header can carry it. The sentence does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise JudgeError(f"the key in the environment variable {variable} (endpoint_key_env) holds a space, a control "
                         "character or one outside ASCII, which no server takes; set it again")
    return key


def decompressed(body: bytes, encoding: str) -> bytes:
    """A body without its compression, which is undone no further than to MAX_REPLY_BYTES.

    Raises:
        NoReply: it is damaged, larger, or compressed in a way that is not read.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise NoReply(f"the reply is compressed ({printable(encoding)[:40]}), which was not asked for")
    stream = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        plain = stream.decompress(body, MAX_REPLY_BYTES)
    except zlib.error as error:
        raise NoReply(f"the reply's compression is damaged: {error}") from error
    if stream.unconsumed_tail:
        raise NoReply(f"the reply is larger than {MAX_REPLY_BYTES} bytes once decompressed")
    return plain


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
    except (ValueError, OverflowError, TypeError):
        return None
