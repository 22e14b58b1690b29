"""The figures of this machine: measured once, in a minute or two, and kept for the next run.

Rates are kept in a file named by processor, accelerator, memory, threads and library versions; free memory and disk
space are looked up anew each time, and so is how fast a CPU is at present.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from flexbatch.engine.measurement import core_count, measure_rates
from flexbatch.engine.present_speed import at_speed, present_speed
from flexbatch.errors import CapacityError, ConfigError
from flexbatch.kernels import CODE_FOLDER
from flexbatch.memory.heap import give_back_freed
from flexbatch.memory.library_pages import release_library_pages
from flexbatch.memory.main_memory import available_memory, memory_limit
from flexbatch.memory.own_process import WorkFailed, in_own_process
from flexbatch.plan.hardware import HardwareProfile, profile_from_mapping
from flexbatch.plan.limits import gibibytes

logger = logging.getLogger(__name__)

# Raise it when a measurement changes meaning: older files are then measured again, as with other kernels.
MEASUREMENT_VERSION = 30

# Part of the whole memory that a run leaves to the machine's other programs.
LEFT_TO_OTHERS = 0.05

# Memory that the process takes beyond what it has when the plan is made: 55 MiB of libraries that it needs after all
# and of the system's own, some 80 of modules, tokens, threads and compiled products, and what the heap keeps. With 48
# less the kernel once ended a run under 1.25 GiB, because it counts its own tables too. Compiling kernels would take
# 120 more: another process does it (`compiling`).
PROCESS_GROWTH = 208 << 20


def measure_hardware(
    device: torch.device, disk_folder: Path, cache_folder: Path, *, refresh: bool = False
) -> HardwareProfile:
    """This machine's profile. Rates come from `cache_folder` where they were measured before, unless `refresh`.

    `disk_folder` (made if need be) is where reads and writes are measured. Raises `ConfigError` for a device that this
    machine or this build of torch does not have.
    """
    check_device(device)
    disk_folder.mkdir(parents=True, exist_ok=True)
    identity = machine_identity(device, disk_folder)
    file = cache_folder.expanduser() / f"hardware-{_digest(identity)}.json"
    rates = None if refresh else _kept(file, identity)
    if rates is None:
        started = time.perf_counter()
        logger.info("Measuring this machine once (a minute or two)")
        rates = _measured(device, disk_folder)
        logger.info("Measured in %.0f s; kept in %s", time.perf_counter() - started, file)
        _keep(file, identity, rates)
        return _profile(rates, device, disk_folder, file)
    kept = _profile(rates, device, disk_folder, file)
    return at_speed(kept, present_speed(kept)) if device.type == "cpu" else kept


def familiar_hardware(
    device: torch.device, disk_folder: Path, cache_folder: Path, typical: dict[str, Any]
) -> HardwareProfile:
    """As `measure_hardware`, but in no time: where nothing was measured before, the rates are the `typical` ones."""
    check_device(device)
    disk_folder.mkdir(parents=True, exist_ok=True)
    identity = machine_identity(device, disk_folder)
    rates = _kept(cache_folder.expanduser() / f"hardware-{_digest(identity)}.json", identity) or typical
    return _profile(rates, device, disk_folder, "this machine")


def in_this_process(profile: HardwareProfile) -> HardwareProfile:
    """A described machine for a run here: where the process is in the memory that limits count, with what this one has.

    A description cannot know how many libraries a job loads, and the limit holds for all of them.
    """
    if profile.has_accelerator:
        return profile
    return replace(profile, process_bytes=max(profile.process_bytes, _held_bytes() + PROCESS_GROWTH))


def _measured(device: torch.device, disk_folder: Path) -> dict[str, Any]:
    """The rates, from a process that holds what measuring takes, and compiles its kernels: a run has the room then."""
    try:
        return in_own_process(_measured_with, torch.get_num_threads(), device, disk_folder)
    except WorkFailed as failure:
        if failure.was_killed:
            raise CapacityError(
                "The process that measures this machine was ended by the system: for a moment it takes over a GiB.",
                remedy="Raise the limit that it runs under for this first run, or describe the machine with hardware=.",
            ) from failure
        logger.warning("Measuring once more, in this process: %s", failure)
        return measure_rates(device, disk_folder)


def _measured_with(threads: int, device: torch.device, disk_folder: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return measure_rates(device, disk_folder)


def check_device(device: torch.device) -> None:
    there: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if device.type not in there or not there[device.type]():
        raise ConfigError(
            f"offload.device is {device}, which this machine or this build of torch does not have.",
            remedy="Set offload.device=cpu, or install a torch build for the accelerator.",
        )


def machine_identity(device: torch.device, disk_folder: Path) -> dict[str, Any]:
    """What the rates depend on."""
    return {
        "version": MEASUREMENT_VERSION,
        "kernels": CODE_FOLDER.name,
        "processor": _processor(),
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "disk": os.stat(disk_folder).st_dev,  # noqa: PTH116 - of the folder itself
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _profile(rates: dict[str, Any], device: torch.device, disk_folder: Path, where: object) -> HardwareProfile:
    return profile_from_mapping({**rates, **_room(device, disk_folder)}, where=str(where))


def _room(device: torch.device, disk_folder: Path) -> dict[str, int]:
    """What is free now. On a CPU the device's memory counts what this process already holds, as limits do."""
    free = available_memory()
    disk = shutil.disk_usage(disk_folder).free
    if device.type == "cuda":
        on_device, _ = torch.cuda.mem_get_info(device)
        return {"device_memory": on_device, "host_memory": free, "disk_space": disk, "process_bytes": 0}
    held = _held_bytes()
    process = held + PROCESS_GROWTH
    # Pages of shared libraries that the process holds may be charged to another group than its own.
    memory = min(free + held - _left_to_others(), memory_limit())
    if process >= memory:
        raise CapacityError(
            f"The process takes {gibibytes(process)} by itself, before any weights, and only {gibibytes(memory)} of "
            "main memory are there for it.",
            remedy="Raise the limit that it runs under, or end other programs.",
        )
    return {
        "device_memory": memory,
        "host_memory": 0 if device.type == "cpu" else free,
        "disk_space": disk,
        "process_bytes": process,
    }


def _held_bytes() -> int:
    """What this process holds once it has given back what only its start, or a measurement of the machine, needed."""
    gc.collect()
    give_back_freed()
    release_library_pages()
    held: int = psutil.Process().memory_info().rss
    return held


def _left_to_others() -> int:
    """Bytes of main memory that a run leaves free on a machine that is not its own: what other programs begin to use in
    the night must not end it. A memory cgroup is its own."""
    whole = psutil.virtual_memory().total
    return int(whole * LEFT_TO_OTHERS) if memory_limit() >= whole else 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _kept(file: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The rates in `file`; None where there are none, or none that can be read, or another machine's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("machine") != identity:
        return None
    rates = content.get("rates")
    return rates if isinstance(rates, dict) else None


def _keep(file: Path, identity: dict[str, Any], rates: dict[str, Any]) -> None:
    """Written beside and renamed, so that no run sees half a file. A folder that cannot be written keeps nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.tmp")
        content = json.dumps({"machine": identity, "rates": rates}, indent=1)
        beside.write_text(content, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        logger.warning("The measurements could not be kept in %s: %s", file, error)
