"""Turns shares into tensors and slots, exactly: every byte is placed once, and a share is held to one tensor or finer.

Both walk their units in the order of use and keep a running account for each tier, so that what is resident is spread
evenly over the layers: a pass then waits for the disk a little everywhere and nowhere long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flexbatch.kernels.error_diffusion import diffuse
from flexbatch.plan.policy import Shares, Tier

TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK)

Numbers = npt.NDArray[np.integer[Any]]

READ_AHEAD = 64 << 20  # bytes: two reads of 8 MiB for each of four threads

NEARLY = 0.98
"""Of a weight that is used several times, what a share must hold to hold it: the plan may know the sizes of compressed
weights, which the share is of, only so well, and a stream with room for an embedding holds twice its bytes."""


def place_weights(sizes: Sequence[int], uses: Sequence[int], shares: Shares) -> list[Tier]:
    """A tier for each of `sizes` (bytes of tensors, in the order of use), of which some are used at several places of a
    pass (`uses`, a tied embedding)."""
    return [TIERS[number] for number in place_numbers(np.array(sizes), np.array(uses), shares).tolist()]


def place_numbers(sizes: Numbers, uses: Numbers, shares: Shares) -> Numbers:
    """The same as numbers of `TIERS`, from and to integers `[tensors]`.

    Every running total of a tier stays within one tensor of its share of the running total of all. But what is used
    several times comes first on the device while its share holds it (or nearly): there it spares most traffic, and the
    stream's buffers need not have room for it.
    """
    total, room, rest = sizes.sum(), shares.device * sizes.sum(), np.ones(len(sizes), bool)
    for index in np.flatnonzero(uses > 1):
        if NEARLY * sizes[index] <= room:
            rest[index] = False
            room -= sizes[index]
    placed, others = np.zeros(len(sizes), np.int8), sizes[rest].sum()
    if rest.all() or not others:
        return _dealt(sizes, shares) if others else placed
    placed[rest] = _dealt(sizes[rest], Shares(max(0.0, room) / others, shares.host * total / others))
    return placed


def _dealt(sizes: Numbers, shares: Shares) -> Numbers:
    wanted = np.array([shares.device, shares.host, shares.disk])
    allowed = np.flatnonzero(wanted > 1e-12)
    return allowed[diffuse(sizes, wanted[allowed])]  # type: ignore[no-any-return]


def kept_weights(sizes: Mapping[str, int], room: int, passes: int, lost: int) -> list[str]:
    """Which streamed tensors (bytes by name) go into `room` bytes that are free for the last `passes` passes.

    They are spread evenly: while what is there is used, the disk reads ahead of what is not, and no further than the
    stream's buffers go. The first of the passes still carries all, so that they can be copied on their way. None where
    they would spare no more than `lost` bytes: what the stream has read ahead, and reads again when it begins anew
    without them.
    """
    share = min(1.0, room / max(1, sum(sizes.values())))
    even = _dealt(np.array(list(sizes.values())), Shares(share, 0.0)) if sizes else ()
    spread = [name for name, tier in zip(sizes, even, strict=True) if TIERS[tier] is Tier.DEVICE]
    chosen, left = set[str](), room
    for name in (*spread, *sizes):  # what is left in the end takes whatever fits
        if name not in chosen and sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return [name for name in sizes if name in chosen] if (room - left) * (passes - 1) > lost else []


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
    return max(allowed, largest) if allowed else 2 * largest + min(largest, READ_AHEAD)


def _between(layer: int, slots: int, share: float) -> int:
    return _rounded((layer + 1) * slots * share) - _rounded(layer * slots * share)


def _rounded(value: float) -> int:
    return int(value + 0.5 + 1e-9)
