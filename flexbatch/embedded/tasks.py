"""The prompt forms that `opt-tiny` is trained and scored on: HELM's adapter fields, one record for each task.

A prompt is `instructions`, the shots and the asked instance, joined by a newline (HELM's `instance_prefix`); the asked
instance ends with `output_prefix` without its trailing space, so the completion starts with that space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from flexbatch.embedded import instances
from flexbatch.embedded.instances import Generator, Instance, draw


@dataclass(frozen=True, slots=True)
class Task:
    """A generator with its prompt form. `choices` numbers the references with letters and answers with a letter.

    `end` follows the last answer in training: the newline that HELM stops at, or nothing where the end-of-sequence
    token alone ends the answer. `shots` is the largest number of examples, `weight` the share of training prompts
    (with `first_weight` added at the start, while copying is learnt) and `answer_weight` that of an answer's token in
    the loss.
    """

    name: str
    generator: Generator
    instructions: str
    input_prefix: str
    output_prefix: str
    input_suffix: str = "\n"
    choices: bool = False
    shots: int = 9
    weight: float = 1.0
    first_weight: float = 0.0
    end: str = "\n"
    answer_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """A whole prompt as pieces: text and whether it is an answer (which the loss counts)."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def prompt(self) -> str:
        """All but the last answer."""
        return "".join(text for text, _ in self.pieces[:-1])

    @property
    def answer(self) -> str:
        """The last answer as it follows the prompt, with its leading space and its end."""
        return self.pieces[-1][0]


TASKS = {
    task.name: task
    for task in (
        Task(
            "pattern_match",
            instances.pattern_match,
            "Please solve the following problem.\n",
            "",
            "Target: ",
            weight=2.0,
        ),
        Task(
            "variable_substitution",
            instances.variable_substitution,
            "Please solve the following problem.\n",
            "",
            "Target: ",
            weight=2.0,
        ),
        Task(
            "facts_choice",
            instances.facts_choice,
            "The following are multiple choice questions (with answers) about facts.\n",
            "Question: ",
            "Answer: ",
            choices=True,
            weight=3.0,
            answer_weight=3.0,
        ),
        Task(
            "field_extraction",
            instances.field_extraction,
            "Give the value of the field.\n",
            "Document: ",
            "Value: ",
            first_weight=5.0,
        ),
        Task("copying", instances.copying, "Repeat the text.\n", "Text: ", "Copy: ", first_weight=15.0),
        Task(
            "record_extraction",
            instances.record_extraction,
            "Extract the fields as JSON.\n",
            "Document: ",
            "JSON:",
            shots=1,
            end="",
            answer_weight=0.5,
        ),
        Task("summary", instances.summary, "", "Article: ", "Summary: ", shots=1, weight=0.5, end=""),
        Task("story", instances.story, "", "", "", input_suffix=" ", shots=0, weight=0.25, end="", answer_weight=0.1),
        Task(
            "word_choice",
            instances.word_choice,
            "The following are multiple choice questions (with answers) about words.\n",
            "Question: ",
            "Answer: ",
            choices=True,
            weight=2.5,
            answer_weight=3.0,
        ),
        Task(
            "kind_choice",
            instances.kind_choice,
            "The following are multiple choice questions (with answers) about words.\n",
            "Question: ",
            "Answer: ",
            choices=True,
            weight=1.5,
            answer_weight=3.0,
        ),
    )
}

EVALUATED = ("pattern_match", "variable_substitution", "word_choice", "kind_choice", "field_extraction", "copying")
"""The scenarios of the bundled evaluation."""


def question(task: Task, instance: Instance) -> str:
    """The instance as it stands in a prompt, up to and including the output prefix."""
    text = task.input_prefix + instance.input + task.input_suffix
    if task.choices:
        text += "".join(f"{chr(65 + i)}. {reference}\n" for i, reference in enumerate(instance.references))
    return text + task.output_prefix


def answer(task: Task, instance: Instance) -> str:
    """The right output: a letter for a choice, else the reference."""
    return chr(65 + instance.correct) if task.choices else instance.answer


def example(task: Task, shots: Sequence[Instance], asked: Instance) -> Example:
    """The prompt of `asked` with `shots` before it. A newline separates the parts."""
    pieces: list[tuple[str, bool]] = []
    opening = f"{task.instructions}\n" if task.instructions else ""
    for place, instance in enumerate([*shots, asked]):
        text = question(task, instance)
        # The space before an answer belongs to its first token, so it goes with the answer.
        bare = text.rstrip(" ")
        pieces.append((opening + bare, False))
        last = place == len(shots)
        pieces.append((text[len(bare) :] + answer(task, instance) + (task.end if last else "\n"), True))
        opening = "\n"
    return Example(tuple(pieces))


def training_example(rng: Random, task: Task, most_shots: int) -> Example:
    """A prompt with a random number of shots; none of its instances is held out."""
    count = rng.randint(0, min(task.shots, most_shots))
    drawn = [draw(task.generator, rng, evaluation=False) for _ in range(count + 1)]
    return example(task, drawn[:-1], drawn[-1])


def evaluation_examples(task: Task, count: int, shots: int, seed: int) -> list[Example]:
    """Held-out instances, all after the same shots, as in one trial of HELM."""
    rng = Random(f"{task.name}-{seed}")
    chosen = [draw(task.generator, rng, evaluation=False) for _ in range(min(shots, task.shots))]
    return [example(task, chosen, draw(task.generator, rng, evaluation=True)) for _ in range(count)]
