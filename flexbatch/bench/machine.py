"""The machine on which the figures were taken, in words and numbers."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("flexbatch", "torch", "transformers", "accelerate", "ctranslate2", "deepspeed")


def describe_machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory in bytes, kernel, Python, versions, load when it was asked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Processes that wanted a core in the last minute: above 0 before a run, the figures are not of a quiet machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def multiplies_bfloat16() -> bool:
    """Whether torch's products of bfloat16 are fast on this CPU: on x86 that takes AVX-512, or AVX2 that converts."""
    flags = set(_processor_fields().get("flags", "").split())
    is_known_x86 = bool(flags) and platform.machine() in ("x86_64", "AMD64")
    return not is_known_x86 or bool(flags & {"avx512bw", "avx_ne_convert"})


def _processor() -> str:
    fields = _processor_fields()
    name = fields.get("model name", platform.processor() or platform.machine())
    flags = fields.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(known)})" if known else name


def _processor_fields() -> dict[str, str]:
    """What Linux says of the last core; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
