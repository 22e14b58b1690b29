"""The closed word lists of the generated language. Every word is one token of `opt-tiny` where it stands after a space."""

from __future__ import annotations

ANIMALS = (
    "zebra cobra stork penguin shark lion buffalo whale seal eagle horse rat otter badger heron crab goat moose"
).split()
FRUITS = (
    "apple peach watermelon banana grape kiwi pear strawberry blueberry blackberry plum cherry mango fig lemon quince"
).split()
THINGS = (
    "lamp kite chair drum clock boat basket ladder mirror blanket kettle bucket hammer violin candle pillow bottle "
    "carpet helmet wallet"
).split()
COLOURS = "red blue green yellow black white brown purple orange grey pink silver".split()
ROOMS = "kitchen garden cellar attic garage office hall shed library workshop".split()
NAMES = (
    "Ada Boris Clara David Elsa Felix Greta Hugo Irene Jonas Karin Leo Marta Nils Olga Paul Rosa Simon Tina Victor"
).split()
SURNAMES = "Berg Carter Dale Ellis Fisher Grant Hill Irving Keller Lang Moore Novak".split()
CITIES = "Lund Turin Porto Ghent Graz Bergen Cork Lyon Krakow Tartu Basel Oulu".split()
MONTHS = "January February March April May June July August September October November December".split()
MATERIALS = "wood glass iron paper stone cotton copper leather".split()
VERBS = "sold found lost painted repaired carried bought hid cleaned dropped".split()

VARIABLES = ("X", "Y", "Z")
OPERATORS = ("+", "-", "*", "=")
