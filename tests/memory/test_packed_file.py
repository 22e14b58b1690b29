"""A checkpoint is quantised once: the file is shared, resumable, and rebuilt when it is torn or stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.errors import CapacityError, FlexbatchError, ModelError, OutputError
from flexbatch.memory import packing, source_pieces
from flexbatch.memory.compressed_weight import PlainLayout
from flexbatch.memory.direct_io import DirectReader
from flexbatch.memory.int8_layout import Int8Layout
from flexbatch.memory.packed_file import Layout, PackedTensor, open_packed
from flexbatch.memory.quantization import QuantizedLayout, QuantizedTensor, dequantize, quantize
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.memory.source_pieces import Piece, PieceReader
from flexbatch.memory.transfer import StreamTensor, StreamUnit, WeightStream

LAYOUTS: Mapping[str, Layout] = {
    "layers.0.up": QuantizedLayout((96, 64), 4, 32),
    "layers.0.down": QuantizedLayout((64, 96), 8, 32, -2),
    "layers.1.experts": QuantizedLayout((4, 32, 64), 4, 64),
    "layers.1.out": Int8Layout((33, 63)),
}


def write_checkpoint(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(layout.shape, generator=generator).bfloat16() for name, layout in LAYOUTS.items()}
    save_file({**tensors, "norm": torch.ones(64)}, folder / "model.safetensors")
    return tensors


def check(packed: Mapping[str, PackedTensor], tensors: Mapping[str, torch.Tensor]) -> None:
    assert set(packed) == set(LAYOUTS)
    for name, found in packed.items():
        for (part, _, _), expected in zip(found.layout.parts, LAYOUTS[name].pack(tensors[name]), strict=True):
            entry = found.parts[part]
            assert load_file(entry.file)[entry.name].equal(expected)


def data_file(cache: Path) -> Path:
    (file,) = cache.glob("*.safetensors")
    return file


def count_packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are packed, as it happens."""
    names: list[str] = []
    real = PieceReader.read

    def read(self: PieceReader, wanted: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        for piece, tensor in real(self, wanted):
            if piece.first == 0:
                names.append(piece.entry.name)
            yield piece, tensor

    monkeypatch.setattr(PieceReader, "read", read)
    return names


def test_a_packed_checkpoint_is_made_once_and_holds_the_quantised_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_pieces, "SLICE_BYTES", 2000)  # several slices for a tensor
    tensors = write_checkpoint(tmp_path)
    index = SafetensorsIndex.open(tmp_path)
    read = count_packed(monkeypatch)
    progress: list[tuple[int, int]] = []
    check(open_packed(index, LAYOUTS, tmp_path / "cache", on_progress=lambda *seen: progress.append(seen)), tensors)
    assert len(read) == len(LAYOUTS)
    assert progress[-1][0] == progress[-1][1] == sum(tensor.nbytes for tensor in tensors.values())
    check(open_packed(index, LAYOUTS, tmp_path / "cache"), tensors)
    assert len(read) == len(LAYOUTS)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_packed_weights_stream_like_any_others(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    packed = open_packed(SafetensorsIndex.open(tmp_path), LAYOUTS, tmp_path / "cache")
    name = "layers.0.up"
    layout = packed[name].layout
    assert isinstance(layout, QuantizedLayout)
    unit = StreamUnit("layer", tuple(StreamTensor(part, entry) for part, entry in packed[name].parts.items()))
    stream = WeightStream([unit], reader=DirectReader(), budget_bytes=1 << 20, device=torch.device("cpu"))
    weights = stream.acquire("layer")
    found = dequantize(QuantizedTensor(weights["q"], weights["scale"], weights["minimum"], layout), torch.empty(96, 64))
    assert found.equal(dequantize(quantize(tensors[name], 4, 32), torch.empty(96, 64)))
    stream.close()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "no manifest", "torn manifest"])
def test_a_torn_file_is_found_and_rebuilt(tmp_path: Path, damage: str) -> None:
    tensors = write_checkpoint(tmp_path)
    index, cache = SafetensorsIndex.open(tmp_path), tmp_path / "cache"
    for _ in range(2):
        open_packed(index, LAYOUTS, cache)
    file = data_file(cache)
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-10] ^= 1
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        file.with_suffix(".json").unlink()
    else:
        file.with_suffix(".json").write_text('{"source": ')
    check(open_packed(index, LAYOUTS, cache), tensors)


def test_a_stale_file_is_replaced_when_the_source_changes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    cache = tmp_path / "cache"
    open_packed(SafetensorsIndex.open(tmp_path), LAYOUTS, cache)
    tensors = write_checkpoint(tmp_path, seed=1)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    check(open_packed(SafetensorsIndex.open(tmp_path), LAYOUTS, cache), tensors)
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_packing_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Journalled tensors are not packed again, unless their bytes are not the ones that were written."""
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 1)
    tensors = write_checkpoint(tmp_path)
    index, cache = SafetensorsIndex.open(tmp_path), tmp_path / "cache"
    read = count_packed(monkeypatch)

    def stop(done: int, total: int) -> None:
        if len(read) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_packed(index, LAYOUTS, cache, on_progress=stop)
    assert not list(cache.glob("*.safetensors"))
    (partial,), (journal,) = cache.glob("*.partial"), cache.glob("*.journal")
    journal.write_text(journal.read_text() + '["layers.1')  # as a kill in the middle of a line leaves it
    damaged, done = read[0], read[1:]
    with partial.open("r+b") as stream:
        header = int.from_bytes(stream.read(8), "little")
        begin = json.loads(stream.read(header))[f"{damaged}.q"]["data_offsets"][0]
        stream.seek(8 + header + begin)
        stream.write(b"\xff" * 3)
    read.clear()
    check(open_packed(index, LAYOUTS, cache), tensors)
    assert damaged in read
    assert not set(read) & set(done)


KILLED = """
import sys
from pathlib import Path
from flexbatch.memory import packing, source_pieces
from flexbatch.memory.compressed_weight import PlainLayout
from flexbatch.memory.packed_file import open_packed
from flexbatch.memory.quantization import QuantizedLayout
from flexbatch.memory.safetensors_index import SafetensorsIndex
packing.JOURNAL_BYTES = 1
index = SafetensorsIndex.open(Path(sys.argv[1]))
layouts = {name: QuantizedLayout(entry.shape, 4, 32) for name, entry in index.entries.items()}
open_packed(index, layouts, Path(sys.argv[1]) / "cache", on_progress=lambda done, total: print(done, flush=True))
"""


def test_a_process_killed_while_packing_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    tensors = {f"layer{number}": torch.randn(256, 256) for number in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    index = SafetensorsIndex.open(tmp_path)
    layouts = {name: QuantizedLayout(entry.shape, 4, 32) for name, entry in index.entries.items()}
    packed = open_packed(index, layouts, tmp_path / "cache")
    loaded = load_file(packed["layer0"].parts["q"].file)
    for name, tensor in tensors.items():
        assert loaded[f"{name}.q"].equal(quantize(tensor, 4, 32).values)


def test_two_runs_that_need_the_file_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write_checkpoint(tmp_path)
    read = count_packed(monkeypatch)
    found: list[Mapping[str, PackedTensor]] = []

    def run() -> None:
        index = SafetensorsIndex.open(tmp_path)
        found.append(open_packed(index, LAYOUTS, tmp_path / "cache", on_progress=lambda *_: time.sleep(0.01)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == len(LAYOUTS)
    for packed in found:
        check(packed, tensors)


def test_a_tensor_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    index = SafetensorsIndex.open(tmp_path)
    for layouts in ({"ghost": Int8Layout((2, 2))}, {"norm": Int8Layout((2, 2))}):
        with pytest.raises(ModelError, match=next(iter(layouts))):
            open_packed(index, layouts, tmp_path / "cache")


@pytest.mark.parametrize(("number", "kind"), [(28, CapacityError), (5, FlexbatchError)])
def test_a_full_or_broken_disk_is_a_clear_error_and_leaves_no_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[FlexbatchError]
) -> None:
    write_checkpoint(tmp_path)

    def broken(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(kind) as caught:
        open_packed(SafetensorsIndex.open(tmp_path), LAYOUTS, tmp_path / "cache")
    assert caught.value.remedy
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_disk_that_fails_while_the_file_is_written_is_a_clear_error_and_leaves_no_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the writing thread comes to whoever wanted the file."""
    tensors = write_checkpoint(tmp_path)
    real = os.pwrite
    written: list[int] = []

    def broken(descriptor: int, raw: memoryview, offset: int) -> int:
        written.append(offset)
        if len(written) > 3:
            raise OSError(5, os.strerror(5))
        return real(descriptor, raw, offset)

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OutputError, match="Input/output error"):
        open_packed(SafetensorsIndex.open(tmp_path), LAYOUTS, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    monkeypatch.undo()
    check(open_packed(SafetensorsIndex.open(tmp_path), LAYOUTS, tmp_path / "cache"), tensors)


def test_what_is_packed_in_the_memory_of_its_source_is_not_read_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain weights are packed without a copy, and the next ones are read while one is written, slowly."""
    real = os.pwrite

    def slow(descriptor: int, raw: memoryview, offset: int) -> int:
        time.sleep(0.01)
        return real(descriptor, raw, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    tensors = {f"layer{number}": torch.randn(700, 300).bfloat16() for number in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    layouts = {name: PlainLayout((700, 300)) for name in tensors}
    packed = open_packed(SafetensorsIndex.open(tmp_path), layouts, tmp_path / "cache")
    loaded = load_file(packed["layer0"].parts["plain"].file)
    assert all(loaded[f"{name}.plain"].equal(tensor) for name, tensor in tensors.items())


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"model\.cache_dir"):
        open_packed(SafetensorsIndex.open(tmp_path), LAYOUTS, tmp_path / "file" / "cache")
