"""The recorder, with a clock that only moves when it is told to."""

import threading
import tracemalloc

import pytest

from veripo_fast.schedule import timeline
from veripo_fast.schedule.timeline import FOR_MEDIA, FOR_RANKS, MAIN, MAX_SPANS, Timeline, count, span


class Clock:
    """Seconds, from a number that is none of a wall clock."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def recorded(clock):
    """The timeline of this process."""
    made = Timeline(clock, lambda: 1.5e9)
    timeline.begin(made)
    yield made
    timeline.end()


def test_a_step_is_its_phases_its_waits_and_a_rest(recorded, clock):
    clock.seconds += 1
    with span("verify"):
        clock.seconds += 2
    recorded.begin_step("grpo-1", 4)
    with span("vision"):
        with span(FOR_MEDIA):
            clock.seconds += 0.25
        clock.seconds += 0.5
        with span("deal"), span(FOR_RANKS):  # a wait inside of a span inside of a phase
            clock.seconds += 0.125
    with span(FOR_RANKS):
        clock.seconds += 1
    with span("vision"):
        clock.seconds += 0.5
    clock.seconds += 0.0625
    before, step = recorded.take("grpo-1")
    assert (before["stage"], before["step"], before["own_us"]) == ("grpo-1", None, {"verify": 2_000_000})
    assert (before["start_us"], before["end_us"]) == (0, 3_000_000)
    assert (step["stage"], step["step"]) == ("grpo-1", 4)
    assert step["own_us"] == {"vision": 1_000_000}
    assert step["waits_us"] == {FOR_MEDIA: 250_000, FOR_RANKS: 1_125_000}
    assert step["end_us"] - step["start_us"] == 1_000_000 + 1_375_000 + 62_500
    assert step["spans"] == [(FOR_MEDIA, MAIN, 3_000_000, 3_250_000), (FOR_RANKS, MAIN, 3_750_000, 3_875_000),
                             ("deal", MAIN, 3_750_000, 3_875_000), ("vision", MAIN, 3_000_000, 3_875_000),
                             (FOR_RANKS, MAIN, 3_875_000, 4_875_000), ("vision", MAIN, 4_875_000, 5_375_000)]


def test_a_phase_that_fails_is_recorded(recorded, clock):
    with pytest.raises(ZeroDivisionError), span("update"):
        clock.seconds += 1
        raise ZeroDivisionError
    with span("update"):
        clock.seconds += 1
    assert recorded.take("grpo-1")[0]["own_us"] == {"update": 2_000_000}


def test_other_threads_have_lanes_and_count_as_no_phase(recorded, clock):
    def work():
        with span("decode"):
            clock.seconds += 1

    with span("rollout"):
        thread = threading.Thread(target=work, name="media_0")
        thread.start()
        thread.join()
    [window] = recorded.take("grpo-1")
    assert window["own_us"] == {"rollout": 1_000_000} and window["waits_us"] == {}
    assert window["spans"] == [("decode", "media_0", 0, 1_000_000), ("rollout", MAIN, 0, 1_000_000)]


def test_counters(recorded, clock):
    clock.seconds += 2
    count("prefetched bytes", 7)
    assert recorded.take("grpo-1")[0]["counts"] == [("prefetched bytes", 2_000_000, 7)]


def test_many_spans_are_bounded_and_the_sums_miss_none(recorded, clock):
    tracemalloc.start()
    for number in range(20 * MAX_SPANS):
        with span("judge"):
            clock.seconds += 1 / 64
        count("done", number)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    [window] = recorded.take("dpo-1")
    assert len(window["spans"]) == len(window["counts"]) == MAX_SPANS
    assert window["dropped"] == 2 * 19 * MAX_SPANS
    assert window["own_us"] == {"judge": 20 * MAX_SPANS * 15625}
    assert held < 1_000_000


def test_without_spans_the_sums_go_on(recorded, clock):
    recorded.keep_spans = False
    with span("update"):
        clock.seconds += 1
    [window] = recorded.take("grpo-1")
    assert (window["spans"], window["dropped"], window["own_us"]) == ([], 1, {"update": 1_000_000})


def test_a_process_without_a_timeline_records_nothing(recorded):
    timeline.end()
    with span("update"):
        count("bytes", 1)
    [window] = recorded.take("grpo-1")
    assert (window["spans"], window["counts"], window["own_us"]) == ([], [], {})


def test_lines_put_the_ranks_side_by_side():
    """The second rank's clock began 300 us before the first one's left the same exchange."""
    clocks = Clock(), Clock()
    ranks = [Timeline(clock, lambda: 2e9) for clock in clocks]
    for rank, clock, seconds in zip(ranks, clocks, (1.0, 1.0003), strict=True):
        clock.seconds += seconds
        rank.exchanged()
        rank.begin_step("grpo-1", 0)
    parts = [rank.take("grpo-1") for rank in ranks]
    between, step = timeline.lines(parts, 3, ranks[0].began)
    assert (between["global_step"], between["step"], step["step"]) == (3, None, 0)
    assert step["began"] == 2e9 and [rank["offset_us"] for rank in step["ranks"]] == [0, -300]
