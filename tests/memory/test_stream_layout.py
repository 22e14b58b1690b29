"""Units lie in the ring without straddling its end, and none spans more than the ring."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.memory.direct_io import PAGE
from flexbatch.memory.safetensors_header import TensorEntry
from flexbatch.memory.stream_layout import (
    FileSpan,
    Region,
    StreamTensor,
    StreamUnit,
    item_phase,
    page_phase,
    placements,
    unit_regions,
)

unit_sizes = st.lists(st.lists(st.integers(0, 9).map(lambda pages: pages * PAGE), max_size=5), min_size=1, max_size=6)


@given(unit_sizes, st.integers(0, 20))
def test_a_unit_always_fits_once_everything_before_it_is_given_back(sizes: list[list[int]], spare: int) -> None:
    units = [tuple(Region(nbytes, (), ()) for nbytes in unit) for unit in sizes]
    ring = max(PAGE, *(sum(unit) for unit in sizes)) + spare * PAGE
    end = 0
    for turn, placed in enumerate(itertools.islice(placements(units, ring), 40)):
        assert placed.index == turn % len(units)
        assert placed.end - placed.start <= ring
        for region, position in zip(placed.regions, placed.positions, strict=True):
            assert position >= end
            assert position % PAGE == 0
            assert position % ring + region.nbytes <= ring
            end = position + region.nbytes
        assert placed.start >= 0
        assert placed.end >= end


def entry(name: str, offset: int, nbytes: int) -> StreamTensor:
    return StreamTensor(name, TensorEntry(name, Path("model"), offset, nbytes, "U8", (nbytes,)))


def test_neighbours_of_a_file_share_a_read_and_large_reads_are_cut_at_pages() -> None:
    large, small = 5 * PAGE, 100
    unit = StreamUnit("layer", (entry("b", 40 + small, large), entry("a", 40, small), entry("far", 10_000_000, small)))
    near, far = unit_regions(unit, chunk_bytes=2 * PAGE, phase=page_phase)
    assert [view.name for view in near.views] == ["a", "b"]
    assert [view.name for view in far.views] == ["far"]
    spans = [job for job in near.jobs if isinstance(job, FileSpan)]
    assert sum(span.nbytes for span in spans) == small + large
    assert all(span.nbytes <= 2 * PAGE for span in spans)
    assert all(span.offset % PAGE == 0 for span in spans[1:])
    assert all(span.at % PAGE == span.offset % PAGE for span in spans)


@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(["U8", "F16", "F32", "F64"]), st.integers(0, 900))))
def test_every_view_is_aligned_for_its_type_wherever_it_lies_in_the_file(
    layout: list[tuple[int, str, int]],
) -> None:
    """Files of other writers may place a tensor at any byte."""
    offset, tensors = 0, []
    for number, (gap, dtype, count) in enumerate(layout):
        offset += gap
        itemsize = {"U8": 1, "F16": 2, "F32": 4, "F64": 8}[dtype]
        source = TensorEntry(str(number), Path("model"), offset, count * itemsize, dtype, (count,))
        tensors.append(StreamTensor(str(number), source))
        offset += count * itemsize
    for phase in (page_phase, item_phase):
        regions = unit_regions(StreamUnit("layer", tuple(tensors)), 2 * PAGE, phase)
        views = [(region, view) for region in regions for view in region.views]
        assert sorted(view.name for _, view in views) == sorted(tensor.name for tensor in tensors)
        for region, view in views:
            assert view.at % view.dtype.itemsize == 0
            assert view.at + view.dtype.itemsize * view.shape[0] <= region.nbytes
