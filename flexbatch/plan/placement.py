"""Turns shares into tensors and slots, exactly: every byte is placed once, and a share is held to one tensor or finer.

Both functions walk their units in the order of use and keep a running account for each tier (error diffusion, as in
Bresenham's line), so that what is resident is spread evenly over the layers: a pass then waits for the disk a little
everywhere and nowhere long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexbatch.plan.policy import Shares, Tier

_TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK)

READ_AHEAD = 64 << 20  # bytes: two reads of 8 MiB for each of four threads


def place_bytes(sizes: Sequence[int], shares: Shares) -> list[Tier]:
    """A tier for each of `sizes` (bytes of tensors, in the order of use).

    Every running total of a tier stays within one tensor of its share of the running total of all.
    """
    wanted = {Tier.DEVICE: shares.device, Tier.HOST: shares.host, Tier.DISK: shares.disk}
    allowed = [tier for tier in _TIERS if wanted[tier] > 1e-12]
    held = dict.fromkeys(allowed, 0.0)
    total = 0.0
    placed = []
    for size in sizes:
        total += size
        # The tier that lacks most of its share takes the tensor; on a tie, the faster tier.
        tier = max(allowed, key=lambda tier: (wanted[tier] * total - held[tier], -_TIERS.index(tier)))
        held[tier] += size
        placed.append(tier)
    return placed


def place_weights(sizes: Sequence[int], uses: Sequence[int], shares: Shares) -> list[Tier]:
    """As `place_bytes`, for weights of which some are used at several places of a pass (`uses`, a tied embedding).

    Those come first on the device while its share holds them: there they spare most traffic, and the stream's buffers
    need not have room for them.
    """
    total, room, first = sum(sizes), shares.device * sum(sizes), set[int]()
    for index, size in enumerate(sizes):
        if uses[index] > 1 and size <= room * (1 + 1e-12):
            first.add(index)
            room -= size
    rest = [index for index in range(len(sizes)) if index not in first]
    others = sum(sizes[index] for index in rest)
    if not first or not others:
        return [Tier.DEVICE] * len(sizes) if not others else place_bytes(sizes, shares)
    tiers = place_bytes([sizes[index] for index in rest], Shares(max(0.0, room) / others, shares.host * total / others))
    placed = [Tier.DEVICE] * len(sizes)
    for index, tier in zip(rest, tiers, strict=True):
        placed[index] = tier
    return placed


def kept_weights(sizes: Mapping[str, int], room: int, passes: int, lost: int) -> list[str]:
    """Which streamed tensors (bytes by name) go into `room` bytes that are free for the last `passes` passes.

    The first of them still carries all, so that they can be copied on their way. None where they would spare no more
    than `lost` bytes: what the stream has read ahead, and reads again when it begins anew without them.
    """
    chosen, left = list[str](), room
    for name, size in sizes.items():
        if size <= left:
            chosen.append(name)
            left -= size
    return chosen if (room - left) * (passes - 1) > lost else []


def place_slots(num_layers: int, slots: int, shares: Shares) -> list[tuple[int, int]]:
    """For each layer, how many of its `slots` are on the device and how many on the host; the rest are on disk.

    A unit is one slot of one layer. Over all layers each tier holds its share of `num_layers * slots` units to half a
    unit, and neighbouring layers differ by at most one slot.
    """
    counts = []
    on_host = 0
    for layer in range(num_layers):
        device = _between(layer, slots, shares.device)
        wanted = _rounded((layer + 1) * slots * shares.host) - on_host
        host = min(max(0, wanted), slots - device)
        on_host += host
        counts.append((device, host))
    missing = _rounded(num_layers * slots * shares.host) - on_host  # the last layers may have had no room for them
    for layer, (device, host) in enumerate(counts):
        more = min(max(0, missing), slots - device - host)
        counts[layer], missing = (device, host + more), missing - more
    return counts


def stream_bytes(largest: int, allowed: int = 0) -> int:
    """Room for streamed weights whose largest unit has so many bytes: what is `allowed`, but one unit at the least.

    With nothing said: the unit in use, the next one, and some reads of the one after it, without which the disk stands
    still whenever the next unit is whole.
    """
    if not largest:
        return 0
    return max(allowed, largest) if allowed else 2 * largest + min(largest // 2, READ_AHEAD)


def _between(layer: int, slots: int, share: float) -> int:
    return _rounded((layer + 1) * slots * share) - _rounded(layer * slots * share)


def _rounded(value: float) -> int:
    return int(value + 0.5 + 1e-9)
