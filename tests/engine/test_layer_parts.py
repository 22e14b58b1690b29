"""Large layers go by matrix by matrix: the same tokens, in less memory, as the plan counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.engine import model as building
from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.engine.weights import in_order_of_use
from flexbatch.plan.policy import Policy, Shares
from flexbatch.plan.weight_need import held_weights
from flexbatch.records import Request, Sampling
from tests.engine.families import FAMILIES, loaded, prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

LONGEST, NEW_TOKENS = 20, 5
WHOLE = {"gpt2"}  # linear modules of another kind


@pytest.fixture(autouse=True)
def _every_layer_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "LARGE_LAYER_PARAMETERS", 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [Shares(0, 0), Shares(0.5, 0.2)], ids=["streamed", "mixed"])
def test_greedy_tokens_are_those_of_transformers(family: str, weights: Shares, tmp_path: Path) -> None:
    rows = prompts(6, LONGEST)
    running = engine(saved(family), Policy(weights, slots=4, prefill_tokens=24), LONGEST + NEW_TOKENS, tmp_path)
    stepped = running._caller.stepped
    assert bool(stepped.paths_in_layers()) == (stepped.lays_side_by_side and family not in WHOLE)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    done, _ = answer(running, (Request(index, row, sampling) for index, row in enumerate(rows)))
    for index, row in enumerate(rows):
        assert_same_tokens(family, row, done[index].token_ids, reference(family, row, NEW_TOKENS))


def test_the_stream_finds_the_order_of_use_once_for_all_layers(tmp_path: Path) -> None:
    """OPT registers keys, values, queries and uses queries, keys, values."""
    running = engine(saved("opt"), Policy(Shares(0, 0), slots=4), LONGEST + NEW_TOKENS, tmp_path)
    weights, opened = running._weights, []
    again = weights._open_stream
    weights._open_stream = lambda: (opened.append(1), again())[1]  # type: ignore[method-assign]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    answer(running, (Request(index, row, sampling) for index, row in enumerate(prompts(3, LONGEST))))
    paths = [path for _, path in (weights._paths[name] for name in weights._order if name in weights._paths)]
    assert paths == 4 * [
        *(f".self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        *(".fc1", ".fc2"),
    ]
    assert len(opened) <= 3


@pytest.mark.parametrize(
    ("family", "parts"), [("opt-iml", ["self_attn", "fc1", "fc2"]), ("gptj", ["attn", "mlp.fc_in", "mlp.fc_out"])]
)
def test_an_attention_no_larger_than_the_largest_matrix_goes_by_as_one(family: str, parts: list[str]) -> None:
    config = loaded(family).config
    stepped, spec = building.build(config, torch.float32), spec_from_config(config)
    layer = next(stop.name for stop in stepped.stops if stop.layer == 1)
    assert [stop.name for stop in stepped.parts(1)] == [f"{layer}.{part}" for part in parts]
    largest = max(value.numel() for value in stepped.layer(1).parameters())
    assert spec.expanded_parameters == largest


def test_the_plan_counts_one_matrix_where_it_counted_a_layer() -> None:
    config = loaded("llama").config
    spec, policy = spec_from_config(config), Policy(Shares(0, 0))
    matrix = max(value.numel() for value in loaded("llama").model.layers[0].parameters())
    rows = max(matrix, config.vocab_size * config.hidden_size)
    assert held_weights(spec, policy).most == rows * spec.dtype_bytes
    assert spec.parameters == sum(value.numel() for value in loaded("llama").parameters())


@given(layers=st.integers(1, 4), parts=st.integers(2, 5), data=st.data())
def test_what_is_learnt_of_one_layer_holds_for_all(layers: int, parts: int, data: st.DataObject) -> None:
    used = data.draw(st.permutations(range(parts)))
    paths = {f"{layer}.{part}": (layer, f".{part}") for layer in range(layers) for part in range(parts)}
    streamed = data.draw(st.lists(st.sampled_from(sorted(paths)), min_size=1, unique=True))
    order = [name for name in paths if name in streamed]
    wanted = [f"{layer}.{part}" for layer in range(layers) for part in used if f"{layer}.{part}" in streamed]
    moves = 0
    for position, name in enumerate(wanted):
        if order[position] != name:
            before, order = order, in_order_of_use(order, position, name, paths)
            assert sorted(before) == sorted(order)
            assert order[: position + 1] == wanted[: position + 1]
            moves += 1
    assert order == wanted
    if len(streamed) == len(paths):
        assert moves <= parts * (parts - 1) // 2
