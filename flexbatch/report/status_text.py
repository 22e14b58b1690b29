"""How far a job is, in a few lines, from the files that it leaves."""

from __future__ import annotations

import time
from datetime import datetime

from flexbatch.data.progress import Status
from flexbatch.report.progress import duration_text, finish_text, rate_text

MEANING = {
    "new": "nothing has run here yet",
    "running": "running",
    "done": "done",
    "interrupted": "stopped on request",
    "failed": "stopped by an error",
    "killed": "stopped without a word (killed, or the machine went down)",
}


def moment_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%a %d %b %Y %H:%M:%S")


def rows_text(status: Status) -> str:
    if status.rows_total is None:
        return f"{status.rows_done:,} (the total is not known yet), in {status.parts_done} parts"
    share = status.rows_done / status.rows_total if status.rows_total else 1.0
    return f"{status.rows_done:,} of {status.rows_total:,} ({share:.1%}), in {status.parts_done} parts"


def status_lines(status: Status, now: float) -> list[tuple[str, str]]:
    """What there is to tell, as label and text. `now` is in seconds since the epoch."""
    where = f", process {status.pid} on {status.host}" if status.alive else ""
    lines = [("folder", status.folder), ("state", MEANING.get(status.state, status.state) + where)]
    lines.append(("rows", rows_text(status)))
    lines.append(("tokens", f"{status.tokens:,} generated"))
    if status.tokens_per_second > 0:
        rates = f"{rate_text(status.rows_per_second)} rows/s, {rate_text(status.tokens_per_second)} tokens/s"
        lines.append(("speed", f"{rates} in the last attempt"))
    if status.started is not None and status.updated is not None:
        lines.append(("started", f"{moment_text(status.started)} (attempt {len(status.attempts)})"))
        lines.append(
            ("last sign", f"{moment_text(status.updated)}, {duration_text(max(0.0, now - status.updated))} ago")
        )
    if status.finish is not None:
        left = max(0.0, status.finish - now)
        clock = datetime.fromtimestamp(now).astimezone()
        lines.append(("finish", f"{finish_text(left, clock)}, {duration_text(left)} left"))
    if status.last_error:
        lines.append(("last error", status.last_error))
    if not status.alive and status.state not in ("done", "new"):
        lines.append(("go on", "run the same command again: finished rows are kept, nothing is done twice"))
    return lines


def status_text(status: Status, now: float | None = None) -> str:
    lines = status_lines(status, time.time() if now is None else now)
    return "\n".join(f"{label:11}{text}" for label, text in lines)
