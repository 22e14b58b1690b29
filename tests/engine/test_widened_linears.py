"""In bfloat16 on a CPU that does not multiply it, products are ours and change no more than the order of sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from flexbatch.engine import linear_layers, opening
from flexbatch.engine.linear_layers import WidenedLinear, use_fastest_linears
from flexbatch.engine.model import build
from flexbatch.kernels import widened_products
from flexbatch.kernels.vectors import multiplies_floats
from flexbatch.plan.policy import Shares
from tests.engine.families import FAMILIES, saved
from tests.engine.test_blocked_linears import completions

pytestmark = pytest.mark.skipif(not multiplies_floats(), reason="this processor has no AVX2")

RESIDENT, STREAMED = Shares(1, 0), Shares(0, 0)


@pytest.fixture(autouse=True)
def _as_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers, "suits", lambda _dtype: False)
    monkeypatch.setattr(widened_products, "suit", lambda _dtype: True)


@pytest.mark.parametrize("family", FAMILIES)
def test_placement_changes_no_bit_and_log_probabilities_are_near_those_of_torch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, streamed = (completions(family, where, tmp_path, None) for where in (RESIDENT, STREAMED))
    assert {index: (done.token_ids, done.logprobs) for index, done in resident.items()} == {
        index: (done.token_ids, done.logprobs) for index, done in streamed.items()
    }
    monkeypatch.setattr(opening, "use_fastest_linears", lambda *_: None)
    plain = completions(family, RESIDENT, tmp_path, None)
    assert resident.keys() == plain.keys()
    for index, done in plain.items():
        assert resident[index].logprobs[0] == pytest.approx(done.logprobs[0], abs=0.05)


@pytest.mark.parametrize("family", ["llama", "falcon", "mixtral"])
def test_every_linear_layer_is_ours_the_head_and_experts_too(family: str) -> None:
    stepped = build(AutoConfig.from_pretrained(saved(family)), torch.bfloat16)
    use_fastest_linears(stepped, torch.bfloat16, torch.device("cpu"))
    linears = [module for module in stepped.model.modules() if isinstance(module, nn.Linear)]
    assert linears
    assert {type(module) for module in linears} == {WidenedLinear}
    matrices = {id(value) for layer in stepped.stops for value in layer.module.parameters() if value.ndim > 2}
    assert not matrices


def test_a_layer_that_its_model_keeps_in_float32_stays_exact() -> None:
    layer = nn.Linear(200, 90).requires_grad_(False)
    x = torch.randn(70, 200)
    wanted = layer(x)
    layer.__class__ = WidenedLinear
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize(("rows", "width"), [(1, 208), (5, 208), (24, 208), (25, 208), (70, 208), (2, 200), (2, 201)])
def test_a_linear_layer_of_ours_is_the_one_of_torch_within_a_rounding(rows: int, width: int) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(width, 90).bfloat16().requires_grad_(False)
    x = torch.randn(2, rows, width).bfloat16()
    wanted = layer.float()(x.float())
    layer.bfloat16().__class__ = WidenedLinear
    torch.testing.assert_close(layer(x).float(), wanted, rtol=2**-8, atol=1e-5)
