"""In the last layer only tokens that are read are computed behind attention; tokens are Transformers' all the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from flexbatch.engine import opening
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.families import prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

LONGEST, NEW_TOKENS = 200, 5


def counted(layer: nn.Module, rows: Counter[str]) -> None:
    """Counts the tokens that each linear layer is really given."""

    def counting(name: str, forward: Any) -> Any:
        def counted_forward(x: Any) -> Any:
            rows[name.rpartition(".")[2]] += x.shape[-2]
            return forward(x)

        return counted_forward

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            module.forward = counting(name, module.forward)


@pytest.mark.parametrize("resident", [1.0, 0.0], ids=["whole prompts", "prompts in parts"])
def test_the_last_layer_computes_what_is_read(resident: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Counter[str]()
    narrow = opening.narrow
    monkeypatch.setattr(opening, "narrow", lambda layer, kind: (counted(layer, rows), narrow(layer, kind)))
    asked = prompts(6, LONGEST, seed=3)
    policy = Policy(Shares(resident, 0), slots=3, prefill_tokens=70)
    running = engine(saved("llama"), policy, LONGEST + NEW_TOKENS, tmp_path)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    done, passes = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(asked)))
    for index, prompt in enumerate(asked):
        assert_same_tokens("llama", prompt, done[index].token_ids, reference("llama", prompt, NEW_TOKENS))
    entered, read = sum(map(len, asked)), sum(len(each.token_ids) for each in done.values())
    # Calls are filled up to a multiple of eight tokens; a pass in which nothing is read computes one.
    assert rows["k_proj"] >= entered + read - len(asked)
    for name in ("o_proj", "up_proj", "down_proj"):
        assert read <= rows[name] <= read + 2 * len(passes) < entered
