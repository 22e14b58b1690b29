"""The journal: whatever byte a crash stops at, a prefix of the records is loaded."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from data.support import completion
from flexbatch.data import journal as journal_module
from flexbatch.data.journal import Journal, SavedRow, load_records
from flexbatch.records import Completion

texts = st.text(max_size=8) | st.just("\ud800\n\0")
floats = st.floats(width=32, allow_nan=False)
completions = st.builds(
    Completion,
    index=st.integers(0, 9),
    token_ids=st.lists(st.integers(0, 60000), max_size=4).map(tuple),
    text=texts,
    finish_reason=st.sampled_from(["stop", "length", "error"]),
    logprobs=st.lists(floats, max_size=4).map(tuple),
    greedy_match=st.booleans(),
    error=texts,
)
tokens = st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 60000), min_size=1, max_size=3).map(tuple))
records = st.tuples(tokens, st.lists(completions, max_size=2), st.lists(st.integers(0, 9), max_size=3))


def open_journal(folder: Path, **options: Any) -> Journal:
    options = {"sync_seconds": 1000.0, **options}
    return Journal(folder / "journal", folder / "_tmp", **options)


def write(folder: Path, given_records: list[Any]) -> list[dict[int, SavedRow]]:
    """Record them all; the states after each line of the file."""
    # In a clock that stands nothing is flushed under way, however slow the machine: pending lines are counted below.
    journal = open_journal(folder, clock=lambda: 0.0)
    states = [journal.saved()]
    for gained, finished, dropped in given_records:
        lines = len(journal._pending)
        journal.record(gained, {index: (-0.5,) * len(ids) for index, ids in gained.items()}, finished)
        states += [journal.saved()] * (len(journal._pending) - lines)
        lines = len(journal._pending)
        journal.drop(dropped)
        states += [journal.saved()] * (len(journal._pending) - lines)
    journal.close()
    return states


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_records=st.lists(records, min_size=1, max_size=6), data=st.data())
def test_a_journal_cut_at_any_byte_loads_as_a_prefix_of_its_records(
    tmp_path: Path, given_records: list[Any], data: st.DataObject
) -> None:
    (tmp_path / "journal").unlink(missing_ok=True)
    states = write(tmp_path, given_records)
    content = (tmp_path / "journal").read_bytes()
    assert content.count(b"\n") == len(states) - 1
    length = data.draw(st.integers(0, len(content)))
    (tmp_path / "journal").write_bytes(content[:length])
    assert open_journal(tmp_path).saved() == states[content[:length].count(b"\n")]


def test_a_journal_cut_at_each_byte_of_a_small_one(tmp_path: Path) -> None:
    states = write(tmp_path, [({1: (5, 6)}, [], []), ({1: (7,), 2: (8,)}, [completion(2)], []), ({}, [], [2])])
    content = (tmp_path / "journal").read_bytes()
    for length in range(len(content) + 1):
        (tmp_path / "journal").write_bytes(content[:length])
        assert open_journal(tmp_path).saved() == states[content[:length].count(b"\n")]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_byte_ends_the_journal_before_its_record(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "journal").unlink(missing_ok=True)
    write(tmp_path, [({1: (5, 6)}, [], []), ({2: (8,)}, [completion(3)], []), ({1: (9,)}, [], [])])
    content = (tmp_path / "journal").read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "journal").write_bytes(damaged)
    assert len(list(load_records(tmp_path / "journal"))) == content.count(b"\n", 0, at)


class JournalMachine(RuleBasedStateMachine):
    """The journal against a plain dictionary, through crashes that lose what was not flushed, and compactions."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.now = 0.0
        self.model: dict[int, list[Any]] = {}
        self.journal = self.reopen()

    def reopen(self) -> Journal:
        return open_journal(self.folder, clock=lambda: self.now)

    @rule(gained=tokens, finished=st.lists(completions, max_size=2))
    def record(self, gained: dict[int, tuple[int, ...]], finished: list[Completion]) -> None:
        self.journal.record(gained, {}, finished)
        for index, ids in gained.items():
            self.model.setdefault(index, [(), None])
            self.model[index] = [self.model[index][0] + ids, self.model[index][1]]
        for done in finished:
            self.model.setdefault(done.index, [(), None])[1] = done

    @rule(indices=st.lists(st.integers(0, 9), max_size=4))
    def drop(self, indices: list[int]) -> None:
        self.journal.drop(indices)
        for index in indices:
            self.model.pop(index, None)

    @rule(seconds=st.floats(0, 1))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def compact(self) -> None:
        self.journal._compact()

    @rule()
    def killed_after_a_flush(self) -> None:
        self.journal.flush()
        self.journal._close_file()
        self.open_again()

    @rule()
    def closed_cleanly(self) -> None:
        self.journal.close()
        self.open_again()

    def open_again(self) -> None:
        self.journal = self.reopen()
        for index, row in self.journal.saved().items():
            if row.completion is not None:  # its tokens are in it, and not kept twice
                self.model[index][0] = row.tokens

    @invariant()
    def holds_what_was_recorded(self) -> None:
        if hasattr(self, "journal"):
            saved = {index: [row.tokens, row.completion] for index, row in self.journal.saved().items()}
            assert saved == self.model

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.journal._close_file()
            shutil.rmtree(self.folder)


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_a_record_is_written_within_a_quarter_second_and_no_more_often(tmp_path: Path) -> None:
    now = 0.0
    journal = open_journal(tmp_path, clock=lambda: now)
    sizes = []
    for step in range(11):
        now = step * 0.1
        journal.record({1: (step,)}, {})
        sizes.append((tmp_path / "journal").stat().st_size)
    assert sizes[2] == 0 < sizes[3] == sizes[5] < sizes[6]


def test_rows_of_written_parts_are_dropped_at_the_next_start(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.record({0: (1,), 1: (2,), 7: (3,)}, {0: (-1.0,)}, [completion(1)])
    journal.close()
    again = open_journal(tmp_path, is_done=lambda index: index < 1)
    assert again.saved() == {1: SavedRow((2,), (), completion(1)), 7: SavedRow((3,))}
    again.close()


def test_the_journal_stays_small_while_rows_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 2000)
    journal = open_journal(tmp_path)
    for index in range(500):
        journal.record({index: tuple(range(20))}, {}, [completion(index)])
        journal.flush()
        if index % 4 == 3:
            journal.drop(range(index - 3, index + 1))
        assert (tmp_path / "journal").stat().st_size < 5000
    journal.close()
    assert open_journal(tmp_path).saved() == {}
