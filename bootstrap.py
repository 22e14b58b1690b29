"""Set-up from nothing: `python3 bootstrap.py run` runs the main job, `python3 bootstrap.py test` the tests.

Needs Python 3.11 and its standard library. Both commands make `.venv` beside this file, install the package with its
dependencies into it, and are safe to repeat: a stamp with a hash of pyproject.toml makes the second call fast.

    python3 bootstrap.py run [verb] [overrides]    python -m flexbatch with these arguments, in that environment
    python3 bootstrap.py test [pytest arguments]   ruff, ruff format, mypy, import-linter, pytest
    python3 bootstrap.py install [extras]          the environment alone, for example with `eval bench`

Where no NVIDIA GPU is present the CPU build of torch is installed, which needs none of the CUDA packages.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """What is wrong and what to do about it, for stderr."""


def say(text: str) -> None:
    print(f"[bootstrap] {text}", file=sys.stderr, flush=True)


def check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file must say so on an older Python too
        raise SetupError(
            f"flexbatch needs Python 3.11 or newer; this is {platform.python_version()} ({sys.executable}).\n"
            "Install a newer one and call it by name, for example: python3.11 bootstrap.py run"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            "This Python cannot make virtual environments (the module venv or ensurepip is missing).\n"
            "On Debian and Ubuntu: apt-get install python3-venv"
        ) from None


def has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def works(python: Path) -> bool:
    """A virtual environment moved or half made is no use: ask its Python for its version."""
    command = [str(python), "-c", "import sys, pip; sys.exit(sys.version_info < (3, 11))"]
    return python.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def pip(*arguments: str) -> bool:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0


def install_torch() -> None:
    """The CPU build where that is enough: first from the configured package index, then from PyTorch's own."""
    if platform.system() != "Linux" or has_nvidia_gpu():
        return  # the build that the package index gives is the right one
    say(f"no NVIDIA GPU here: installing the CPU build of torch {TORCH}")
    if pip("--quiet", f"torch=={TORCH}+cpu"):
        return
    say(f"the package index has no such build; trying {TORCH_CPU_INDEX}")
    if pip("--quiet", "--index-url", TORCH_CPU_INDEX, f"torch=={TORCH}"):
        return
    raise SetupError(
        f"No CPU build of torch {TORCH} could be installed (pip's messages are above).\n"
        f"Install a torch of your choice with: {PYTHON} -m pip install 'torch>=2.11,<2.14'\n"
        "and repeat this command."
    )


def has_torch() -> bool:
    probe = "import importlib.metadata as m; m.version('torch')"
    return subprocess.run([str(PYTHON), "-c", probe], capture_output=True, check=False).returncode == 0


def fingerprint() -> str:
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()


def is_installed(extras: list[str]) -> bool:
    stamps = [VENV / f"flexbatch-{extra}.stamp" for extra in extras or ["core"]]
    return all(stamp.exists() and stamp.read_text() == fingerprint() for stamp in stamps)


def install(extras: list[str]) -> None:
    """Make `.venv` and install the package into it, unless both were done for this pyproject.toml before."""
    check_python()
    if works(PYTHON) and is_installed(extras):
        return
    if not works(PYTHON):
        say(f"making the virtual environment {VENV}")
        shutil.rmtree(VENV, ignore_errors=True)
        if subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False).returncode != 0:
            raise SetupError(f"The virtual environment {VENV} could not be made; is the folder writable?")
    if not has_torch():
        install_torch()
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    say(f"installing flexbatch{' with ' + ', '.join(extras) if extras else ''} (once; some minutes)")
    if not pip("--quiet", "--editable", target):
        raise SetupError("pip could not install flexbatch (its messages are above). Is the package index reachable?")
    for name in ["core", *extras]:
        (VENV / f"flexbatch-{name}.stamp").write_text(fingerprint())


def run(arguments: list[str]) -> int:
    install([])
    # The child takes this process's place, so that Ctrl-C and exit codes are its own.
    os.execv(str(PYTHON), [str(PYTHON), "-m", "flexbatch", *arguments])


def test(arguments: list[str]) -> int:
    install(["dev"])
    tools = VENV / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}", "VIRTUAL_ENV": str(VENV)}
    # One test process more than cores (some tests wait), four at the most, each with one thread for its arithmetic.
    environment.setdefault("OMP_NUM_THREADS", "1")
    processes = min(4, len(os.sched_getaffinity(0)) + 1) if hasattr(os, "sched_getaffinity") else 4
    gates = [
        [str(tools / "ruff"), "check", "."],
        [str(tools / "ruff"), "format", "--check", "."],
        [str(tools / "mypy")],
        [str(tools / "lint-imports")],
        [str(PYTHON), "-m", "pytest", "-n", str(processes), "--dist", "worksteal", *arguments],
    ]
    failed = []
    for gate in gates:
        name = " ".join([Path(gate[0]).name, *gate[1:]])
        say(name)
        if subprocess.run(gate, cwd=ROOT, env=environment, check=False).returncode != 0:
            failed.append(name)
    say(f"failed: {'; '.join(failed)}" if failed else "all gates passed")
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    try:
        if verb == "run":
            return run(rest)
        if verb == "test":
            return test(rest)
        if verb == "install":
            install(rest)
            say(f"ready: {PYTHON} -m flexbatch")
            return 0
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(__doc__)
    return 0 if verb in {"-h", "--help"} else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
