"""Measures the rates of a machine: products, attention, copies, links, the disk, and what a pass costs besides.

Every figure is taken at the shapes of real work (a hidden size of 4096, heads of 128, weights that are not in a cache).
All are measured in turn, several times over, and the median is kept: what other tenants of a machine take comes and
goes within seconds, and a run meets it too, so the best of a few tries would promise too much. The plan weighs a rate
at some rows against that at others, so these are taken in turn more often still.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from flexbatch.engine.attention import attend
from flexbatch.engine.linear_layers import as_multiplied, product
from flexbatch.engine.rehearsal import half_type, random_values, rehearse
from flexbatch.engine.stream_measurement import streaming_cost
from flexbatch.memory.direct_io import AlignedBuffer, DirectReader
from flexbatch.memory.int8_layout import int8_layout
from flexbatch.memory.int8_linear import int8_linear
from flexbatch.memory.quantization import dequantize, quantize
from flexbatch.plan.model_spec import QUANTIZATION_GROUP

ROWS = (1, 4, 16, 64, 256, 1024)
"""Of the products that are measured; an accelerator gains by more."""
MOST_ROWS = 2048
LAPS = 3
"""Over all of them in a round."""
HIDDEN = 4096
WIDTH_ROWS = 256
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
    gemm = dict(_gemm_curves(device))
    return {
        "gemm": gemm,
        "gemm_width": _width_factors(besides.products, gemm[_name(half_type(device))][WIDTH_ROWS]),
        "activation_numbers": besides.activation_numbers,
        "attention_flops": _prefill_attention(device),
        "attention_bytes": _decode_attention(device),
        "host_attention_bytes": _decode_attention(cpu),
        "memory_copy": _copy_rate(cpu, cpu),
        "memory_touch": _touch_rate(),
        "disk_read": read,
        "host_to_device": _copy_rate(cpu, device),
        "device_to_host": _copy_rate(device, cpu),
        "dequantize_numbers": _dequantise_rate(device),
        "read_cpu_seconds": read_cpu,
        "layer_call_seconds": besides.layer_seconds,
        "pass_seconds": besides.pass_seconds,
    }


def medians(rounds: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """The median of each figure, figures of figures too."""
    return {
        key: medians([each[key] for each in rounds])
        if isinstance(value, Mapping)
        else statistics.median(each[key] for each in rounds)
        for key, value in rounds[0].items()
    }


def core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float = 0.05) -> float:
    """Mean seconds of one call, over calls that take `at_least` seconds together, after one to warm up (which does not
    show in a long one)."""

    def calls(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / count

    first = calls(1)
    if first < 4 * at_least:
        first = calls(1)
    count = math.ceil(at_least / max(first, 1e-6))
    return first if count <= 1 else calls(min(count, 10_000))


def _gemm_curves(device: torch.device) -> Iterator[tuple[str, dict[int, float]]]:
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    for dtype in kinds if device.type != "cpu" else kinds[:2]:
        yield _name(dtype), _gemm_curve(device, dtype)
    if device.type == "cpu":
        yield "int8", _int8_curve()


@torch.inference_mode()
def _gemm_curve(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of a linear layer by rows, as the engine has it. Weights come from memory: two in turn, larger than a
    cache."""
    weights = [as_multiplied(random_values((HIDDEN, HIDDEN), dtype, device)) for _ in range(2)]
    rows = ROWS if device.type == "cpu" else (*ROWS, MOST_ROWS)
    return _curve(
        {many: partial(_products, random_values((many, HIDDEN), dtype, device), weights) for many in rows},
        len(weights),
        device,
    )


@torch.inference_mode()
def _int8_curve() -> dict[int, float]:
    """The same of the engine's own 8-bit linear layer, its weights laid as they are kept, rounding of the activations
    included."""
    cpu = torch.device("cpu")
    layout = int8_layout((HIDDEN, HIDDEN))
    stored = [layout.pack(random_values((HIDDEN, HIDDEN), torch.bfloat16, cpu)) for _ in range(4)]
    weights = [(layout.weight(values), scale) for values, scale in stored]

    def products(inputs: torch.Tensor) -> None:
        for weight in weights:
            int8_linear(inputs, *weight)

    inputs = {many: random_values((many, HIDDEN), torch.bfloat16, cpu) for many in ROWS}
    return _curve({many: partial(products, rows) for many, rows in inputs.items()}, len(weights), cpu)


def _curve(works: Mapping[int, Callable[[], None]], weights: int, device: torch.device) -> dict[int, float]:
    """FLOP/s by rows, given what multiplies so many rows by so many `weights`: in turn, so that a slow moment is no
    slow number of rows."""
    flop = 2.0 * weights * HIDDEN * HIDDEN  # of a row
    laps = [{rows: flop * rows / seconds_of(work, device, 0.02) for rows, work in works.items()} for _ in range(LAPS)]
    return medians(laps)


def _width_factors(products: Mapping[int, float], square: float) -> dict[int, float]:
    """Rates of products by hidden size as parts of `square`, the rate of `HIDDEN`'s by themselves. What is lost at the
    largest of the sizes is halved with every doubling: it goes with the results, not with the products."""
    factors = {width: min(1.0, rate / square) for width, rate in products.items()}
    width, lost = max(factors), 1.0 / factors[max(factors)] - 1.0
    while width < HIDDEN:
        width, lost = 2 * width, lost / 2
        factors[width] = 1.0 / (1.0 + lost)
    return factors


def _products(inputs: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    for weight in weights:
        product(inputs, weight)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def _prefill_attention(device: torch.device) -> float:
    """FLOP/s over all pairs of 512 positions, those that are masked included."""
    heads, length, size = 16, 512, 64
    query, key, value = (torch.randn(1, heads, length, size, dtype=half_type(device), device=device) for _ in range(3))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    work = (
        partial(attend, query, key, value, None, size**-0.5)
        if device.type == "cpu"
        else partial(functional.scaled_dot_product_attention, query, key, value, attn_mask=mask)
    )
    seconds = seconds_of(work, device)
    return 4.0 * heads * length * length * size / seconds


@torch.inference_mode()
def _decode_attention(device: torch.device) -> float:
    """KV bytes per second for one query per row, read through the arena's strides (a column range of longer rows)."""
    rows, heads, length, size = 8, 16, 512, 64
    dtype = half_type(device)
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


def _write(file: Path) -> float:
    """Bytes per second written to the medium, as `file`."""
    seconds = 0.0
    with file.open("wb") as stream:
        for _ in range(min(FILE_BYTES, shutil.disk_usage(file.parent).free // 4) // READ_BYTES):
            block = os.urandom(READ_BYTES)  # never the same twice: a disk below may keep equal blocks once
            started = time.perf_counter()
            stream.write(block)
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        stream.flush()
        os.fsync(stream.fileno())
        seconds += time.perf_counter() - started
    return file.stat().st_size / seconds


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

    inputs, weight = (random_values((rows, HIDDEN), half_type(device), device) for rows in (WIDTH_ROWS, HIDDEN))
    products = partial(_products, inputs, [as_multiplied(weight)] * 2)
    products()
    threads = [threading.Thread(target=read, args=(index,)) for index in range(READ_THREADS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    while device.type == "cpu" and any(thread.is_alive() for thread in threads):
        products()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    reader.close()
    lost = streaming_cost(file, core_count()) if device.type == "cpu" else 0.0
    return nbytes / seconds, max(lost, sum(cpu) / nbytes)
