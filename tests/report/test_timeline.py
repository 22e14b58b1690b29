"""The record of what the run did: everything adds up, at any length and through any end."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexbatch.records import PassResult
from flexbatch.report.timeline import Stretch, Timeline, read_timeline, totals, totals_text


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self) -> float:
        return self.seconds


def one_pass(seconds: float = 0.1) -> PassResult:
    return PassResult(
        completions=(),
        new_tokens={},
        new_logprobs={},
        seconds=seconds,
        rows_in_flight=4,
        prefill_tokens=100,
        decode_tokens=4,
        guessed_tokens=6,
        right_tokens=2,
        waits={"weights": seconds / 4},
        bytes_moved={"disk>device": 1000},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "_state").mkdir()
    return tmp_path


def run(folder: Path, clock: Clock, passes: int, seconds: float = 0.1) -> None:
    with Timeline(folder, clock) as timeline:
        for number in range(passes):
            clock.seconds += seconds
            timeline.update(one_pass(seconds), number)


@pytest.mark.parametrize("passes", [1, 9, 10, 11, 995])
def test_every_pass_is_in_exactly_one_stretch(folder: Path, passes: int) -> None:
    run(folder, Clock(), passes)
    sums = totals(read_timeline(folder))
    assert sums.passes == passes
    assert sums.decode_tokens == 4 * passes
    assert (sums.guessed_tokens, sums.right_tokens) == (6 * passes, 2 * passes)
    assert sums.bytes_moved == {"disk>device": 1000 * passes}
    assert sums.seconds == pytest.approx(0.1 * passes, rel=1e-3)


def test_a_long_run_stays_a_few_thousand_lines(folder: Path) -> None:
    run(folder, Clock(), 20_000, seconds=2.0)
    assert len(read_timeline(folder)) < 4000


def test_attempts_follow_each_other_and_the_time_between_them_is_not_counted(folder: Path) -> None:
    clock = Clock()
    run(folder, clock, 20)
    clock.seconds += 5000
    run(folder, clock, 20)
    stretches = read_timeline(folder)
    assert {stretch.attempt for stretch in stretches} == {1, 2}
    assert totals(stretches).seconds == pytest.approx(4, rel=1e-2)


def test_a_line_cut_by_a_crash_is_left_out(folder: Path) -> None:
    run(folder, Clock(), 20)
    path = folder / "_state" / "timeline.jsonl"
    whole = read_timeline(folder)
    path.write_text(path.read_text() + '{"attempt": 1, "ti')
    assert read_timeline(folder) == whole


def test_shares_of_time_make_one() -> None:
    stretch = Stretch(1, 0.0, 10.0, 9.0, 3, 5, 2, 100, 50, {"weights": 3.0, "kv": 1.0}, {"disk>device": 10})
    shares = totals([stretch]).shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares == pytest.approx(
        {"computing": 0.5, "waiting for weights": 0.3, "waiting for kv": 0.1, "between passes": 0.1}
    )


def test_the_summary_says_what_guesses_brought(folder: Path) -> None:
    run(folder, Clock(), 3)
    assert "Guessed  18 tokens, 6 of them right: a row gained 2.00 tokens a pass" in totals_text(
        totals(read_timeline(folder))
    )
    assert "Guessed" not in totals_text(totals([Stretch(1, 0.0, 10.0, 9.0, 3, 5, 2, 100, 50)]))


def test_an_empty_run_divides_by_nothing(folder: Path) -> None:
    assert "0 tokens generated" in totals_text(totals(read_timeline(folder)))


def test_a_full_disk_costs_the_line_and_not_the_run(tmp_path: Path) -> None:
    run(tmp_path, Clock(), 20)  # there is no _state folder to write to
    assert read_timeline(tmp_path) == []
