"""The weight stream: the tensors of one layer after the other, read ahead of use, pass after pass, in a fixed budget.

    stream = WeightStream(units, reader=reader, budget_bytes=512 << 20, device=torch.device("cpu"))
    for unit in itertools.cycle(units):
        weights = stream.acquire(unit.name)
        ...
        stream.release(unit.name)
    stream.close()

Worker threads fill one ring buffer, allocated once, in the order of use and across the wrap from the last unit to the
first; `stream_layout` says what goes where, a `Courier` carries it. `acquire` and `release` belong to one thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flexbatch.errors import CapacityError, EngineError, FlexbatchError
from flexbatch.memory.courier import make_courier, staged_on_device, staging_bytes
from flexbatch.memory.direct_io import PAGE, AlignedBuffer, Reader, page_floor
from flexbatch.memory.ring_schedule import Lease, LeaseState, RingSchedule, Task
from flexbatch.memory.stream_layout import (
    HostSpan,
    Region,
    StreamTensor,
    StreamUnit,
    item_phase,
    page_phase,
    unit_regions,
)

__all__ = ["NO_STATISTICS", "OnEvent", "StreamStatistics", "StreamTensor", "StreamUnit", "WeightStream"]

OnEvent = Callable[[str, str, float, float, int], None]
"""Called with kind (`read`, `copy`, `wait`), name of the unit, start and end (`time.perf_counter` seconds), bytes.

`read` and `copy` come from worker threads."""


@dataclass(frozen=True)
class StreamStatistics:
    """Counters since the start. Bytes are by link (`disk>device`, `host>device`, on CUDA also `disk>host`);
    `busy_seconds` by kind (`read`, `copy`) are summed over threads, `cpu_seconds` is the threads' processor time;
    `wait_seconds` is how long `acquire` made its caller wait."""

    bytes_moved: Mapping[str, int]
    busy_seconds: Mapping[str, float]
    cpu_seconds: float
    wait_seconds: float
    units_delivered: int

    def __add__(self, other: StreamStatistics) -> StreamStatistics:
        return StreamStatistics(
            bytes_moved=Counter(self.bytes_moved) + Counter(other.bytes_moved),
            busy_seconds={kind: self.busy_seconds.get(kind, 0.0) + more for kind, more in other.busy_seconds.items()},
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
            wait_seconds=self.wait_seconds + other.wait_seconds,
            units_delivered=self.units_delivered + other.units_delivered,
        )


NO_STATISTICS = StreamStatistics(bytes_moved={}, busy_seconds={}, wait_seconds=0.0, cpu_seconds=0.0, units_delivered=0)


class WeightStream:
    """Delivers `units` in cyclic order, for ever. See the module's docstring.

    `budget_bytes` bounds the memory on `device` for weights on their way and handed out. CapacityError if the largest
    unit needs more. `staging_bytes` (in main memory) is the threads' own buffers; on the CPU they count in the budget.
    """

    def __init__(
        self,
        units: Sequence[StreamUnit],
        *,
        reader: Reader,
        budget_bytes: int,
        device: torch.device,
        threads: int = 4,
        chunk_bytes: int = 8 << 20,
        on_event: OnEvent | None = None,
    ) -> None:
        names = [unit.name for unit in units]
        if len(set(names)) != len(names):
            raise EngineError(f"Units of the weight stream share a name: {names}.")
        self._names = tuple(names)
        self._on_event = on_event
        regions = _all_regions(units, device, chunk_bytes)
        self.staging_bytes = staging_bytes(regions, device, threads, chunk_bytes)
        self.ring_bytes = self._admit(regions, budget_bytes - staged_on_device(device, self.staging_bytes), device)
        buffer = AlignedBuffer(self.ring_bytes) if device.type == "cpu" else None
        self._ring = torch.empty(self.ring_bytes, dtype=torch.uint8, device=device) if buffer is None else buffer.tensor
        self._schedule = RingSchedule(self._names, regions, self.ring_bytes)

        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # workers wait for something to carry
        self._ready = threading.Condition(self._lock)  # the caller waits for a unit
        self._tasks: deque[Task] = deque()
        self._active = 0
        self._turn = 0
        self._error: FlexbatchError | None = None
        self._closed = False
        self._busy: dict[str, float] = {"read": 0.0, "copy": 0.0}
        self._cpu = [0.0] * threads
        self._waited = 0.0
        share = self.staging_bytes // threads
        self._couriers = [make_courier(reader, self._ring, buffer, share) for _ in range(threads)]
        self._threads = _start_single_threaded(self._serve, threads) if any(regions) else []

    @staticmethod
    def required_bytes(
        units: Sequence[StreamUnit], device: torch.device, *, threads: int = 4, chunk_bytes: int = 8 << 20
    ) -> int:
        """The smallest budget with which these units can be streamed: the largest unit (whole pages) and staging."""
        regions = _all_regions(units, device, chunk_bytes)
        staging = staged_on_device(device, staging_bytes(regions, device, threads, chunk_bytes))
        return max((_footprint(unit) for unit in regions), default=0) + staging

    def acquire(self, name: str) -> Mapping[str, torch.Tensor]:
        """The tensors of the next unit, which must be `name`, by `StreamTensor.name`; waits until they are there.

        They are views of the stream's buffer: valid until `release(name)`. Raises EngineError when a read failed (with
        file and offset), when `name` is not the next unit, or when the budget is held by units not yet released.
        """
        expected = self._names[self._turn % len(self._names)] if self._names else "nothing"
        if name != expected:
            raise EngineError(
                f"The weight stream's next unit is {expected!r}, not {name!r}: units come in a fixed order."
            )
        started = time.perf_counter()
        with self._lock:
            lease = self._await_whole(name)
            lease.state = LeaseState.HELD
            self._turn += 1
        ended = time.perf_counter()
        self._waited += ended - started
        if self._on_event is not None:
            self._on_event("wait", name, started, ended, 0)
        for event in lease.events.values():
            torch.cuda.current_stream(self._ring.device).wait_event(event)
        return self._views(lease)

    def release(self, name: str) -> None:
        """Gives the unit's memory back. On CUDA, work queued so far on the current stream may still read it."""
        event = torch.cuda.current_stream(self._ring.device).record_event() if self._ring.is_cuda else None
        with self._lock:
            self._schedule.release(name, event)
            self._work.notify()

    def statistics(self) -> StreamStatistics:
        with self._lock:
            moved: Counter[str] = Counter()
            for courier in self._couriers:
                moved.update(courier.bytes_moved)
            return StreamStatistics(dict(moved), dict(self._busy), sum(self._cpu), self._waited, self._turn)

    def close(self) -> None:
        """Stops the workers and waits for them; a caller blocked in `acquire` gets an EngineError. Safe to repeat."""
        with self._lock:
            already, self._closed = self._closed, True
            self._work.notify_all()
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()
        if not already:
            for courier in self._couriers:
                courier.close()

    def _admit(self, regions: Sequence[Sequence[Region]], available: int, device: torch.device) -> int:
        """The ring's size: within the budget, and no more than two whole passes."""
        sizes = [_footprint(unit) for unit in regions]
        largest = max(sizes, default=0)
        if available < largest:
            needed = largest + staged_on_device(device, self.staging_bytes)
            raise CapacityError(
                f"The prefetch budget of {available + needed - largest} bytes is too small for the weights of "
                f"{self._names[sizes.index(largest)]!r}, which need {needed} bytes at once.",
                remedy=f"Set offload.prefetch_bytes to at least {needed}, or raise offload.device_memory.",
            )
        return max(PAGE, min(page_floor(available), 2 * sum(sizes)))

    def _await_whole(self, name: str) -> Lease:
        """With the lock: waits for the lease of the current turn. Never for something that only the caller can do."""
        while True:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise EngineError(f"The weight stream was closed while {name!r} was awaited.")
            lease = self._schedule.next_lease()
            if lease is not None and lease.whole:
                return lease
            if not self._active and not self._tasks and not self._schedule.can_open():
                raise EngineError(
                    f"{name!r} does not fit into the weight stream's {self.ring_bytes} bytes "
                    f"beside what is not released: {self._schedule.held()}.",
                    remedy="Release units before acquiring more, or raise offload.prefetch_bytes.",
                )
            self._ready.wait()

    def _views(self, lease: Lease) -> dict[str, torch.Tensor]:
        views = {}
        for region, position in zip(lease.placed.regions, lease.placed.positions, strict=True):
            base = position % self.ring_bytes
            for view in region.views:
                flat = self._ring[base + view.at : base + view.at + _nbytes(view.dtype, view.shape)]
                views[view.name] = flat.view(view.dtype).view(view.shape)
        return views

    # What follows runs in the workers.

    def _serve(self, number: int) -> None:
        """A worker's life: take a task, carry it, say so."""
        cpu_started = time.thread_time()
        while (task := self._next_task()) is not None:
            started = time.perf_counter()
            try:
                self._couriers[number].carry(task.job, task.place, task.after)
                event = self._couriers[number].event()
                ended = time.perf_counter()
                kind = "copy" if isinstance(task.job, HostSpan) else "read"
                if self._on_event is not None:
                    self._on_event(kind, task.lease.name, started, ended, task.job.nbytes)
            except BaseException as error:  # noqa: BLE001 (whatever it is, the caller must hear of it)
                self._fail(task, error)
                return
            with self._lock:
                self._busy[kind] += ended - started
                self._cpu[number] = time.thread_time() - cpu_started
                self._active -= 1
                task.lease.jobs_left -= 1
                if event is not None:
                    task.lease.events[number] = event
                self._ready.notify_all()

    def _next_task(self) -> Task | None:
        with self._lock:
            while not self._closed and self._error is None:
                if not self._tasks and (opened := self._schedule.open_region()):
                    self._tasks.extend(opened)
                    self._work.notify(len(opened))  # for the rest of it, and to see whether there is room for more
                if self._tasks:
                    self._active += 1
                    return self._tasks.popleft()
                self._ready.notify_all()
                self._work.wait()
            return None

    def _fail(self, task: Task, error: BaseException) -> None:
        if not isinstance(error, FlexbatchError):
            job = task.job
            where = "main memory" if isinstance(job, HostSpan) else f"byte {job.offset} of {job.file}"
            message = f"Streaming {task.lease.name!r} from {where} failed: {error!r}."
            failure: FlexbatchError = EngineError(message, remedy="Start the same command again: it goes on.")
            failure.__cause__ = error
        else:
            failure = error
        with self._lock:
            self._active -= 1
            self._error = self._error or failure
            self._work.notify_all()
            self._ready.notify_all()


def _all_regions(units: Sequence[StreamUnit], device: torch.device, chunk_bytes: int) -> list[tuple[Region, ...]]:
    phase = page_phase if device.type == "cpu" else item_phase
    return [unit_regions(unit, chunk_bytes, phase) for unit in units]


def _footprint(regions: Sequence[Region]) -> int:
    return sum(region.nbytes for region in regions)


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return nbytes


def _start_single_threaded(work: Callable[[int], None], count: int) -> list[threading.Thread]:
    """Starts workers whose torch copies and conversions use no thread pool of their own: it would fight the arithmetic.

    `torch.set_num_threads` acts on the calling thread's pool and on threads that come to torch later (a thread's first
    use takes over the last value set, hence the two calls), so the caller's own setting is put back at the end.
    """
    own = torch.get_num_threads()
    settled = threading.Barrier(count + 1)

    def serve(number: int) -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        settled.wait()
        work(number)

    threads = [
        threading.Thread(target=serve, args=(number,), daemon=True, name=f"weights-{number}") for number in range(count)
    ]
    for thread in threads:
        thread.start()
    settled.wait()
    torch.set_num_threads(own)
    return threads
