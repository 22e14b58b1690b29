"""What every engine's run is measured with: seconds, and bytes that the process had read from the disk."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path


def disk_bytes_read() -> int:
    """Bytes that this process made the disk read (proc(5), `io`: faults of mapped files count too); 0 if unknown."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["read_bytes"])
    except (OSError, ValueError, KeyError):
        return 0


@dataclass
class Meter:
    """Made when the process's work begins, started when generation begins."""

    born: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    read_before: int = 0
    processor_before: float = 0.0

    def start(self) -> None:
        self.read_before, self.processor_before = disk_bytes_read(), time.process_time()
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def processor_seconds(self) -> float:
        """Of all threads of this process."""
        return time.process_time() - self.processor_before

    @property
    def setup_seconds(self) -> float:
        return self.started - self.born

    @property
    def read_bytes(self) -> int:
        return disk_bytes_read() - self.read_before
