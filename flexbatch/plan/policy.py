"""A policy: what lives where, how many rows are in flight, in how many bits (FlexGen, arXiv 2303.06865, 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flexbatch.errors import ConfigError
from flexbatch.plan.admission import SHORTEST_PART


class Tier(StrEnum):
    """Where a tensor lives: where the maths runs, in main memory, or in a file."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Shares:
    """Fractions of some bytes on each tier; they sum to 1."""

    device: float
    host: float

    @property
    def disk(self) -> float:
        return max(0.0, 1.0 - self.device - self.host)

    @staticmethod
    def from_percent(device: float, host: float, *, what: str) -> Shares:
        if device < 0 or host < 0 or device + host > 100 + 1e-9:
            raise ConfigError(
                f"offload.percent: {what} on device and host are {device:g} and {host:g}; "
                f"each must be at least 0 and their sum at most 100.",
                remedy="Give six numbers: weights, KV, hidden states, each on device, then on host.",
            )
        return Shares(device / 100, host / 100)


ALL_DEVICE = Shares(1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a job is run. Nothing in it changes a row's result in float32 except `weight_bits`, `kv_bits` and `compute`.

    `slots` rows are in flight; about `prefill_tokens` prompt tokens join per pass (see `admission.Admission`);
    `prefetch_bytes` bounds the weights that are on their way or wait on the device (0: see `placement.stream_bytes`).
    With `compressed` the layers' matrices, with `compressed_cache` the KV cache of 16 bits, are kept and moved in fewer
    bytes, without loss. With `more_if_short` there
    may be more rows in flight where rows are shorter than the job's longest and all the cache is in one memory. With
    `guesses` rows may gain several tokens in a pass that waits for weights. With `whole_prompts` none enters in parts:
    one that does not fit waits until enough passes have left something.
    """

    weights: Shares = ALL_DEVICE
    kv: Shares = ALL_DEVICE
    hidden: Shares = ALL_DEVICE
    slots: int = 8
    prefill_tokens: int = 2048
    weight_bits: int = 16
    kv_bits: int = 16
    compute: str = "auto"
    prefix_sharing: bool = True
    host_attention: bool = False
    prefetch_bytes: int = 0
    compressed: bool = False
    compressed_cache: bool = False
    more_if_short: bool = False
    guesses: bool = False
    whole_prompts: bool = False

    @property
    def shortest_part(self) -> int:
        """Tokens of the shortest part in which a prompt may enter; 0 where each pass takes one at least, because no
        weights are streamed that the arithmetic of a pass should be balanced with."""
        return SHORTEST_PART if self.weights.device < 1.0 - 1e-9 else 0

    @staticmethod
    def percent_shares(percent: list[float]) -> tuple[Shares, Shares, Shares]:
        """The three shares from FlexGen's six percentages."""
        if len(percent) != 6:
            raise ConfigError(
                f"offload.percent has {len(percent)} numbers ({percent}); it needs 6.",
                remedy="Write offload.percent=[weights on device, on host, KV on device, on host, hidden ..., ...].",
            )
        names = ("weights", "KV cache", "hidden states")
        weights, kv, hidden = (
            Shares.from_percent(percent[2 * i], percent[2 * i + 1], what=name) for i, name in enumerate(names)
        )
        return weights, kv, hidden
