"""The weight stream delivers every unit's true bytes, pass after pass, in any budget that holds the largest unit."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexbatch.errors import CapacityError, EngineError
from flexbatch.memory.courier import CopyingCourier
from flexbatch.memory.direct_io import PAGE, AlignedBuffer, BufferedReader, DirectReader
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.memory.stream_layout import item_phase, unit_regions
from flexbatch.memory.transfer import StreamTensor, StreamUnit, WeightStream

CPU = torch.device("cpu")
COUNTS = (0, 1, 7, 100, 2048, 5000, 20_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[SafetensorsIndex, dict[str, torch.Tensor]]:
    """Two shards with tensors of many sizes and types; names tell nothing of the place in the file."""
    folder = tmp_path_factory.mktemp("stream")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{position % 7}.{dtype}.{count}": (torch.randn(count, generator=generator) * 50).to(dtype)
        for position, (dtype, count) in enumerate(itertools.product(DTYPES, COUNTS))
    }
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"shard{number}.safetensors")
    return SafetensorsIndex.open(folder), tensors


def run_forever(stream: WeightStream, units: list[StreamUnit]) -> None:
    for unit in itertools.cycle(units):
        stream.acquire(unit.name)
        stream.release(unit.name)


def acquire_all(stream: WeightStream, units: list[StreamUnit]) -> None:
    for unit in units:
        stream.acquire(unit.name)


def layer_units(index: SafetensorsIndex, count: int = 4) -> list[StreamUnit]:
    tensors = [StreamTensor(name, entry) for name, entry in index.entries.items()]
    return [StreamUnit(f"layer{number}", tuple(tensors[number::count])) for number in range(count)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_tensor_equals_its_source_in_every_pass(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]], data: st.DataObject
) -> None:
    index, tensors = files
    names = data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=25, unique=True))
    owners = [data.draw(st.integers(0, 4)) for _ in names]
    delivered: dict[str, torch.Tensor] = {}
    members: dict[int, list[StreamTensor]] = {owner: [] for owner in range(max(owners, default=0) + 1)}
    for name, owner in zip(names, owners, strict=True):
        target = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
        source = index.entries[name] if data.draw(st.booleans()) else tensors[name]
        members[owner].append(StreamTensor(name, source, target))
        delivered[name] = tensors[name].to(target or tensors[name].dtype)
    units = [StreamUnit(f"unit{owner}", tuple(found)) for owner, found in members.items()]
    settings_of_stream = {"threads": data.draw(st.integers(1, 3)), "chunk_bytes": data.draw(st.integers(512, 40_000))}
    needed = WeightStream.required_bytes(units, CPU, **settings_of_stream)
    budget = needed + data.draw(st.integers(0, 400_000))
    reader = data.draw(st.sampled_from([DirectReader, BufferedReader]))()
    stream = WeightStream(units, reader=reader, budget_bytes=budget, device=CPU, **settings_of_stream)
    try:
        for unit in units * data.draw(st.integers(1, 4)):
            weights = stream.acquire(unit.name)
            assert set(weights) == {tensor.name for tensor in unit.tensors}
            for name, weight in weights.items():
                assert weight.dtype == delivered[name].dtype
                assert weight.equal(delivered[name])
            stream.release(unit.name)
        assert stream.ring_bytes + stream.staging_bytes <= budget + PAGE
    finally:
        stream.close()
        reader.close()


class _MeetingReader(BufferedReader):
    """Each of the first two small reads waits for the other."""

    def __init__(self, small: int) -> None:
        super().__init__()
        self._small, self._meeting, self._before = small, threading.Barrier(2), itertools.count()

    def read(self, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int) -> int:
        if nbytes <= self._small and next(self._before) < 2:
            self._meeting.wait(timeout=20)
        return super().read(file, offset, nbytes, buffer, buffer_offset)


def test_small_units_that_a_large_one_makes_room_for_are_read_at_the_same_time(tmp_path: Path) -> None:
    sizes = {"large": 400_000, "small0": 50_000, "small1": 50_000, "small2": 50_000}
    save_file({name: torch.ones(size, dtype=torch.uint8) for name, size in sizes.items()}, tmp_path / "a.safetensors")
    entries = SafetensorsIndex.open(tmp_path).entries
    units = [StreamUnit(name, (StreamTensor(name, entries[name]),)) for name in sizes]
    budget = WeightStream.required_bytes(units, CPU)
    stream = WeightStream(units, reader=_MeetingReader(50_000), budget_bytes=budget, device=CPU, threads=3)
    try:
        for unit in units:
            assert stream.acquire(unit.name)[unit.name].sum() == sizes[unit.name]
            stream.release(unit.name)
    finally:
        stream.close()


@settings(max_examples=15, deadline=None)
@given(depth=st.integers(1, 4), spare=st.integers(0, 300_000), backwards=st.booleans())
def test_memory_that_is_held_is_never_written_to(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]], depth: int, spare: int, backwards: bool
) -> None:
    """Several units are held at once and given back in either order; until then their bytes stay."""
    index, tensors = files
    units = layer_units(index, 6)
    budget = (depth + 1) * WeightStream.required_bytes(units, CPU) + spare
    stream = WeightStream(units, reader=BufferedReader(), budget_bytes=budget, device=CPU, threads=2, chunk_bytes=8192)
    try:
        turns = itertools.cycle(units)
        for _ in range(8):
            held = [(unit, stream.acquire(unit.name)) for unit in itertools.islice(turns, depth)]
            spans = [
                (weight.data_ptr(), weight.data_ptr() + weight.nbytes)
                for _, weights in held
                for weight in weights.values()
                if weight.nbytes
            ]
            assert all(first[1] <= second[0] for first, second in itertools.pairwise(sorted(spans)))
            for unit, weights in reversed(held) if backwards else held:
                assert all(weight.equal(tensors[name]) for name, weight in weights.items())
                stream.release(unit.name)
    finally:
        stream.close()


def test_units_are_read_ahead_across_the_wrap_while_none_is_asked_for(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]],
) -> None:
    index, _ = files
    units = layer_units(index, 3)
    read: list[str] = []
    wrapped = threading.Event()

    def on_event(kind: str, name: str, start: float, end: float, nbytes: int) -> None:
        if kind != "read":
            return
        assert start <= end
        assert nbytes > 0
        if name == units[0].name and units[2].name in read:
            wrapped.set()
        read.append(name)

    stream = WeightStream(
        units, reader=BufferedReader(), budget_bytes=10 << 20, device=CPU, threads=1, on_event=on_event
    )
    try:
        stream.acquire(units[0].name)
        stream.release(units[0].name)
        assert wrapped.wait(20)
    finally:
        stream.close()


def test_the_counters_tell_bytes_by_link_and_the_seconds_waited(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]],
) -> None:
    index, tensors = files
    on_disk = StreamTensor("disk", index.entries["0.torch.float32.0"])
    name = next(name for name in tensors if name.endswith("20000") and "bfloat16" in name)
    units = [
        StreamUnit("a", (on_disk, StreamTensor("x", index.entries[name]))),
        StreamUnit("b", (StreamTensor("y", tensors[name]),)),
    ]
    stream = WeightStream(units, reader=BufferedReader(), budget_bytes=1 << 20, device=CPU)
    for unit in units:
        stream.acquire(unit.name)
    stream.close()
    statistics = stream.statistics()
    assert statistics.bytes_moved["disk>device"] >= 40_000
    assert statistics.bytes_moved["host>device"] >= 40_000
    assert statistics.units_delivered == 2
    assert statistics.wait_seconds > 0
    assert statistics.busy_seconds["read"] > 0


def test_a_budget_below_the_largest_unit_is_refused_with_its_name_and_need(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]],
) -> None:
    units = layer_units(files[0])
    needed = WeightStream.required_bytes(units, CPU)
    with pytest.raises(CapacityError, match=rf"'layer\d', which need {needed} bytes") as caught:
        WeightStream(units, reader=BufferedReader(), budget_bytes=needed - 1, device=CPU)
    assert str(needed) in caught.value.remedy


def test_units_out_of_turn_are_refused_and_named(files: tuple[SafetensorsIndex, dict[str, torch.Tensor]]) -> None:
    units = layer_units(files[0])
    stream = WeightStream(units, reader=BufferedReader(), budget_bytes=4 << 20, device=CPU)
    try:
        with pytest.raises(EngineError, match=r"next unit is 'layer0', not 'layer2'"):
            stream.acquire("layer2")
        with pytest.raises(EngineError, match="without being held"):
            stream.release("layer0")
    finally:
        stream.close()


def test_asking_for_more_than_fits_beside_what_is_held_is_an_error_and_no_deadlock(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]],
) -> None:
    units = layer_units(files[0])
    budget = WeightStream.required_bytes(units, CPU)
    stream = WeightStream(units, reader=BufferedReader(), budget_bytes=budget, device=CPU)
    try:
        with pytest.raises(EngineError, match="not released"):
            acquire_all(stream, units)
        stream.release("layer0")
    finally:
        stream.close()


class BrokenReader(BufferedReader):
    """Reads until `allowed` reads are done, then does what it is told."""

    def __init__(self, allowed: int, then: Callable[[], None]) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._allowed = allowed
        self._then = then

    def read(self, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int) -> int:
        if next(self._numbers) >= self._allowed:
            self._then()
        return super().read(file, offset, nbytes, buffer, buffer_offset)


def failing() -> None:
    raise OSError(5, "Input/output error")


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Whatever happens, the workers are gone at the end."""
    before = threading.active_count()
    yield
    assert threading.active_count() <= before


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize("allowed", [0, 1, 17])
def test_a_reader_that_fails_surfaces_in_the_callers_thread_with_file_and_offset(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]], allowed: int
) -> None:
    units = layer_units(files[0])
    budget = WeightStream.required_bytes(units, CPU)
    stream = WeightStream(units, reader=BrokenReader(allowed, failing), budget_bytes=budget, device=CPU)
    with pytest.raises(EngineError, match=r"byte \d+ of .*shard\d\.safetensors failed.*Input/output error"):
        run_forever(stream, units)
    stream.close()


@pytest.mark.usefixtures("no_hang")
def test_a_file_that_is_cut_while_the_job_runs_is_an_error_with_file_and_offset(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({str(number): torch.ones(50_000) for number in range(4)}, file)
    units = [
        StreamUnit(name, (StreamTensor(name, entry),))
        for name, entry in SafetensorsIndex.open(tmp_path).entries.items()
    ]
    stream = WeightStream(units, reader=DirectReader(), budget_bytes=300_000, device=CPU)
    with file.open("r+b") as stream_of_file:
        stream_of_file.truncate(100_000)
    with pytest.raises(EngineError, match=r"of .*model\.safetensors failed: the file ends before that"):
        run_forever(stream, units)
    stream.close()


@pytest.mark.usefixtures("no_hang")
def test_closing_frees_a_caller_that_waits(files: tuple[SafetensorsIndex, dict[str, torch.Tensor]]) -> None:
    gate = threading.Event()
    units = layer_units(files[0])
    stream = WeightStream(
        units, reader=BrokenReader(0, lambda: gate.wait(20) and None), budget_bytes=4 << 20, device=CPU
    )
    errors: list[EngineError] = []

    def wait() -> None:
        try:
            stream.acquire("layer0")
        except EngineError as error:
            errors.append(error)

    caller = threading.Thread(target=wait)
    caller.start()
    closer = threading.Thread(target=stream.close)
    closer.start()
    caller.join(20)
    gate.set()
    closer.join(20)
    assert "closed" in errors[0].message
    stream.close()


def test_the_callers_own_thread_count_is_left_alone(files: tuple[SafetensorsIndex, dict[str, torch.Tensor]]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        WeightStream(layer_units(files[0]), reader=BufferedReader(), budget_bytes=4 << 20, device=CPU).close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_courier_that_stages_its_bytes_delivers_the_same_ones(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]],
) -> None:
    """The way to devices whose memory cannot be read into, with main memory in the device's place."""
    index, tensors = files
    unit = StreamUnit("all", tuple(StreamTensor(name, entry) for name, entry in index.entries.items()))
    regions = unit_regions(unit, 10_000, item_phase)
    courier = CopyingCourier(
        BufferedReader(), torch.zeros(sum(region.nbytes for region in regions), dtype=torch.uint8), 1 << 16
    )
    start = 0
    for region in regions:
        for job in region.jobs:
            courier.carry(job, start + job.at, ())
        for view in region.views:
            place = start + view.at
            nbytes = view.dtype.itemsize * view.shape[0]
            assert courier.ring[place : place + nbytes].view(view.dtype).equal(tensors[view.name])
        start += region.nbytes
    assert courier.bytes_moved["disk>device"] >= index.nbytes


@pytest.mark.gpu
def test_on_cuda_every_tensor_equals_its_source_in_every_pass(
    files: tuple[SafetensorsIndex, dict[str, torch.Tensor]],
) -> None:
    """The result is computed on the device before the unit is released, and read only at the end."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    index, tensors = files
    cuda = torch.device("cuda")
    units = layer_units(index)
    units.append(
        StreamUnit("host", tuple(StreamTensor(name, tensors[name].pin_memory(), torch.float32) for name in tensors))
    )
    stream = WeightStream(units, reader=DirectReader(), budget_bytes=4 << 20, device=cuda, threads=2, chunk_bytes=8192)
    copies = []
    for unit in units * 5:
        copies += [(name, weight.clone()) for name, weight in stream.acquire(unit.name).items()]
        stream.release(unit.name)
    stream.close()
    for name, weight in copies:
        assert weight.cpu().equal(tensors[name].to(weight.dtype))
