"""Room on the three tiers for what the engine keeps besides weights: KV cache and waiting hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from flexbatch.memory.direct_io import AlignedBuffer
from flexbatch.memory.disk_file import DiskFile
from flexbatch.memory.pages import TouchingAhead, give_back, gives_back
from flexbatch.memory.tiers import DiskArena, HostArena, TierBudget
from flexbatch.plan.policy import Shares, Tier


class Storage:
    """Zeroed tensors on a tier, admitted by that tier's budget before they are made."""

    def __init__(self, device: torch.device, budgets: Mapping[Tier, TierBudget], disk_folder: Path) -> None:
        self.device, self.budgets = device, budgets
        self._host = HostArena(budgets[Tier.HOST], pinned=device.type == "cuda")
        self._ahead: TouchingAhead | None = None
        self._disk_folder, self._disk_arenas, self._disk_files = disk_folder, list[DiskArena](), list[DiskFile]()

    def zeros(self, tier: Tier, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if tier is Tier.HOST:
            return self._host.tensor(shape, dtype, what).zero_()
        self.budgets[tier].reserve(nbytes, what)
        if tier is Tier.DISK:
            arena = DiskArena(self._disk_folder, nbytes)
            self._disk_arenas.append(arena)
            return arena.tensor(shape, dtype)
        if self.device.type == "cpu":
            # Beside the heap: what lives long there keeps the room of what was freed before it from being used again.
            made = AlignedBuffer(nbytes).view(0, dtype, shape)
            if self._ahead is not None:
                self._ahead.touch(made)
            return made
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def touch_ahead(self, has_room: Callable[[int], bool]) -> None:
        """What is made in main memory from now on will be used soon, and all of it: it is there ahead of that, as long
        as `has_room` for so many bytes more."""
        self._ahead = TouchingAhead(has_room)

    def file(self, nbytes: int, what: str) -> DiskFile:
        """A file on the disk tier, admitted likewise."""
        self.budgets[Tier.DISK].reserve(nbytes, what)
        self._disk_files.append(DiskFile(self._disk_folder, nbytes))
        return self._disk_files[-1]

    @property
    def main_memory(self) -> Tier:
        """The tier that main memory is."""
        return Tier.DEVICE if self.device.type == "cpu" else Tier.HOST

    @property
    def gives_back(self) -> bool:
        """Whether memory on the device can be given back before its tensor goes."""
        return self.device.type == "cpu" and gives_back()

    def give_back(self, tensor: torch.Tensor, what: str) -> int:
        """The memory of a part of a tensor on the device, until `take_again`; returns its bytes."""
        if self._ahead is not None:
            self._ahead.stop()
        give_back(tensor)
        self.budgets[Tier.DEVICE].release(tensor.nbytes, what)
        return tensor.nbytes

    def release(self, tensors: Iterable[torch.Tensor], what: str) -> None:
        """These tensors on the device are used no more; their memory goes with their last views."""
        self.budgets[Tier.DEVICE].release(sum(tensor.nbytes for tensor in tensors), what)

    def take_again(self, tensor: torch.Tensor, what: str) -> None:
        """The part of a tensor is used again; it is zeros."""
        self.budgets[Tier.DEVICE].reserve(tensor.nbytes, what)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
        for arena in self._disk_arenas:
            arena.close()
        for file in self._disk_files:
            file.close()
        self._host.close()


class HiddenStateParking:
    """Where hidden states are while their micro-batch waits: the shares of each tensor's elements on each tier.

    A waiting tensor keeps its identity (the model's own frame holds it); only its memory is given back and returned.
    """

    def __init__(self, shares: Shares, storage: Storage) -> None:
        self._shares, self._storage = shares, storage
        self._buffers: dict[tuple[Tier, torch.dtype], list[torch.Tensor]] = {}

    def park(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Moves `tensor`'s memory to the tiers; calling the result brings it back, bit for bit."""
        memory = tensor.untyped_storage()
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(memory)
        count = flat.numel()
        on_device = round(count * self._shares.device)
        on_host = round(count * (self._shares.device + self._shares.host)) - on_device
        cuts = (
            (Tier.DEVICE, 0, on_device),
            (Tier.HOST, on_device, on_device + on_host),
            (Tier.DISK, on_device + on_host, count),
        )
        kept = [
            (tier, start, stop, self._borrow(tier, tensor.dtype, stop - start))
            for tier, start, stop in cuts
            if stop > start
        ]
        for _, start, stop, buffer in kept:
            buffer[: stop - start].copy_(flat[start:stop])
        nbytes = memory.nbytes()
        if memory.resizable():
            memory.resize_(0)
        elif gives_back():  # a kernel's result: pages of its own (kernels/result_memory.py)
            give_back(flat)

        def restore() -> None:
            if memory.resizable():
                memory.resize_(nbytes)
            for tier, start, stop, buffer in kept:
                flat[start:stop].copy_(buffer[: stop - start])
                self._buffers.setdefault((tier, tensor.dtype), []).append(buffer)

        return restore

    def _borrow(self, tier: Tier, dtype: torch.dtype, count: int) -> torch.Tensor:
        """A free buffer of at least `count` elements on the tier; made where none is free."""
        free = self._buffers.setdefault((tier, dtype), [])
        for index, buffer in enumerate(free):
            if buffer.numel() >= count:
                return free.pop(index)
        return self._storage.zeros(tier, (count,), dtype, "hidden states")
