"""Measures the rates of a machine: products, attention, copies, links, the disk, and what a pass costs besides.

Every figure is taken at the shapes of real work (a hidden size of 4096, heads of 128, weights that are not in a cache),
as the best of a few rounds, because other processes only ever add time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from flexbatch.engine.attention import attend
from flexbatch.engine.rehearsal import rehearse
from flexbatch.memory.direct_io import AlignedBuffer, DirectReader
from flexbatch.memory.int8_linear import int8_linear
from flexbatch.memory.quantization import dequantize, quantize
from flexbatch.plan.model_spec import QUANTIZATION_GROUP

ROWS = (1, 4, 16, 64, 256, 1024, 2048)
HIDDEN = 4096
WIDTHS = (512, 1024, 2048, 4096)
WIDTH_ROWS = 160
WIDTH_BYTES = 128 << 20
READ_BYTES = 8 << 20
READ_THREADS = 4
FILE_BYTES = 1536 << 20


def measure_rates(device: torch.device, disk_folder: Path) -> dict[str, Any]:
    """The fields of a `HardwareProfile` that do not change while the machine stays what it is (units there).

    `disk_folder` must exist; up to 1.5 GiB are written there for a moment.
    """
    read, write, read_cpu = _disk(disk_folder)
    to_device, to_host = _links(device)
    besides = rehearse(device, disk_folder)
    return {
        "name": "this machine",
        "device": device.type,
        "cores": core_count(),
        "gemm": {kind: dict(curve) for kind, curve in _gemm_curves(device)},
        "gemm_width": _width_factors(device),
        "activation_numbers": besides.activation_numbers,
        "attention_flops": _prefill_attention(device),
        "attention_bytes": _decode_attention(device),
        "host_attention_bytes": _decode_attention(torch.device("cpu")),
        "memory_copy": _copy_rate(torch.device("cpu"), torch.device("cpu")),
        "disk_read": read,
        "disk_write": write,
        "host_to_device": to_device,
        "device_to_host": to_host,
        "dequantize_numbers": _dequantise_rate(device),
        "read_cpu_seconds": read_cpu,
        "layer_call_seconds": besides.layer_seconds,
        "pass_seconds": besides.pass_seconds,
    }


def core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_of(work: Callable[[], object], device: torch.device, *, rounds: int = 5, at_least: float = 0.02) -> float:
    """Least seconds of one call, after one call to warm up; short calls are repeated within a round."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return (time.perf_counter() - started) / times

    once(1)
    first = once(1)
    times = max(1, min(1000, int(at_least / max(first, 1e-7))))
    return min(once(times) for _ in range(rounds if first < 0.2 else 2))


def _gemm_curves(device: torch.device) -> Iterator[tuple[str, dict[int, float]]]:
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    for dtype in kinds if device.type != "cpu" else kinds[:2]:
        yield _name(dtype), {rows: _gemm_rate(device, dtype, rows) for rows in ROWS}
    if device.type == "cpu":
        yield "int8", {rows: _int8_rate(rows) for rows in ROWS}


@torch.inference_mode()
def _gemm_rate(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    """FLOP/s of a linear layer whose weights come from memory: several matrices in turn, larger than a cache."""
    count = 4 if rows <= 64 else 2
    weights = [torch.randn(HIDDEN, HIDDEN, dtype=dtype, device=device) for _ in range(count)]
    inputs = torch.randn(rows, HIDDEN, dtype=dtype, device=device)

    seconds = seconds_of(partial(_linears, inputs, weights), device, rounds=3)
    return 2.0 * rows * HIDDEN * HIDDEN * count / seconds


@torch.inference_mode()
def _width_factors(device: torch.device) -> dict[int, float]:
    """A linear layer's rate at several hidden sizes, as a part of its rate at the largest: for the rows of an ordinary
    pass, and weights that come from memory."""
    rates = {}
    for width in WIDTHS:
        count = max(1, WIDTH_BYTES // (8 * width * width))
        weights = [torch.randn(4 * width, width, dtype=_half(device), device=device) for _ in range(count)]
        inputs = torch.randn(WIDTH_ROWS, width, dtype=_half(device), device=device)
        seconds = seconds_of(partial(_linears, inputs, weights), device, rounds=9)
        rates[width] = 2.0 * inputs.numel() * 4 * width * count / seconds
    return {width: min(1.0, rate / rates[HIDDEN]) for width, rate in rates.items()}


def _linears(inputs: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    for weight in weights:
        functional.linear(inputs, weight)


@torch.inference_mode()
def _int8_rate(rows: int) -> float:
    """FLOP/s of the engine's own 8-bit linear layer, its weights laid as they are kept, rounding of the activations
    included."""
    weights = [torch.randint(-9, 9, (HIDDEN, HIDDEN), dtype=torch.int8).t() for _ in range(2)]
    scale = torch.ones(HIDDEN)
    inputs = torch.randn(rows, HIDDEN, dtype=torch.bfloat16)

    def work() -> None:
        for weight in weights:
            int8_linear(inputs, weight, scale)

    return 2.0 * rows * HIDDEN * HIDDEN * len(weights) / seconds_of(work, torch.device("cpu"), rounds=3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _half(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.bfloat16


@torch.inference_mode()
def _prefill_attention(device: torch.device) -> float:
    """FLOP/s over all pairs of 512 positions, with a mask as padded prompts have one."""
    heads, length, size = 16, 512, 64
    query, key, value = (torch.randn(1, heads, length, size, dtype=_half(device), device=device) for _ in range(3))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    seconds = seconds_of(lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=mask), device)
    return 4.0 * heads * length * length * size / seconds


@torch.inference_mode()
def _decode_attention(device: torch.device) -> float:
    """KV bytes per second for one query per row, read through the arena's strides (a column range of longer rows)."""
    rows, heads, length, size = 8, 16, 512, 64
    dtype = _half(device)
    keys, values = (
        torch.randn(rows, heads, length + 160, size, dtype=dtype, device=device)[:, :, 80 : 80 + length]
        for _ in range(2)
    )
    query = torch.randn(rows, heads, 1, size, dtype=dtype, device=device)
    mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device)
    work = (
        partial(attend, query, keys, values, mask, size**-0.5)
        if device.type == "cpu"
        else partial(functional.scaled_dot_product_attention, query, keys, values, attn_mask=mask)
    )
    seconds = seconds_of(work, device)
    return 2.0 * rows * heads * length * size * dtype.itemsize / seconds


def _copy_rate(source: torch.device, target: torch.device) -> float:
    pin = "cuda" in (source.type, target.type)
    nbytes = 128 << 20
    made = [
        torch.zeros(nbytes, dtype=torch.uint8, device=each, pin_memory=pin and each.type == "cpu")
        for each in (source, target)
    ]
    watched = source if source.type != "cpu" else target
    return nbytes / seconds_of(lambda: made[1].copy_(made[0], non_blocking=True), watched)


def _links(device: torch.device) -> tuple[float, float]:
    cpu = torch.device("cpu")
    return _copy_rate(cpu, device), _copy_rate(device, cpu)


@torch.inference_mode()
def _dequantise_rate(device: torch.device) -> float:
    """Numbers per second from packed four bits to the compute type, as the engine expands a weight."""
    packed = quantize(torch.randn(HIDDEN, HIDDEN, device=device), 4, QUANTIZATION_GROUP)
    out = torch.empty(HIDDEN, HIDDEN, dtype=_half(device), device=device)
    return out.numel() / seconds_of(partial(dequantize, packed, out), device)


def _disk(folder: Path) -> tuple[float, float, float]:
    """Bytes per second read (several threads, past the page cache) and written (to the medium), core-seconds per byte
    read."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="flexbatch-measure-") as made:
        file = Path(made) / "block"
        seconds = 0.0
        with file.open("wb") as stream:
            for _ in range(min(FILE_BYTES, shutil.disk_usage(folder).free // 4) // READ_BYTES):
                block = os.urandom(READ_BYTES)  # never the same twice: a disk below may keep equal blocks once
                started = time.perf_counter()
                stream.write(block)
                seconds += time.perf_counter() - started
            started = time.perf_counter()
            stream.flush()
            os.fsync(stream.fileno())
            seconds += time.perf_counter() - started
        nbytes = file.stat().st_size
        written = nbytes / seconds
        seconds, processor = _read_all(file, nbytes)
    return nbytes / seconds, written, processor / nbytes


def _read_all(file: Path, nbytes: int) -> tuple[float, float]:
    """Wall seconds and summed core-seconds of reading the file with several threads into reused buffers."""
    reader = DirectReader()
    buffers = [AlignedBuffer(READ_BYTES + (1 << 16)) for _ in range(READ_THREADS)]
    cpu = [0.0] * READ_THREADS

    def read(thread: int) -> None:
        started = time.thread_time()
        for offset in range(thread * READ_BYTES, nbytes - READ_BYTES + 1, READ_THREADS * READ_BYTES):
            reader.read(file, offset, READ_BYTES, buffers[thread], 0)
        cpu[thread] = time.thread_time() - started

    rounds = []
    for _ in range(3):
        threads = [threading.Thread(target=read, args=(index,)) for index in range(READ_THREADS)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rounds.append(time.perf_counter() - started)
    reader.close()
    return sorted(rounds)[len(rounds) // 2], sum(cpu)
