"""What streaming takes from products is measured on the stream itself."""

from __future__ import annotations

import os
from pathlib import Path

from flexbatch.engine.stream_measurement import streaming_cost


def test_a_byte_costs_time_but_no_more_than_its_share_of_a_second(tmp_path: Path) -> None:
    file = tmp_path / "block"
    file.write_bytes(os.urandom(128 << 20))
    assert 0.0 <= streaming_cost(file, 2) < 1e-7


def test_a_file_with_less_than_a_layer_in_it_tells_nothing(tmp_path: Path) -> None:
    file = tmp_path / "block"
    file.write_bytes(b"0" * 4096)
    assert streaming_cost(file, 2) == 0.0
