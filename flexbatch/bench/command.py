"""`flexbatch bench`: checkpoint, prompts, the machine's limits, every engine in turn, a table, one line of JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from flexbatch.bench.comparison import OWN, Comparison, EngineRuns
from flexbatch.bench.fitting import why_no_room
from flexbatch.bench.launcher import Launcher
from flexbatch.bench.machine import describe_machine, load_average, multiplies_bfloat16
from flexbatch.bench.peers import Search, search_batch
from flexbatch.bench.policies import measure_policies
from flexbatch.bench.roofline import MachineLimits
from flexbatch.bench.scaling import measure_scaling
from flexbatch.bench.table import print_comparison, print_policies, print_scaling
from flexbatch.bench.trial import Outcome, Prompts, Trial, write_prompts
from flexbatch.bench.workloads import make_prompts
from flexbatch.config import Config, parse_bytes
from flexbatch.errors import ConfigError, EngineError

PREPARATIONS = {"ctranslate2": "ctranslate2-conversion"}
"""What is done once, before a peer can open the model."""


def bench(config: Config) -> None:
    """Measures `bench.workload` and prints it; the last line of stdout is one JSON object."""
    console = Console(stderr=False, width=max(120, Console().width))
    result: dict[str, Any] = {"workload": config.bench.workload, "machine": describe_machine()}
    if config.bench.workload == "scaling":
        result["scaling"] = measure_scaling(config, console)
        print_scaling(console, f"{config.model.name}: time and memory against rows", result["scaling"])
    elif config.bench.workload == "quality":
        result |= judge(config, console)
    else:
        result |= compare(config, console)
    result["machine"]["load_average_after"] = load_average()
    print(json.dumps(result))


def judge(config: Config, console: Console) -> dict[str, Any]:
    """What fewer bits cost this model. Imports torch, which the parent of timed runs must not."""
    from flexbatch.bench.quality import as_records, measure_quality, print_quality, write_quality

    measured = measure_quality(config, console)
    print_quality(console, f"{config.model.name}: what fewer bits cost", measured)
    if config.bench.document:
        write_quality(Path(config.bench.document), measured)
    return {"quality": as_records(measured)}


def compare(config: Config, console: Console) -> dict[str, Any]:
    """flexbatch and its peers on the same prompts."""
    cache = Path(config.model.cache_dir) / "bench"
    folder = cache / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="scratch-") as scratch:
        session = Session(config, Launcher(folder, config.bench.timeout), console, Path(scratch))
        measured = session.policies() if config.bench.policies else session.measure()
        return measured | {"records": str(folder)}


class Session:
    """One comparison: what all its trials have in common."""

    def __init__(self, config: Config, launcher: Launcher, console: Console, scratch: Path) -> None:
        self._config, self._launcher, self._console = config, launcher, console
        bench = config.bench
        self._dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
        self._peer_dtype = peer_dtype(bench.peer_dtype, self._dtype)
        self._model = model_folder(config, self._dtype)
        self._template = Trial(
            engine=OWN,
            model=str(self._model),
            prompts=str(launcher.folder / "prompts.json"),
            rows=bench.rows,
            new_tokens=bench.new_tokens,
            dtype=self._dtype,
            scratch=str(scratch),
            cache_dir=str(config.model.cache_dir),
            limit=0 if bench.memory == "auto" else parse_bytes(bench.memory, key="bench.memory"),
            options={
                "offload": dataclasses.asdict(config.offload) | {"lookup": bench.lookup},
                "hardware": dataclasses.asdict(config.hardware),
            },
        )

    def measure(self) -> dict[str, Any]:
        prompts = self._prompts()
        searches = {peer: self._search(peer) for peer in self._config.bench.peers}
        limits = [self._limits()]
        measured: dict[str, list[Outcome]] = {engine: [] for engine in (OWN, *searches)}
        for _ in range(self._config.bench.repeats):
            for engine, trial in self._turns(searches):
                measured[engine].append(self._run(trial))
                if engine == OWN:
                    limits.append(self._limits())
        engines = tuple(self._engine_runs(engine, runs, searches.get(engine)) for engine, runs in measured.items())
        comparison = Comparison(prompts, self._template.new_tokens, tuple(limits), engines, self._int8)
        notes = (prompts.note, self._peer_note(), comparison.agreement())
        conditions = [*sorted(self._launcher.conditions), *filter(None, notes)]
        print_comparison(self._console, self._title(), comparison, conditions)
        return {
            "model": self._config.model.name,
            "dtype": self._dtype,
            "peer_dtype": self._peer_dtype,
            "memory_limit_bytes": self._template.limit,
            "rows": self._template.rows,
            "prompt_tokens": sum(prompts.lengths),
            "new_tokens": self._template.new_tokens,
            "shared_tokens": prompts.shared_tokens,
            "conditions": conditions,
            "limits": [dataclasses.asdict(measurement) for measurement in limits],
            "engines": comparison.record(),
        }

    def policies(self) -> dict[str, Any]:
        """The automatic policy beside hand-made ones."""
        self._prompts()
        self._limits()
        grid = measure_policies(self._template, self._config.bench.policies, self._run)
        print_policies(self._console, self._title(), grid)
        return {"model": self._config.model.name, "policies": grid.record()}

    @property
    def _int8(self) -> bool:
        return self._config.offload.compute == "int8"

    def _title(self) -> str:
        bench = self._config.bench
        return (
            f"{self._config.model.name}, {self._dtype}{', int8 compute' if self._int8 else ''}, {bench.workload}: "
            f"{bench.rows} rows of {bench.prompt_tokens} + {bench.new_tokens} tokens, memory {bench.memory}"
        )

    def _prompts(self) -> Prompts:
        """Makes the checkpoint if need be, then the prompts for its vocabulary."""
        fields = dict(self._config.model.config)
        made = self._run(self._trial("checkpoint", limit=0, options={"config": fields}))
        if made.error:
            raise EngineError(f"The random checkpoint could not be made: {made.error}")
        prompts = make_prompts(self._config.bench, int(made.details["vocabulary"]))
        write_prompts(Path(self._template.prompts), prompts)
        return prompts

    def _limits(self) -> MachineLimits:
        outcome = self._run(self._trial("roofline", limit=0))
        if outcome.error:
            raise EngineError(f"The machine's limits could not be measured: {outcome.error}")
        return MachineLimits.from_details(outcome.details)

    def _search(self, peer: str) -> Search:
        """The peer's best batch size, or why it cannot run here."""
        error = why_no_room(self._peer_trial(peer))
        if not error and peer in PREPARATIONS:
            error = self._run(self._peer_trial(PREPARATIONS[peer], limit=0)).error
        if error:
            return Search((Outcome(peer, error=error),))
        sizes = [min(size, self._template.rows) for size in self._config.bench.batches]
        return search_batch(sizes, lambda size: self._run(self._peer_trial(peer, batch=size, rows=size)))

    def _turns(self, searches: dict[str, Search]) -> Iterator[tuple[str, Trial]]:
        yield OWN, self._trial(OWN)
        rows = self._config.bench.peer_rows or self._template.rows
        for peer, search in searches.items():
            if search.best is not None:
                size = search.best.batch
                # Whole batches, so that the peer's rate is that of its best size.
                yield peer, self._peer_trial(peer, batch=size, rows=min(self._template.rows, max(size, rows)))

    def _engine_runs(self, engine: str, runs: list[Outcome], search: Search | None) -> EngineRuns:
        if search is not None and search.best is None:
            failed = Outcome(engine, error=search.error or "no batch size to try")
            return EngineRuns(engine, (failed,), search.tried)
        return EngineRuns(engine, tuple(runs), search.tried if search else ())

    def _trial(self, engine: str, **changes: Any) -> Trial:
        return dataclasses.replace(self._template, engine=engine, **changes)

    def _peer_trial(self, engine: str, **changes: Any) -> Trial:
        """In the peers' type, or in flexbatch's own where only that leaves room for the whole model."""
        trial = self._trial(engine, dtype=self._peer_dtype, **changes)
        is_too_large = self._config.bench.peer_dtype == "auto" and why_no_room(trial)
        return dataclasses.replace(trial, dtype=self._dtype) if is_too_large else trial

    def _peer_note(self) -> str:
        if self._peer_dtype == self._dtype or not self._config.bench.peers:
            return ""
        return f"peers compute in {self._peer_dtype} where that fits, of the same stored weights"

    def _run(self, trial: Trial) -> Outcome:
        load = load_average()
        size = f", batch {trial.batch}" if trial.batch else ""
        with self._console.status(f"{trial.engine}{size} (load {load})"):
            outcome = self._launcher.run(trial)
        return dataclasses.replace(outcome, load_before=load)


def peer_dtype(choice: str, own: str) -> str:
    """The type that peers compute in where flexbatch computes in `own`: what is fastest for them."""
    if choice != "auto":
        return choice
    return own if own == "float32" or (own == "bfloat16" and multiplies_bfloat16()) else "float32"


def model_folder(config: Config, dtype: str) -> Path:
    """The folder that every engine opens: the user's own where there is one, else a random checkpoint to be made."""
    given = Path(config.model.path).expanduser()
    if (given / "config.json").is_file() and list(given.glob("*.safetensors")):
        return given
    if not config.model.config:
        raise ConfigError(
            f"bench: model.path={config.model.path} is no folder with weights, and the model's shapes are not known.",
            remedy="Choose a model whose config comes with flexbatch, such as model=opt-1.3b, or give a folder.",
        )
    fields = json.dumps([dict(config.model.config), dtype], sort_keys=True)
    digest = hashlib.sha256(fields.encode()).hexdigest()[:8]
    return Path(config.model.cache_dir) / "bench" / "models" / f"{config.model.name}-{dtype}-{digest}"
