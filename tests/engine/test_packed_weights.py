"""Weights in 8 and 4 bits: what is computed is what the quantised numbers say, wherever they live."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexbatch.engine.packed_sources import GROUP_SIZE
from flexbatch.memory.quantization import dequantize, quantizable, quantize
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.families import prompts, saved
from tests.engine.running import answer, engine

NEW_TOKENS = 6
LONGEST = 20


def quantised_reference(family: str, bits: int, prompt: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of Transformers' model whose layers' matrices were quantised and expanded again."""
    model = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            in_a_layer = ".layers." in name or ".h." in name
            if in_a_layer and value.dim() >= 2 and quantizable(value.shape, GROUP_SIZE):
                value.copy_(dequantize(quantize(value, bits, GROUP_SIZE), torch.empty_like(value)))
        return model(torch.tensor([prompt])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("shares", [Shares(1, 0), Shares(0.4, 0.3), Shares(0, 0)], ids=["device", "mixed", "disk"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "mixtral"])
def test_quantised_weights_give_the_scores_of_their_expanded_values(
    family: str, bits: int, shares: Shares, tmp_path: Path
) -> None:
    asked = [Request(i, p, score_tokens=len(p) - 1) for i, p in enumerate(prompts(3, LONGEST))]
    policy = Policy(weights=shares, weight_bits=bits, slots=3)
    done, _ = answer(engine(saved(family), policy, LONGEST + NEW_TOKENS, tmp_path), asked)
    for request in asked:
        ids = request.prompt_ids
        logprobs = quantised_reference(family, bits, ids)
        want = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        torch.testing.assert_close(torch.tensor(done[request.index].logprobs), want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shares", [Shares(1, 0), Shares(0, 0)], ids=["device", "disk"])
def test_integer_arithmetic_stays_near_full_precision(shares: Shares, tmp_path: Path) -> None:
    asked = [
        Request(i, p, Sampling(max_new_tokens=1), score_tokens=len(p) - 1) for i, p in enumerate(prompts(4, LONGEST))
    ]
    scores = []
    for policy in (Policy(slots=4), Policy(weights=shares, compute="int8", slots=4)):
        done, _ = answer(engine(saved("opt"), policy, LONGEST + 1, tmp_path), asked)
        scores.append(torch.tensor([value for index in sorted(done) for value in done[index].logprobs]))
    exact, integers = scores
    assert not torch.equal(exact, integers)  # the integer path ran
    assert float((exact - integers).abs().mean()) < 0.05 * float(exact.abs().mean())


def test_the_packed_file_is_made_once(tmp_path: Path) -> None:
    policy = Policy(weights=Shares(0, 0), weight_bits=4, slots=2)
    asked = [Request(0, prompts(1)[0], Sampling(max_new_tokens=2))]
    stamps = []
    for _ in range(2):
        answer(engine(saved("llama"), policy, LONGEST + NEW_TOKENS, tmp_path), asked)
        stamps.append([(file.name, file.stat().st_mtime_ns) for file in sorted(tmp_path.rglob("packed-*.safetensors"))])
    assert stamps[0] == stamps[1] != []
