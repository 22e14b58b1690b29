"""Packing weights for minutes is said, and can be stopped."""

from __future__ import annotations

from io import StringIO

import pytest

from flexbatch.errors import Interrupted
from flexbatch.report.packing_notice import PackingNotice

GIB = 1 << 30


def test_the_beginning_and_the_end_are_said_and_not_every_tensor() -> None:
    stream = StringIO()
    notice = PackingNotice(stream, lambda: None)
    for done in range(1, 101):
        notice(done * GIB, 100 * GIB)
    assert stream.getvalue().splitlines() == [
        "packing the weights, once: 1GiB of 100GiB",
        "packing the weights, once: 100GiB of 100GiB",
    ]


def test_a_stop_that_was_asked_for_ends_it() -> None:
    def check() -> None:
        raise Interrupted("Stopped.", remedy="")

    with pytest.raises(Interrupted):
        PackingNotice(StringIO(), check)(1, 2)
