"""What needs memory: named uses of a tier, and their sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flexbatch.plan.policy import Tier

_THERE_BEFORE = {"process", "small weights", "resident weights", "weight stream", "weights"}
_GIVEN_BACK = {"activations", "logits"}


@dataclass(frozen=True, slots=True)
class Need:
    """One named use of a tier, in bytes."""

    what: str
    tier: Tier
    nbytes: int


def peak_bytes(items: Iterable[Need]) -> dict[Tier, int]:
    totals = dict.fromkeys(Tier, 0)
    for item in items:
        totals[item.tier] += item.nbytes
    return totals


def kv_bytes(items: Iterable[Need]) -> int:
    """Bytes of the KV cache on all tiers."""
    return sum(item.nbytes for item in items if item.what == "KV cache")


def working_bytes(items: Iterable[Need]) -> int:
    """Bytes of the device that calls take and give back while a pass walks through the layers."""
    return sum(item.nbytes for item in items if item.tier is Tier.DEVICE and item.what in _GIVEN_BACK)


def first_used_bytes(items: Iterable[Need]) -> int:
    """Bytes of main memory that are used for the first time while the job runs: all but the process and its weights."""
    return sum(item.nbytes for item in items if item.tier is not Tier.DISK and item.what not in _THERE_BEFORE)
