"""CTranslate2 with the whole model in memory, converted once from the checkpoint."""

from __future__ import annotations

import importlib.util

from flexbatch.bench.fitting import require_room
from flexbatch.bench.trial import Outcome, Trial
from flexbatch.errors import EngineError


def run(trial: Trial) -> Outcome:
    if importlib.util.find_spec("ctranslate2") is None:
        raise EngineError("not run: CTranslate2 is not installed here (pip install 'flexbatch[bench]').")
    require_room(trial, "CTranslate2")
    raise EngineError("not run: its converter needs a tokenizer, and the benchmark's models have none.")
