"""The output folder: one process, one run, and nothing lost however that ends."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data.support import completion, output_of, parts, pass_result, start_python
from flexbatch.data.ledger import Ledger
from flexbatch.data.progress import Progress, read_status
from flexbatch.data.writer import PartWriter
from flexbatch.errors import EngineError, FingerprintError, Interrupted, LockedError, OutputError

RUN = {"model": {"path": "opt", "hash": "abc"}, "prompt": {"template": "{{ text }}"}, "files": {"a.arrow": "1:x"}}


def open_ledger(folder: Path, fingerprint: dict[str, Any] = RUN, part_rows: int = 4) -> Ledger:
    return Ledger.open(folder, fingerprint, part_rows=part_rows)


def test_a_restart_knows_what_is_done_and_what_is_saved(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "run")
    first, second, _ = parts(10, 4)
    ledger = open_ledger(tmp_path / "run")
    ledger.record(pass_result({n: (n,) for n in range(6)}, *map(completion, range(5)), logprobs=True))
    writer.write(first)
    ledger.part_written(first)
    assert (ledger.rows_done, ledger.rows_written) == (5, 4)
    ledger.close("failed", "a read failed")
    with open_ledger(tmp_path / "run") as ledger:
        assert ledger.done_parts == {0}
        assert ledger.is_done(3)
        assert not ledger.is_done(4)
        assert sorted(ledger.saved) == [4, 5]
        assert ledger.saved[4].completion == completion(4)
        assert ledger.saved[5].tokens == (5,)
        assert ledger.saved[5].logprobs == (-1.5,)
        writer.write(second)
        ledger.part_written(second)


def test_a_part_that_was_renamed_but_not_noted_is_done(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.record(pass_result({}, *map(completion, range(4))))
        PartWriter(tmp_path).write(parts(4, 4)[0])
    with open_ledger(tmp_path) as ledger:
        assert ledger.done_parts == {0}
        assert ledger.saved == {}
        assert ledger.rows_done == 4


def test_scratch_is_emptied_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "_tmp" / "kv").mkdir(parents=True)
    (tmp_path / "_tmp" / "kv" / "layer").write_bytes(b"x")
    (tmp_path / "_tmp" / "part-00003.parquet.17").write_bytes(b"half")
    with open_ledger(tmp_path):
        assert list((tmp_path / "_tmp").iterdir()) == []


# Whose folder it is


def test_another_run_is_refused_and_told_which_keys_differ(tmp_path: Path) -> None:
    with open_ledger(tmp_path):
        pass
    other = {"model": {"path": "opt", "hash": "def"}, "prompt": {"template": "{{ text }}", "max": 1}, "files": {}}
    with pytest.raises(FingerprintError) as caught:
        open_ledger(tmp_path, other)
    message = str(caught.value)
    for part in ('model.hash: "abc" there, "def" now', "prompt.max: (absent) there, 1 now", "files.a.arrow"):
        assert part in message
    assert "prompt.template" not in message
    assert "choose another output.dir" in message
    with open_ledger(tmp_path):
        pass  # the lock was given back, the folder is as it was


def test_tuples_and_lists_are_the_same_in_a_fingerprint(tmp_path: Path) -> None:
    with open_ledger(tmp_path, {"stop": ("a", "b"), "path": Path("x"), "none": None}):
        pass
    with open_ledger(tmp_path, {"stop": ["a", "b"], "path": "x", "none": None}):
        pass


def test_a_data_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.csv").write_text("a")
    with pytest.raises(FingerprintError, match="no run of flexbatch"):
        open_ledger(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "short"])
def test_a_damaged_part_is_named_with_the_remedy(tmp_path: Path, damage: str) -> None:
    writer = PartWriter(tmp_path)
    with open_ledger(tmp_path):
        for part in parts(8, 4):
            writer.write(part)
    path = tmp_path / "data" / "part-00000.parquet"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        pq.write_table(pq.read_table(path).slice(0, 3), path)
    with pytest.raises(OutputError, match=r"part-00000\.parquet") as caught:
        open_ledger(tmp_path)
    assert "Delete the file" in caught.value.remedy
    path.unlink()
    with open_ledger(tmp_path) as ledger:
        assert ledger.done_parts == {1}


# One process at a time

HOLD = """
import sys, time
from flexbatch.data.ledger import Ledger
ledger = Ledger.open(sys.argv[1], {"a": 1}, part_rows=4)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_on_a_live_folder_is_refused_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    process = start_python(HOLD, str(tmp_path))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {process.pid} on .*, since 20"):
            open_ledger(tmp_path, {"a": 1})
        assert read_status(tmp_path).state == "running"
        assert read_status(tmp_path).pid == process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    status = read_status(tmp_path)
    assert (status.state, status.alive) == ("killed", False)
    with open_ledger(tmp_path, {"a": 1}):
        assert read_status(tmp_path).alive


WATCH = """
import sys
from pathlib import Path
from flexbatch.data.progress import read_status
print("on", flush=True)
while True:
    read_status(Path(sys.argv[1]))
"""


def test_looking_at_the_status_is_never_taken_for_a_run(tmp_path: Path) -> None:
    with open_ledger(tmp_path):
        pass
    watcher = start_python(WATCH, str(tmp_path))
    try:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        for _ in range(20):
            with open_ledger(tmp_path):
                pass
    finally:
        watcher.kill()
        watcher.wait()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output\.dir: .*file"):
        open_ledger(tmp_path / "file" / "run")


# Status


def test_status_tells_how_every_attempt_ended(tmp_path: Path) -> None:
    def attempt(error: BaseException | None) -> None:
        with open_ledger(tmp_path) as ledger:
            ledger.set_total(20)
            ledger.record(pass_result({0: (1, 2, 3)}))
            if error is not None:
                raise error

    with pytest.raises(EngineError):
        attempt(EngineError("the device ran out of memory"))
    with pytest.raises(KeyboardInterrupt):
        attempt(KeyboardInterrupt())
    with pytest.raises(Interrupted):
        attempt(Interrupted("stopped"))
    attempt(None)
    status = read_status(tmp_path)
    assert [entry.reason for entry in status.attempts] == ["failed", "interrupted", "interrupted", "done"]
    assert [entry.number for entry in status.attempts] == [1, 2, 3, 4]
    assert status.last_error == "the device ran out of memory"
    assert status.state == "done"
    assert status.tokens == 12
    assert status.rows_total == 20
    assert all(entry.stopped is not None and entry.stopped >= entry.started for entry in status.attempts)


def test_the_rate_is_the_attempts_own_and_the_finish_follows_from_it(tmp_path: Path) -> None:
    now = 1000.0
    state = tmp_path / "_state"
    (tmp_path / "_tmp").mkdir()
    state.mkdir()
    progress = Progress(state, tmp_path / "_tmp", rows_done=50, clock=lambda: now)
    now = 1010.0
    progress.update(rows_done=70, rows_total=100, new_tokens=400)
    with (state / "lock").open("w") as lock_file:
        import fcntl

        fcntl.flock(lock_file, fcntl.LOCK_EX)
        status = read_status(tmp_path)
    assert (status.rows_per_second, status.tokens_per_second) == (2.0, 40.0)
    assert status.finish == 1010.0 + 15.0
    assert read_status(tmp_path).finish is None  # dead


def test_status_of_what_is_no_output_folder_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OutputError):
            read_status(folder)


def test_files_cut_by_a_crash_do_not_hide_the_status(tmp_path: Path) -> None:
    with open_ledger(tmp_path):
        pass
    events = tmp_path / "_state" / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-5])
    (tmp_path / "_state" / "progress.json").write_text('{"state": "run')
    assert read_status(tmp_path).state == "killed"
    with open_ledger(tmp_path):
        pass
    assert [entry.reason for entry in read_status(tmp_path).attempts] == ["killed", "done"]


# Killed

WORK = '''
"""Twenty-one parts of five rows; every row is generated in three passes. Goes on from what it finds."""
import sys
from pathlib import Path
from data.support import completion, pass_result, prompt
from flexbatch.data.batcher import split_parts
from flexbatch.data.ledger import Ledger
from flexbatch.data.parts import PartAssembler
from flexbatch.data.writer import PartWriter
from flexbatch.records import Completion

ROWS, PART_ROWS, SLOTS = 103, 5, 7
folder = Path(sys.argv[1])
with Ledger.open(folder, {"run": 1}, part_rows=PART_ROWS, journal_seconds=0.05) as ledger:
    writer, assembler = PartWriter(folder), PartAssembler(PART_ROWS)
    print("open", flush=True)

    def finish(part):
        if part is not None:
            writer.write(part)
            ledger.part_written(part)

    waiting, work = [], 0
    for place in split_parts(map(prompt, range(ROWS)), PART_ROWS):
        if ledger.is_done(place.index):
            continue
        assembler.expect(place)
        saved = ledger.saved.get(place.index)
        if saved is not None and saved.completion is not None:
            assert saved.completion == Completion(place.index, saved.completion.token_ids, "text", "length")
            finish(assembler.complete(saved.completion))
        else:
            waiting.append((place.index, list(saved.tokens) if saved else []))
    in_flight = []
    while waiting or in_flight:
        while waiting and len(in_flight) < SLOTS:
            in_flight.append(waiting.pop(0))
        gained, done = {}, []
        for index, tokens in in_flight:
            gained[index] = (index * 10 + len(tokens),)
            tokens.append(index * 10 + len(tokens))
            work += 1
            if len(tokens) >= 3:
                done.append(Completion(index, tuple(tokens), "text", "length"))
        ledger.record(pass_result(gained, *done))
        in_flight = [item for item in in_flight if len(item[1]) < 3]
        for completed in done:
            finish(assembler.complete(completed))
    for part in assembler.close():
        finish(part)
'''


def read_rows_of(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "data").glob("*")) if (folder / "data").exists() else []
    return [record for path in paths for record in pq.read_table(path).to_pylist()]


def test_killed_at_ten_random_moments_the_result_is_that_of_a_clean_run(tmp_path: Path) -> None:
    clean = start_python(WORK, str(tmp_path / "clean"))
    assert clean.wait(60) == 0
    wanted = read_rows_of(tmp_path / "clean")
    assert [record["row"] for record in wanted] == list(range(103))
    moments = random.Random(7)
    kills, seen = 0, 0
    while True:
        process = start_python(WORK, str(tmp_path / "killed"))
        assert process.stdout is not None
        process.stdout.readline()
        if kills < 10:
            time.sleep(moments.uniform(0, 0.06))
            process.send_signal(signal.SIGKILL)
            kills += 1
        code = process.wait(60)
        rows = read_rows_of(tmp_path / "killed")  # whole files only, at every moment
        assert len(rows) >= seen
        seen = len(rows)
        assert all(record in wanted for record in rows)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert read_rows_of(tmp_path / "killed") == wanted
    assert read_status(tmp_path / "killed").rows_done == 103


FULL = """
import resource, sys
from flexbatch.data.ledger import Ledger
from flexbatch.errors import CapacityError
from data.support import pass_result
try:
    with Ledger.open(sys.argv[1], {"a": 1}, part_rows=4, journal_seconds=0.0) as ledger:
        ledger.record(pass_result({0: (1,)}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        for number in range(1000):
            ledger.record(pass_result({number: tuple(range(50))}))
except CapacityError as error:
    print(error)
"""


def test_a_disk_that_fills_under_the_journal_stops_the_run_and_it_goes_on_later(tmp_path: Path) -> None:
    process = start_python(FULL, str(tmp_path))
    output = output_of(process)
    assert "the disk is full" in output
    assert "journal" in output
    status = read_status(tmp_path)
    assert status.state == "failed"
    assert "the disk is full" in status.last_error
    with open_ledger(tmp_path, {"a": 1}) as ledger:
        assert ledger.saved[0].tokens[0] == 1
        assert all(row.tokens == tuple(range(50)) for index, row in ledger.saved.items() if index)
        ledger.record(pass_result({5000: (1,)}))
    with open_ledger(tmp_path, {"a": 1}) as ledger:
        assert ledger.saved[5000].tokens == (1,)


def test_the_state_is_plain_json_that_anybody_can_read(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.save_plan({"slots": 8, "path": Path("x")})
    assert json.loads((tmp_path / "_state" / "plan.json").read_text()) == {"slots": 8, "path": "x"}
    assert json.loads((tmp_path / "_state" / "fingerprint.json").read_text()) == RUN
    assert json.loads((tmp_path / "_state" / "progress.json").read_text())["state"] == "done"
