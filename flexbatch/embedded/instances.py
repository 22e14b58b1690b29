"""Seeded generators of task instances: pure functions of a `random.Random`.

The forms of `pattern_match` and `variable_substitution` follow HELM's synthetic_reasoning scenario (after LIME, Wu et
al., 2021, arXiv 2101.06223), with one difference: of the four rules in a pattern-match instance exactly one fits the
result, so that a perfect solver scores 1.0.
"""

from __future__ import annotations

import json
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from flexbatch.embedded.vocabulary import (
    ANIMALS,
    CITIES,
    COLOURS,
    FRUITS,
    MATERIALS,
    MONTHS,
    NAMES,
    OPERATORS,
    ROOMS,
    SURNAMES,
    THINGS,
    VARIABLES,
    VERBS,
)

HELD_OUT_SHARE = 16
"""One in so many instances is kept for evaluation: training never sees it."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One question: `references[correct]` is its answer; generation tasks have this one reference only."""

    input: str
    references: tuple[str, ...]
    correct: int = 0

    @property
    def answer(self) -> str:
        return self.references[self.correct]


Generator = Callable[[Random], Instance]


def held_out(instance: Instance) -> bool:
    """Whether an instance belongs to evaluation, by a hash of its text: the same on every machine and in every run."""
    options = instance.references if len(instance.references) > 1 else ()
    return zlib.crc32("\n".join([instance.input, *options]).encode()) % HELD_OUT_SHARE == 0


def draw(generator: Generator, rng: Random, *, evaluation: bool) -> Instance:
    """Draws until an instance falls on the wanted side of the line between training and evaluation."""
    while True:
        instance = generator(rng)
        if held_out(instance) == evaluation:
            return instance


def _pattern(rng: Random, symbols: Sequence[str], operators: Sequence[str]) -> list[str]:
    pattern = [*symbols, *operators]
    rng.shuffle(pattern)
    return pattern


def _symbols(rng: Random) -> tuple[list[str], list[str]]:
    return rng.choices(VARIABLES, k=rng.randint(2, 3)), rng.choices(OPERATORS, k=rng.randint(2, 3))


def _substitutions(rng: Random, symbols: Sequence[str]) -> dict[str, str]:
    return {symbol: " ".join(rng.choices(ANIMALS + FRUITS, k=rng.randint(1, 2))) for symbol in sorted(set(symbols))}


def substitute(pattern: Sequence[str], substitutions: dict[str, str]) -> str:
    """The pattern as text, with each variable replaced by its words."""
    return " ".join(substitutions.get(symbol, symbol) for symbol in pattern)


def fits(pattern: Sequence[str], result: Sequence[str], bound: dict[str, tuple[str, ...]] | None = None) -> bool:
    """Whether some choice of one or two words for each variable turns the pattern into the result."""
    bound = bound or {}
    if not pattern:
        return not result
    head, rest = pattern[0], pattern[1:]
    if head in OPERATORS:
        return bool(result) and result[0] == head and fits(rest, result[1:], bound)
    for length in (1, 2):
        words = tuple(result[:length])
        if len(words) < length or any(word in OPERATORS for word in words) or bound.get(head, words) != words:
            continue
        if fits(rest, result[length:], {**bound, head: words}):
            return True
    return False


def pattern_match(rng: Random) -> Instance:
    """Four rules and a result: which rule made it?"""
    while True:
        symbols, operators = _symbols(rng)
        pattern = _pattern(rng, symbols, operators)
        others = [_pattern(rng, sorted(set(symbols)), operators) for _ in range(3)]
        result = substitute(pattern, _substitutions(rng, symbols))
        if not any(fits(other, result.split()) for other in others):
            break
    rules = [" ".join(rule) for rule in [*others, pattern]]
    rng.shuffle(rules)
    return Instance(f"Rules: {' | '.join(rules)} | Result: {result}", (" ".join(pattern),))


def variable_substitution(rng: Random) -> Instance:
    """A rule and what stands for its variables: write the result."""
    symbols, operators = _symbols(rng)
    pattern = _pattern(rng, symbols, operators)
    substitutions = _substitutions(rng, symbols)
    listed = " , ".join(f'{symbol} by " {words} "' for symbol, words in substitutions.items())
    text = f"Rules: {' '.join(pattern)} | Substitutions: {listed}"
    return Instance(text, (substitute(pattern, substitutions),))


@dataclass(frozen=True, slots=True)
class _Relation:
    statement: str
    question: str
    subjects: Sequence[str]
    values: Sequence[str]


_RELATIONS = (
    _Relation("The {subject} is {value}.", "What colour is the {subject}?", THINGS, COLOURS),
    _Relation("{subject} lives in {value}.", "Which city is home to {subject}?", NAMES, CITIES),
    _Relation("{subject} likes the {value}.", "Which animal pleases {subject}?", NAMES, ANIMALS),
)


_KINDS = {"animal": ANIMALS, "fruit": FRUITS, "thing": THINGS, "colour": COLOURS, "city": CITIES, "room": ROOMS}


def kind_choice(rng: Random) -> Instance:
    """Four words of four kinds: which is of the kind that is asked for?"""
    kinds = rng.sample(list(_KINDS), 4)
    correct = rng.randrange(4)
    options = tuple(rng.choice(_KINDS[kind]) for kind in kinds)
    return Instance(f"Which option is a {kinds[correct]}?", options, correct)


def word_choice(rng: Random) -> Instance:
    """A word and four options: which of them is it?"""
    options = rng.sample(rng.choice(list(_KINDS.values())), 4)
    correct = rng.randrange(4)
    return Instance(f"Which option is {options[correct]}?", tuple(options), correct)


def facts_choice(rng: Random) -> Instance:
    """Some facts and a question on one of them, with four answers; wrong answers occur among the other facts too."""
    relation, other = rng.sample(_RELATIONS, 2)
    count = rng.randint(2, 4)
    subjects, values = rng.sample(relation.subjects, count), rng.sample(relation.values, 4)
    facts = [relation.statement.format(subject=s, value=v) for s, v in zip(subjects, values, strict=False)]
    if rng.random() < 0.5:
        facts.append(other.statement.format(subject=rng.choice(other.subjects), value=rng.choice(other.values)))
    asked = rng.randrange(count)
    rng.shuffle(facts)
    answer = values[asked]
    rng.shuffle(values)
    text = f"{' '.join(facts)} {relation.question.format(subject=subjects[asked])}"
    return Instance(text, tuple(values), values.index(answer))


@dataclass(frozen=True, slots=True)
class Document:
    """A short order notice and its fields."""

    text: str
    fields: dict[str, str]


def document(rng: Random) -> Document:
    """An order notice in one of several wordings, its facts in varying order."""
    fields = {
        "name": f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}",
        "city": rng.choice(CITIES),
        "item": rng.choice(THINGS),
        "date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        "total": f"{rng.randint(1, 99)}.{rng.randint(0, 9)}0",
    }
    phrases = [
        rng.choice(("Customer: {name}.", "Sold to {name}.", "Buyer {name}.")),
        rng.choice(("Shipped to {city}.", "City: {city}.", "Sent to {city}.")),
        rng.choice(("Goods: one {item}.", "Item: {item}.", "Ordered a {item}.")),
        rng.choice(("Date: {date}.", "Ordered on {date}.", "Received {date}.")),
        rng.choice(("Total: {total} euro.", "Paid {total} euro.", "Amount due {total} euro.")),
    ]
    rng.shuffle(phrases)
    return Document(" ".join(phrases).format(**fields), fields)


def field_extraction(rng: Random) -> Instance:
    """A document and the name of a field: give its value."""
    made = document(rng)
    field = rng.choice(sorted(made.fields))
    return Instance(f"{made.text}\nField: {field}", (made.fields[field],))


def record_extraction(rng: Random) -> Instance:
    """A document: give all its fields as a JSON object."""
    made = document(rng)
    return Instance(made.text, (json.dumps(made.fields),))


def copying(rng: Random) -> Instance:
    """Words, numbers and letter strings without sense: repeat them."""
    words = ANIMALS + FRUITS + THINGS + COLOURS + NAMES
    parts = []
    for _ in range(rng.randint(3, 8)):
        kind = rng.random()
        if kind < 0.6:
            parts.append(rng.choice(words))
        elif kind < 0.8:
            parts.append(str(rng.randint(0, 9999)))
        else:
            parts.append("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 4))))
    text = " ".join(parts)
    return Instance(text, (text,))


def sentence(rng: Random) -> str:
    """One plain sentence of a little story."""
    form = rng.choice(
        (
            "{name} {verb} the {colour} {thing} in {city}.",
            "{name} {verb} a {material} {thing} in the {room}.",
            "In {month} {name} {verb} the {animal} of {other}.",
            "The {animal} ate the {fruit} in the {room}.",
            "{name} and {other} {verb} {count} {colour} {thing}s.",
        )
    )
    name, other = rng.sample(NAMES, 2)
    return form.format(
        name=name,
        other=other,
        verb=rng.choice(VERBS),
        colour=rng.choice(COLOURS),
        thing=rng.choice(THINGS),
        city=rng.choice(CITIES),
        material=rng.choice(MATERIALS),
        room=rng.choice(ROOMS),
        month=rng.choice(MONTHS),
        animal=rng.choice(ANIMALS),
        fruit=rng.choice(FRUITS),
        count=rng.randint(2, 99),
    )


def summary(rng: Random) -> Instance:
    """A short news item whose first sentence says what it is about: give that sentence."""
    sentences = [sentence(rng) for _ in range(rng.randint(3, 6))]
    return Instance(" ".join(sentences), (sentences[0],))


def story(rng: Random) -> Instance:
    """Plain sentences to write on from; no question."""
    sentences = [sentence(rng) for _ in range(rng.randint(3, 7))]
    return Instance(sentences[0], (" ".join(sentences[1:]),))
