"""Rows to prompts: a bad setup fails before the first row, a bad row fails alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flexbatch.config import DatasetConfig, GenerationConfig, PromptConfig
from flexbatch.data.columns import ColumnType
from flexbatch.data.prompts import PromptBuilder, carried_columns, derive_seed
from flexbatch.data.reader import Source
from flexbatch.errors import ConfigError, DataError, FlexbatchError, PromptError
from flexbatch.records import Prompt, Row

BEGIN, END = 256, 257
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
)


def byte_tokenizer(*, end: bool = False, chat: str = "") -> Any:
    """A real fast tokenizer: a token for each byte, `<s>` before every text and, if asked for, `</s>` after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)} | {"<s>": BEGIN, "</s>": END}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = chat
    return tokenizer


TOKENIZER = byte_tokenizer()
STRING = ColumnType.parse("string")


def rows(*fields: dict[str, Any]) -> list[Row]:
    return [Row(f"s:{number}", "s", number, record) for number, record in enumerate(fields)]


def build(
    *fields: dict[str, Any],
    tokenizer: Any = TOKENIZER,
    generation: GenerationConfig | None = None,
    columns: dict[str, ColumnType] | None = None,
    carried: tuple[str, ...] = (),
    **options: Any,
) -> list[Prompt]:
    columns = columns or dict.fromkeys(fields[0], STRING)
    builder = PromptBuilder(
        PromptConfig(**options), generation or GenerationConfig(), tokenizer, columns=columns, carried=carried
    )
    return builder.build(rows(*fields))


def text_of(prompt: Prompt, tokenizer: Any = TOKENIZER) -> str:
    assert not prompt.error
    return str(tokenizer.decode([token for token in prompt.token_ids if token < BEGIN]))


def refused(kind: type[FlexbatchError], *fields: dict[str, Any], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        build(*(fields or ({"text": "a"},)), **options)
    assert caught.value.remedy
    return str(caught.value)


def test_a_template_sees_the_columns() -> None:
    (prompt,) = build({"title": "T", "text": "x\n"}, template="{{ title }}: {{ text }}Answer:\n")
    assert text_of(prompt) == "T: x\nAnswer:\n"
    assert prompt.token_ids[0] == BEGIN
    assert prompt.row.id == "s:0"


def test_a_template_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("File: {{ text }}")
    assert text_of(build({"text": "x"}, template_file=str(tmp_path / "t.jinja"))[0]) == "File: x"
    assert "nowhere.jinja" in refused(PromptError, template_file=str(tmp_path / "nowhere.jinja"))


def test_the_identity_holds_what_files_say_not_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("File: {{ text }}")
    config = PromptConfig(template_file=str(tmp_path / "t.jinja"), shots=SHOTS, shot_count=1, chat_template=True)
    tokenizer = byte_tokenizer(chat=CHAT)
    builder = PromptBuilder(config, GenerationConfig(), tokenizer, columns={"text": STRING})
    assert builder.identity == {
        "template": "File: {{ text }}",
        "examples": "File: 1+1 2\n\n",
        "chat_template": CHAT,
    }


def test_a_column_that_is_missing_is_refused_before_the_first_row_with_the_near_miss() -> None:
    message = refused(PromptError, {"question": "a", "text": "b"}, template="{{ text }} {{ qestion }}")
    assert "'qestion'" in message
    assert "Did you mean 'question'" in message


def test_a_syntax_error_is_refused_with_its_line() -> None:
    assert "line 2" in refused(PromptError, template="{{ text }}\n{% if %}")


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ text.format.__globals__ }}", "{{ items.append(1) }}{{ text }}"],
)
def test_a_template_cannot_leave_its_sandbox_or_change_the_row(template: str) -> None:
    record = {"text": "a", "items": ["x"]}
    columns = {"text": STRING, "items": ColumnType.parse("list<string>")}
    (prompt,) = build(record, columns=columns, template=template)
    assert "the template failed" in prompt.error
    assert record["items"] == ["x"]


def test_include_is_refused() -> None:
    assert "include" in refused(PromptError, template="{% include '/etc/passwd' %}")


def test_a_row_on_which_the_template_fails_fails_alone() -> None:
    good, bad, null, last = build(
        {"text": "a"}, {"text": "b"}, {"text": None}, {"text": "d"}, template="{{ {'a': 1, 'd': 2}[text] }}"
    )
    assert text_of(good) == "1"
    assert text_of(last) == "2"
    assert "the template failed" in bad.error
    assert bad.token_ids == ()
    assert "null in this row: text" in null.error


def test_a_null_is_never_printed_as_none() -> None:
    first, second = build({"text": None}, {"text": "x"}, template="Text: {{ text }}")
    assert "null" in first.error
    assert text_of(second) == "Text: x"
    (handled,) = build({"text": None}, template="Text: {{ text or 'nothing' }}")
    assert text_of(handled) == "Text: nothing"


def test_a_value_of_the_wrong_type_fails_its_row_alone(tmp_path: Path) -> None:
    """JSON lines have no schema: the commonest type of a column is its type, another value there is an error."""
    values = ["a", "b", {"deep": 1}, 5, "\ud800", "c"]
    lines = "".join(json.dumps({"text": value, "size": 10**n}) + "\n" for n, value in enumerate(values, 15))
    (tmp_path / "a.jsonl").write_text(lines)
    source = Source.open(DatasetConfig(path=str(tmp_path / "a.jsonl")))
    builder = PromptBuilder(
        PromptConfig(), GenerationConfig(), TOKENIZER, columns=source.columns, carried=["text", "size"]
    )
    prompts = builder.build(list(source.rows()))
    assert [bool(prompt.error) for prompt in prompts] == [False, False, True, True, True, True]
    assert "'text' holds a dict" in prompts[2].error
    assert "'size' holds a int" in prompts[5].error  # 10**20 is more than 64 bits hold
    assert prompts[2].carried == {"text": None, "size": 10**17}
    assert prompts[1].carried == {"text": "b", "size": 10**16}


def test_an_empty_prompt_is_an_error_of_its_row() -> None:
    empty, full = build({"text": ""}, {"text": "x"}, special_tokens=False)
    assert "no tokens" in empty.error
    assert text_of(full) == "x"
    assert build({"text": ""})[0].token_ids == (BEGIN,)  # with special tokens it is a prompt of one token


def test_special_tokens_can_be_left_out() -> None:
    assert build({"text": "a"}, special_tokens=False)[0].token_ids == build({"text": "a"})[0].token_ids[1:]


@given(st.text("ab\n é漢", max_size=30), st.integers(3, 12), st.sampled_from(["left", "right"]), st.booleans())
def test_truncation_keeps_the_special_tokens_and_cuts_one_end(text: str, limit: int, side: str, end: bool) -> None:
    tokenizer = byte_tokenizer(end=end)
    whole = build({"text": text}, tokenizer=tokenizer, max_tokens=1000)[0].token_ids
    (prompt,) = build({"text": text}, tokenizer=tokenizer, max_tokens=limit, truncation=side)
    assert len(prompt.token_ids) == min(limit, len(whole))
    assert prompt.dropped_tokens == len(whole) - len(prompt.token_ids)
    own = whole[1:-1] if end else whole[1:]
    room = limit - (2 if end else 1)
    kept = own[-room:] if side == "left" else own[:room]
    assert prompt.token_ids == (BEGIN, *kept, *([END] if end else []))


def test_truncation_error_fails_the_row_and_says_how_long_it_is() -> None:
    long, short = build({"text": "a" * 20}, {"text": "a"}, max_tokens=10, truncation="error")
    assert "21 tokens" in long.error
    assert "prompt.max_tokens is 10" in long.error
    assert not short.error


def test_a_limit_below_the_special_tokens_is_refused() -> None:
    assert "prompt.max_tokens" in refused(ConfigError, max_tokens=1)


SHOTS = [{"text": "1+1", "answer": "2"}, {"text": "2+2", "answer": "4"}, {"text": "3+3", "answer": "6"}]


def test_examples_come_before_every_prompt() -> None:
    first, second = build({"text": "4+4"}, {"text": "5+5"}, template="{{ text }} =", shots=SHOTS, shot_count=2)
    assert text_of(first) == "1+1 = 2\n\n2+2 = 4\n\n4+4 ="
    assert text_of(second) == "1+1 = 2\n\n2+2 = 4\n\n5+5 ="


def test_examples_may_have_a_template_of_their_own_and_columns_of_their_own() -> None:
    shots = [{"q": "1+1", "a": 2}]
    (prompt,) = build({"text": "4+4"}, shots=shots, shot_template="{{ q }} is {{ a }}", shot_separator=" | ")
    assert text_of(prompt) == "1+1 is 2 | 4+4"


def test_examples_may_come_from_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(shot) + "\n" for shot in SHOTS))
    (prompt,) = build({"text": "4+4"}, template="{{ text }}", shots=[str(tmp_path / "s.jsonl")], shot_count=1)
    assert text_of(prompt) == "1+1 2\n\n4+4"
    refused(DataError, shots=[str(tmp_path / "missing.jsonl")])


def test_examples_that_cannot_be_met_are_refused() -> None:
    assert "prompt.shot_count is 5" in refused(PromptError, shots=SHOTS, shot_count=5)
    assert "prompt.shot_count is 5" in refused(PromptError, shot_count=5)
    assert "'answer'" in refused(PromptError, shots=[{"text": "a"}])
    assert "'q'" in refused(PromptError, shots=SHOTS, shot_template="{{ q }}")
    assert "example 1" in refused(PromptError, shots=[SHOTS[0], {"text": "a", "answer": None}])
    assert "mixes" in refused(PromptError, shots=[SHOTS[0], "path"])


def test_a_chat_template_wraps_the_prompt_and_adds_no_special_tokens_of_its_own() -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    (prompt,) = build({"text": "Hi"}, tokenizer=tokenizer, chat_template=True, system="Be brief.")
    assert text_of(prompt, tokenizer) == "[system]Be brief.[user]Hi[model]"
    assert prompt.token_ids[0] != BEGIN


def test_a_chat_template_that_is_not_there_or_fails_is_refused() -> None:
    assert "prompt.chat_template" in refused(PromptError, chat_template=True)
    fails = byte_tokenizer(chat="{{ raise_exception('no system message here') }}")
    assert "no system message here" in refused(PromptError, tokenizer=fails, chat_template=True)


def test_several_completions_have_their_own_seeds_and_the_same_prompt() -> None:
    generation = GenerationConfig(num_completions=3, temperature=1.0, seed=7, stop=["\n"])
    prompts = build({"text": "a"}, {"text": "b"}, generation=generation)
    assert [(prompt.row.row, prompt.completion_index) for prompt in prompts] == [
        (row, number) for row in range(2) for number in range(3)
    ]
    assert len({prompt.sampling.seed for prompt in prompts}) == 6
    assert prompts[0].token_ids == prompts[2].token_ids
    assert prompts[0].sampling.stop == ("\n",)


def test_a_seed_is_the_same_today_and_tomorrow() -> None:
    assert derive_seed(0, "a:0", 0) == 1287703967236246123
    assert len({derive_seed(s, r, c) for s in range(3) for r in ("1", "11") for c in range(3)}) == 18


def test_an_empty_stop_string_is_refused() -> None:
    message = refused(ConfigError, generation=GenerationConfig(stop=["a", ""]))
    assert "generation.stop[1]" in message


def test_carried_columns_are_copied_and_checked() -> None:
    (prompt,) = build({"text": "a", "label": "x"}, carried=("label",))
    assert prompt.carried == {"label": "x"}
    assert "output.columns" in refused(ConfigError, carried=("labl",))
    with pytest.raises(ConfigError, match="twice"):
        carried_columns(["a", "a"], ["a"])


def test_building_in_batches_of_any_size_gives_the_same_prompts() -> None:
    source = rows(*({"text": "x" * (n % 7)} for n in range(20)))
    builder = PromptBuilder(PromptConfig(), GenerationConfig(), TOKENIZER, columns={"text": STRING})
    whole = builder.build(source)
    assert builder.build([]) == []
    for size in (1, 3, 19):
        assert [p for start in range(0, 20, size) for p in builder.build(source[start : start + size])] == whole


@pytest.mark.realdata
def test_the_opt_tokenizer_keeps_its_leading_token_when_a_review_is_cut(realdata: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(realdata / "opt-tokenizer")
    source = Source.open(DatasetConfig(path=str(realdata / "movie_reviews" / "reviews.jsonl"), limit=20))
    builder = PromptBuilder(
        PromptConfig(max_tokens=128), GenerationConfig(), tokenizer, columns=source.columns, carried=["label"]
    )
    prompts = builder.build(list(source.rows()))
    assert all(len(prompt.token_ids) == 128 and prompt.token_ids[0] == 2 for prompt in prompts)
    assert all(prompt.dropped_tokens > 0 for prompt in prompts)
    for prompt in prompts:
        assert str(prompt.row.fields["text"]).endswith(tokenizer.decode(prompt.token_ids[2:]).lstrip("\ufffd"))
