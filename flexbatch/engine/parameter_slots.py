"""Where each weight belongs, what it is made from, and on which tier that lies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flexbatch.engine.checkpoint_map import ParameterSource, Place
from flexbatch.engine.model import SteppedModel, Stop
from flexbatch.plan.placement import place_weights
from flexbatch.plan.policy import Shares, Tier


@dataclass(frozen=True)
class Slot:
    """One parameter of a stop: where it belongs and what it is made from."""

    place: Place
    source: ParameterSource


def parameter_slots(
    stepped: SteppedModel, sources: Mapping[str, ParameterSource], device: torch.device
) -> dict[str | None, list[Slot]]:
    """Every parameter by the stop that owns it (None: the small modules between the stops)."""
    owners = stepped.stop_of_parameter()
    slots: dict[str | None, list[Slot]] = {}
    for name, value in stepped.model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        place = Place(stepped.model.get_submodule(path), leaf, value.dtype, device)
        slot = Slot(place, sources[name])
        slots.setdefault(owners[name], []).append(slot)
    return slots


def place_sources(stops: Sequence[Stop], slots: Mapping[str | None, Sequence[Slot]], shares: Shares) -> dict[str, Tier]:
    """A tier for each source by its name; a source that several stops share (tied weights) is placed once."""
    owned = [slot.source for stop in stops for slot in slots.get(stop.name, ())]
    sources, uses = {source.name: source for source in owned}, Counter(source.name for source in owned)
    sizes = [source.nbytes for source in sources.values()]
    tiers = place_weights(sizes, [uses[name] for name in sources], shares)
    return dict(zip(sources, tiers, strict=True))


def resident_bytes(slot: Slot) -> int:
    """Of the weight once it is on the device for good."""
    if slot.source.stays_packed:
        return slot.source.nbytes
    return sum(math.prod(entry.shape) for entry in slot.source.entries) * slot.place.dtype.itemsize
