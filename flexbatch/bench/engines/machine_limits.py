"""Measures what the machine can do at most for this model: matrix products at its shapes, disk, memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoConfig

from flexbatch.bench.trial import Outcome, Trial
from flexbatch.checkpoint.architecture import expected_tensors
from flexbatch.engine.calibration import measure_hardware
from flexbatch.engine.linear_layers import as_multiplied, product
from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.engine.timing import seconds_of
from flexbatch.errors import EngineError
from flexbatch.memory.direct_io import PAGE, AlignedBuffer, DirectReader
from flexbatch.memory.int8_layout import int8_layout
from flexbatch.memory.int8_linear import int8_sums

ROWS = (1, 8, 16, 32, 64, 128, 512, 2048)
CHUNK = 8 << 20
THREADS = 4
READ_LIMIT = 2 << 30
COPY_BYTES = 256 << 20
CPU = torch.device("cpu")

PLANNED_FROM = 64 << 20
"""Bytes of weights from which the plan asks for measured figures."""


def run(trial: Trial) -> Outcome:
    """`details` are the fields of `roofline.MachineLimits`. The plan's own figures are measured too, if need be."""
    files = sorted(Path(trial.model).glob("*.safetensors"))
    if not trial.options["hardware"]["profile"] and sum(file.stat().st_size for file in files) > PLANNED_FROM:
        measure_hardware(CPU, Path(trial.cache_dir), Path(trial.cache_dir))
    config = AutoConfig.from_pretrained(trial.model)
    expected = expected_tensors(config)
    shapes = [shape for name, shape in expected.shapes.items() if expected.layer_of.get(name) == 0 and len(shape) == 2]
    spec = spec_from_config(config, stored_dtype=trial.dtype, compute_dtype=trial.dtype)
    int8 = trial.options["offload"]["compute"] == "int8"
    details = {
        "gemm": {rows: gemm_rate(shapes, rows, getattr(torch, trial.dtype)) for rows in ROWS},
        "int8": {rows: int8_rate(shapes, rows) for rows in ROWS} if int8 else {},
        # The first reading may warm a cache of the machine below a virtual one, as a job's first pass does.
        "disk_read": max(disk_rate(files) for _ in range(2)),
        "memory_copy": copy_rate(),
        "linear_flops": float(spec.linear_flops_per_token),
        "head_flops": 2.0 * spec.head_parameters,
        "attention_flops": spec.attention_flops(1, 1),
    }
    return Outcome(trial.engine, details=details)


def least_seconds(work: Callable[[], object]) -> float:
    """Of one call: a limit is what the machine does when nobody else takes from it."""
    return min(seconds_of(work, CPU) for _ in range(3))


@torch.inference_mode()
def gemm_rate(shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype) -> float:
    """FLOP/s of one layer's matrices in turn, by the engine's products or torch's, whichever are faster: together they
    are larger than a cache, as streamed weights are."""
    plain = [torch.randn(shape, dtype=dtype) for shape in shapes]
    laid_out = [as_multiplied(weight) for weight in plain]
    inputs = [torch.randn(rows, width, dtype=dtype) for _, width in shapes]

    def work(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], weights: list[torch.Tensor]) -> None:
        for each, weight in zip(inputs, weights, strict=True):
            multiply(each, weight)

    pairs = ((product, laid_out), (functional.linear, plain))
    seconds = min(least_seconds(partial(work, *pair)) for pair in pairs)
    return 2.0 * rows * sum(out * width for out, width in shapes) / seconds


@torch.inference_mode()
def int8_rate(shapes: Sequence[tuple[int, int]], rows: int) -> float:
    """The same for integer products (without the scaling of activations around them), weights laid as they are kept."""
    layouts = [int8_layout(tuple(shape)) for shape in shapes]
    stored = [layout.pack(torch.randn(layout.shape, dtype=torch.bfloat16))[0] for layout in layouts]
    weights = [(layout.shape, layout.weight(values)) for layout, values in zip(layouts, stored, strict=True)]
    inputs = {width: torch.randint(-9, 9, (rows, width), dtype=torch.int8) for _, width in shapes}

    def work() -> None:
        for (out, width), weight in weights:
            int8_sums(inputs[width], weight, out)

    return 2.0 * rows * sum(out * width for out, width in shapes) / least_seconds(work)


def disk_rate(files: Sequence[Path]) -> float:
    """Bytes per second of direct reads of the checkpoint itself, several threads, each with one reused buffer."""
    spans = [(file, at) for file in files for at in range(0, file.stat().st_size - CHUNK + 1, CHUNK)]
    spans = spans[: READ_LIMIT // CHUNK] or [(file, 0) for file in files]
    reader, errors = DirectReader(), list[EngineError]()
    waiting = iter(spans)
    lock = threading.Lock()

    def read() -> None:
        buffer = AlignedBuffer(CHUNK + 2 * PAGE)
        try:
            while True:
                with lock:
                    span = next(waiting, None)
                if span is None:
                    return
                reader.read(span[0], span[1], min(CHUNK, span[0].stat().st_size), buffer, 0)
        except EngineError as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(THREADS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    reader.close()
    if errors:
        raise errors[0]
    return sum(min(CHUNK, file.stat().st_size) for file, _ in spans) / seconds


def copy_rate() -> float:
    """Bytes per second that arrive, copied from main memory to main memory."""
    source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.empty(COPY_BYTES, dtype=torch.uint8)
    return COPY_BYTES / least_seconds(lambda: target.copy_(source))
