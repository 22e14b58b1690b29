"""The cache's memory is cut into as many slots as the rows at hand leave room for, and the plan foresees how many."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.config import OffloadConfig
from flexbatch.plan.enumeration import base_policy
from flexbatch.plan.rows_in_flight import most_rows, usual_rows
from flexbatch.plan.slot_layout import GAIN, MOST_TIMES, SlotLayout, SlotMemory, most_slots, next_layout, usual_slots
from flexbatch.plan.workload import Workload, span

LENGTHS = st.integers(1, 544)
MEMORY = st.builds(
    lambda slots, times: SlotMemory(SlotLayout(slots, 544), slots * times),
    st.integers(1, 60),
    st.integers(1, MOST_TIMES),
)


@given(MEMORY, LENGTHS)
def test_no_layout_takes_more_memory_than_was_planned_or_holds_fewer_rows(memory: SlotMemory, longest: int) -> None:
    made = memory.layout(longest)
    assert made.slots * made.columns <= memory.planned.slots * memory.planned.columns
    assert memory.planned.slots <= made.slots <= memory.most
    assert made.span == longest


@given(MEMORY, LENGTHS, st.lists(LENGTHS, max_size=80), st.lists(LENGTHS, max_size=80))
def test_rows_in_flight_have_room_in_the_next_layout_and_it_stays(
    memory: SlotMemory, now_for: int, in_flight: list[int], waiting: list[int]
) -> None:
    now = memory.layout(max([now_for, *in_flight]))
    in_flight = in_flight[: now.slots]
    made = next_layout(memory, now, in_flight=in_flight, waiting=waiting)
    assert len(in_flight) <= made.slots
    assert max(in_flight, default=0) <= made.span
    assert made == now or made.slots >= GAIN * now.slots or waiting[0] > now.span
    assert next_layout(memory, made, in_flight=in_flight, waiting=waiting) == made


@given(MEMORY, st.lists(LENGTHS, min_size=1, max_size=80))
def test_a_row_of_any_length_finds_room_once_no_other_is_in_flight(memory: SlotMemory, waiting: list[int]) -> None:
    for now_for in (1, 300, 544):
        assert next_layout(memory, memory.layout(now_for), in_flight=[], waiting=waiting).span >= waiting[0]


def test_rows_of_one_length_leave_the_slots_as_they_are() -> None:
    workload = Workload.uniform(500, 512, 32)
    assert usual_slots(workload, 14) == most_slots(workload, 14) == 14


@given(st.integers(2, 40), st.lists(st.integers(1, 512), min_size=1, max_size=30), st.integers(1, 40))
def test_the_plan_never_foresees_fewer_rows_than_slots_or_more_than_the_most(
    slots: int, lengths: list[int], times: int
) -> None:
    ordered = sorted(lengths, reverse=True) * times
    workload = Workload(max(slots, len(ordered)), tuple(ordered), (32,), 512, 32)
    assert slots <= usual_slots(workload, slots) <= most_slots(workload, slots) <= MOST_TIMES * slots


def test_the_rows_that_are_foreseen_are_those_of_a_run() -> None:
    """Windows of 256 rows of 20 to 512 tokens, the longest first: within a tenth of what the layouts let in."""
    lengths = sorted((20 + (index * 97) % 493 for index in range(256)), reverse=True) * 4
    workload = Workload(len(lengths), tuple(lengths), (32,), 512, 32)
    memory = SlotMemory(SlotLayout(12, span(workload)), MOST_TIMES * 12)
    waiting, flight, now, in_flight = deque(lengths), deque[tuple[int, int]](), memory.planned, list[int]()
    for number in range(100_000):
        while flight and flight[0][0] <= number:
            flight.popleft()
        line = [each + 32 for each in list(waiting)[: now.slots]]
        if not (line or flight):
            break
        now = next_layout(memory, now, in_flight=[need for _, need in flight], waiting=line)
        while waiting and waiting[0] + 32 <= now.span and len(flight) < now.slots:
            flight.append((number + 32, waiting.popleft() + 32))
        in_flight.append(len(flight))
    usual = sum(in_flight) / len(in_flight)
    assert 0.9 < usual_slots(workload, 12) / usual < 1.1


def test_slots_that_the_user_fixed_are_the_rows_in_flight_however_short_they_are() -> None:
    workload = Workload(4, (512, 20, 20, 20), (32,), 512, 32)
    for slots, most in ((2, 2), ("auto", 4)):
        policy = replace(base_policy(OffloadConfig(slots=slots)), slots=2)
        assert most_rows(workload, policy) == most
        assert usual_rows(workload, policy) <= most
