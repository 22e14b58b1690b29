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


def test_a_tied_weight_is_held_by_a_share_that_was_measured_on_a_few_bytes_more() -> None:
    """The plan's share for it alone, of a copy whose compressed bytes are a thousandth fewer than it knew."""
    layers, embedding = [98_000_000] * 90, 412_000_000
    share = Shares(embedding / (embedding + 1.001 * sum(layers)), 0)
    tiers = place_weights([embedding, *layers], [2, *[1] * 90], share)
    assert tiers == [Tier.DEVICE, *[Tier.DISK] * 90]


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


@given(layers=st.integers(10, 60), share=st.floats(0.05, 0.95))
def test_kept_weights_are_spread_so_that_the_disk_never_stands_still_for_long(layers: int, share: float) -> None:
    sizes = {f"{layer} {part}": size for layer in range(layers) for part, size in enumerate((24, 24, 24, 24, 96, 96))}
    kept = set(kept_weights(sizes, int(share * sum(sizes.values())), 10, 0))
    seen = held = 0
    for name, size in sizes.items():
        seen, held = seen + size, held + (size if name in kept else 0)
        assert abs(held - share * seen) <= 2 * 96


@given(largest=st.integers(0, 1 << 32), allowed=st.integers(0, 1 << 32))
def test_the_stream_has_room_for_two_units_and_some_reads_unless_its_room_is_given(largest: int, allowed: int) -> None:
    assert stream_bytes(largest, allowed) >= largest
    if allowed:
        assert stream_bytes(largest, allowed) in {0, largest, allowed}
    else:
        assert 2 * largest <= stream_bytes(largest) <= min(3 * largest, 2 * largest + READ_AHEAD)
    assert (stream_bytes(largest, allowed) == 0) == (largest == 0)
