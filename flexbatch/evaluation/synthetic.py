"""Synthetic reasoning data, generated here with the draws that HELM 0.5.16 makes.

HELM's `synthetic_reasoning` (after LIME, arXiv 2101.06223) and `synthetic_reasoning_natural` (after "Transformers as
Soft Reasoners over Language", arXiv 2002.05867) have no data files: a seed fixes every instance. To get the same text
the generators below consume their random numbers in the same order as HELM, call by call; each draw is therefore
written on its own line and none may be reordered or merged. `tests/evaluation/test_synthetic.py` holds the proof.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flexbatch.evaluation.instance import TEST, TRAIN, VALID, Instance, Reference

ANIMALS = ("zebra", "cobra", "stork", "penguin", "shark", "lion", "buffalo", "whale", "seal", "eagle", "horse", "rat")
FRUITS = ("apple", "peach", "watermelon", "banana", "grape", "kiwi", "pear", "strawberry", "blueberry", "blackberry")
WORDS = ANIMALS + FRUITS
VARIABLES = ("X", "Y", "Z")
OPERATORS = ("+", "-", "*", "=")

PATTERN_MODES = ("pattern_match", "variable_substitution", "induction")
NATURAL_DIFFICULTIES = ("easy", "medium", "hard")


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """How many instances of each split to generate, in this order."""

    train: int = 1000
    valid: int = 5000
    test: int = 5000

    def splits(self) -> Iterator[str]:
        yield from (TRAIN for _ in range(self.train))
        yield from (VALID for _ in range(self.valid))
        yield from (TEST for _ in range(self.test))


def synthetic_reasoning(mode: str, seed: int = 42, sizes: SplitSizes | None = None) -> list[Instance]:
    """Instances of one of `PATTERN_MODES`. The legacy numpy generator is part of the definition."""
    generator = np.random.RandomState(seed)
    return [_pattern_instance(generator, mode, split) for split in (sizes or SplitSizes()).splits()]


def _pattern_instance(generator: np.random.RandomState, mode: str, split: str) -> Instance:
    variables = _some(generator, VARIABLES)
    distinct = sorted(set(variables))
    operators = _some(generator, OPERATORS)
    pattern = _shuffled(generator, variables + operators)
    words = _substitution(generator, distinct)
    other_words = _substitution(generator, distinct)  # drawn in every mode, used by induction alone
    rule = " ".join(pattern)
    result = _substitute(pattern, words)
    if mode == "induction":
        question = f"Two results: {result} | {_substitute(pattern, other_words)}"
        answer = f"Rule: {rule}"
    elif mode == "variable_substitution":
        listed = " , ".join(f'{name} by " {word} "' for name, word in words.items())
        question = f"Rules: {rule} | Substitutions: {listed}"
        answer = result
    else:
        rules = [" ".join(_shuffled(generator, distinct + operators)) for _ in range(3)] + [rule]
        question = f"Rules: {' | '.join(_shuffled(generator, rules))} | Result: {result}"
        answer = rule
    return Instance(question, (Reference(answer),), split)


def _some(generator: np.random.RandomState, population: tuple[str, ...]) -> list[str]:
    """Two or three members, with replacement; the count is drawn before the members."""
    count = generator.randint(2, 4)
    return [str(member) for member in generator.choice(population, size=count)]


def _shuffled(generator: np.random.RandomState, items: list[str]) -> list[str]:
    shuffled = list(items)
    generator.shuffle(shuffled)
    return shuffled


def _substitution(generator: np.random.RandomState, variables: list[str]) -> dict[str, str]:
    """One or two words for each variable."""
    words = {}
    for variable in variables:
        count = generator.randint(1, 3)
        words[variable] = " ".join(generator.choice(WORDS, size=count))
    return words


def _substitute(pattern: list[str], words: dict[str, str]) -> str:
    return " ".join(words.get(symbol, symbol) for symbol in pattern)


SUBJECTS: dict[str, tuple[str, ...]] = {
    "person": ("Alice", "Bob", "Carol", "Dan", "Erin", "Frank"),
    "animal": (
        *("dog", "cat", "rabbit", "mouse", "tiger", "lion", "bear"),
        *("squirrel", "cow", "panda", "hedgehog", "elephant", "giraffe", "hippo"),
    ),
    "plant": ("poppy", "dandelion", "tree", "rose", "sunflower"),
}

# General attribute to the words that imply it (the hard difficulty uses the latter in facts). The order is HELM's.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "young": ("young",),
    "soft": ("soft",),
    "sad": ("sad",),
    "scary": ("scary",),
    "cold": ("cold", "chill", "cool"),
    "hot": ("hot", "warm"),
    "smart": ("smart", "clever", "wise", "intelligent"),
    "clean": ("clean", "tidy"),
    "small": ("small", "little", "tiny"),
    "big": ("big", "enormous", "giant", "huge"),
    "good": ("good", "kind", "nice"),
    "beautiful": ("beautiful", "pretty"),
    "red": ("red", "crimson"),
    "blue": ("blue", "cobalt"),
    "green": ("green", "viridian"),
    "purple": ("purple", "violet"),
    "boring": ("boring", "dull"),
    "old": ("old", "ancient", "antique"),
    "strong": ("strong", "powerful", "muscular"),
    "weak": ("weak", "frail", "fragile"),
    "fast": ("fast", "quick"),
    "slow": ("slow", "sluggish"),
    "bad": ("bad", "evil", "wicked", "mean"),
    "happy": ("happy", "elated", "glad", "cheerful"),
    "round": ("round", "circular", "spherical"),
}


@dataclass(frozen=True, slots=True)
class _Rule:
    subject: str
    category: str
    conditions: tuple[str, ...]
    conjunction: str
    consequent: str

    def text(self) -> str:
        condition = f" {self.conjunction} ".join(self.conditions)
        subject, particular = (_with_article(self.subject, self.category, article) for article in ("a", "the"))
        return f"If {subject} is {condition}, then {particular} is {self.consequent}."

    def applies_to(self, attributes: list[str]) -> bool:
        if self.consequent in attributes:
            return False
        held = [condition in attributes for condition in self.conditions]
        return all(held) if self.conjunction == "and" else any(held)


def synthetic_reasoning_natural(difficulty: str, seed: int = 42, sizes: SplitSizes | None = None) -> list[Instance]:
    """Instances of one of `NATURAL_DIFFICULTIES`: easy keeps to one subject, hard states facts in other words."""
    generator = random.Random(seed)
    return [_natural_instance(generator, difficulty, split) for split in (sizes or SplitSizes()).splits()]


def _natural_instance(generator: random.Random, difficulty: str, split: str) -> Instance:
    category = generator.choice(list(SUBJECTS))
    subject = generator.choice(SUBJECTS[category])
    rules = _draw_rules(generator, subject, category, keep_subject=difficulty == "easy")
    general, specific, consequents = _draw_fact(generator, rules)
    told = specific if difficulty == "hard" else general
    question = "".join(f"{rule.text()}\n" for rule in rules)
    question += f"Fact:\n{_fact_text(subject, category, told)}\n"
    question += f"The following can be determined about {_with_article(subject, category, 'the')}:"
    return Instance(question, (Reference(_fact_text(subject, category, consequents)),), split)


def _draw_rules(generator: random.Random, subject: str, category: str, keep_subject: bool) -> list[_Rule]:
    """Up to five rules; no attribute occurs in two of them, so that one step of reasoning is enough."""
    unused = list(ATTRIBUTES)
    generator.shuffle(unused)
    rules: list[_Rule] = []
    while len(unused) > 2 and len(rules) < 5:
        about = subject if keep_subject else generator.choice([category, subject])
        count = generator.randint(2, 3)
        used, unused = unused[:count], unused[count:]
        conjunction = generator.choice(["and", "or"])
        rules.append(_Rule(about, category, tuple(used[:-1]), conjunction, used[-1]))
    return rules


def _draw_fact(generator: random.Random, rules: list[_Rule]) -> tuple[list[str], list[str], list[str]]:
    """Two attributes, the words for them, and what follows; a fact without consequences is kept once in ten times."""
    while True:
        general = generator.sample(list(ATTRIBUTES), 2)
        specific = [generator.choice(ATTRIBUTES[attribute]) for attribute in general]
        consequents = [rule.consequent for rule in rules if rule.applies_to(general)]
        if consequents or generator.random() <= 0.1:
            return general, specific, consequents


def _fact_text(subject: str, category: str, attributes: list[str]) -> str:
    if not attributes:
        return "Nothing."
    name = _with_article(subject, category, "the")
    if category != "person":
        name = name[0].upper() + name[1:]
    return f"{name} is {' and '.join(attributes)}."


def _with_article(subject: str, category: str, article: str) -> str:
    if category == "person":
        return subject
    vowel = article == "a" and subject[0].lower() in "aeiou"
    return f"{article}{'n' if vowel else ''} {subject}"
