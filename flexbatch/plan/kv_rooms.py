"""Rooms in memory through which a KV cache that is elsewhere comes: the engine makes them, the plan counts them."""

from __future__ import annotations

import math

# Of a cache on disk: the newest columns, which wait in memory until they are written together; slots of a layer that
# wait to be written; columns that a slot's are a multiple of; and a slot's parts at most, which begin on pages (plain;
# packed or compressed).
TAIL_COLUMNS = 32
OUTGOING_BLOCKS = 3
BLOCK_STEP = 64
PARTS, PACKED_PARTS = 2, 6
PAGE = 4096

# Slots of such a cache are read into rooms of about this size, ahead of their use by no more than this.
ROOM_BYTES, AHEAD_BYTES = 16 << 20, 1 << 30

# Slots that attention cannot read where or as they are come to it, or are expanded, so many bytes at a time.
BROUGHT_BYTES = 128 << 20


def written_anew(new_tokens: float) -> float:
    """Of the rows on disk that decode, and get so many tokens in all, the share that is written once more in a pass:
    where what waits in memory is full."""
    decoded = max(1, math.ceil(new_tokens) - 1)
    return decoded // TAIL_COLUMNS / decoded


def block_columns(tokens: int, most: int) -> int:
    """Columns with which a slot of so many tokens is written: it is read with those that come before it is written
    again. Rows of like length get the same number, and are read together; none gets more than `most`."""
    return min(most, -(-(tokens + TAIL_COLUMNS) // BLOCK_STEP) * BLOCK_STEP)


def reading_rooms(slots: int, block: int) -> tuple[int, int]:
    """How many of a layer's `slots`, of `block` bytes each, are read into one room, and how many rooms there are: for
    all of a layer and one that is in use, or as many as may be read ahead."""
    at_once = max(1, min(slots, ROOM_BYTES // block))
    return at_once, min(math.ceil(slots / at_once), max(1, AHEAD_BYTES // (at_once * block))) + 1


def reading_bytes(slots: int, block: int) -> int:
    """No less than those rooms take for slots of up to `block` bytes: how many fit into a room goes by steps."""
    return min(slots * block, AHEAD_BYTES) + 2 * max(block, min(slots * block, ROOM_BYTES))


def brought_at_once(nbytes: int) -> int:
    """How many slots of a layer, of `nbytes` each, are brought to attention, or expanded for it, at a time."""
    return max(1, BROUGHT_BYTES // max(1, nbytes))
