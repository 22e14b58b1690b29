"""The command line: a verb, then `key=value` overrides. `python -m flexbatch --help` shows both.

Imports stand inside the functions that need them: `status` answers at once and loads no torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flexbatch.errors import ConfigError, FlexbatchError, Interrupted
from flexbatch.torch_environment import prepare_torch

if TYPE_CHECKING:
    from flexbatch.config import Config

USAGE = """\
Run language models bigger than the machine over whole datasets.

    flexbatch [run] [key=value ...]     run a job, or go on with it
    flexbatch plan [key=value ...]      where everything would live and how long it would take; loads no weights
    flexbatch status DIR                how far a running or stopped job is
    flexbatch report DIR                the run as one HTML file
    flexbatch bench [key=value ...]     flexbatch beside other engines on the same work; the last line is JSON
    flexbatch chat [key=value ...]      talk to a model, in a terminal or through a pipe
    flexbatch import SOURCE TARGET      bring published weights into safetensors; import --help says how

    --cfg job            print the composed configuration and stop
    --config-dir DIR     a folder of your own with job/mine.yaml, model/mine.yaml and so on
    --help, --version

Without a verb it is run; without overrides job=helm_eval model=opt-tiny. For example:

    flexbatch job=generate model=hf model.path=FOLDER dataset.path=reviews.jsonl prompt.template='{{ text }}'
"""


def run(arguments: Sequence[str]) -> int:
    config, overrides = parse(arguments)
    prepare_torch()

    from flexbatch import pipeline
    from flexbatch.interrupt import StopSignal

    with StopSignal() as stop:
        pipeline.run(config, stop=stop, overrides=overrides)
    return 0


def plan(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments)
    prepare_torch()

    from flexbatch import pipeline

    pipeline.plan(config)
    return 0


def status(arguments: Sequence[str]) -> int:
    target = folder("status", next(iter(arguments), ""))

    from flexbatch.data.progress import read_status
    from flexbatch.report.status_text import status_text

    print(status_text(read_status(target)))
    return 0


def report(arguments: Sequence[str]) -> int:
    target = folder("report", next(iter(arguments), ""))

    from flexbatch.report.html import write_report

    print(write_report(target))
    return 0


def bench(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments)

    from flexbatch.bench import command

    command.bench(config)
    return 0


def chat(arguments: Sequence[str]) -> int:
    prepare_torch()

    from flexbatch.chat.command import DEFAULTS, chat

    config, _ = parse([*DEFAULTS, *arguments])
    return chat(config)


def import_weights(arguments: Sequence[str]) -> int:
    from flexbatch.checkpoint.command import import_command

    return import_command(list(arguments))


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "plan": plan,
    "status": status,
    "report": report,
    "bench": bench,
    "chat": chat,
    "import": import_weights,
}


def parse(arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """The overrides, composed and checked, and as they were given. `--cfg` prints and leaves."""
    from flexbatch.composition import as_yaml, load_config

    overrides: list[str] = []
    config_dir: Path | None = None
    show = False
    remaining = iter(arguments)
    for argument in remaining:
        if argument in ("--cfg", "-c"):
            show = next(remaining, "job") != ""
        elif argument.split("=")[0] == "--config-dir":
            config_dir = folder("--config-dir", argument.partition("=")[2] or next(remaining, ""))
        elif argument in ("-m", "--multirun"):
            raise ConfigError(
                "Sweeps are not a part of flexbatch.", remedy="Run it once for each value, in a shell loop."
            )
        elif argument.startswith("-"):
            raise ConfigError(f"There is no flag {argument!r}.", remedy="Options are key=value; --help lists them.")
        else:
            overrides.append(argument)
    config = load_config(overrides, config_dir)
    if show:
        print(as_yaml(config), end="")
        raise SystemExit(0)
    return config, overrides


def folder(what: str, path: str) -> Path:
    if not Path(path).is_dir() or not path:
        raise ConfigError(f"{what}: {path or 'nothing'!r} is not a folder.", remedy=f"Give a folder: {what} DIR.")
    return Path(path)


def usage() -> str:
    from flexbatch.composition import bundled, group_options
    from flexbatch.overrides import GROUPS, option_lines

    parts = [USAGE]
    for group in GROUPS:
        names = ", ".join(group_options(group, [bundled("conf")]))
        parts.append(textwrap.fill(f"{group}=NAME, one of: {names}", 120, subsequent_indent="    "))
        parts.extend([*option_lines(group), ""])
    return "\n".join(parts)


def choose_verb(arguments: Sequence[str]) -> tuple[Callable[[Sequence[str]], int], Sequence[str]]:
    """The first argument if it is a verb; a first argument that looks like one but is none is an error."""
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        return VERBS["run"], arguments
    if arguments[0] in VERBS:
        return VERBS[arguments[0]], arguments[1:]
    from flexbatch.overrides import near_miss

    raise ConfigError(
        f"{arguments[0]!r} is neither a verb nor key=value.",
        remedy=f"{near_miss(arguments[0], list(VERBS))}The verbs are {', '.join(VERBS)}.",
    )


def quiet_libraries() -> None:
    """Their advice and progress bars would tear our own display; whoever wants them sets these variables."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DATASETS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)


def explain(error: BaseException) -> int:
    """A few lines on stderr and the exit code; the traceback only for those who ask for it."""
    if os.environ.get("FLEXBATCH_TRACEBACK") == "1":
        traceback.print_exception(error)
    if isinstance(error, FlexbatchError):
        label = "" if isinstance(error, Interrupted) else "error: "
        print(f"{label}{error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("Stopped.", file=sys.stderr)
        return Interrupted.exit_code
    text = " ".join(str(error).split())[:500]
    print(f"error: {type(error).__name__}: {text}", file=sys.stderr)
    print(
        "This is a bug in flexbatch. FLEXBATCH_TRACEBACK=1 shows where; what is finished is on disk.", file=sys.stderr
    )
    return 1


def main(arguments: Sequence[str]) -> int:
    quiet_libraries()
    try:
        if {"-h", "--help"} & set(arguments) and arguments[0] != "import":
            print(usage())
            return 0
        if "--version" in arguments:
            from flexbatch import __version__

            print(f"flexbatch {__version__}")
            return 0
        if arguments and arguments[0] == "--complete":
            from flexbatch.completion import complete

            print("\n".join(complete(os.environ, list(VERBS))))
            return 0
        verb, rest = choose_verb(arguments)
        return verb(rest)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last place where anything can be said
        return explain(error)


def leave(code: int) -> NoReturn:
    """Ends the process at once. All is on disk by now, and native libraries that end their threads at exit can abort a
    process that has done its work ("terminate called without an active exception", once in some 30 runs under load)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def console() -> None:
    leave(main(sys.argv[1:]))


if __name__ == "__main__":
    console()
