"""The job's order and its parts: fixed by the input alone."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.data.batcher import Placed, job_order, split_parts
from flexbatch.data.parts import PartAssembler
from flexbatch.records import Completion, Part, Prompt, Row

lengths = st.lists(st.integers(0, 9), max_size=60)
sizes = st.integers(1, 20)


def prompts(lengths: Sequence[int]) -> list[Prompt]:
    return [Prompt(Row(str(number), "s", number, {}), (1,) * length) for number, length in enumerate(lengths)]


@given(lengths, sizes)
def test_the_order_holds_every_prompt_once_and_sorts_only_inside_windows(lengths: list[int], window: int) -> None:
    given_prompts = prompts(lengths)
    order = list(job_order(given_prompts, window))
    for start in range(0, len(order), window):
        block = order[start : start + window]
        assert {prompt.row.row for prompt in block} == set(range(start, start + len(block)))
        keys = [(-len(prompt.token_ids), prompt.row.row) for prompt in block]
        assert keys == sorted(keys)  # the longest first, equals in input order


@given(lengths, sizes)
def test_the_order_is_the_same_each_time_and_reads_no_further_than_its_window(lengths: list[int], window: int) -> None:
    assert list(job_order(prompts(lengths), window)) == list(job_order(prompts(lengths), window))
    source = iter(prompts(lengths))
    next(job_order(source, window), None)
    assert len(list(source)) == max(0, len(lengths) - window)


@given(lengths, sizes)
def test_parts_are_runs_of_the_order_and_only_the_last_is_short(lengths: list[int], part_rows: int) -> None:
    placed = list(split_parts(prompts(lengths), part_rows))
    assert [place.index for place in placed] == list(range(len(lengths)))
    assert all(place.index == place.part * part_rows + place.offset for place in placed)
    assert all(0 <= place.offset < part_rows for place in placed)


@given(st.data(), lengths, sizes)
def test_parts_fill_in_any_order_of_completion(data: st.DataObject, lengths: list[int], part_rows: int) -> None:
    """Each prompt is in one part, beside its own completion, and a part comes as soon as its last row is done."""
    placed = list(split_parts(prompts(lengths), part_rows))
    assembler = PartAssembler(part_rows)
    events: list[Placed | int] = []
    waiting = list(placed)
    in_flight: list[int] = []
    while waiting or in_flight:
        if waiting and (not in_flight or data.draw(st.booleans())):
            events.append(waiting[0])
            in_flight.append(waiting.pop(0).index)
        else:
            events.append(in_flight.pop(data.draw(st.integers(0, len(in_flight) - 1))))
    parts: list[Part] = []
    for event in events:
        if isinstance(event, Placed):
            assembler.expect(event)
        elif (part := assembler.complete(Completion(event, (event,), str(event), "stop"))) is not None:
            parts.append(part)
    assert all(len(part.rows) == part_rows for part in parts)
    parts += assembler.close()
    assert assembler.open_parts == ()
    parts.sort(key=lambda part: part.number)
    assert [part.first for part in parts] == [number * part_rows for number in range(len(parts))]
    rows = [row for part in parts for row in part.rows]
    assert [prompt for prompt, _ in rows] == [place.prompt for place in placed]
    assert [completion.index for _, completion in rows] == list(range(len(placed)))


def test_a_last_part_that_is_complete_before_the_end_is_known_comes_at_the_end() -> None:
    assembler = PartAssembler(4)
    for place in split_parts(prompts([1, 1]), 4):
        assembler.expect(place)
        assert assembler.complete(Completion(place.index, (), "", "stop")) is None
    (part,) = assembler.close()
    assert len(part.rows) == 2


def test_a_last_part_that_is_completed_after_the_end_is_known_comes_with_its_last_row() -> None:
    assembler = PartAssembler(4)
    for place in split_parts(prompts([1, 1]), 4):
        assembler.expect(place)
    assert list(assembler.close()) == []
    assert assembler.complete(Completion(1, (), "", "stop")) is None
    part = assembler.complete(Completion(0, (), "", "stop"))
    assert part is not None
    assert [completion.index for _, completion in part.rows] == [0, 1]


def test_a_completion_that_nobody_waits_for_is_an_error() -> None:
    assembler = PartAssembler(4)
    assembler.expect(next(split_parts(prompts([1]), 4)))
    assembler.complete(Completion(0, (), "", "stop"))
    for index in (0, 1):
        with pytest.raises(KeyError):
            assembler.complete(Completion(index, (), "", "stop"))
