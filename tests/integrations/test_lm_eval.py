"""flexbatch in lm-eval gives what lm-eval's own `hf` backend gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")
pytest.importorskip("accelerate")

from flexbatch.errors import ConfigError
from flexbatch.integrations import session
from tests.integrations.lm_eval_tasks import write_mmlu, write_tasks

BUFFERED = {"offload.reader": "buffered", "model.dtype": "float32"}
TOLERANCE = 1e-3


def evaluate(model: Any, folder: Path, tasks: list[str], **options: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def compare(model: Path, folder: Path, tasks: list[str]) -> None:
    """Runs both backends and holds every answer and every score of ours to those of `hf`."""
    from lm_eval.models.huggingface import HFLM

    from flexbatch.integrations.lm_eval import FlexbatchLM

    theirs = evaluate(HFLM(str(model), device="cpu", dtype="float32", batch_size=4), folder, tasks)
    ours = evaluate(FlexbatchLM(str(model), **BUFFERED), folder, tasks)
    for task in tasks:
        for left, right in zip(theirs["samples"][task], ours["samples"][task], strict=True):
            assert_alike(left["resps"], right["resps"])
        scores, expected = ours["results"][task], theirs["results"][task]
        assert scores.keys() == expected.keys()
        for name, value in expected.items():
            exact = name.startswith(("acc", "exact_match")) or not isinstance(value, float)
            assert scores[name] == (value if exact else pytest.approx(value, rel=TOLERANCE)), (task, name)


def assert_alike(left: Any, right: Any) -> None:
    """Nested answers: texts and truth values the same, log-probabilities nearly."""
    if isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_alike(one, other)
    elif isinstance(left, float):
        assert right == pytest.approx(left, abs=TOLERANCE, rel=1e-5)
    else:
        assert right == left


def test_every_kind_of_task_gets_the_answers_of_the_hf_backend(small_model: Path, tmp_path: Path) -> None:
    """A random OPT whose 256 positions the long texts exceed: windows roll, contexts are cut on the left."""
    compare(small_model, tmp_path, write_tasks(tmp_path, long_text=6))


@pytest.mark.realdata
def test_a_trained_model_gets_the_answers_of_the_hf_backend(realdata: Path, tmp_path: Path) -> None:
    """stories260k, whose tokenizer puts a token before every text."""
    compare(realdata / "stories260k", tmp_path, write_tasks(tmp_path, long_text=12))


@pytest.mark.realdata
@pytest.mark.parametrize("subject", ["us_foreign_policy", "abstract_algebra"])
def test_mmlu_scores_as_with_the_hf_backend(realdata: Path, tmp_path: Path, subject: str) -> None:
    compare(realdata / "stories260k", tmp_path, [write_mmlu(tmp_path, realdata, subject, rows=12, shots=2)])


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("subject", ["abstract_algebra", "college_physics"])
@pytest.mark.parametrize("model", ["stories260k", "random OPT"])
def test_a_whole_mmlu_subject_with_five_shots_scores_as_with_the_hf_backend(
    realdata: Path, tmp_path: Path, model: str, subject: str
) -> None:
    """Prompts longer than the 512 positions of stories260k are cut; the random OPT reads them whole."""
    folder = realdata / model if model == "stories260k" else random_opt(tmp_path / "opt", realdata / "opt-tokenizer")
    compare(folder, tmp_path, [write_mmlu(tmp_path, realdata, subject)])


def random_opt(folder: Path, tokenizer: Path) -> Path:
    """OPT with its true vocabulary and 2,048 positions, narrow and random."""
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64)
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # spread the logits, so that greedy choices are clear
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_contexts_that_end_in_spaces_and_empty_ones_are_split_as_by_hf(small_model: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from flexbatch.integrations.lm_eval import FlexbatchLM

    pairs = [("a b  ", "c"), ("", "hello"), ("x" * 300, " end"), ("<s>a", " b"), ("a\n", "\n")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    theirs = HFLM(str(small_model), device="cpu", dtype="float32").loglikelihood(asked, disable_tqdm=True)
    assert_alike(theirs, FlexbatchLM(str(small_model), **BUFFERED).loglikelihood(asked, disable_tqdm=True))


def test_an_evaluation_started_again_computes_nothing_twice(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexbatch.integrations.lm_eval import FlexbatchLM

    tasks = write_tasks(tmp_path)
    first = evaluate(FlexbatchLM(str(small_model), output_dir=tmp_path / "answers", **BUFFERED), tmp_path, tasks)
    opened: list[object] = []
    monkeypatch.setattr(session, "open_for", lambda *_: opened.append(None))
    again = evaluate(FlexbatchLM(str(small_model), output_dir=tmp_path / "answers", **BUFFERED), tmp_path, tasks)
    assert not opened
    assert again["results"] == first["results"]
    assert len(list((tmp_path / "answers").iterdir())) == 3  # one batch for each kind of request


def test_lm_eval_finds_the_backend_by_its_name(small_model: Path, tmp_path: Path) -> None:
    """By the registry once the module is imported (0.4.13); by the entry point in later versions."""
    from importlib.metadata import EntryPoint

    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import get_model

    from flexbatch.integrations.lm_eval import FlexbatchLM

    assert get_model("flexbatch") is FlexbatchLM
    assert EntryPoint("flexbatch", "flexbatch.integrations.lm_eval:FlexbatchLM", "lm_eval.models").load() is FlexbatchLM
    made = FlexbatchLM.create_from_arg_string(
        f"pretrained={small_model},offload.reader=buffered,offload.prefix_sharing=False", {"batch_size": 8}
    )
    assert made._session.config.offload.prefix_sharing is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 256}, "256 tokens"), ({"best_of": 2, "n": 2}, "best_of, n")],
)
def test_generation_settings_that_cannot_be_met_are_refused(
    small_model: Path, settings: dict[str, Any], message: str
) -> None:
    from lm_eval.api.instance import Instance

    from flexbatch.integrations.lm_eval import FlexbatchLM

    model = FlexbatchLM(str(small_model), **BUFFERED)
    with pytest.raises(ConfigError, match=message):
        model.generate_until([Instance("generate_until", {}, ("a", settings), 0)])
