"""Rows to prompts: template, few-shot examples, chat template, tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexbatch.config import DatasetConfig, GenerationConfig, PromptConfig
from flexbatch.data.columns import ColumnType, near_misses
from flexbatch.data.encoder import Encoded, Encoder, Tokenizer
from flexbatch.data.reader import Source
from flexbatch.data.template import RenderError, Template, read_template
from flexbatch.errors import ConfigError, PromptError
from flexbatch.records import Prompt, Row, Sampling

ANSWER = "answer"  # the column of an example's answer, where prompt.shot_template does not say otherwise


class PromptBuilder:
    """Builds the prompts of one job; everything that can fail for all rows fails here, before the first.

    `columns` are the dataset's columns with their types (`Source.columns`), `carried` the names in `output.columns`.

    Raises:
        ConfigError: an option, or a carried column that is not there.
        PromptError: a template, or examples, that cannot work.
    """

    def __init__(
        self,
        config: PromptConfig,
        generation: GenerationConfig,
        tokenizer: Tokenizer,
        *,
        columns: Mapping[str, ColumnType],
        carried: Sequence[str] = (),
    ) -> None:
        check_stop(generation.stop)
        self._config = config
        self._generation = generation
        self._columns = columns
        self._carried = carried_columns(carried, columns)
        self._encoder = Encoder(config, tokenizer)
        key = "prompt.template_file" if config.template_file else "prompt.template"
        source = read_template(config.template_file) if config.template_file else config.template
        self._template = Template(source, columns, key=key)
        self._source = source
        self._checked = sorted(self._template.variables | set(self._carried))
        self.prefix = _examples(config, source)

    @property
    def identity(self) -> dict[str, Any]:
        """For the run's fingerprint: the texts that files and the tokenizer add to the options."""
        chat = {"chat_template": str(self._encoder.chat_template)} if self._config.chat_template else {}
        return {"template": self._source, "examples": self.prefix, **chat}

    def build(self, rows: Sequence[Row]) -> list[Prompt]:
        """`generation.num_completions` prompts for each row, in the rows' order; a row that fails gets an `error`."""
        texts, errors = [], []
        for row in rows:
            text, error = self._text(row)
            texts.append(text)
            errors.append(error)
        encoded = self._encoder.encode(texts)
        return [
            prompt
            for row, error, tokens in zip(rows, errors, encoded, strict=True)
            for prompt in self._prompts(row, Encoded(error=error) if error else tokens)
        ]

    def _text(self, row: Row) -> tuple[str, str]:
        """(text of the prompt, error)."""
        for name in self._checked:
            if not self._columns[name].accepts(row.fields[name]):
                kind, expected = type(row.fields[name]).__name__, self._columns[name].name
                return "", f"column '{name}' holds a {kind} here, where the dataset's other rows hold {expected}"
        try:
            text = self.prefix + self._template.render(row.fields)
            return (self._encoder.chat(text) if self._config.chat_template else text), ""
        except RenderError as error:
            return "", str(error)

    def _prompts(self, row: Row, encoded: Encoded) -> Iterable[Prompt]:
        carried = {name: self._carry(name, row.fields[name]) for name in self._carried}
        for number in range(self._generation.num_completions):
            yield Prompt(
                row=row,
                token_ids=encoded.token_ids,
                sampling=sampling_of(self._generation, derive_seed(self._generation.seed, row.id, number)),
                carried=carried,
                dropped_tokens=encoded.dropped_tokens,
                completion_index=number,
                error=encoded.error,
            )

    def _carry(self, name: str, value: Any) -> Any:
        """A value that does not fit its column cannot be written; its row says so in `error`."""
        return value if self._columns[name].accepts(value) else None


def sampling_of(generation: GenerationConfig, seed: int) -> Sampling:
    """The job's sampling with a seed of one's own."""
    return Sampling(
        max_new_tokens=generation.max_new_tokens,
        min_new_tokens=generation.min_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        seed=seed,
        stop=tuple(generation.stop),
        logprobs=generation.logprobs,
    )


def derive_seed(seed: int, row_id: str, completion_index: int) -> int:
    """A seed of 63 bits that depends on the row's identity alone, not on its place in the dataset or in a batch."""
    name = f"{seed}\0{completion_index}\0{row_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def check_stop(stop: Sequence[str]) -> None:
    """Raises ConfigError for a stop string that would end every completion at once."""
    for position, text in enumerate(stop):
        if not text:
            raise ConfigError(
                f"generation.stop[{position}] is {text!r}.", remedy="A stop string is a text of at least one character."
            )


def carried_columns(names: Sequence[str], columns: Iterable[str]) -> tuple[str, ...]:
    """`output.columns`, checked against the dataset's.

    Raises:
        ConfigError: a name that the dataset does not have, or that is given twice.
    """
    known = list(columns)
    for position, name in enumerate(names):
        if name not in known:
            raise ConfigError(f"output.columns: the dataset has no column '{name}'.", remedy=near_misses(name, known))
        if name in names[:position]:
            raise ConfigError(f"output.columns names '{name}' twice.", remedy="Name each column once.")
    return tuple(names)


def _examples(config: PromptConfig, template: str) -> str:
    """The few-shot examples as the text that every prompt begins with; it ends with the separator."""
    shots = read_shots(config)
    if not shots:
        return ""
    columns = list(dict.fromkeys(name for shot in shots for name in shot))
    if not config.shot_template and ANSWER not in columns:
        raise PromptError(
            f"prompt.shots: the examples have no column '{ANSWER}', and prompt.shot_template is empty.",
            remedy="Write prompt.shot_template, such as 'Q: {{ question }}\\nA: {{ label }}'.",
        )
    key = "prompt.shot_template" if config.shot_template else "prompt.template (for the examples)"
    compiled = Template(config.shot_template or _with_answer(template), columns, key=key)
    texts = []
    for number, shot in enumerate(shots):
        try:
            texts.append(compiled.render(shot) + config.shot_separator)
        except RenderError as error:
            raise PromptError(
                f"prompt.shots: example {number}: {error}", remedy="Correct the example or prompt.shot_template."
            ) from error
    return "".join(texts)


def _with_answer(template: str) -> str:
    """The template followed by the answer, with a space between where the template does not end with one."""
    space = "" if template[-1:].isspace() else " "
    return f"{template}{space}{{{{ {ANSWER} }}}}"


def read_shots(config: PromptConfig) -> list[Mapping[str, Any]]:
    """The first `prompt.shot_count` examples (0: all) of `prompt.shots`: rows in place, or paths of a dataset.

    Raises:
        PromptError: fewer examples than asked for, or something that is neither a row nor a path.
        DataError: the dataset of examples cannot be read.
    """
    shots = list(config.shots)
    if shots and all(isinstance(shot, str) for shot in shots):
        rows = Source.open(DatasetConfig(path=shots, limit=config.shot_count)).rows()
        found: list[Mapping[str, Any]] = [row.fields for row in rows]
    elif all(isinstance(shot, Mapping) for shot in shots):
        found = shots[: config.shot_count] if config.shot_count else shots
    else:
        raise PromptError(
            "prompt.shots mixes rows with something else.",
            remedy="Give a list of rows (mappings of column to value), or the path of a dataset.",
        )
    if len(found) < config.shot_count:
        raise PromptError(
            f"prompt.shot_count is {config.shot_count}, but prompt.shots has {len(found)} examples.",
            remedy="Lower prompt.shot_count or give more examples.",
        )
    return found
