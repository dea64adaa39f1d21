"""The endpoint judge against a real HTTP server on this machine."""

import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.children import PATIENCE_SECONDS
from tests.support.verifier_groups import group, prompt, written
from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.errors import JudgeError
from veripo_fast.verifier import endpoint_client
from veripo_fast.verifier.endpoint_client import pause_seconds
from veripo_fast.verifier.judge_endpoint import EndpointJudge
from veripo_fast.verifier.judge_reading import NoReply, VerdictCache, judge_text, read_reply
from veripo_fast.verifier.judges import no_progress

RIGHT, SLIP = written("I see it go right", "B"), written("I see it go right too", "A")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def chat(content):
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}, {}


def supports(letter):
    return chat(json.dumps({"supported_answer": letter}))


class Server:
    """Answers with `behave(number of the request, body)` -> (status, JSON or text, headers)."""

    def __init__(self, behave):
        self.requests, self.headers, self.times = [], [], []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                status, payload, headers = behave(number, body)
                data = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # the client may have gone away, as it does on a time-out

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving(behave):
    server = Server(behave)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def judge_for(url, cache=None, **options):
    options = {"endpoint_concurrency": 4, "endpoint_timeout_seconds": PATIENCE_SECONDS, "endpoint_retries": 2,
               **options}
    config = VerifierConfig(judge="endpoint", endpoint_url=url, endpoint_model="small-judge", **options)
    return EndpointJudge(config, cache, backoff_seconds=0.01)


def judged(judge, *groups):
    return [[(j.consistent, j.supported_answer) for j in row] for row in judge.judge(list(groups), no_progress)]


def many(count):
    return group(*(written(f"case {n}", "B") for n in range(count)))


# Good replies

def test_good_server():
    with serving(lambda number, body: supports("B")) as server:
        counted = []
        rows = judge_for(server.url).judge([group(RIGHT, SLIP, RIGHT, "no tags", to=prompt(gold="D"))], counted.append)
    assert [(j.consistent, j.supported_answer) for j in rows[0]] == [
        (True, "B"), (False, "B"), (True, "B"), (None, None)]
    assert len(server.requests) == 2 and sum(counted) == 4
    body = server.requests[0]
    assert body["model"] == "small-judge" and body["temperature"] == 0
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["supported_answer"]["enum"] == ["A", "B", "C", "D", "none"]


def test_the_judge_sees_neither_the_given_answer_nor_the_gold():
    to = prompt("number", "31337")
    with serving(lambda number, body: supports("5")) as server:
        assert judged(judge_for(server.url), group(written("so 5", "424242"), to=to)) == [[(False, "5")]]
    sent = json.dumps(server.requests)
    assert "so 5" in sent and "Which way does it move?" in sent and "424242" not in sent and "31337" not in sent
    assert judge_text(prompt(gold="A"), "why") == judge_text(prompt(gold="B"), "why")


def test_the_key_is_sent_and_only_then(monkeypatch):
    with serving(lambda number, body: supports("B")) as server:
        judged(judge_for(server.url), group(RIGHT))
        monkeypatch.setenv("MY_KEY", "s3cret")
        judged(judge_for(server.url, endpoint_key_env="MY_KEY"), group(RIGHT))
    assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer s3cret"]


def test_requests_run_at_the_same_time():
    barrier = threading.Barrier(4, timeout=PATIENCE_SECONDS)

    def together(number, body):
        barrier.wait()
        return supports("B")

    with serving(together) as server:
        assert judged(judge_for(server.url), many(4)) == [[(True, "B")] * 4]


# Trouble that passes

def test_500_then_ok():
    with serving(lambda number, body: (500, "oops", {}) if number < 2 else supports("B")) as server:
        assert judged(judge_for(server.url), group(RIGHT)) == [[(True, "B")]]
    assert len(server.requests) == 3


@pytest.mark.parametrize("retry_after", ["0.4", "date"])
def test_429_with_retry_after_is_honoured(retry_after):
    def busy(number, body):
        when = formatdate(time.time() + 2, usegmt=True) if retry_after == "date" else retry_after
        return (429, {"error": "slow down"}, {"Retry-After": when}) if number == 0 else supports("B")

    with serving(busy) as server:
        assert judged(judge_for(server.url), group(RIGHT)) == [[(True, "B")]]
    waited = server.times[1] - server.times[0]
    assert waited >= (0.39 if retry_after == "0.4" else 0.9)


def test_pauses_grow_and_vary():
    for attempt in range(4):
        pauses = [pause_seconds(attempt, None, 0.5) for _ in range(50)]
        assert 0.25 * 2**attempt <= min(pauses) < max(pauses) <= 0.75 * 2**attempt
    assert max(pause_seconds(60, None, 0.5) for _ in range(50)) <= 45
    assert 7 <= pause_seconds(0, "7", 0.5) <= 7.5 and pause_seconds(0, "1e9", 0.5) <= 300.5
    assert pause_seconds(0, "Mon, 01 Jan 2001 00:00:00 GMT", 0.5) <= 0.5
    assert 0.25 <= pause_seconds(0, "rubbish", 0.5) <= 0.75


def test_slow_server_times_out_and_is_asked_again():
    """The first request gets no answer; on a loaded machine later ones may miss the time-out as well."""
    judged_at_last = threading.Event()

    def slow(number, body):
        if number == 0:
            judged_at_last.wait(PATIENCE_SECONDS)
        return supports("B")

    with serving(slow) as server:
        judge = judge_for(server.url, endpoint_timeout_seconds=0.3, endpoint_retries=100)
        assert judged(judge, group(RIGHT)) == [[(True, "B")]]
        judged_at_last.set()
    assert len(server.requests) >= 2


def test_response_format_rejected_falls_back_once_and_says_so(caplog):
    def plain_only(number, body):
        if "response_format" in body:
            return 400, {"error": "response_format is not supported"}, {}
        return chat('Sure!\n```json\n{"supported_answer": "B"}\n```')

    with serving(plain_only) as server:
        assert judged(judge_for(server.url, endpoint_concurrency=1), many(3)) == [[(True, "B")] * 3]
    assert ["response_format" in body for body in server.requests] == [True, False, False, False]
    assert len([record for record in caplog.records if "response_format" in record.message]) == 1


def test_a_single_rejected_item_does_not_turn_structured_output_off():
    def one_too_long(number, body):
        return (400, "too long", {}) if "case 0" in json.dumps(body) else supports("B")

    with serving(one_too_long) as server:
        rows = judged(judge_for(server.url, endpoint_concurrency=1, endpoint_max_failures=0.5), many(3))
    assert rows == [[(None, None), (True, "B"), (True, "B")]]
    assert "response_format" in server.requests[-1]


# Trouble that stays

def test_down_from_the_start_stops_at_once(monkeypatch):
    monkeypatch.setattr(endpoint_client, "pause_seconds", lambda *_: pytest.fail("it is asked again"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match="cannot be reached"):
        judged(judge_for(url, endpoint_retries=9), many(50))


def test_an_address_without_scheme_stops_at_once():
    with pytest.raises(JudgeError, match="correct endpoint_url"):
        judged(judge_for("127.0.0.1:9/v1"), many(2))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_stops_at_once(status):
    with serving(lambda number, body: (status, {"error": "no such model"}, {})) as server, \
            pytest.raises(JudgeError, match=f"HTTP {status}.*no such model"):
        judged(judge_for(server.url), many(40))
    assert len(server.requests) <= 8


@pytest.mark.parametrize("reply", ["I cannot say", '{"answer": "B"}', '{"supported_answer": "Q"}', '["B"]', "{",
                                   '{"supported_answer": ["B"]}', '{"supported_answer": "A or B"}', ""])
def test_nonsense_is_no_verdict_and_too_much_of_it_stops(reply):
    def behave(number, body):
        return chat(reply) if "case 0" in json.dumps(body) else supports("B")

    with serving(behave) as server:
        rows = judged(judge_for(server.url, endpoint_max_failures=0.25), many(4))
        assert rows == [[(None, None)] + [(True, "B")] * 3]
        with pytest.raises(JudgeError, match=r"no verdict for 1 of 4 items.*endpoint_max_failures is 0\.2"):
            judged(judge_for(server.url, endpoint_max_failures=0.2), many(4))


@pytest.mark.parametrize("payload", ["<html>", "{}", '{"choices": []}',
                                     '{"choices": [{"message": {"content": null}}]}'])
def test_a_reply_that_is_no_chat_completion_is_no_verdict(payload):
    with serving(lambda number, body: (200, payload, {})) as server:
        assert judged(judge_for(server.url, endpoint_max_failures=1.0), group(RIGHT)) == [[(None, None)]]


def test_a_server_that_goes_down_on_the_way_stops_the_stage():
    with serving(lambda number, body: supports("B") if number < 2 else (503, "down", {})) as server, \
            pytest.raises(JudgeError, match="HTTP 503"):
        judged(judge_for(server.url), many(60))
    assert len(server.requests) < 60 * 3


# Reading replies

def test_read_reply():
    assert read_reply('{"supported_answer": "none"}', prompt()) is None
    assert read_reply('{"supported_answer": null}', prompt()) is None
    assert read_reply('{"supported_answer": "(b)"}', prompt()) == "B"
    assert read_reply('{"supported_answer": "right"}', prompt()) == "B"
    assert read_reply('{"supported_answer": 3}', prompt("number", "1")) == "3"
    assert read_reply('<think>{"supported_answer": "A"} no {</think> {"supported_answer": "B"}', prompt()) == "B"
    with pytest.raises(NoReply):
        read_reply('{"supported_answer": "many"}', prompt("number", "1"))


@pytest.mark.parametrize("to", [prompt(), prompt("number", "1"), prompt("text", "x")], ids=lambda to: to.problem_type)
def test_no_answer_can_be_copied_out_of_the_task(to):
    """Small models repeat the example of a prompt; what stands there is refused as an answer."""
    task = judge_text(to, "why").rpartition(" -----")[2]
    [example] = re.findall(r"\{.*?\}", task)
    with pytest.raises(NoReply, match="names no possible answer"):
        read_reply(example, to)
    assert not re.search(r"\b(?:[B-HJ-Z]|\d+)\b", task.replace("JSON", ""))


# The cache

def test_verdicts_are_kept_and_not_asked_again(tmp_path):
    cache = tmp_path / "new" / "verdicts.jsonl"
    with serving(lambda number, body: supports("none" if "case 1" in json.dumps(body) else "B")) as server:
        first = judged(judge_for(server.url, cache), many(3))
        assert first == [[(True, "B"), (None, None), (True, "B")]] and len(server.requests) == 3
        counted = []
        judge_for(server.url, cache).judge([many(4)], counted.append)
        assert len(server.requests) == 4 and sum(counted) == 4
    assert judged(judge_for("http://127.0.0.1:9/v1", cache), many(3)) == first  # nothing left to ask
    config = VerifierConfig(judge="endpoint", endpoint_url=server.url, endpoint_model="other-judge", endpoint_retries=0)
    with pytest.raises(JudgeError):
        EndpointJudge(config, cache).judge([many(3)], no_progress)


def test_nonsense_is_not_kept(tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    with serving(lambda number, body: chat("hm") if number == 0 else supports("B")) as server:
        assert judged(judge_for(server.url, cache, endpoint_max_failures=1.0), group(RIGHT)) == [[(None, None)]]
        assert judged(judge_for(server.url, cache), group(RIGHT)) == [[(True, "B")]]


def test_verdicts_given_before_a_stop_are_kept(tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    with serving(lambda number, body: supports("B") if number < 3 else chat("hm")) as server, \
            pytest.raises(JudgeError):
        judged(judge_for(server.url, cache, endpoint_concurrency=1, endpoint_max_failures=0.0), many(6))
    assert len(cache.read_text().splitlines()) == 3


def test_a_torn_last_line_is_ignored_and_closed(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    cache = VerdictCache(path)
    cache.add("one", "B")
    cache.add("two", None)
    path.write_bytes(path.read_bytes()[:-9])
    again = VerdictCache(path)
    assert "one" in again and again["one"] == "B" and "two" not in again
    again.add("three", "C")
    last = VerdictCache(path)
    assert "one" in last and "two" not in last and last["three"] == "C"
    path.write_bytes(b"\xff\xfe\n[1]\n{}\n" + path.read_bytes())
    assert VerdictCache(path)["three"] == "C"
