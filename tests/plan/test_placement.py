"""Weights and KV slots on the tiers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.plan.placement import READ_AHEAD, kept_weights, place_weights, stream_bytes
from flexbatch.plan.policy import Shares, Tier


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=60), data=st.data())
def test_tied_weights_come_first_on_the_device_and_shares_still_hold(sizes: list[int], data: st.DataObject) -> None:
    uses = data.draw(st.lists(st.integers(1, 2), min_size=len(sizes), max_size=len(sizes)))
    device = data.draw(st.floats(0, 1))
    shares = Shares(device, data.draw(st.floats(0, 1 - device)))
    tiers = place_weights(sizes, uses, shares)
    total, largest = sum(sizes), max(sizes)
    for tier, share in ((Tier.DEVICE, shares.device), (Tier.HOST, shares.host), (Tier.DISK, shares.disk)):
        held = sum(size for size, where in zip(sizes, tiers, strict=True) if where is tier)
        assert abs(held - share * total) <= largest + 1e-6
    tied = [size for size, count in zip(sizes, uses, strict=True) if count > 1]
    if sum(tied) <= device * total:
        assert all(where is Tier.DEVICE for where, count in zip(tiers, uses, strict=True) if count > 1)


@given(
    st.dictionaries(st.text(min_size=1), st.integers(1, 1000), max_size=30),
    st.integers(0, 5000),
    st.integers(1, 40),
    st.integers(0, 20_000),
)
def test_kept_weights_fit_and_spare_more_than_beginning_anew_costs(
    sizes: dict[str, int], room: int, passes: int, lost: int
) -> None:
    kept = kept_weights(sizes, room, passes, lost)
    nbytes = sum(sizes[name] for name in kept)
    assert nbytes <= room
    assert not kept or nbytes * (passes - 1) > lost
    if kept:
        assert all(size > room - nbytes for name, size in sizes.items() if name not in kept)


@given(largest=st.integers(0, 1 << 32), allowed=st.integers(0, 1 << 32))
def test_the_stream_has_room_for_two_units_and_some_reads_unless_its_room_is_given(largest: int, allowed: int) -> None:
    assert stream_bytes(largest, allowed) >= largest
    if allowed:
        assert stream_bytes(largest, allowed) in {0, largest, allowed}
    else:
        assert 2 * largest <= stream_bytes(largest) <= min(3 * largest, 2 * largest + READ_AHEAD)
    assert (stream_bytes(largest, allowed) == 0) == (largest == 0)
