"""Both readers bring exactly the file's bytes to the promised place, and a failed read says where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.errors import ConfigError, EngineError
from flexbatch.memory.direct_io import (
    PAGE,
    AlignedBuffer,
    BufferedReader,
    DirectReader,
    Reader,
    ReadMeasurement,
    cheapest,
    choose_reader,
    fastest_rounds,
)

SIZE = 5 * PAGE + 123
CONTENT = (
    torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("direct") / "weights"
    file.write_bytes(CONTENT)
    return file


def readers() -> list[DirectReader | BufferedReader]:
    return [DirectReader(), BufferedReader()]


@pytest.mark.parametrize("reader", readers(), ids=lambda reader: reader.kind)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_span_arrives_at_its_place_in_the_page(file: Path, reader: Reader, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, SIZE))
    nbytes = data.draw(st.integers(0, SIZE - offset))
    page = data.draw(st.integers(0, 2)) * PAGE
    buffer = AlignedBuffer(10 * PAGE)
    start = reader.read(file, offset, nbytes, buffer, page)
    assert start == page + offset % PAGE
    assert buffer.tensor[start : start + nbytes].numpy().tobytes() == CONTENT[offset : offset + nbytes]


def test_a_filesystem_without_direct_reads_is_read_all_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tmpfs did for years: opening works or not, but reading with O_DIRECT gives EINVAL."""
    reader, real = DirectReader(), __import__("os").preadv
    direct_descriptors = {reader._files.descriptor(file)}

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct_descriptors:
            raise OSError(22, "Invalid argument")
        return int(real(descriptor, buffers, offset))

    monkeypatch.setattr("os.preadv", refuse)
    buffer = AlignedBuffer(SIZE)
    start = reader.read(file, 100, 5000, buffer, 0)
    assert buffer.tensor[start : start + 5000].numpy().tobytes() == CONTENT[100:5100]
    assert reader.refused == {file}


@pytest.mark.parametrize("reader", readers(), ids=lambda reader: reader.kind)
def test_a_file_that_ends_too_early_is_an_error_with_file_and_offset(file: Path, reader: Reader) -> None:
    with pytest.raises(EngineError, match=rf"{SIZE}.*{file.name}.*ends before"):
        reader.read(file, PAGE, SIZE, AlignedBuffer(10 * PAGE), 0)


@pytest.mark.parametrize("reader", readers(), ids=lambda reader: reader.kind)
def test_a_file_that_is_gone_is_an_error_that_names_it(tmp_path: Path, reader: Reader) -> None:
    with pytest.raises(EngineError, match=r"gone.*No such file"):
        reader.read(tmp_path / "gone", 0, 10, AlignedBuffer(PAGE), 0)


def test_buffer_views_share_the_buffers_memory() -> None:
    buffer = AlignedBuffer(100)
    assert buffer.nbytes == PAGE
    assert buffer.tensor.data_ptr() % PAGE == 0
    view = buffer.view(64, torch.float32, (2, 3))
    view.fill_(1.0)
    assert view.shape == (2, 3)
    assert buffer.tensor[64:88].view(torch.float32).eq(1).all()


def test_the_reader_is_the_one_asked_for_or_measured(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(64 << 20)
    assert choose_reader([large], "direct").kind == "direct"
    assert choose_reader([large], "buffered").kind == "buffered"
    measured = choose_reader([large], "auto", threads=2)
    assert {measurement.kind for measurement in measured.measurements} == {"direct", "buffered"}
    assert all(measurement.bytes_read and measurement.bytes_per_second for measurement in measured.measurements)
    with pytest.raises(ConfigError, match=r"offload\.reader"):
        choose_reader([large], "fast")


def measured(kind: str, gigabytes: float, nanoseconds: float) -> ReadMeasurement:
    return ReadMeasurement(kind, gigabytes * 1e9, nanoseconds * 1e-9, 1)


def test_a_pause_of_the_disk_in_one_round_does_not_decide_how_weights_are_read() -> None:
    rounds = [
        measured("direct", 0.4, 0.01),
        measured("buffered", 1.3, 0.35),
        measured("direct", 2.4, 0.01),
        measured("buffered", 1.2, 0.35),
    ]
    assert [each.bytes_per_second for each in fastest_rounds(rounds)] == [2.4e9, 1.3e9]
    assert cheapest(fastest_rounds(rounds)).kind == "direct"


def test_a_reader_must_bring_more_than_the_processor_time_that_it_takes() -> None:
    ways = measured("direct", 1.2, 0.01), measured("buffered", 1.3, 0.2 * (os.cpu_count() or 1))
    assert cheapest(ways).kind == "direct"
    ways = measured("direct", 0.3, 0.01), measured("buffered", 1.3, 0.2 * (os.cpu_count() or 1))
    assert cheapest(ways).kind == "buffered"


def test_files_too_small_to_measure_are_not_measured(file: Path) -> None:
    assert choose_reader([file]).measurements == ()
