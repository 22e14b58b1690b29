"""Threads that wait give their core away soon, unless the user said how they shall wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

# Leaves as soon as torch is asked for: what it reads from the environment must be there by then.
UNTIL_TORCH = """
import os, sys

def leave(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
        os._exit(0)

sys.addaudithook(leave)
from flexbatch.__main__ import main
main(sys.argv[1:])
"""


def spins(*arguments: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ran = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH, *arguments],
        env=kept | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.strip()


@pytest.mark.parametrize("verb", ["run", "plan", "chat"])
def test_it_is_said_before_torch_is_there(verb: str) -> None:
    assert 1_000 < int(spins(verb)) < 100_000


def test_the_users_own_setting_stays() -> None:
    assert spins("plan", GOMP_SPINCOUNT="7") == "7"
    assert spins("plan", OMP_WAIT_POLICY="active") == "None"
