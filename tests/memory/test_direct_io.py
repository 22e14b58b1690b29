"""Both readers bring exactly the file's bytes to the promised place, and a failed read says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.errors import EngineError
from flexbatch.memory.direct_io import (
    PAGE,
    AlignedBuffer,
    BufferedReader,
    DirectReader,
    Reader,
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
