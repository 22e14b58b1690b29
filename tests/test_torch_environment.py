"""Threads that wait give their core away soon, and few compiled products are kept, unless the user said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flexbatch.memory.blocked_weight import suits
from flexbatch.torch_environment import spin_rounds
from tests.conftest import REPOSITORY

# Leaves as soon as torch is asked for: what it reads from the environment must be there by then.
UNTIL_TORCH = """
import importlib, os, sys

NAME, PROGRAM = sys.argv[1:3]

def leave(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print(os.environ.get(NAME), flush=True)
        os._exit(0)

sys.addaudithook(leave)
importlib.import_module(PROGRAM).main(sys.argv[3:])
"""


SET = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def spins(*arguments: str, **environment: str) -> str:
    return told("GOMP_SPINCOUNT", *arguments, **environment)


def told(what: str, *arguments: str, program: str = "flexbatch.__main__", **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in SET}
    ran = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH, what, program, *arguments],
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


def test_fewer_rounds_are_as_long_where_each_takes_longer() -> None:
    intel, other = spin_rounds("vendor_id\t: GenuineIntel\n"), spin_rounds("vendor_id\t: AuthenticAMD\n")
    assert intel * 140 == pytest.approx(other * 50, rel=0.5)  # cycles of a PAUSE
    assert spin_rounds("") == other


def test_it_is_said_in_the_process_that_answers_for_helm() -> None:
    arguments = ("prompts.jsonl", "answers.jsonl", "folder", "model")
    assert int(told("LRU_CACHE_CAPACITY", *arguments, program="flexbatch.integrations.worker")) < 100


def test_the_users_own_setting_stays() -> None:
    assert spins("plan", GOMP_SPINCOUNT="7") == "7"
    assert spins("plan", OMP_WAIT_POLICY="active") == "None"


@pytest.mark.parametrize("cache", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"])
def test_few_compiled_products_are_kept(cache: str) -> None:
    assert int(told(cache, "run")) < 100
    assert told(cache, "run", **{cache: "500"}) == "500"


# Products of many sizes, as prompts of many lengths make them; its memory after some and after all of them.
MANY_SIZES = """
from flexbatch.torch_environment import prepare_torch
prepare_torch()
import ctypes, os, sys
import torch
from flexbatch.memory.blocked_weight import lay_out, linear

weight = lay_out(torch.randn(512, 512).bfloat16())
for rows in range(1, 601):
    linear(torch.ones(rows, 512, dtype=torch.bfloat16), weight, None)
    if rows in (200, 600):
        ctypes.CDLL(None).malloc_trim(0)
        resident, of_files = open("/proc/self/statm").read().split()[1:3]
        print((int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE"))
"""


@pytest.mark.skipif(sys.platform != "linux" or not suits(torch.bfloat16), reason="oneDNN multiplies no bfloat16 here")
def test_prompts_of_many_lengths_take_no_more_memory_than_of_some() -> None:
    ran = subprocess.run([sys.executable, "-c", MANY_SIZES], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    some, all_of_them = map(int, ran.stdout.split())
    assert all_of_them - some < 16 << 20
