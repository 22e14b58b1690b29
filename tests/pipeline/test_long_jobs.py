"""A job of more rows than are read before it starts keeps to its plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexbatch.composition import load_config
from flexbatch.engine.layer_store import KV
from flexbatch.plan.policy import Tier
from flexbatch.records import Request
from flexbatch.stages import work
from flexbatch.stages.model import find_model
from flexbatch.stages.opening import open_for
from flexbatch.stages.planning import plan_run
from flexbatch.stages.work import describe_work
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import overrides

ROWS = 40


@pytest.mark.parametrize("template", ["'{{ text }}'", "'the same beginning of every prompt, word for word {{ text }}'"])
@pytest.mark.parametrize("scanned", [8, ROWS])
def test_the_cache_takes_what_was_planned(
    scanned: int, template: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "SCANNED_ROWS", scanned)
    dataset = write_rows(tmp_path / "data", shards=1, rows=ROWS)
    options = {"prompt__template": template, "generation__max_new_tokens": 4, "prompt__window": 8}
    config = load_config(overrides(small_model, dataset, tmp_path / "run", **options))
    model = find_model(config)
    job = describe_work(config, model)
    assert job.scan.complete == (scanned == ROWS)
    plan = plan_run(config, model, job)
    planned = sum(need.nbytes for need in plan.prediction.needs if need.what == KV)
    engine = open_for(config, model, job, plan, tmp_path)
    requests = (
        Request(item.index, item.prompt.token_ids, item.prompt.sampling, shared_tokens=item.prompt.shared_tokens)
        for item in job.placed()
    )
    try:
        next(engine.run(requests))
        assert engine._storage.budgets[Tier.DEVICE].by_purpose[KV] == pytest.approx(planned, rel=1e-3)
    finally:
        engine.close()
