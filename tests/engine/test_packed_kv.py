"""The KV cache in 8 and 4 bits: attention sees each token's packed numbers, whatever happened to the token since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer

from flexbatch.engine.carried_keys import OwnKeys
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.kv_form import PackedForm
from flexbatch.engine.micro_batch import MicroBatch, walk
from flexbatch.engine.model import cache_argument
from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.engine.opening import Limits
from flexbatch.engine.storage import Storage
from flexbatch.memory.tiers import TierBudget
from flexbatch.plan.kv_rooms import PACKED_PARTS, PAGE
from flexbatch.plan.memory_need import kv_block_bytes, kv_unit_bytes, kv_units, needs
from flexbatch.plan.model_spec import ModelSpec, key_bits, kv_group_size, packed_head_bytes
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.plan.workload import Workload
from flexbatch.records import Completion, Request, Sampling
from tests.engine.families import FAMILIES, SHAPES, VOCABULARY, loaded, prompts, saved
from tests.engine.running import answer, engine
from tests.plan.examples import machine

NEW_TOKENS = 6
LONGEST = 16
# Two logits closer than this may change places: sums in another order put a number on the other side of a rounding.
TIE = 2e-2
PLACEMENTS = {"device": Shares(1, 0), "disk": Shares(0, 0), "mixed": Shares(0.35, 0.4)}
# Merged attention, copied prefixes and partly rotary positions show single tiers; the others all tiers at once.
CASES = [
    *((family, "mixed") for family in FAMILIES | SHAPES),
    *(
        (family, placement)
        for family in ("llama", "llama-wide", "bloom", "gpt-neox")
        for placement in ("device", "disk")
    ),
]


def packed(states: torch.Tensor, bits: int) -> torch.Tensor:
    """The reference: asymmetric rounding to nearest along the head dimension, in float64 but for the float16 scales."""
    group = kv_group_size(states.shape[-1])
    grouped = states.double().unflatten(-1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    low = _float16(low, up=False)
    step = _float16((high - low) / (2**bits - 1), up=True)
    levels = ((grouped - low) / step.clamp(min=1e-30)).round().clamp(0, 2**bits - 1)
    return (levels * step + low).flatten(-2).to(states.dtype)


def _float16(values: torch.Tensor, *, up: bool) -> torch.Tensor:
    rounded = values.half()
    inside = rounded.double() < values if up else rounded.double() > values
    beyond = torch.nextafter(rounded, torch.full_like(rounded, torch.inf if up else -torch.inf))
    return torch.where(inside, beyond, rounded).double()


class PackedReference(DynamicLayer):
    """Transformers' own cache, but that every token goes through packing when it comes."""

    bits = 16

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(packed(key_states, key_bits(self.bits)), packed(value_states, self.bits), *args, **kwargs)


def reference_logits(family: str, tokens: tuple[int, ...], bits: int) -> torch.Tensor:
    """float32 `[tokens, vocabulary]` of the unmodified model over a cache of packed tokens."""
    model = loaded(family)
    kind = type("Layer", (PackedReference,), {"bits": bits})
    cache = DynamicCache(config=model.config)
    cache.layers = [kind() for _ in range(model.config.num_hidden_layers)]
    with torch.inference_mode():
        return model(torch.tensor([tokens]), **{cache_argument(model): cache}, use_cache=True).logits[0].float()


def assert_greedy(family: str, rows: list[tuple[int, ...]], done: Mapping[int, Completion], bits: int) -> None:
    """Each token is the one that the reference chooses after those before it, with the reference's probability."""
    errors = [log_error(family, prompt, done[index], bits) for index, prompt in enumerate(rows)]
    # A few rows have a number that another order of sums puts on the other side of a rounding: one step of error.
    assert max(errors) < TIE
    assert median(errors) < 5e-4


def log_error(family: str, prompt: tuple[int, ...], done: Completion, bits: int) -> float:
    """How far the log-probabilities of a row are from the reference's, which would choose the same tokens."""
    assert len(done.token_ids) == NEW_TOKENS
    logits = reference_logits(family, prompt + done.token_ids, bits)[len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    assert float((logprobs.amax(1) - chosen).max()) < TIE
    return float((torch.tensor(done.logprobs) - chosen).abs().max())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("family", "placement"), CASES)
def test_tokens_are_those_of_a_cache_that_packs_each_token(
    family: str, bits: int, placement: str, tmp_path: Path
) -> None:
    rows = prompts(7, LONGEST)
    policy = Policy(kv=PLACEMENTS[placement], kv_bits=bits, slots=3, prefill_tokens=30)
    running = engine(saved(family), policy, LONGEST + NEW_TOKENS, tmp_path)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, logprobs=True)
    done, _ = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(rows)))
    assert_greedy(family, rows, done, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mistral", "bloom"])
def test_scores_are_those_of_a_cache_that_packs_each_token(family: str, bits: int, tmp_path: Path) -> None:
    asked = [Request(i, p, score_tokens=len(p) - 1) for i, p in enumerate(prompts(3, LONGEST))]
    done, _ = answer(engine(saved(family), Policy(kv_bits=bits, slots=3), LONGEST + 1, tmp_path), asked)
    for request in asked:
        ids = request.prompt_ids
        logprobs = reference_logits(family, ids[:-1], bits).log_softmax(-1)
        want = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        # A number within a rounding error of the edge of a step may fall on its other side.
        torch.testing.assert_close(torch.tensor(done[request.index].logprobs), want, rtol=0, atol=0.05)


@pytest.mark.parametrize("family", ["llama", "llama-wide", "bloom"])
def test_a_resumed_row_and_a_shared_prefix_give_the_tokens_of_an_undisturbed_row(family: str, tmp_path: Path) -> None:
    """The first attempt stops after three tokens; in the second all prompts share a prefix."""
    shared = prompts(1, 40, seed=5)[0] * 3
    rows = [shared[:11] + prompt for prompt in prompts(6, 8, seed=6)]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, logprobs=True)
    policy = Policy(kv_bits=4, slots=4, prefill_tokens=40)
    alone, _ = answer(
        engine(saved(family), Policy(kv_bits=4, slots=1), 30, tmp_path),
        (Request(index, prompt, sampling) for index, prompt in enumerate(rows)),
    )
    resumed, _ = answer(
        engine(saved(family), policy, 30, tmp_path),
        (
            Request(index, prompt, sampling, before.token_ids[:3], before.logprobs[:3], shared_tokens=11)
            for index, prompt in enumerate(rows)
            for before in (alone[index],)
        ),
    )
    assert_greedy(family, rows, resumed, 4)
    for index in range(len(rows)):
        assert resumed[index].token_ids[:3] == alone[index].token_ids[:3]


def test_a_long_job_is_shifted_again_and_again_and_keeps_its_tokens(tmp_path: Path) -> None:
    rows = prompts(40, LONGEST, seed=2)
    policy = Policy(kv=Shares(0.5, 0.5), kv_bits=4, slots=2)
    running = engine(saved("llama"), policy, LONGEST + NEW_TOKENS, tmp_path)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, logprobs=True)
    done, passes = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(rows)))
    assert len(passes) > 2 * running._arena.columns
    assert_greedy("llama", rows, done, 4)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([16, 8, 4]),
    head_dim=st.sampled_from([8, 20, 64, 80]),
    tiers=st.sampled_from([(4, 0), (0, 4), (0, 0), (2, 1)]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("prompt"), st.integers(0, 3), st.integers(1, 5)),
            st.tuples(st.just("move"), st.integers(0, 3), st.integers(0, 3)),
            st.tuples(st.just("token"), st.just(0), st.just(0)),
        ),
        max_size=14,
    ),
    seed=st.integers(0, 99),
)
def test_shifts_and_moves_keep_every_token(
    bits: int, head_dim: int, tiers: tuple[int, int], steps: list[tuple[str, int, int]], seed: int
) -> None:
    """Against a list of rows: whatever joins, grows, moves and is shifted, a row's tokens are its own, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    cpu, span, slots, heads = torch.device("cpu"), 9, 4, 2
    storage = Storage(cpu, Limits().budgets(), Path("/tmp"))
    arena = KVArena([tiers], slots, span, 3, storage, bits)
    store, model = arena.layers[0], dict[int, list[torch.Tensor]]()

    def new(rows: int, tokens: int) -> torch.Tensor:
        made = torch.randn(2, rows, heads, tokens, head_dim, generator=generator)
        return made.bfloat16()

    def seen(states: torch.Tensor) -> torch.Tensor:
        return torch.stack(store.seen(store.pack(*states), *states))

    first = new(1, 1)
    store.prepare(*first)
    for kind, one, other in steps:
        if kind == "prompt":
            states = new(1, other)
            store.write_prompts([one], arena.end, store.pack(*states), [other])
            model[one] = list(seen(states)[:, 0].unbind(2))
        elif kind == "move" and one in model and other < one:
            arena.move(one, other)
            model[other] = model.pop(one)
        elif kind == "token" and model and max(map(len, model.values())) < span:
            arena.advance(1)
            arena.reserve(0, [0] * (1 + max(model)))
            rows = 1 + max(model)
            states = new(rows, 1)
            store.write_column(arena.end, *states)
            for slot, tokens in model.items():
                tokens.append(seen(states)[:, slot, :, 0])
    if model:
        longest, rows = max(map(len, model.values())), 1 + max(model)
        wanted = (rows, arena.end + 1 - longest, arena.end, cpu)
        gathered = OwnKeys(*store.gathered(*wanted), slice(rows))
        for part in chain([gathered], store.read(*wanted)):
            for row, slot in enumerate(range(rows)[part.rows]):
                if tokens := model.get(slot, []):
                    start = longest - len(tokens) - (part.before[row] if part.before else 0)
                    read = torch.stack([part.keys[row], part.values[row]])[:, :, start : start + len(tokens)]
                    assert read.equal(torch.stack(tokens, 2))
    storage.close()


@given(head=st.sampled_from([8, 16, 20, 64, 72, 80, 96, 112, 128, 192, 256, 62, 7]), bits=st.sampled_from([8, 4]))
@settings(max_examples=30, deadline=None)
def test_packed_bytes_are_those_that_the_plan_counts_and_errors_stay_below_half_a_step(head: int, bits: int) -> None:
    states = torch.randn(3, 2, 5, head, generator=torch.Generator().manual_seed(head)) * 3 + 1
    form = PackedForm(bits)
    parts = form.pack(states)
    assert sum(part.nbytes for part in parts) == 3 * 2 * 5 * packed_head_bytes(head, bits)
    assert [(part.shape[1], part.shape[-1], part.dtype) for part in parts] == list(form.stored(2, head, states.dtype))
    back = torch.empty_like(states)
    form.unpack(parts, back)
    group = kv_group_size(head)
    half = parts[1].float().repeat_interleave(group, -1)[..., :head] / 2
    assert bool(((back - states).abs() <= half * 1.001 + 1e-5).all())


def assert_slots_are_booked(
    budgets: Mapping[Tier, TierBudget], spec: ModelSpec, workload: Workload, policy: Policy
) -> None:
    """As the plan counts them; on disk, parts begin on pages, of which it counts the most."""
    unit, block = kv_unit_bytes(spec, workload, policy), kv_block_bytes(spec, workload, policy)
    for tier, count in kv_units(spec, policy).items():
        booked = budgets[tier].by_purpose.get("KV cache", 0)
        if tier is Tier.DISK:
            assert 0 <= count * block - booked <= count * PACKED_PARTS * PAGE
        else:
            assert booked == count * unit


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", ["llama", "llama-wide", "bloom", "gemma"])
def test_the_budgets_hold_exactly_what_the_plan_says(family: str, bits: int, tmp_path: Path) -> None:
    spec = spec_from_config(loaded(family).config.to_dict(), family, "float32", "float32")
    policy = Policy(kv=Shares(0.35, 0.4), kv_bits=bits, slots=5, prefix_sharing=False)
    workload = Workload.uniform(9, LONGEST, NEW_TOKENS)
    running = engine(saved(family), policy, LONGEST + NEW_TOKENS, tmp_path, limits=Limits(disk_folder=tmp_path))
    budgets = running._storage.budgets
    rows = [(7,) * LONGEST] * 9
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    iterator = running.run(iter([Request(index, prompt, sampling) for index, prompt in enumerate(rows)]))
    for _ in range(3):
        next(iterator)
    assert_slots_are_booked(budgets, spec, workload, policy)
    planned = {need.what: need.nbytes for need in needs(spec, machine("cpu-2core"), workload, policy)}
    what = "KV of one layer, expanded"
    if family == "llama-wide":  # only prompts that enter in parts would be expanded, one at a time
        assert what not in budgets[Tier.DEVICE].by_purpose
        assert planned.get(what, 0) <= kv_unit_bytes(spec, workload, replace(policy, kv_bits=16))
    else:
        assert budgets[Tier.DEVICE].by_purpose.get(what, 0) == planned.get(what, 0)
    running.close()


def test_packing_really_happens(tmp_path: Path) -> None:
    asked = [Request(i, p, score_tokens=len(p) - 1) for i, p in enumerate(prompts(3, LONGEST))]
    scores = [
        answer(engine(saved("llama"), Policy(kv_bits=bits, slots=3), LONGEST + 1, tmp_path), asked)[0][0].logprobs
        for bits in (16, 8, 4)
    ]
    assert len(set(scores)) == 3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "llama-wide"])
def test_prompts_that_enter_in_parts_see_what_whole_prompts_see(family: str, bits: int, tmp_path: Path) -> None:
    """An extending call over packed tokens gives the logits of one call over all of them."""
    tokens = tuple(torch.randint(5, VOCABULARY, (14,), generator=torch.Generator().manual_seed(1)).tolist())
    running = engine(saved(family), Policy(kv_bits=bits, slots=2), 20, tmp_path)
    caller, read = running._caller, list[torch.Tensor]()
    with torch.inference_mode():
        for start, end in ((0, 5), (5, 11), (11, 14)):
            part = caller.extend(
                tokens[start:end], 0, start, running._arena.end, 1, lambda logits, *_: read.append(logits[0, -1])
            )
            walk([MicroBatch(partial(caller.alone, part))], running._weights.ready)
            running._arena.end += 3 if end == 11 else 6
    running.close()
    torch.testing.assert_close(read[-1], reference_logits(family, tokens, bits)[-1], rtol=0, atol=0.05)
