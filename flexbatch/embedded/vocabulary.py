"""The closed word lists of the generated language. After a space each of these words is one token of `opt-tiny`."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(text.split())


ANIMALS = words(
    "zebra cobra stork penguin shark lion buffalo whale seal eagle horse rat otter badger heron crab goat moose"
)
FRUITS = words(
    "apple peach watermelon banana grape kiwi pear strawberry blueberry blackberry plum cherry mango fig lemon quince"
)
THINGS = words(
    "lamp kite chair drum clock boat basket ladder mirror blanket kettle bucket hammer violin candle pillow bottle "
    "carpet helmet wallet"
)
COLOURS = words("red blue green yellow black white brown purple orange grey pink silver")
ROOMS = words("kitchen garden cellar attic garage office hall shed library workshop")
NAMES = words(
    "Ada Boris Clara David Elsa Felix Greta Hugo Irene Jonas Karin Leo Marta Nils Olga Paul Rosa Simon Tina Victor"
)
SURNAMES = words("Berg Carter Dale Ellis Fisher Grant Hill Irving Keller Lang Moore Novak")
CITIES = words("Lund Turin Porto Ghent Graz Bergen Cork Lyon Krakow Tartu Basel Oulu")
MONTHS = words("January February March April May June July August September October November December")
MATERIALS = words("wood glass iron paper stone cotton copper leather")
VERBS = words("sold found lost painted repaired carried bought hid cleaned dropped")

VARIABLES = ("X", "Y", "Z")
OPERATORS = ("+", "-", "*", "=")
