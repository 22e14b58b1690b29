"""The trace is valid JSON in the Trace Event Format, whatever threads write to it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from flexbatch.report.trace import ChromeTrace


def test_events_from_several_threads_make_one_readable_file(tmp_path: Path) -> None:
    with ChromeTrace(tmp_path / "run" / "trace.json") as trace:
        writers = [
            threading.Thread(target=lambda kind=kind: [trace.event(kind, "layer", i, i + 0.5, 7) for i in range(50)])
            for kind in ("compute", "read", "copy")
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    events = [event for event in json.loads((tmp_path / "run" / "trace.json").read_text()) if event.get("ph") == "X"]
    assert len(events) == 150
    assert {event["cat"] for event in events} == {"compute", "read", "copy"}
    assert all(event["dur"] == 500_000 and event["args"]["bytes"] == 7 for event in events)
