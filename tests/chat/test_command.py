"""`flexbatch chat` as a user meets it: a process of its own, through a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pexpect
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
    program, *arguments = command(llama, tmp_path, "generation.max_new_tokens=5")
    terminal = pexpect.spawn(program, arguments, cwd=str(tmp_path), env=ENVIRONMENT, timeout=200)
    terminal.expect_exact("> ")
    terminal.sendline("abc")
    terminal.expect_exact("in the context")
    terminal.expect_exact("> ")
    insist(terminal.sendintr, terminal, "Ctrl-D leaves.")
    terminal.expect_exact("> ")
    insist(terminal.sendeof, terminal, pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def insist(press: Callable[[], None], terminal: pexpect.spawn, answer: Any) -> None:
    """A key that comes in the moment before the line editor waits for keys is not heard: press it again then."""
    for _ in range(30):
        press()
        if terminal.expect([answer, pexpect.TIMEOUT], timeout=3) == 0:
            return
    raise AssertionError(f"{answer} did not come")


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["chat.context=5000"], 2, "the model has 1024 positions"),
        (["chat.template=tokenizer"], 3, "no chat template"),
        (["chat.templat=human"], 2, "Did you mean chat.template?"),
        (["generation.logprobs=true"], 2, "does not take it"),
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
