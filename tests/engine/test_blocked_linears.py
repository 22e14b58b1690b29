"""In bfloat16 on a CPU, weights laid out for the processor change no bit of what a job writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from flexbatch.engine import opening
from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.opening import UNLIMITED, Checkpoint, EngineOptions, Limits, open_engine
from flexbatch.errors import OutputError
from flexbatch.memory.blocked_weight import suits
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Completion, Request, Sampling
from tests.engine.families import FAMILIES, prompts, saved
from tests.engine.running import NumberDecoder, answer

pytestmark = pytest.mark.skipif(not suits(torch.bfloat16), reason="no blocked bfloat16 weights on this machine")

NEW_TOKENS, LONGEST = 6, 20
RESIDENT, MIXED, STREAMED = Shares(1, 0), Shares(0.4, 0.3), Shares(0, 0)


def completions(
    family: str, weights: Shares, folder: Path, file_bytes: int | None, compute: str = "auto"
) -> dict[int, Completion]:
    model = saved(family)
    running = open_engine(
        Checkpoint(AutoConfig.from_pretrained(model), SafetensorsIndex.open(model).entries, str(model)),
        Policy(weights, slots=5, prefill_tokens=40, compute=compute),
        Limits(disk_folder=folder),
        Vocabulary(NumberDecoder(), frozenset({2})),
        EngineOptions(
            LONGEST + NEW_TOKENS,
            torch.bfloat16,
            reader="buffered",
            packed_folder=folder / "packed",
            blocked_file_bytes=file_bytes,
        ),
    )
    sampling = Sampling(max_new_tokens=NEW_TOKENS, logprobs=True)
    done, _ = answer(running, (Request(index, row, sampling) for index, row in enumerate(prompts(7, LONGEST))))
    return done


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_log_probabilities_are_those_of_plain_weights(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = [completions(family, RESIDENT, tmp_path, None), completions(family, MIXED, tmp_path, UNLIMITED)]
    monkeypatch.setattr(opening, "use_fastest_linears", lambda *_: None)
    plain = completions(family, RESIDENT, tmp_path, None)
    assert [{index: (done.token_ids, done.logprobs) for index, done in each.items()} for each in got] == [
        {index: (done.token_ids, done.logprobs) for index, done in plain.items()}
    ] * 2


def test_products_of_eight_bits_do_what_comes_after_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = completions("opt", RESIDENT, tmp_path, None, "int8")
    monkeypatch.setattr(opening, "use_fastest_linears", lambda *_: None)
    plain = completions("opt", RESIDENT, tmp_path, None, "int8")
    assert {index: done.logprobs for index, done in got.items()} == {
        index: done.logprobs for index, done in plain.items()
    }


def test_a_copy_is_made_once_where_weights_are_streamed_and_only_as_large_as_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    completions("llama", RESIDENT, tmp_path, UNLIMITED)
    completions("llama", STREAMED, tmp_path, None)
    completions("llama", STREAMED, tmp_path, 1000)
    assert not list(folder.glob("*.safetensors"))
    completions("llama", STREAMED, tmp_path, UNLIMITED)
    (file,) = folder.glob("*.safetensors")
    made = file.stat().st_mtime_ns
    # One that is there is used even if a new one would be too large.
    torn = completions("llama", STREAMED, tmp_path, 0)
    assert file.stat().st_mtime_ns == made
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    assert completions("llama", STREAMED, tmp_path, UNLIMITED).keys() == torn.keys()
    assert file.stat().st_mtime_ns > made


def test_a_copy_that_was_begun_is_gone_on_with_though_it_has_taken_its_room(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    completions("llama", STREAMED, tmp_path, UNLIMITED)
    (file,) = folder.glob("*.safetensors")
    file.rename(file.with_suffix(".partial"))
    completions("llama", STREAMED, tmp_path, 0)
    assert file.exists()
    assert not list(folder.glob("*.partial"))


def test_where_no_copy_can_be_made_the_job_goes_on_without_unless_it_must_have_one(tmp_path: Path) -> None:
    (tmp_path / "packed").write_text("in the way")
    plenty = UNLIMITED - 1
    assert len(completions("llama", STREAMED, tmp_path, plenty)) == 7
    with pytest.raises(OutputError):
        completions("llama", STREAMED, tmp_path, UNLIMITED)
