"""Rooms for what a KV cache on disk brings."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.engine.kv_reading_rooms import ReadingRooms
from flexbatch.memory.direct_io import AlignedBuffer

SIZE = 8


def rooms_of(count: int) -> ReadingRooms:
    return ReadingRooms(AlignedBuffer(count * SIZE), SIZE, count)


@given(count=st.integers(1, 9), steps=st.lists(st.booleans(), max_size=40))
def test_what_is_taken_and_given_back_in_turn_lies_beside_each_other_but_where_the_memory_ends(
    count: int, steps: list[bool]
) -> None:
    rooms, taken, last = rooms_of(count), deque[int](), -1
    held = {}
    for takes in steps:
        if takes and len(rooms):
            room = rooms.take()
            assert room.number not in taken
            assert room.number == (last + 1) % count or not taken
            taken.append(room.number)
            held[room.number], last = room, room.number
        elif taken:
            rooms.give_back(held.pop(taken.popleft()))
            assert len(rooms) == count - len(taken)


def test_rooms_beside_each_other_are_seen_as_one_memory() -> None:
    rooms = rooms_of(3)
    taken = [rooms.take() for _ in range(3)]
    for room in taken:
        room.tensor[:] = room.number
    assert rooms.together(taken[1:]).tolist() == [1] * SIZE + [2] * SIZE
    assert bytes(taken[2].bytes) == bytes([2] * SIZE)


def test_a_room_that_is_not_needed_after_all_is_the_next_one() -> None:
    rooms = rooms_of(4)
    first, second = rooms.take(), rooms.take()
    rooms.give_back(second)
    assert [first.number, rooms.take().number] == [0, 1]


def test_others_are_filled_while_some_are_seen_as_one() -> None:
    assert [rooms_of(count).at_most_together for count in (1, 2, 3, 9)] == [1, 1, 1, 4]
