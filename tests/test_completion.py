"""Tab completion, at the interface that bash uses."""

from __future__ import annotations

import pytest

from flexbatch.completion import complete


def offered(line: str) -> list[str]:
    return complete({"COMP_LINE": line, "COMP_POINT": str(len(line))}, ["run", "plan", "report"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flexbatch pl", ["plan"]),
        ("flexbatch r", ["run", "report"]),
        ("flexbatch plan mod", ["model=", "model."]),
        ("flexbatch plan model=opt-13", ["opt-13b"]),
        ("flexbatch prompt.trunc", ["prompt.truncation="]),
        ("flexbatch prompt.truncation=", ["left", "right", "error"]),
        ("flexbatch offload.prefix_sharing=f", ["false"]),
        ("flexbatch offload=all-d", ["all-device", "all-disk"]),
        ("flexbatch dataset.path=x", []),
        ("flexbatch nothing.like=", []),
    ],
)
def test_completion_offers_what_can_follow(line: str, expected: list[str]) -> None:
    assert offered(line) == expected
