"""The real command line without its seconds of imports: a warm process forks a child for every command.

The child runs `flexbatch.__main__.main` with its own folder, streams, limits and user, and ends with its exit code. It
can be told to die at an exact moment: SIGKILL as a file is opened or renamed, or some time after that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Moment:
    """SIGKILL `delay` seconds after the `count`-th audit event in which the regular expression `path` is found.

    `event` is `open`, `os.rename` or another of Python's, or `pass`: the engine has finished a pass.
    """

    event: str
    path: str = ""
    count: int = 1
    delay: float = 0.0


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit code (negative: the signal that killed it) and its streams."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class _Order:
    """What the warm process is told."""

    arguments: list[str]
    cwd: str
    streams: str
    moment: dict[str, Any] | None = None
    token_counter: str = ""
    file_size: int = 0
    user: int = 0
    environment: dict[str, str] = field(default_factory=dict)


class Command:
    """A command under way."""

    def __init__(self, server: CommandLine, pid: int, streams: Path) -> None:
        self._server, self.pid, self._streams = server, pid, streams

    @property
    def err(self) -> str:
        return (self._streams / "err").read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._server.outer_pid(self.pid), number)

    def is_running(self) -> bool:
        return self._server.status(self.pid) is None

    def wait_for(self, file: Path, timeout: float = 60) -> None:
        """Until `file` is there or the command has ended."""
        end = time.monotonic() + timeout
        while not file.exists() and self.is_running():
            assert time.monotonic() < end, f"{file} did not appear: {self.err}"
            time.sleep(0.002)

    def wait(self, timeout: float = 100) -> Finished:
        end = time.monotonic() + timeout
        while (status := self._server.status(self.pid)) is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"the command hangs: {self.err}")
            time.sleep(0.005)
        return Finished(status, (self._streams / "out").read_text(errors="replace"), self.err)


class CommandLine:
    """The client's side: starts the warm process and asks it for commands. `prefix` is a command to run it under."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.pipeline.command_line"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._streams = tempfile.TemporaryDirectory()
        self._mutex = threading.Lock()
        self._ended: dict[int, int] = {}
        self.ready = self._answer() == {"ready": True}

    @property
    def pid(self) -> int:
        return self._process.pid

    def outer_pid(self, pid: int) -> int:
        return pid

    def start(self, *arguments: str, cwd: Path, moment: Moment | None = None, **options: Any) -> Command:
        streams = Path(tempfile.mkdtemp(dir=self._streams.name))
        order = _Order(list(arguments), str(cwd), str(streams), asdict(moment) if moment else None, **options)
        return Command(self, self._ask({"start": asdict(order)})["pid"], streams)

    def run(self, *arguments: str, cwd: Path, **options: Any) -> Finished:
        return self.start(*arguments, cwd=cwd, **options).wait()

    def status(self, pid: int) -> int | None:
        if pid not in self._ended:
            status = self._ask({"status": pid})["status"]
            if status is None:
                return None
            self._ended[pid] = status
        return self._ended[pid]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._streams.cleanup()

    def _ask(self, request: dict[str, Any]) -> Any:
        with self._mutex:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def serve() -> None:
    """The warm process: imports everything once, then forks on request until its input ends."""
    _warm_up()
    children: set[int] = set()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                _child(_Order(**request["start"]))
            children.add(pid)
            answer: dict[str, Any] = {"pid": pid}
        else:
            pid, status = os.waitpid(request["status"], os.WNOHANG)
            children.discard(pid)
            answer = {"status": os.waitstatus_to_exitcode(status) if pid else None}
        print(json.dumps(answer), flush=True)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _warm_up() -> None:
    """What every job would import and compose for itself."""
    import pandas  # noqa: F401 - pyarrow asks for it as soon as it infers a type
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.opt import modeling_opt  # noqa: F401

    import flexbatch.pipeline  # noqa: F401
    from flexbatch.__main__ import quiet_libraries
    from flexbatch.composition import load_config

    quiet_libraries()
    load_config(["job=generate", "model=hf", "model.path=x"])
    get_checkpoint_conversion_mapping("opt")
    torch.set_num_threads(1)


def _child(order: _Order) -> None:
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            descriptor = os.open(Path(order.streams) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.update(order.environment)
        os.chdir(order.cwd)
        code = _command(order)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - nothing may get back into the parent's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(order: _Order) -> int:
    from flexbatch.__main__ import main

    _watch_passes(Path(order.token_counter or os.devnull))
    if order.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_size, order.file_size))
    if order.user:
        os.setgroups([])
        os.setgid(order.user)
        os.setuid(order.user)
    if order.moment is not None:
        _die_at(Moment(**order.moment))
    return main(order.arguments)


def _die_at(moment: Moment) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != moment.event or not any(re.search(moment.path, str(argument)) for argument in arguments[:2]):
            return
        seen += 1
        if seen == moment.count:
            if moment.delay:
                threading.Thread(target=_die, args=(moment.delay,), daemon=True).start()
            else:
                _die(0)

    sys.addaudithook(hook)


def _die(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def _watch_passes(counter: Path) -> None:
    """Every pass adds its decoded tokens to the number in `counter`: exact, even where the attempt is killed."""
    from flexbatch.data.ledger import Ledger

    record = Ledger.record
    descriptor = os.open(counter, os.O_RDWR | os.O_CREAT)

    def counted(self: Ledger, result: Any) -> None:
        before = int(os.pread(descriptor, 20, 0) or b"0")
        os.pwrite(descriptor, b"%20d" % (before + result.decode_tokens), 0)
        record(self, result)
        sys.audit("pass", result.decode_tokens)

    Ledger.record = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
