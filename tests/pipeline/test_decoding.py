"""Sampling, stopping, log-probabilities and scores: a row's result depends on the row alone, and is Transformers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Completion, Request, Sampling
from tests.engine.families import loaded, logits, prompts, reference, saved
from tests.engine.running import NumberDecoder, answer, assert_same_tokens, engine
from tests.pipeline.command_line import CommandLine
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import output_rows, overrides

NEW_TOKENS = 8
LONGEST = 20
EVERYWHERE = {"weights": Shares(0.3, 0.3), "kv": Shares(0.35, 0.4), "hidden": Shares(0.2, 0.5)}
SAMPLED = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.9, top_p=0.95, top_k=40, logprobs=True)


def run(
    family: str, requests: list[Request], folder: Path, policy: Policy | None = None, end: int = 2
) -> dict[int, Completion]:
    running = engine(saved(family), policy or Policy(slots=4), LONGEST + NEW_TOKENS, folder, end_tokens=[end])
    done, _ = answer(running, requests)
    assert sorted(done) == sorted(request.index for request in requests)
    return done


def text_of(tokens: list[int] | tuple[int, ...]) -> str:
    return NumberDecoder().decode(list(tokens))


def transformers_logprobs(family: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Natural logarithms of the probabilities of the completion's tokens after the prompt, in float32."""
    with torch.inference_mode():
        scores = loaded(family)(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    before = scores[len(prompt) - 1 : -1]
    return before.gather(-1, torch.tensor(completion)[:, None])[:, 0]


# Sampling


@pytest.mark.parametrize("family", ["opt", "llama", "bloom"])
def test_a_sampled_row_is_the_same_in_every_company(family: str, tmp_path: Path) -> None:
    rows = prompts(9, LONGEST)
    requests = [Request(index, prompt, replace(SAMPLED, seed=100 + index)) for index, prompt in enumerate(rows)]
    first = run(family, requests, tmp_path, Policy(slots=1, prefill_tokens=1))
    assert len({completion.token_ids for completion in first.values()}) == len(rows)
    for policy in (
        Policy(slots=3, prefill_tokens=30),
        Policy(slots=9, prefill_tokens=10_000),
        Policy(**EVERYWHERE, slots=5, prefill_tokens=1),
    ):
        again = run(family, requests[::-1] if policy.slots == 9 else requests, tmp_path / str(policy.slots), policy)
        assert {i: c.token_ids for i, c in again.items()} == {i: c.token_ids for i, c in first.items()}


def test_a_sampled_row_goes_on_from_any_token_as_it_would_have(tmp_path: Path) -> None:
    (prompt,) = prompts(1, LONGEST)
    request = Request(0, prompt, replace(SAMPLED, seed=7))
    whole = run("opt", [request], tmp_path)[0]
    resumed = [
        replace(request, index=cut, resumed=whole.token_ids[:cut], resumed_logprobs=whole.logprobs[:cut])
        for cut in range(1, NEW_TOKENS + 1)
    ]
    for cut, completion in run("opt", resumed, tmp_path / "resumed").items():
        assert completion.token_ids == whole.token_ids, cut
        assert completion.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
        assert completion.finish_reason == whole.finish_reason


@pytest.mark.parametrize(
    "narrowed", [replace(SAMPLED, top_k=1), replace(SAMPLED, top_p=1e-6), replace(SAMPLED, temperature=1e-4)]
)
def test_sampling_from_the_likeliest_alone_is_greedy(narrowed: Sampling, tmp_path: Path) -> None:
    rows = prompts(5, LONGEST)
    done = run("opt", [Request(index, prompt, narrowed) for index, prompt in enumerate(rows)], tmp_path)
    for index, prompt in enumerate(rows):
        assert_same_tokens("opt", prompt, done[index].token_ids, reference("opt", prompt, NEW_TOKENS))


def test_tokens_are_drawn_as_often_as_temperature_top_k_and_top_p_say(tmp_path: Path) -> None:
    (prompt,) = prompts(1, LONGEST)
    draws, sampling = 1500, Sampling(max_new_tokens=1, temperature=1.7, top_k=6, top_p=0.9)
    requests = [Request(index, prompt, replace(sampling, seed=index)) for index in range(draws)]
    done = run("opt", requests, tmp_path, Policy(slots=64, prefill_tokens=10_000))
    scores, order = (logits("opt", prompt) / 1.7).topk(6)
    probabilities = scores.softmax(-1)
    kept = int((probabilities.cumsum(-1) - probabilities < 0.9).sum())
    expected = probabilities[:kept] / probabilities[:kept].sum()
    counts = torch.tensor([sum(c.token_ids == (token,) for c in done.values()) for token in order[:kept].tolist()])
    assert int(counts.sum()) == draws, "a token was drawn that top_k or top_p leave out"
    deviation = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() < 4 * deviation + 1).all(), (counts, draws * expected)


def test_several_completions_of_a_row_differ_and_depend_on_nothing_else(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    dataset = write_rows(tmp_path / "data", shards=2, rows=6)
    sampled = {"generation__temperature": 1.0, "generation__num_completions": 3, "generation__max_new_tokens": 6}
    found = []
    for name, slots, part_rows in (("a", 2, 4), ("b", 16, 256)):
        options = {**sampled, "offload__slots": slots, "output__part_rows": part_rows, "dataset__id_column": "name"}
        finished = command_line.run(*overrides(small_model, dataset, tmp_path / name, **options), cwd=tmp_path)
        assert finished.code == 0, finished.err
        found.append({(row["id"], row["completion_index"]): row for row in output_rows(tmp_path / name)})
    assert found[0] == found[1]
    assert sorted(found[0]) == [(f"row {row}", number) for row in range(6) for number in range(3)]
    for row in range(6):
        assert len({tuple(found[0][f"row {row}", number]["completion_ids"]) for number in range(3)}) == 3


# Stopping


def test_a_stop_string_across_token_borders_ends_the_completion_before_it(tmp_path: Path) -> None:
    (prompt,) = prompts(1, LONGEST)
    free = reference("opt", prompt, NEW_TOKENS)
    text = text_of(free)
    requests, expected = [], []
    for start in range(1, len(text) - 1):
        for length in (1, 3, 9, 17):
            stop = text[start : start + length]
            cut = text.index(stop)
            ended = next(n for n in range(1, NEW_TOKENS + 1) if stop in text_of(free[:n]))
            requests.append(Request(len(requests), prompt, Sampling(max_new_tokens=NEW_TOKENS, stop=(stop,))))
            expected.append((stop, text[:cut], tuple(free[:ended])))
    done = run("opt", requests, tmp_path, Policy(slots=7, prefill_tokens=10_000))
    for completion, (stop, cut_text, tokens) in zip((done[i] for i in range(len(requests))), expected, strict=True):
        assert (completion.text, completion.token_ids, completion.finish_reason) == (cut_text, tokens, "stop"), stop


def test_of_several_stop_strings_the_first_in_the_text_counts(tmp_path: Path) -> None:
    (prompt,) = prompts(1, LONGEST)
    free = reference("opt", prompt, NEW_TOKENS)
    stops = ("never", text_of(free[4:6]), text_of(free[2:4])[1:], text_of(free[6:]))
    completion = run("opt", [Request(0, prompt, Sampling(max_new_tokens=NEW_TOKENS, stop=stops))], tmp_path)[0]
    text = text_of(free)
    assert completion.text == text[: min(text.index(stop) for stop in stops[1:])]
    assert completion.token_ids == tuple(free[:4])


def test_without_its_stop_string_a_completion_is_as_long_as_it_may(tmp_path: Path) -> None:
    rows = prompts(3, LONGEST)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, stop=("never",))
    done = run("opt", [Request(index, prompt, sampling) for index, prompt in enumerate(rows)], tmp_path)
    assert {(len(c.token_ids), c.finish_reason, c.text) for c in done.values()} == {
        (NEW_TOKENS, "length", text_of(c.token_ids)) for c in done.values()
    }


@pytest.mark.parametrize("family", ["opt", "mistral"])
def test_no_end_of_sequence_before_the_fewest_tokens(family: str, tmp_path: Path) -> None:
    rows = prompts(7, LONGEST, seed=3)
    end = reference(family, rows[0], NEW_TOKENS)[1]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, min_new_tokens=5)
    done = run(family, [Request(index, prompt, sampling) for index, prompt in enumerate(rows)], tmp_path, end=end)
    for index, prompt in enumerate(rows):
        want = reference(family, prompt, NEW_TOKENS, eos_token_id=end, min_new_tokens=5)
        assert_same_tokens(family, prompt, done[index].token_ids, want)
        assert end not in done[index].token_ids[:5]


# Log-probabilities and scores


@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "falcon"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_those_of_the_model(family: str, temperature: float, tmp_path: Path) -> None:
    rows = prompts(6, LONGEST)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=temperature, seed=1, logprobs=True)
    requests = [Request(index, prompt, sampling) for index, prompt in enumerate(rows)]
    done = run(family, requests, tmp_path, Policy(**EVERYWHERE, slots=4, prefill_tokens=30))
    for index, prompt in enumerate(rows):
        want = transformers_logprobs(family, prompt, done[index].token_ids)
        assert done[index].logprobs == pytest.approx(want.tolist(), abs=1e-4)


def test_logprobs_are_left_out_where_nobody_asked(tmp_path: Path) -> None:
    one, other = prompts(2, LONGEST)
    plain = Sampling(max_new_tokens=NEW_TOKENS)
    done = run("opt", [Request(0, one, plain), Request(1, other, replace(plain, logprobs=True))], tmp_path)
    assert done[0].logprobs == ()
    assert len(done[1].logprobs) == NEW_TOKENS


@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "gemma2"])
def test_scored_tokens_have_the_likelihood_that_transformers_gives(family: str, tmp_path: Path) -> None:
    rows = prompts(8, LONGEST, seed=5)
    greedy = reference(family, rows[0], 3)
    rows[0] = rows[0][: LONGEST - 3] + tuple(reference(family, rows[0][: LONGEST - 3], 3))
    assert len(greedy) == 3
    counts = [3, *[1 + index % (len(row) - 1) for index, row in enumerate(rows[1:])]]
    requests = [
        Request(index, row, score_tokens=count) for index, (row, count) in enumerate(zip(rows, counts, strict=True))
    ]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    requests += [Request(len(rows) + index, row, sampling) for index, row in enumerate(prompts(3, LONGEST))]
    done = run(family, requests, tmp_path, Policy(**EVERYWHERE, slots=3, prefill_tokens=40))
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        want = transformers_logprobs(family, row[:-count], row[-count:])
        assert done[index].token_ids == row[-count:]
        assert done[index].logprobs == pytest.approx(want.tolist(), abs=1e-4)
        best = [int(logits(family, row[: len(row) - count + step]).argmax()) for step in range(count)]
        assert done[index].greedy_match == (best == list(row[-count:]))
    assert done[0].greedy_match
    for index, row in enumerate(prompts(3, LONGEST)):
        assert_same_tokens(family, row, done[len(rows) + index].token_ids, reference(family, row, NEW_TOKENS))
