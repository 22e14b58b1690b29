"""Measures the rates of a machine: products, attention, copies, links, the disk, and what a pass costs besides.

Every figure is taken at the shapes of real work (a hidden size of 4096, heads of 128, weights that are not in a cache).
All are measured in turn, several times over, and the median is kept: what other tenants of a machine take comes and
goes within seconds, and a run meets it too, so the best of a few tries would promise too much. The plan weighs a rate
at some rows against that at others, so these are taken in turn more often still.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexbatch.engine.attention_rates import (
    compressed_attention_rate,
    decode_attention_work,
    packed_attention_rate,
    prefill_attention_rate,
)
from flexbatch.engine.product_rates import HIDDEN, gemm_curves, gemm_works
from flexbatch.engine.rehearsal import half_type, random_values, rehearse
from flexbatch.engine.stream_measurement import streaming_cost
from flexbatch.engine.timing import Work, medians, seconds_of
from flexbatch.kernels import exponent_codes
from flexbatch.memory.direct_io import AlignedBuffer, DirectReader
from flexbatch.memory.quantization import dequantize, quantize
from flexbatch.memory.span_writer import SpanWriter
from flexbatch.memory.tiers import allocate
from flexbatch.plan.model_spec import QUANTIZATION_GROUP

WIDTH_ROWS, WIDTH_BYTES = 256, 96 << 20
READ_BYTES = 8 << 20
READ_THREADS = 4
FILE_BYTES = 1536 << 20
TOUCH_BYTES = 128 << 20
ROUNDS = 3


def measure_rates(device: torch.device, disk_folder: Path) -> dict[str, Any]:
    """The fields of a `HardwareProfile` that do not change while the machine stays what it is (units there).

    `disk_folder` must exist; up to 1.5 GiB are written there for a moment.
    """
    with tempfile.TemporaryDirectory(dir=disk_folder, prefix="flexbatch-measure-") as made:
        file = Path(made) / "block"
        written = _write(file)
        rounds = [_round(device, file) for _ in range(ROUNDS)]
    return {
        "name": "this machine",
        "device": device.type,
        "cores": core_count(),
        "disk_write": written,
        **medians(rounds),
    }


def _round(device: torch.device, file: Path) -> dict[str, Any]:
    """Every rate once. `file` is read."""
    read, read_cpu = _read_rate(device, file)
    besides = rehearse(device, file.parent)
    cpu = torch.device("cpu")
    return {
        "gemm": dict(gemm_curves(device)),
        "gemm_width": _width_factors(besides.products, _width_work(device).rate()),
        "activation_numbers": besides.activation_numbers,
        "attention_flops": prefill_attention_rate(device),
        "attention_bytes": decode_attention_work(device).rate(),
        "host_attention_bytes": decode_attention_work(cpu).rate(),
        "packed_attention_numbers": packed_attention_rate(device),
        "compressed_attention_numbers": compressed_attention_rate(device),
        "memory_copy": _copy_rate(cpu, cpu),
        "memory_touch": _touch_rate(),
        "disk_read": read,
        "host_to_device": _copy_rate(cpu, device),
        "device_to_host": _copy_rate(device, cpu),
        "dequantize_numbers": _dequantise_rate(device),
        "expansion_numbers": _expansion_rate(device),
        "read_cpu_seconds": read_cpu,
        "layer_call_seconds": besides.layer_seconds,
        "pass_seconds": besides.pass_seconds,
    }


def core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _width_work(device: torch.device) -> Work:
    """Products of `WIDTH_ROWS` by weights of as many bytes as the models of a rehearsal have."""
    return gemm_works(device, half_type(device), [WIDTH_ROWS], WIDTH_BYTES)[WIDTH_ROWS]


def _width_factors(products: Mapping[int, float], square: float) -> dict[int, float]:
    """Rates of products by hidden size as parts of `square`, the rate of `HIDDEN`'s by themselves. What is lost at the
    largest of the sizes is halved with every doubling: it goes with the results, not with the products."""
    factors = {width: min(1.0, rate / square) for width, rate in products.items()}
    width, lost = max(factors), 1.0 / factors[max(factors)] - 1.0
    while width < HIDDEN:
        width, lost = 2 * width, lost / 2
        factors[width] = 1.0 / (1.0 + lost)
    return factors


def _copy_rate(source: torch.device, target: torch.device) -> float:
    pin = "cuda" in (source.type, target.type)
    nbytes = 128 << 20
    made = [
        torch.zeros(nbytes, dtype=torch.uint8, device=each, pin_memory=pin and each.type == "cpu")
        for each in (source, target)
    ]
    watched = source if source.type != "cpu" else target
    return nbytes / seconds_of(lambda: made[1].copy_(made[0], non_blocking=True), watched)


def _touch_rate() -> float:
    """Bytes of main memory per second that the kernel finds and clears when they are used for the first time."""
    started = time.perf_counter()
    AlignedBuffer(TOUCH_BYTES).tensor.zero_()
    return TOUCH_BYTES / (time.perf_counter() - started)


@torch.inference_mode()
def _dequantise_rate(device: torch.device) -> float:
    """Numbers per second from packed four bits to the compute type, as the engine expands a weight."""
    packed = quantize(torch.randn(HIDDEN, HIDDEN, device=device), 4, QUANTIZATION_GROUP)
    out = torch.empty(HIDDEN, HIDDEN, dtype=half_type(device), device=device)
    return out.numel() / seconds_of(partial(dequantize, packed, out), device)


@torch.inference_mode()
def _expansion_rate(device: torch.device) -> float:
    """Numbers per second from a lossless copy to bfloat16, as a CPU expands a weight; 0 elsewhere."""
    if device.type != "cpu":
        return 0.0
    numbers = random_values((4 * HIDDEN, HIDDEN), torch.bfloat16, device).view(-1, exponent_codes.CHUNK)
    exceptions, out = exponent_codes.most_exceptions(numbers), torch.empty_like(numbers)
    records = torch.zeros(len(numbers), exponent_codes.record_bytes(exceptions), dtype=torch.uint8)
    exponent_codes.compress(numbers, exceptions, records)
    work = [exponent_codes.Expansion(records, exceptions, out)]
    return out.numel() / seconds_of(partial(exponent_codes.expand, work), device)


def _write(file: Path) -> float:
    """Bytes per second written to the medium, as `file`, past the page cache as KV cache and packed weights are."""
    blocks = min(FILE_BYTES, shutil.disk_usage(file.parent).free // 4) // READ_BYTES
    with file.open("wb") as stream:
        allocate(stream.fileno(), blocks * READ_BYTES, file.parent)
    with closing(SpanWriter(file)) as writer:
        seconds = 0.0
        for block in range(blocks):
            content = os.urandom(READ_BYTES)  # never the same twice: a disk below may keep equal blocks once
            started = time.perf_counter()
            writer.write(memoryview(content), block * READ_BYTES)
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        writer.sync()
        seconds += time.perf_counter() - started
    return blocks * READ_BYTES / seconds


@torch.inference_mode()
def _read_rate(device: torch.device, file: Path) -> tuple[float, float]:
    """Bytes per second of reading the file past the page cache with several threads into reused buffers, beside
    products where those run on the same processor; and the core-seconds that one byte takes."""
    nbytes, reader = file.stat().st_size, DirectReader()
    buffers = [AlignedBuffer(READ_BYTES + (1 << 16)) for _ in range(READ_THREADS)]
    for buffer in buffers:
        buffer.tensor.zero_()
    cpu = [0.0] * READ_THREADS

    def read(thread: int) -> None:
        started = time.thread_time()
        for offset in range(thread * READ_BYTES, nbytes - READ_BYTES + 1, READ_THREADS * READ_BYTES):
            reader.read(file, offset, READ_BYTES, buffers[thread], 0)
        cpu[thread] = time.thread_time() - started

    multiply = _width_work(device).run
    multiply()
    threads = [threading.Thread(target=read, args=(index,)) for index in range(READ_THREADS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    while device.type == "cpu" and any(thread.is_alive() for thread in threads):
        multiply()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    reader.close()
    lost = streaming_cost(file, core_count()) if device.type == "cpu" else 0.0
    return nbytes / seconds, max(lost, sum(cpu) / nbytes)
