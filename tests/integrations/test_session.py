"""Lists of requests, answered without a dataset."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexbatch.errors import ConfigError, FingerprintError, Interrupted
from flexbatch.integrations import session as module
from flexbatch.integrations.session import Session
from flexbatch.records import Completion, PassResult, Request, Sampling


@pytest.fixture(scope="module")
def session(small_model: Path) -> Session:
    return Session.open(str(small_model), "offload.reader=buffered", "output.part_rows=4")


def mixed(count: int = 11) -> list[Request]:
    """Requests that generate and requests that are scored, of random tokens and lengths."""
    draw = random.Random(0)
    ids = [tuple(draw.choices(range(3, 259), k=draw.randint(4, 40))) for _ in range(count)]
    return [
        Request(number, tokens, score_tokens=3)
        if number % 3 == 0
        else Request(number, tokens, Sampling(6 + number % 4))
        for number, tokens in enumerate(ids)
    ]


def expected(model: Path, request: Request) -> tuple[tuple[int, ...], float, bool]:
    """Tokens, log-probability and greedy match from Transformers."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([request.prompt_ids])
    if not request.score_tokens:
        out = loaded.generate(ids, max_new_tokens=request.sampling.max_new_tokens, do_sample=False)
        return tuple(out[0, ids.shape[1] :].tolist()), 0.0, False
    with torch.no_grad():
        logits = loaded(ids[:, :-1]).logits[0, -request.score_tokens :].log_softmax(-1)
    targets = ids[0, -request.score_tokens :]
    chosen = logits.gather(-1, targets[:, None]).sum().item()
    return tuple(targets.tolist()), chosen, bool((logits.argmax(-1) == targets).all())


def test_a_mixed_list_is_answered_in_its_order_as_transformers_would(session: Session, small_model: Path) -> None:
    requests = mixed()
    for request, answer in zip(requests, session.answer(requests), strict=True):
        tokens, logprob, greedy = expected(small_model, request)
        assert (answer.index, answer.token_ids, answer.greedy_match) == (request.index, tokens, greedy)
        assert sum(answer.logprobs) == pytest.approx(logprob, abs=1e-4)


def test_a_greedy_continuation_is_scored_as_a_greedy_match(session: Session) -> None:
    prompt = tuple(range(10, 30))
    (said,) = session.answer([Request(0, prompt, Sampling(4))])
    match, other = session.answer(
        [
            Request(0, prompt + said.token_ids, score_tokens=4),
            Request(1, prompt + said.token_ids[:3] + (said.token_ids[3] ^ 1,), score_tokens=4),
        ]
    )
    assert match.greedy_match
    assert not other.greedy_match


def test_one_token_more_than_the_model_has_positions_is_scored(session: Session, small_model: Path) -> None:
    """A rolling window feeds all positions, and predicts what comes after each."""
    request = Request(0, tuple(3 + number % 250 for number in range(257)), score_tokens=256)
    (answer,) = session.answer([request])
    assert sum(answer.logprobs) == pytest.approx(expected(small_model, request)[1], rel=1e-5)


def test_a_batch_that_was_stopped_goes_on_and_ends_with_the_same_answers(session: Session, tmp_path: Path) -> None:
    requests, stops = mixed(), [0]
    whole = session.answer(requests)

    def stop(_result: PassResult, _rows: int) -> None:
        stops[0] += 1
        if stops[0] in (2, 5):
            raise Interrupted("enough")

    answers: list[Completion] = []
    for _ in range(3):
        try:
            answers = session.answer(requests, tmp_path / "kept", stop)
        except Interrupted:
            continue
    assert stops[0] > 5
    assert answers == whole


def test_answers_that_are_kept_are_read_back_without_the_model(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session.answer(mixed(), tmp_path / "kept")
    monkeypatch.delattr(module, "open_for")
    assert session.answer(mixed(), tmp_path / "kept") == first


def test_a_folder_with_answers_to_other_requests_is_refused(session: Session, tmp_path: Path) -> None:
    session.answer(mixed(3), tmp_path / "kept")
    with pytest.raises(FingerprintError, match=r"job\.requests"):
        session.answer(mixed(4), tmp_path / "kept")


def test_no_requests_have_no_answers(session: Session) -> None:
    assert session.answer([]) == []


def test_a_batch_can_be_planned_without_being_run(session: Session) -> None:
    assert session.plan(mixed()).prediction.policy.slots >= 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0, ()), "no tokens"),
        (Request(0, (5, 6), score_tokens=2), "2 of its 2 tokens"),
        (Request(0, (5,) * 258, score_tokens=1), "256 positions"),
        (Request(0, (5,) * 240, Sampling(18)), "256 positions"),
        (Request(0, (5, 6), constraint="target"), "constraint"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_before_anything_runs(
    session: Session, request_: Request, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        session.answer([Request(0, (5, 6)), request_])
