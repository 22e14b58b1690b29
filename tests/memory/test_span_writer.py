"""Spans of any place and length arrive whole, past the page cache or through it."""

from __future__ import annotations

import errno
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.memory import span_writer
from flexbatch.memory.span_writer import SpanWriter

SIZE = 1 << 17


def empty_file(folder: Path) -> Path:
    file = folder / "file"
    file.write_bytes(bytes(SIZE))
    return file


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, SIZE), max_size=12),
    step=st.sampled_from([4096, 12288, 8 << 20]),
    order=st.randoms(use_true_random=False),
)
def test_spans_side_by_side_make_the_file_that_they_were_cut_from(cuts: list[int], step: int, order: object) -> None:
    content = os.urandom(SIZE)
    bounds = sorted({0, SIZE, *cuts})
    spans = list(pairwise(bounds))
    order.shuffle(spans)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(span_writer, "STEP_BYTES", step)
        file = empty_file(Path(folder))
        writer = SpanWriter(file)
        for begin, end in spans:
            writer.write(memoryview(content)[begin:end], begin)
        writer.sync()
        writer.close()
        assert file.read_bytes() == content


def test_a_filesystem_that_refuses_direct_writes_gets_them_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwrite, list[int]()
    file, content = empty_file(tmp_path), os.urandom(SIZE)
    writer = SpanWriter(file)
    direct = writer._direct

    def refusing(descriptor: int, raw: memoryview, offset: int) -> int:
        if descriptor == direct:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, raw, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    writer.write(memoryview(content)[:-5], 5)
    writer.write(memoryview(content)[-5:], 0)
    writer.close()
    assert file.read_bytes() == content[-5:] + content[:-5]
    assert refused == ([] if direct is None else [4096])  # asked for once


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SpanWriter(empty_file(tmp_path))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input/output error"):
        writer.write(memoryview(bytes(SIZE)), 0)
    writer.close()
