"""From instances to prompt text, with the meaning that HELM's `AdapterSpec` gives to every key.

Format and rules: HELM 0.5.16, `benchmark/adaptation` (Liang et al., 2022, arXiv 2211.09110). Two rules are easy to
miss: the last `output_prefix` loses its trailing whitespace, and blocks are joined by `instance_prefix`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle
from typing import Final

from flexbatch.evaluation.instance import Instance

GENERATION: Final = "generation"
JOINT: Final = "multiple_choice_joint"
SEPARATE: Final = "multiple_choice_separate_original"
CALIBRATED: Final = "multiple_choice_separate_calibrated"
LANGUAGE_MODELING: Final = "language_modeling"
METHODS: Final = (GENERATION, JOINT, SEPARATE, CALIBRATED, LANGUAGE_MODELING)
SCORED_METHODS: Final = (SEPARATE, CALIBRATED)

ORIGINAL: Final = "original"
CALIBRATION: Final = "calibration"
NO_REFERENCE: Final = "n/a"
CALIBRATION_INPUT: Final = "Answer:"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """How prompts are made and continued. Names and defaults are HELM's, so that its settings can be copied over."""

    method: str = GENERATION
    global_prefix: str = ""
    global_suffix: str = ""
    instructions: str = ""
    input_prefix: str = "Input: "
    input_suffix: str = "\n"
    reference_prefix: str = "A. "
    reference_prefix_characters: tuple[str, ...] = ()
    reference_suffix: str = "\n"
    output_prefix: str = "Output: "
    output_suffix: str = "\n"
    instance_prefix: str = "\n"
    substitutions: tuple[tuple[str, str], ...] = ()
    max_train_instances: int = 5
    max_eval_instances: int | None = None
    num_outputs: int = 5
    num_train_trials: int = 1
    sample_train: bool = True
    temperature: float = 1.0
    max_tokens: int = 100
    stop_sequences: tuple[str, ...] = ()
    multi_label: bool = False
    eval_splits: tuple[str, ...] = ("valid", "test")
    output_mapping_pattern: str = ""

    @property
    def scores_references(self) -> bool:
        """Whether references are scored one by one (prefill only) instead of anything being generated."""
        return self.method in SCORED_METHODS

    @property
    def generates(self) -> bool:
        """Whether tokens are generated; otherwise tokens of the prompt are scored."""
        return self.method in (GENERATION, JOINT)

    @property
    def completions(self) -> int:
        """Completions of one prompt: HELM's `num_outputs` means another thing for multiple choice."""
        return self.num_outputs if self.method == GENERATION else 1


ADAPTER_KEYS: Final = tuple(field.name for field in fields(AdapterSpec))


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt in blocks, before it is fitted into the tokens that it may have."""

    spec: AdapterSpec
    shots: tuple[str, ...]
    question: str

    @property
    def text(self) -> str:
        spec = self.spec
        instructions = [spec.instructions] if spec.instructions else []
        joined = spec.instance_prefix.join([*instructions, *self.shots, self.question])
        joined = f"{spec.global_prefix}{joined}{spec.global_suffix}"
        for pattern, replacement in spec.substitutions:
            joined = re.sub(pattern, replacement, joined)
        return joined

    def without_last_shot(self) -> Draft:
        return replace(self, shots=self.shots[:-1])


@dataclass(frozen=True, slots=True)
class Query:
    """One prompt to be made: which instance, and for scored methods which reference in which mode."""

    instance: Instance
    reference_index: int = -1
    mode: str = ""


def queries(spec: AdapterSpec, instance: Instance) -> list[Query]:
    """One query for a method that generates; one or two for each reference for a method that scores."""
    if not spec.scores_references:
        return [Query(instance)]
    modes = (ORIGINAL, CALIBRATION) if spec.method == CALIBRATED else (ORIGINAL,)
    return [Query(instance, index, mode) for index in range(len(instance.references)) for mode in modes]


def draft(spec: AdapterSpec, shots: Sequence[str], query: Query) -> Draft:
    """`shots` are the example texts of the trial, made once by `shot_texts`."""
    if query.mode == CALIBRATION:
        bare = replace(query.instance, input=CALIBRATION_INPUT)
        return Draft(spec, (), example_text(spec, bare, query.reference_index))
    if query.reference_index >= 0:
        return Draft(spec, tuple(shots), example_text(spec, query.instance, query.reference_index))
    return Draft(spec, tuple(shots), question_text(spec, query.instance))


def shot_texts(spec: AdapterSpec, shots: Sequence[Instance]) -> tuple[str, ...]:
    return tuple(example_text(spec, shot) for shot in shots)


def question_text(spec: AdapterSpec, instance: Instance) -> str:
    return _input_text(spec, instance) + spec.output_prefix.rstrip()


def example_text(spec: AdapterSpec, instance: Instance, reference_index: int = -1) -> str:
    """The instance with its answer; with `reference_index` that reference is taken for the answer."""
    if spec.method == JOINT:
        answer = _answer_letters(spec, instance)
    elif reference_index >= 0:
        answer = instance.references[reference_index].text
    else:
        answer = _answer_text(spec, [reference.text for reference in instance.correct])
    return _input_text(spec, instance) + spec.output_prefix + answer + spec.output_suffix


def letter(spec: AdapterSpec, index: int) -> str:
    """The character that stands for reference `index`, counted on from the first one in `reference_prefix`."""
    if spec.reference_prefix_characters:
        return spec.reference_prefix_characters[index]
    return chr(ord(_first_letter(spec)) + index)


def letter_answers(spec: AdapterSpec, references: Sequence[str]) -> dict[str, str]:
    """From what the model writes to the reference that it means, for `multiple_choice_joint`."""
    return {letter(spec, index): text for index, text in enumerate(references)}


def _first_letter(spec: AdapterSpec) -> str:
    return next(character for character in spec.reference_prefix if character.isalnum())


def _input_text(spec: AdapterSpec, instance: Instance) -> str:
    text = spec.input_prefix + instance.input + spec.input_suffix
    if spec.method == JOINT:
        first = _first_letter(spec)
        for index, reference in enumerate(instance.references):
            prefix = spec.reference_prefix.replace(first, letter(spec, index))
            text += prefix + reference.text + spec.reference_suffix
    return text


def _answer_letters(spec: AdapterSpec, instance: Instance) -> str:
    return _answer_text(spec, [letter(spec, i) for i, reference in enumerate(instance.references) if reference.correct])


def _answer_text(spec: AdapterSpec, answers: Sequence[str]) -> str:
    if not answers:
        return NO_REFERENCE
    return ", ".join(answers) if spec.multi_label else answers[0]


def draw_shots(spec: AdapterSpec, train: Sequence[Instance], trial: int) -> list[Instance]:
    """The examples of one trial, the same for each of its prompts.

    Labels are visited round and round, the most frequent first (ties in shuffled order), and one instance is drawn
    from each, so that a classification task shows every label; instances without a correct reference come last.
    """
    count = min(len(train), spec.max_train_instances)
    if not spec.sample_train:
        return list(train[count * trial : count * (trial + 1)])
    generator = random.Random(trial)
    pools: dict[str, list[Instance]] = {}
    unlabelled = []
    for instance in train:
        if instance.label is None:
            unlabelled.append(instance)
        else:
            pools.setdefault(instance.label, []).append(instance)
    order = _labels_by_frequency(pools, generator)
    labelled_count = min(count, sum(map(len, pools.values())))
    shots: list[Instance] = []
    for label in cycle(order):
        if len(shots) == labelled_count:
            break
        if pools[label]:
            shots.append(pools[label].pop(generator.randrange(len(pools[label]))))
    return shots + generator.sample(unlabelled, count - len(shots))


def _labels_by_frequency(pools: dict[str, list[Instance]], generator: random.Random) -> list[str]:
    frequency = Counter({label: len(pools[label]) for label in sorted(pools)})
    order: list[str] = []
    for count in sorted(set(frequency.values()), reverse=True):
        tied = [label for label in frequency if frequency[label] == count]
        generator.shuffle(tied)
        order.extend(tied)
    return order
