"""Names of stored tensors: those that mean nothing any more, and a few of many for a message."""

from __future__ import annotations

import re
from collections.abc import Sequence

SHOWN = 5

# Causal masks, rotary tables and a version number that were once saved with the weights.
_LEFTOVERS = re.compile(
    r"(\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|rotary_emb\.inv_freq|\.causal_mask|\bembed_positions"
    r"|decoder\.version)$"
)


def is_leftover(name: str) -> bool:
    """Whether published checkpoints hold such a tensor though no model reads it."""
    return bool(_LEFTOVERS.search(name))


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
