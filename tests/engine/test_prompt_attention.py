"""Prompts in bfloat16 on a CPU are attended to by a kernel of ours, and get the log-probabilities of torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.opening import Checkpoint, EngineOptions, Limits, open_engine
from flexbatch.kernels import prefill_attention
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Completion, Request, Sampling
from tests.engine.families import prompts, saved
from tests.engine.running import NumberDecoder, answer

pytestmark = pytest.mark.skipif(
    not prefill_attention.is_available(), reason="torch's attention is used on this processor"
)

SHARED, LONGEST = 12, 30


def completions(family: str, folder: Path, prefill_tokens: int, shared: int) -> dict[int, Completion]:
    """One token for each of nine prompts of many lengths, which begin with the same `shared` tokens."""
    model = saved(family)
    running = open_engine(
        Checkpoint(AutoConfig.from_pretrained(model), SafetensorsIndex.open(model).entries, str(model)),
        Policy(Shares(0, 0), slots=5, prefill_tokens=prefill_tokens),
        Limits(disk_folder=folder),
        Vocabulary(NumberDecoder(), frozenset({2})),
        EngineOptions(SHARED + LONGEST + 2, torch.bfloat16, reader="buffered"),
    )
    sampling = Sampling(max_new_tokens=2, logprobs=True)
    rows = prompts(9, LONGEST)
    asked = (Request(n, rows[0][:1] * shared + row, sampling, shared_tokens=shared) for n, row in enumerate(rows))
    done, _ = answer(running, asked)
    return done


@pytest.mark.parametrize("family", ["opt", "llama", "gpt-neox", "phi"])
@pytest.mark.parametrize(("prefill_tokens", "shared"), [(64, 0), (11, 0), (64, SHARED)])
def test_prompts_parts_and_prefixes_get_torchs_log_probabilities(
    family: str, prefill_tokens: int, shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    kernel = prefill_attention.prefill_attention

    def counted(query: torch.Tensor, prefix: Any, own: Any, *rest: Any) -> Any:
        called.append(prefix[0].shape[2])
        return kernel(query, prefix, own, *rest)

    monkeypatch.setattr(prefill_attention, "prefill_attention", counted)
    got = completions(family, tmp_path, prefill_tokens, shared)
    assert called
    assert shared in called
    monkeypatch.setattr(prefill_attention, "suits", lambda *_: False)
    wanted = completions(family, tmp_path, prefill_tokens, shared)
    for index, completion in got.items():
        other = wanted[index]
        same = completion.token_ids[0] == other.token_ids[0]
        assert abs(completion.logprobs[0] - other.logprobs[0]) < 0.03 or not same  # type: ignore[index]
