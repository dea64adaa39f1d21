"""Requests to stop: which signals, what they say, and when the time is up."""

import os
import signal
import threading

import pytest

from veripo_fast.errors import Interrupted
from veripo_fast.run.interrupt import EXIT_TIME_UP, StopRequests


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_a_request_and_the_second_one_ends(number: int, code: int) -> None:
    with StopRequests() as requests:
        assert not requests.request()
        requests.stop()
        os.kill(os.getpid(), number)
        assert requests.request()
        with pytest.raises(Interrupted, match=f"interrupted by {number.name}$") as first:
            requests.stop()
        with pytest.raises(Interrupted, match="for the second time") as second:
            os.kill(os.getpid(), number)
        assert first.value.exit_code == second.value.exit_code == code


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopRequests():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup` ignores SIGHUP for its child."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests.request()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_may_train() -> None:
    results = []

    def work() -> None:
        with StopRequests() as requests:
            results.append(requests.request())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [None]


def test_the_longest_step_decides_whether_another_one_fits() -> None:
    now = [0.0]
    requests = StopRequests(max_hours=1.0, clock=lambda: now[0])
    for seconds in (600, 1200, 600):
        assert not requests.request()
        now[0] += seconds
        requests.step_done()
    assert requests.longest_step == 1200 and not requests.request()  # 2400 s done, 1200 more just fit
    now[0] += 1
    assert requests.request()
    with pytest.raises(Interrupted, match=r"stopped after 0\.67 hours, because train\.max_hours") as stopped:
        requests.stop()
    assert stopped.value.exit_code == EXIT_TIME_UP
