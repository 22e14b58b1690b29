"""A disk that slows to a crawl is named beside the rate that the plan counts on; a disk that keeps up is not."""

from __future__ import annotations

import io

from flexbatch.report.disk_watch import DiskWatch
from flexbatch.report.progress import Progress
from tests.report.test_progress import Clock, one_pass

PLANNED = 1e9


def watched(read_seconds: float, wait_seconds: float, passes: int = 10, layer_bytes: int = 100_000_000) -> DiskWatch:
    """Layers of 0.1 s of arithmetic whose weights take so long to read, and are awaited so long."""
    clock = Clock()
    watch = DiskWatch(PLANNED, clock)
    for _ in range(passes):
        start = clock.seconds
        clock.seconds += wait_seconds
        watch.event("read", "layer", clock.seconds - read_seconds, clock.seconds, layer_bytes)
        watch.event("wait", "layer", start, clock.seconds, 0)
        clock.seconds += 0.1
        watch.event("compute", "layer", clock.seconds - 0.1, clock.seconds, 0)
    return watch


def test_a_slow_disk_is_named_with_both_rates() -> None:
    note = watched(read_seconds=5.0, wait_seconds=5.0).note()
    assert note == "waiting for weights from disk at 20 MB/s; the plan counts on 1,000 MB/s"


def test_a_disk_that_keeps_up_is_not_mentioned() -> None:
    assert watched(read_seconds=0.1, wait_seconds=0.1).note() == ""  # awaited half of the time, at the planned rate
    assert watched(read_seconds=0.5, wait_seconds=0.0).note() == ""  # slow, but nobody waits for it
    assert DiskWatch(PLANNED).note() == ""


def test_a_disk_that_stops_is_noticed_within_the_pass() -> None:
    watch = watched(read_seconds=0.1, wait_seconds=0.1)
    clock = watch._clock
    clock.seconds += 30
    assert "at 3" in watch.note()  # what came before, over the silence since
    clock.seconds += 60
    assert watch.note() == "waiting for weights from disk at 0 MB/s; the plan counts on 1,000 MB/s"


def test_the_progress_line_says_it() -> None:
    stream, clock = io.StringIO(), Clock()
    note = watched(read_seconds=5.0, wait_seconds=5.0).note
    with Progress(10, stream=stream, clock=clock, every_seconds=1, note=note) as progress:
        clock.seconds += 2
        progress.update(one_pass(), 1)
    assert "| waiting for weights from disk at 20 MB/s; the plan counts on 1,000 MB/s |" in stream.getvalue()
