"""The progress display, driven by passes on a clock of the test's own."""

from __future__ import annotations

import io
import math
import os
import pty
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from flexbatch.records import PassResult
from flexbatch.report.outlook import Outlook
from flexbatch.report.progress import (
    Progress,
    duration_text,
    finish_text,
    line_text,
    traffic_text,
)
from flexbatch.report.snapshot import RATE_WINDOW_SECONDS, Sample, Samples


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def one_pass(decode_tokens: int = 8, rows_in_flight: int = 8) -> PassResult:
    return PassResult(
        completions=(),
        new_tokens={},
        new_logprobs={},
        seconds=1.0,
        rows_in_flight=rows_in_flight,
        prefill_tokens=512,
        decode_tokens=decode_tokens,
        waits={"weights": 0.25},
        bytes_moved={"disk>device": 2_000_000_000},
    )


def drive(progress: Progress, clock: Clock, passes: int, rows_per_pass: int = 1) -> None:
    before = progress.now.rows_done
    for number in range(passes):
        clock.seconds += 1.0
        progress.update(one_pass(), before + rows_per_pass * (number + 1))


def test_a_pipe_gets_one_line_every_few_seconds_and_always_a_last_one() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, stream=stream, clock=clock, every_seconds=5) as progress:
        drive(progress, clock, 12)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("12/100 rows (12%)")
    assert "\x1b" not in stream.getvalue()


def test_a_run_shorter_than_the_interval_still_says_that_it_is_done() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(2, stream=stream, clock=clock) as progress:
        drive(progress, clock, 2)
    assert stream.getvalue().splitlines()[-1].endswith("done in 2 s")


def test_the_line_says_rows_tokens_bytes_waits_and_finish() -> None:
    clock = Clock()
    with Progress(100, stream=io.StringIO(), clock=clock) as progress:
        drive(progress, clock, 10)
        line = line_text(progress.now, datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC))
    assert line == (
        "10/100 rows (10%) | 8 tokens/s | prefill 512 tokens/s | 8 in flight | disk>device 2.00 GB/s"
        " | waiting 25% | 1 min 30 s left, done at 12:01:30"
    )


def test_rows_of_earlier_attempts_count_as_done_but_not_as_speed() -> None:
    clock = Clock()
    with Progress(1000, already_done=900, stream=io.StringIO(), clock=clock) as progress:
        drive(progress, clock, 10)
        now = progress.now
    assert now.rows_done == 910
    assert now.seconds_left == pytest.approx(90)


def test_the_finish_time_follows_the_last_minutes_not_the_whole_run() -> None:
    clock = Clock()
    with Progress(100_000, stream=io.StringIO(), clock=clock, every_seconds=1e9) as progress:
        drive(progress, clock, 1000, rows_per_pass=1)
        done = progress.now.rows_done
        for number in range(int(2 * RATE_WINDOW_SECONDS)):
            clock.seconds += 1.0
            progress.update(one_pass(), done + 10 * (number + 1))
        now = progress.now
    assert now.seconds_left == pytest.approx((100_000 - now.rows_done) / 10, rel=0.01)


def test_a_million_short_passes_take_no_memory() -> None:
    clock = Clock()
    with Progress(10**9, stream=io.StringIO(), clock=clock, every_seconds=1e9) as progress:
        for number in range(20_000):
            clock.seconds += 0.001
            progress.update(one_pass(), number + 1)
        assert len(progress._samples) < 100
        assert progress.now.decode_tokens_per_second == pytest.approx(8000)


def test_nobody_knows_the_finish_before_the_first_row() -> None:
    samples = Samples(Sample(0, 0, 0, 0, 0, {}))
    samples.add(Sample(1, 0, 5, 5, 0, {}))
    now = samples.snapshot(1.0, 10, 5)
    assert math.isinf(now.seconds_left)
    assert "? left, done at ?" in line_text(now, datetime(2026, 1, 1, tzinfo=UTC))


def test_the_plan_says_when_it_ends_until_the_first_pass_is_done() -> None:
    clock = Clock()
    with Progress(100, stream=io.StringIO(), outlook=Outlook(600, 500, 51_200, 20), clock=clock) as progress:
        clock.seconds += 10
        assert progress.now.seconds_left == pytest.approx(590)


def test_while_few_rows_finish_the_plan_at_the_speed_of_the_passes_says_when_it_ends() -> None:
    """OPT-6.7B on a machine that was faster when it was measured: 24 rows in 16 slots, which finish in two bursts."""
    clock, outlook = Clock(), Outlook(1264.0, 1060.0, 12_288, 31)
    times, rows = [26.0] * 51 + [7.1] * 31, [0] * 32 + [1, 0] * 9 + [1] * 15 + [0] * 17
    whole, done = sum(times), 0
    with Progress(24, stream=io.StringIO(), outlook=outlook, clock=clock, every_seconds=1e9) as progress:
        for number, (seconds, more) in enumerate(zip(times, rows, strict=True)):
            clock.seconds += seconds
            done = min(23, done + more)
            prompts = 241 if number < 51 else 0
            progress.update(replace(one_pass(), prefill_tokens=prompts), done)
            assert clock.seconds + progress.now.seconds_left == pytest.approx(whole, rel=0.08)
        clock.seconds += 3.0
        assert progress.now.seconds_left >= 1.0
        progress.update(one_pass(), 24)
        assert progress.now.seconds_left == 0.0


def test_a_pass_in_which_every_row_gains_three_tokens_is_three_passes_of_the_plan() -> None:
    """The last ones are as many as the row needs that gains least."""
    clock, outlook = Clock(), Outlook(130.0, 100.0, 51_200, 30)
    with Progress(24, stream=io.StringIO(), outlook=outlook, clock=clock, every_seconds=1e9) as progress:
        for prompts, gained in ((51_200, [1, 1]), (0, [3, 3]), (0, [9, 3])):
            clock.seconds += 100.0 if prompts else 1.0
            tokens = {index: (7,) * count for index, count in enumerate(gained)}
            progress.update(replace(one_pass(), prefill_tokens=prompts, new_tokens=tokens), 0)
        assert progress.now.seconds_left == pytest.approx(102 * (130 / 106 - 1))


def test_many_rows_that_finish_say_it_better_than_the_plan() -> None:
    clock = Clock()
    with Progress(1000, stream=io.StringIO(), outlook=Outlook(600, 500, 51_200, 20), clock=clock) as progress:
        drive(progress, clock, 100)
        assert progress.now.seconds_left == pytest.approx(900)


def test_a_pass_of_minutes_is_not_silence() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, stream=stream, clock=clock, every_seconds=5) as progress:
        drive(progress, clock, 1)
        clock.seconds += 90
        line = line_text(progress.now, datetime(2026, 1, 1, tzinfo=UTC))
        assert "1 min 30 s into this pass" in line
        deadline = time.monotonic() + 20
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "into this pass" in stream.getvalue()


def test_a_job_without_rows_is_done() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(0, stream=stream, clock=clock):
        pass
    assert "0/0 rows (100%)" in stream.getvalue()


def test_a_job_of_unknown_length_makes_no_share_up_and_ends_as_done() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(None, stream=stream, clock=clock) as progress:
        drive(progress, clock, 6)
        progress.finish(7)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("5 rows | ")
    assert "? left" in first
    assert last.startswith("7/7 rows (100%)")
    assert "done in 6 s" in last


def test_the_last_line_is_not_said_twice() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(5, stream=stream, clock=clock, every_seconds=5) as progress:
        for number in range(5):
            clock.seconds += 1.0
            progress.update(one_pass(rows_in_flight=4 - number), number + 1)
        clock.seconds += 1
        progress.finish(5)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_live_display_with_the_same_facts() -> None:
    reader, writer = pty.openpty()
    clock = Clock()
    with os.fdopen(writer, "w") as terminal, Progress(100, stream=terminal, clock=clock) as progress:
        drive(progress, clock, 3)
        terminal.flush()
    shown = b""
    try:
        while chunk := os.read(reader, 4096):
            shown += chunk
    except OSError:
        pass  # the other end is closed
    os.close(reader)
    text = shown.decode()
    assert "3/100 rows" in text
    assert "disk>device 2.00 GB/s" in text
    assert "tokens/s generated" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (425, "7 min 05 s"), (11520, "3 h 12 min"), (187200, "2 d 4 h"), (math.inf, "?")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_finish_on_another_day_has_its_date() -> None:
    now = datetime(2026, 1, 1, 23, 0, tzinfo=UTC)
    assert finish_text(7200, now) == "Fri 02 Jan 01:00"
    assert finish_text(1800, now) == "23:30"


def test_links_that_carry_nothing_are_left_out() -> None:
    assert traffic_text({"host>device": 0.0, "disk>device": 1.5e9, "device>disk": 2e5}) == (
        "disk>device 1.50 GB/s, device>disk 0.20 MB/s"
    )
