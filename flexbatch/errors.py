"""Every error that flexbatch raises on purpose.

    FlexbatchError                 exit code 1
     ├── ConfigError               2   a key, a value, or two values that do not go together
     ├── DataError                 3   the dataset: missing, empty, truncated, changed between shards
     ├── PromptError               3   a template that cannot be compiled, a few-shot setup that cannot be met
     ├── ModelError                4   the model folder: config, shards, shapes, architecture, tokenizer
     ├── CapacityError             5   a limit that cannot be met: device memory, host memory, disk
     ├── OutputError               6   the output folder: permission, full disk
     │    ├── FingerprintError     6   the folder belongs to another run
     │    └── LockedError          6   another process is running on the folder
     ├── EngineError               7   generation failed (a read failed under way)
     │    ├── OutOfMemory          7   memory ran out under way, on whichever tier
     │    └── IncompressibleCache  7   keys or values do not fit into a compressed cache
     └── Interrupted             130   Ctrl-C; everything finished so far is on disk

A message says what is wrong, where (key or file), which value, and what to do. The command line prints it in a few
lines and exits with the code; `FLEXBATCH_TRACEBACK=1` shows the traceback as well.
"""

from __future__ import annotations


class FlexbatchError(Exception):
    """Base of the tree. `remedy` is the sentence that tells the user what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class ConfigError(FlexbatchError):
    exit_code = 2


class DataError(FlexbatchError):
    exit_code = 3


class PromptError(FlexbatchError):
    exit_code = 3


class ModelError(FlexbatchError):
    exit_code = 4


class CapacityError(FlexbatchError):
    exit_code = 5


class OutputError(FlexbatchError):
    exit_code = 6


class FingerprintError(OutputError):
    """The output folder belongs to a run whose results would differ."""


class LockedError(OutputError):
    """Another live process holds the output folder."""


class EngineError(FlexbatchError):
    exit_code = 7


class OutOfMemory(EngineError):
    """Memory ran out while rows were in flight: fewer of them need less."""


class IncompressibleCache(EngineError):
    """Keys or values of a model are of so many sizes that a compressed cache has no room for them."""


class Interrupted(FlexbatchError):
    exit_code = 130
