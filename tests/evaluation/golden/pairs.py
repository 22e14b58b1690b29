"""1,000 random pairs of reference and prediction on which the text metrics are compared with HELM's."""

from __future__ import annotations

from random import Random

WORDS = [
    "the",
    "a",
    "an",
    "The",
    "A",
    "An",
    "cat",
    "dog",
    "it",
    "is",
    "was",
    "red",
    "big",
    "cold",
    "kind",
    "Paris",
    "42",
    "3.5",
    "1,000",
    "-7",
    "isn't",
    "well-known",
    "U.S.",
    "café",
    "naïve",
    "東京",
    "running",
    "runs",
    "ran",
    "studies",
    "study",
    "Alice",
    ",",
    ".",
    "!",
    "?",
    ":",
    ";",
    "(",
    ")",
    '"',
    "'",
    "and",
    "or",
    "not",
    "nothing",
    "answer",
    "####",
    "=",
    "+",
    "*",
    "X",
    "Y",
    "Z",
    "B",
    "C",
    "D",
    "$5",
    "50%",
]
SETS = (
    "Nothing.",
    "The dog is red.",
    "The dog is red and big.",
    "The dog is big and red",
    "Alice is kind and cold.",
    "",
)


def text(rng: Random) -> str:
    """Words and punctuation with untidy spacing; now and then nothing, a statement of a set, or several lines."""
    kind = rng.random()
    if kind < 0.04:
        return rng.choice(["", " ", "\n", ".", "the", "a an the"])
    if kind < 0.2:
        return rng.choice(SETS) + rng.choice(["", "", "\nThe cat is big.", " "])
    joined = ""
    for _ in range(rng.randint(1, 14)):
        joined += rng.choice(WORDS) + rng.choice([" ", " ", " ", "  ", "", "\n"])
    return joined if rng.random() < 0.3 else joined.strip()


def mutate(rng: Random, original: str) -> str:
    """A prediction near the reference: the same, longer, cased, re-spaced, with words dropped or exchanged."""
    kind = rng.randrange(8)
    if kind == 0:
        return original
    if kind == 1:
        return original + " " + text(rng)
    if kind == 2:
        return original.upper()
    if kind == 3:
        return "the " + original + " ."
    words = original.split(" ")
    if kind == 4:
        return " ".join(word for word in words if rng.random() < 0.7)
    if kind == 5:
        return " ".join(rng.choice(WORDS) if rng.random() < 0.3 else word for word in words)
    if kind == 6:
        return "  " + original.replace(" ", "  ") + "\n"
    return text(rng)


def pairs(count: int = 1000, seed: int = 5) -> list[tuple[str, str]]:
    """(reference, prediction); the same ones on every machine and every Python."""
    rng = Random(seed)
    made = []
    for _ in range(count):
        reference = text(rng)
        made.append((reference, mutate(rng, reference)))
    return made
