"""Rows of the KV cache on disk: every token is there in every pass, whatever joins, grows, moves and is shifted."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from flexbatch.engine import kv_disk, layer_store
from flexbatch.engine.carried_keys import OwnKeys
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.kv_disk import DiskSlots
from flexbatch.engine.kv_traffic import DiskTraffic
from flexbatch.engine.layer_store import LayerStore
from flexbatch.engine.opening import Limits
from flexbatch.engine.storage import Storage
from flexbatch.errors import CapacityError, EngineError, OutputError
from flexbatch.memory.direct_io import PAGE, AlignedBuffer
from flexbatch.memory.disk_file import DiskFile
from flexbatch.plan import kv_rooms
from flexbatch.plan.kv_rooms import AHEAD_BYTES, OUTGOING_BLOCKS, ROOM_BYTES, reading_bytes, reading_rooms
from flexbatch.plan.model_spec import COMPRESSED
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.records import Request, Sampling
from tests.engine.families import prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

CPU = torch.device("cpu")
LAYERS, SLOTS, HEADS, SPAN, SLACK, TAIL = 3, 4, 2, 12, 4, 3
SIZES = {16: 8, 8: 8, 4: 8, COMPRESSED: 64}
"""Of a head, by the bits of the cache."""
WIDE = 512
"""Of a head two columns of which take half a page."""
States = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def short_tails(step: int = kv_rooms.BLOCK_STEP) -> Iterator[None]:
    """Rows outgrow what waits in memory after `TAIL` tokens, and their blocks have a multiple of `step` columns."""
    whole, steps = kv_rooms.TAIL_COLUMNS, kv_rooms.BLOCK_STEP
    kv_rooms.TAIL_COLUMNS = kv_disk.TAIL_COLUMNS = layer_store.TAIL_COLUMNS = TAIL  # type: ignore[attr-defined]
    kv_rooms.BLOCK_STEP = step
    try:
        yield
    finally:
        kv_rooms.TAIL_COLUMNS = kv_disk.TAIL_COLUMNS = layer_store.TAIL_COLUMNS = whole  # type: ignore[attr-defined]
        kv_rooms.BLOCK_STEP = steps


@contextmanager
def small_rooms(room_bytes: int, ahead_bytes: int) -> Iterator[None]:
    """Slots are read into rooms of so many bytes (one at least), and so many bytes ahead; the fewer there are, the
    fewer are brought to attention at a time."""
    kept = kv_rooms.ROOM_BYTES, kv_rooms.AHEAD_BYTES, kv_rooms.BROUGHT_BYTES
    kv_rooms.ROOM_BYTES, kv_rooms.AHEAD_BYTES, kv_rooms.BROUGHT_BYTES = room_bytes, ahead_bytes, room_bytes
    try:
        yield
    finally:
        kv_rooms.ROOM_BYTES, kv_rooms.AHEAD_BYTES, kv_rooms.BROUGHT_BYTES = kept


class Rows:
    """An arena beside plain lists of what each row's tokens are, layer by layer."""

    def __init__(
        self,
        tiers: tuple[int, int],
        bits: int,
        seed: int,
        folder: Path,
        *,
        gathers: bool = False,
        waits: bool = False,
        size: int = 0,
    ) -> None:
        self.gathers, self.waits = gathers, waits
        self._generator, self._size = torch.Generator().manual_seed(seed), size or SIZES[bits]
        self.storage = Storage(CPU, Limits().budgets(), folder)
        self.arena = KVArena([tiers] * LAYERS, SLOTS, SPAN, SLACK, self.storage, bits)
        self.tokens: dict[int, list[torch.Tensor]] = {}  # by slot: one `[layers, 2, heads, size]` for each token
        self.entering: tuple[int, list[torch.Tensor], int] | None = None

    def new(self, count: int) -> list[torch.Tensor]:
        states = torch.randn(LAYERS, 2, 1, HEADS, count, self._size, generator=self._generator).bfloat16()
        for layer, store in enumerate(self.arena.layers):
            store.prepare(*states[layer])
        return list(states[:, :, 0].unbind(3))

    def seen(self, tokens: list[torch.Tensor], layer: int) -> torch.Tensor:
        """What the cache has left of a row's tokens, `[2, heads, tokens, size]`."""
        store, states = self.arena.layers[layer], self._states(tokens, layer)
        return torch.stack(store.seen(store.pack(*states), *states))[:, 0]

    def join(self, slot: int, count: int) -> None:
        tokens = self.tokens[slot] = self.new(count)
        for layer, store in enumerate(self.arena.layers):
            packed = store.pack(*self._states(tokens, layer))
            padded = tuple(pad(part, (0, 0, 2, 0), value=1) for part in packed)  # as beside a longer prompt
            store.write_prompts([slot], self.arena.end, padded, [count])

    def enter(self, slot: int, first: int, rest: int) -> None:
        """Half of a prompt; the other half comes with the next pass."""
        self.arena.reserve(1, [0] * self._in_use(slot))
        self.entering = (slot, self.new(first), rest)
        self._extend(slot, self.entering[1], 0, self.arena.end + 1 - rest)

    def move(self, source: int, target: int) -> None:
        self.arena.move(source, target)
        self.tokens[target] = self.tokens.pop(source)

    def leave(self, slot: int) -> None:
        del self.tokens[slot]
        self.arena.vacate(slot)

    def one_pass(self) -> None:
        """All rows gain a token, and find what they had; then the row that enters gets the rest of its prompt."""
        self.arena.advance(1)
        self.arena.reserve(0, [0] * self._in_use())
        if self.tokens:
            self._decode()
        if self.entering is not None:
            slot, tokens, rest = self.entering
            self.entering, self.tokens[slot] = None, tokens + self.new(rest)
            self._extend(slot, self.tokens[slot], len(tokens), self.arena.end)

    def _decode(self) -> None:
        rows, longest = 1 + max(self.tokens), 1 + max(map(len, self.tokens.values()))
        fresh = torch.stack([token for _ in range(rows) for token in self.new(1)])
        for slot, tokens in self.tokens.items():
            tokens.append(fresh[slot])
        for layer, store in enumerate(self.arena.layers):
            store.write_column(self.arena.end, fresh[:, layer, 0, :, None], fresh[:, layer, 1, :, None])
            first = self.arena.end + 1 - longest
            for part in self._read(store, rows, first):
                for row, slot in enumerate(range(rows)[part.rows]):
                    if tokens := self.tokens.get(slot, []):
                        start = longest - len(tokens) - (part.before[row] if part.before else 0)
                        read = torch.stack([part.keys[row], part.values[row]])[:, :, start : start + len(tokens)]
                        assert read.equal(self.seen(tokens, layer))

    def _read(self, store: LayerStore, rows: int, first: int) -> Iterator[OwnKeys]:
        if self.waits:
            time.sleep(0.002)  # what is read ahead has arrived
        if self.gathers:
            yield OwnKeys(*store.gathered(rows, first, self.arena.end, CPU), slice(rows))
        else:
            yield from store.read(rows, first, self.arena.end, CPU)

    def _extend(self, slot: int, tokens: list[torch.Tensor], held: int, end: int) -> None:
        for layer, store in enumerate(self.arena.layers):
            new = self._states(tokens[held:], layer)
            seen = store.extend(slot, end + 1 - len(tokens), end, *new)
            assert torch.stack(seen)[:, 0].equal(self.seen(tokens, layer))
            if store.is_compressed:
                before = store.extend_behind(slot, end + 1 - len(tokens), end, *new)
                assert (before is None) == (held == 0)
                assert before is None or torch.stack(before)[:, 0].equal(self.seen(tokens[:held], layer))

    def _in_use(self, slot: int = -1) -> int:
        return 1 + max([slot, *self.tokens, *([self.entering[0]] if self.entering else [])])

    @staticmethod
    def _states(tokens: list[torch.Tensor], layer: int) -> States:
        keys, values = torch.stack(tokens, 3)[layer]
        return keys[None], values[None]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(list(SIZES)),
    tiers=st.sampled_from([(0, 0), (2, 0), (1, 1), (3, 0)]),
    rooms=st.sampled_from([(1, 1), (6 * PAGE, 1), (1, 18 * PAGE), (1, 1 << 20), (ROOM_BYTES, AHEAD_BYTES)]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("join"), st.integers(0, 3), st.integers(1, 5)),
            st.tuples(st.just("enter"), st.integers(0, 3), st.integers(1, 4)),
            st.tuples(st.just("leave"), st.integers(0, 3), st.just(0)),
            st.tuples(st.just("move"), st.integers(0, 3), st.integers(0, 3)),
            st.tuples(st.just("pass"), st.just(0), st.integers(1, 4)),
        ),
        max_size=20,
    ),
    seed=st.integers(0, 99),
    gathers=st.booleans(),
    waits=st.booleans(),
    step=st.sampled_from([1, 2, 5, 64]),
    size=st.sampled_from([0, WIDE]),
)
def test_every_token_of_every_row_is_read_in_every_pass(
    bits: int,
    tiers: tuple[int, int],
    rooms: tuple[int, int],
    steps: list[tuple[str, int, int]],
    seed: int,
    gathers: bool,
    waits: bool,
    step: int,
    size: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder, small_rooms(*rooms), short_tails(step):
        rows = Rows(tiers, bits, seed, Path(folder), gathers=gathers, waits=waits, size=size if bits == 16 else 0)
        for kind, slot, number in steps:
            busy = set(rows.tokens) | ({rows.entering[0]} if rows.entering else set())
            if kind == "join" and slot not in busy:
                rows.join(slot, number)
            elif kind == "enter" and slot not in busy and rows.entering is None:
                rows.enter(slot, number, 1 + seed % 3)
            elif kind == "leave" and slot in rows.tokens:
                rows.leave(slot)
            elif kind == "move" and slot in rows.tokens and number < slot and number not in busy:
                rows.move(slot, number)
            for _ in range(number if kind == "pass" else 0):
                for full in [at for at, tokens in rows.tokens.items() if len(tokens) == SPAN]:
                    rows.leave(full)
                rows.one_pass()
        rows.arena.close()
        rows.storage.close()


@pytest.mark.parametrize("passes_before", range(SLACK + 1))
def test_a_row_that_entered_in_parts_keeps_its_tokens_when_columns_move_before_it_is_written(
    passes_before: int, tmp_path: Path
) -> None:
    with short_tails():
        rows = Rows((0, 0), 16, 0, tmp_path)
        for _ in range(passes_before):
            rows.one_pass()
        rows.enter(0, 3, 2)
        for _ in range(TAIL + 1):
            rows.one_pass()
        rows.arena.close()
        rows.storage.close()


def test_rows_on_disk_are_written_as_often_as_the_plan_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_rooms, "TAIL_COLUMNS", TAIL)
    with short_tails():
        rows = Rows((0, 0), 16, 0, tmp_path)
        for slot in range(SLOTS):
            rows.join(slot, 1)
        written = []
        for _ in range(3 * TAIL):
            rows.one_pass()
            written.append(rows.arena.statistics().bytes_moved["device>disk"])
        block = 2 * PAGE  # keys and values, each less than a page
        joined, new_tokens = block * LAYERS * SLOTS, 1 + 3 * TAIL
        assert written[0] == joined
        assert (written[-1] - joined) / (joined * 3 * TAIL) == kv_rooms.written_anew(new_tokens)
        rows.arena.close()
        rows.storage.close()


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize("kv", [Shares(0, 0), Shares(0.4, 0.2), Shares(0, 1)], ids=["disk", "mixed", "host"])
def test_greedy_tokens_are_those_of_transformers_with_rows_elsewhere(family: str, kv: Shares, tmp_path: Path) -> None:
    """Brought to attention one by one."""
    longest, new_tokens, rows = 20, 6, prompts(9, 20)
    with short_tails(), small_rooms(1, 1):
        running = engine(saved(family), Policy(kv=kv, slots=4, prefill_tokens=12), longest + new_tokens, tmp_path)
        sampling = Sampling(max_new_tokens=new_tokens)
        done, _ = answer(running, (Request(index, row, sampling) for index, row in enumerate(rows)))
    for index, row in enumerate(rows):
        assert_same_tokens(family, row, done[index].token_ids, reference(family, row, new_tokens))


def test_what_is_on_disk_is_in_memory_only_by_a_few_layers(tmp_path: Path) -> None:
    rows = Rows((0, 0), 16, 0, tmp_path)
    for slot in range(SLOTS):
        rows.join(slot, 3)
    rows.one_pass()
    booked = rows.storage.budgets[Tier.DEVICE].by_purpose["KV from disk"]
    block = 2 * PAGE  # keys and values, each less than a page
    tails = LAYERS * SLOTS * 2 * HEADS * kv_disk.TAIL_COLUMNS * SIZES[16] * 2
    at_once, rooms = reading_rooms(SLOTS, block)
    assert (at_once, rooms) == (SLOTS, 2)
    assert booked == tails + (at_once * rooms + OUTGOING_BLOCKS) * block
    rows.arena.close()
    rows.storage.close()


def test_what_the_next_pass_reads_first_is_on_its_way_when_a_pass_ends(tmp_path: Path) -> None:
    rows = Rows((0, 0), 16, 0, tmp_path)
    for slot in range(SLOTS):
        rows.join(slot, 3)
    block, read = 2 * PAGE, []
    for _ in range(3):
        rows.one_pass()
        read.append(rows.arena.statistics().bytes_moved["disk>device"])
    assert read == [(passes * LAYERS + 1) * SLOTS * block for passes in (1, 2, 3)]  # nothing twice
    rows.arena.close()
    rows.storage.close()


def test_a_row_that_changes_its_slot_on_disk_is_neither_read_nor_written(tmp_path: Path) -> None:
    rows = Rows((0, 0), 16, 0, tmp_path)
    rows.join(2, 3)
    rows.join(3, 2)
    rows.one_pass()
    moved = rows.arena.statistics().bytes_moved
    rows.move(3, 0)
    rows.move(2, 1)
    assert rows.arena.statistics().bytes_moved == moved
    for _ in range(2 * SLACK):
        rows.one_pass()
    rows.arena.close()
    rows.storage.close()


def test_a_slot_that_a_row_has_left_is_neither_read_nor_written(tmp_path: Path) -> None:
    with short_tails():
        rows = Rows((0, 0), 16, 0, tmp_path)
        rows.join(0, 1)
        rows.join(2, 1)
        rows.join(1, 1)
        rows.leave(0)
        for _ in range(TAIL - 1):  # no row outgrows its tail
            rows.one_pass()
        block, moved = 2 * PAGE, rows.arena.statistics().bytes_moved
        assert moved["device>disk"] == 3 * LAYERS * block
        assert moved["disk>device"] == 2 * block * ((TAIL - 1) * LAYERS + 1)  # and what the next pass reads first
        rows.arena.close()
        rows.storage.close()


def test_of_a_short_row_no_more_is_read_than_it_has_before_it_is_written_again(tmp_path: Path) -> None:
    with short_tails(step=1):
        rows = Rows((0, 0), 16, 0, tmp_path, size=WIDE)
        columns = HEADS * WIDE * 2 * 2  # bytes of a token's keys and values
        rows.join(0, 1)
        rows.join(1, SPAN - TAIL - 2)
        rows.one_pass()
        moved = rows.arena.statistics().bytes_moved
        written = (1 + TAIL + SPAN - 2) * columns  # both whole pages
        assert moved["device>disk"] == LAYERS * written
        # And what there is room for of what the next pass reads first.
        assert moved["disk>device"] == LAYERS * written + (1 + TAIL) * columns
        rows.arena.close()
        rows.storage.close()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_behind_a_rows_tokens_there_are_numbers_whatever_its_block_held_before(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outgoing = DiskTraffic.outgoing

    def full_of_no_numbers(traffic: DiskTraffic, nbytes: int) -> AlignedBuffer:
        block = outgoing(traffic, nbytes)
        block.tensor.fill_(0xFF)
        return block

    monkeypatch.setattr(DiskTraffic, "outgoing", full_of_no_numbers)
    rows = Rows((0, 0), bits, 0, tmp_path)
    for slot in range(SLOTS):
        rows.join(slot, 2 + slot)
    rows.one_pass()
    for store in rows.arena.layers:
        for part in store.read(SLOTS, 0, rows.arena.end, CPU):
            assert part.keys.isfinite().all()
            assert part.values.isfinite().all()
    rows.arena.close()
    rows.storage.close()


def test_a_row_that_lies_in_another_way_leaves_what_comes_after_it_under_way(tmp_path: Path) -> None:
    with short_tails(step=1), small_rooms(1, 1 << 20):
        rows = Rows((0, 0), 16, 0, tmp_path, size=WIDE, waits=True)
        for slot in range(SLOTS):
            rows.join(slot, 5)
        rows.one_pass()
        read = rows.arena.statistics().bytes_moved["disk>device"]
        rows.leave(1)
        rows.join(1, 1)
        rows.one_pass()
        columns = HEADS * WIDE * 2 * 2
        again = rows.arena.statistics().bytes_moved["disk>device"] - read
        # All layers' rows, for this pass or the next, and in the first layer, whose others were under way, the new one.
        assert again == (LAYERS * ((SLOTS - 1) * (5 + TAIL) + 1 + TAIL) + 1 + TAIL) * columns
        rows.arena.close()
        rows.storage.close()


@pytest.mark.parametrize("passes", range(4))
def test_rows_that_have_arrived_are_read_together_as_they_are_now(passes: int, tmp_path: Path) -> None:
    with short_tails(), small_rooms(1, 1 << 20):
        rows = Rows((0, 0), 16, 0, tmp_path, waits=True)
        for slot in range(SLOTS):
            rows.join(slot, 1)
        for _ in range(passes):  # the rooms of each begin elsewhere
            rows.one_pass()
        for slot in (1, 0, 3, 2):
            rows.one_pass()
            rows.leave(slot)
            rows.one_pass()
            rows.join(slot, 2)
        rows.arena.close()
        rows.storage.close()


@pytest.mark.parametrize("rooms", [(1, 1), (1, 1 << 20), (ROOM_BYTES, AHEAD_BYTES)])
def test_a_slot_without_a_row_is_read_as_zeros(rooms: tuple[int, int], tmp_path: Path) -> None:
    with small_rooms(*rooms):
        rows = Rows((0, 0), 16, 0, tmp_path, waits=True)
        for slot in range(SLOTS):
            rows.join(slot, 3)
        rows.one_pass()
        rows.leave(1)
        rows.one_pass()  # whose first rows were on their way
        rows.one_pass()
        for store in rows.arena.layers:
            for part in store.read(SLOTS, 0, rows.arena.end, CPU):
                for row, slot in enumerate(range(SLOTS)[part.rows]):
                    assert bool(part.keys[row].any()) == bool(part.values[row].any()) == (slot != 1)
        rows.arena.close()
        rows.storage.close()


@given(slots=st.integers(1, 500), block=st.integers(1, 40 << 20), more=st.integers(0, 6 * PAGE))
def test_rooms_take_no_more_than_the_plan_counts_for_blocks_that_are_no_smaller(
    slots: int, block: int, more: int
) -> None:
    at_once, rooms = reading_rooms(slots, block)
    assert rooms >= 2
    assert at_once * rooms * block <= reading_bytes(slots, block + more)


def test_a_disk_that_fails_is_an_error_of_the_pass_with_folder_byte_and_remedy(tmp_path: Path) -> None:
    rows = Rows((0, 0), 16, 0, tmp_path)
    rows.join(0, 3)
    rows.one_pass()
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, rows.arena.layers[0].segments[0].slots._blocks.file._descriptor)  # type: ignore[union-attr]
    os.close(full)
    rows.join(1, 2)
    with pytest.raises(EngineError, match=r"Writing \d+ bytes at byte 8192 of a file for tensors in ") as caught:
        rows.one_pass()
    assert str(tmp_path) in str(caught.value)
    assert "offload.disk_dir" in caught.value.remedy
    rows.arena.close()
    rows.storage.close()


def test_a_read_that_failed_before_anyone_waited_for_it_is_an_error_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_rooms(1, 1 << 20):
        rows = Rows((0, 0), 16, 0, tmp_path)
        for slot in range(SLOTS):
            rows.join(slot, 3)
        slots, read = rows.arena.layers[0].segments[0].slots, DiskFile.read
        assert isinstance(slots, DiskSlots)

        def slow_then_broken(file: DiskFile, offset: int, target: memoryview) -> None:
            if file is slots._blocks.file and offset == slots._blocks.largest.nbytes:
                time.sleep(0.1)  # so that the first slot comes alone
            if file is slots._blocks.file and offset == 2 * slots._blocks.largest.nbytes:
                raise EngineError("The disk is gone.")
            read(file, offset, target)

        monkeypatch.setattr(DiskFile, "read", slow_then_broken)
        arriving = slots._traffic.take(slots._blocks, SLOTS)
        next(arriving)
        time.sleep(0.3)  # the second and the third are there, or not, as they are asked for
        with pytest.raises(EngineError, match="The disk is gone"):
            list(arriving)
        rows.arena.close()
        rows.storage.close()


def test_a_disk_file_has_no_name_and_gives_back_what_was_written(tmp_path: Path) -> None:
    file = DiskFile(tmp_path, 4 * PAGE)
    assert list(tmp_path.iterdir()) == []
    written, read = AlignedBuffer(2 * PAGE), AlignedBuffer(4 * PAGE)
    written.tensor.fill_(7)
    file.write(PAGE, written.bytes)
    file.read(0, read.bytes)
    assert read.tensor.view(4, PAGE).float().mean(1).tolist() == [0, 7, 7, 0]
    file.close()
    file.close()


def test_a_disk_file_is_carried_through_the_page_cache_where_direct_access_is_refused(tmp_path: Path) -> None:
    file = DiskFile(tmp_path, 2 * PAGE)
    written, read = memoryview(b"seven" * 20), memoryview(bytearray(100))
    file.write(1, written)  # no disk takes this directly
    file.read(1, read)
    assert read == written
    file.close()


def test_a_disk_that_is_too_small_or_not_writable_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="disk needs"):
        DiskFile(tmp_path, 1 << 50)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        DiskFile(tmp_path / "file" / "folder", PAGE)
