"""`flexbatch chat` as a user meets it: a process of its own, through a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(model: Path, cache: Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "flexbatch", "chat", "model=hf", f"model.path={model}", f"model.cache_dir={cache}"),
        *("offload.reader=buffered", *overrides),
    ]


def piped(arguments: Sequence[str], text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=cwd, env=ENVIRONMENT, input=text, capture_output=True, text=True, timeout=200, check=False
    )


def test_lines_come_in_and_answers_go_out(opt: Path, tmp_path: Path) -> None:
    lines = ["abc abc", "/save first.json", "", "what?", "/reset", "abc abc", "/save first.json", "/save second.json"]
    lines += ["/nonsense", "/help", "two \\", "lines", "x" * 900, "/save README"]
    (tmp_path / "README").write_text("mine")
    arguments = command(opt, tmp_path / "cache", "generation.max_new_tokens=10", "offload=all-disk")
    finished = piped(arguments, "\n".join(lines), tmp_path)
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["messages"] == second["messages"], "what was reset is forgotten"
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert finished.stdout.startswith(first["messages"][1]["content"])
    assert "> " not in finished.stdout
    assert "There is no /nonsense" in finished.stderr
    assert "/reset  " in finished.stderr
    assert "There is no room for this message" in finished.stderr
    assert finished.returncode == 5, "a message found no room"
    assert (tmp_path / "README").read_text() == "mine"
    assert "Traceback" not in finished.stderr


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(opt: Path, tmp_path: Path) -> None:
    arguments = command(opt, tmp_path, "generation.max_new_tokens=800", "chat.lookup=false", "offload=all-disk")
    with subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"abc abc\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/save first.json\n/quit\n")
        process.stdin.flush()
        assert process.wait(200) == 0
        assert b"Stopped." in process.stderr.read()
    messages = json.loads((tmp_path / "first.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert 0 < len(messages[1]["content"]) < 700
    assert not list(tmp_path.glob("chat-*")), "nothing is left behind"


def test_on_a_terminal_there_is_a_prompt_and_ctrl_c_at_it_does_not_leave(llama: Path, tmp_path: Path) -> None:
    arguments = command(llama, tmp_path, "generation.max_new_tokens=5")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        seen = read_until(ours, "> ")
        os.write(ours, b"abc\n")
        seen = read_until(ours, "in the context")
        read_until(ours, "> ")
        seen = interrupted(process, ours)
        assert "Ctrl-D" in seen
        if "> " not in seen.partition("leaves.")[2]:
            read_until(ours, "> ")  # only then the terminal takes keys one by one: Ctrl-D before would be lost
        os.write(ours, b"\x04")
        assert process.wait(100) == 0
    os.close(ours)


def interrupted(process: subprocess.Popen[bytes], terminal: int) -> str:
    """Ctrl-C at the prompt, again where it came in the moment before the line editor waits for keys."""
    for _ in range(30):
        process.send_signal(signal.SIGINT)
        if select.select([terminal], [], [], 2)[0]:
            return read_until(terminal, "leaves.")
    raise AssertionError("nothing was said to Ctrl-C")


def read_until(terminal: int, wanted: str) -> str:
    seen, end = "", time.monotonic() + 200
    while wanted not in seen:
        assert time.monotonic() < end, f"{wanted!r} did not come: {seen!r}"
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["chat.context=5000"], 2, "the model has 1024 positions"),
        (["chat.template=tokenizer"], 3, "no chat template"),
        (["chat.templat=human"], 2, "Did you mean chat.template?"),
        (["generation.logprobs=true"], 2, "does not take this"),
        (["generation.stop=['']"], 2, "empty stop string"),
        (["offload.host_memory=1KiB"], 5, "offload.device_memory"),
    ],
)
def test_bad_input_is_named(
    overrides: list[str], code: int, said: str, opt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexbatch.__main__ import main

    assert main(command(opt, tmp_path, *overrides)[3:]) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""
