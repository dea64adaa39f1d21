"""The sampling contract: which frames, how large; pure functions, checked against their definitions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.video.contract import frame_count, frame_indices, resized_size, window


def cfr(frames: int, fps: float = 30.0) -> list[float]:
    return [index / fps for index in range(frames)]


@pytest.mark.parametrize(("frames", "fps", "contract", "count"), [
    (300, 30.0, VideoConfig(fps=2), 20),                              # 10 s
    (300, 30.0, VideoConfig(fps=1.9), 18),                            # 19 wanted: rounded down to pairs
    (30, 30.0, VideoConfig(fps=1), 4),                                # min_frames
    (3000, 30.0, VideoConfig(fps=2), 64),                             # max_frames
    (3, 30.0, VideoConfig(fps=2), 3),                                 # a video of 3 frames has no more
    (7, 1.0, VideoConfig(fps=2), 6),                                  # 7 frames available: even where bounds allow
    (100, 10.0, VideoConfig(fps=2, min_frames=5, max_frames=5), 5),   # the bounds leave only an odd count
    (300, 30.0, VideoConfig(fps=None, num_frames=5), 5),
    (3, 30.0, VideoConfig(fps=None, num_frames=8), 3),
])
def test_frame_count(frames: int, fps: float, contract: VideoConfig, count: int) -> None:
    assert frame_count(frames, frames / fps, contract) == count


def test_constant_rate_is_linspace() -> None:
    for frames, count in ((300, 16), (60, 16), (17, 16), (301, 4)):
        exact = [(frames - 1) * i / (count - 1) for i in range(count)]
        chosen = frame_indices(cfr(frames, 29.97), VideoConfig(fps=None, num_frames=count))
        assert max(abs(index - position) for index, position in zip(chosen, exact, strict=True)) <= 0.5001


def test_ties_go_to_the_earlier_frame_whatever_the_rounding() -> None:
    contract = VideoConfig(fps=None, num_frames=3)
    for offset in (0.0, 0.1, 1 / 3, 1e4 / 7):
        assert frame_indices([offset + time for time in cfr(4, 30)], contract) == (0, 1, 3)


def test_variable_rate_is_even_in_time_and_takes_no_frame_twice() -> None:
    fast_then_slow = [i / 100 for i in range(100)] + [1.0 + i for i in range(10)]
    chosen = frame_indices(fast_then_slow, VideoConfig(fps=None, num_frames=11))
    times = [fast_then_slow[index] for index in chosen]
    assert all(abs(time - i) < 0.5 for i, time in enumerate(times))
    frozen = [0.0, 9.0, 9.1, 9.2, 9.3, 9.4]
    assert frame_indices(frozen, VideoConfig(fps=None, num_frames=4)) == (0, 1, 2, 5)


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 5.0), min_size=0, max_size=200), st.floats(0.1, 30), st.integers(1, 20),
       st.integers(0, 60))
def test_indices_are_increasing_real_frames(gaps: list[float], fps: float, least: int, extra: int) -> None:
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    contract = VideoConfig(fps=fps, min_frames=least, max_frames=least + extra)
    chosen = frame_indices(times, contract)
    assert list(chosen) == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] <= len(times) - 1
    assert min(least, len(times)) <= len(chosen) <= least + extra
    if len(chosen) % 2:  # odd only where the bounds force it
        assert len(chosen) in {least, len(times)}


def test_no_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        frame_count(0, 0.0, VideoConfig())
    with pytest.raises(ValueError, match="at least one time"):
        frame_indices([], VideoConfig())


@pytest.mark.parametrize(("start", "end", "frames"), [
    (None, None, range(300)), (1.0, 2.0, range(30, 60)), (None, 0.5, range(15)), (9.0, None, range(270, 300)),
    (1.01, 1.02, range(30, 31)),      # shorter than a frame: the one on screen
    (9.99, 99.0, range(299, 300)),    # the end may lie behind the video
    (10.0, 11.0, range(0)), (12.0, None, range(0)), (-1.0, 2.0, range(0)), (3.0, 3.0, range(0)), (3.0, 1.0, range(0)),
])
def test_window(start: float | None, end: float | None, frames: range) -> None:
    for offset in (0.0, 5.0, 0.1):  # the clock of a stream need not start at 0
        assert window([offset + time for time in cfr(300)], start, end) == frames


@pytest.mark.parametrize(("height", "width", "factor", "expected"), [
    (720, 1280, 28, (224, 420)), (1280, 720, 28, (420, 224)), (56, 56, 28, (56, 56)), (100, 100, 32, (96, 96)),
    (10, 100, 28, (28, 280)),
])
def test_resized_size(height: int, width: int, factor: int, expected: tuple[int, int]) -> None:
    assert resized_size(height, width, factor, 4 * 28 * 28, 128 * 28 * 28) == expected


@settings(deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([28, 32]))
def test_resized_size_keeps_its_promises(height: int, width: int, factor: int) -> None:
    low, high = 16 * factor**2, 256 * factor**2
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200 times"):
            resized_size(height, width, factor, low, high)
        return
    new_height, new_width = resized_size(height, width, factor, low, high)
    assert new_height % factor == new_width % factor == 0
    assert min(new_height, new_width) == factor or low <= new_height * new_width <= high
    if min(new_height, new_width) >= 4 * factor:
        assert abs((new_width / new_height) / (width / height) - 1) < 0.45  # rounding by one factor on either side
