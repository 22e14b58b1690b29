"""The smallest unit of an evaluation: one input and its references, as HELM names them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

TRAIN: Final = "train"
VALID: Final = "valid"
TEST: Final = "test"
SPLITS: Final = (TRAIN, VALID, TEST)


@dataclass(frozen=True, slots=True)
class Reference:
    """A possible output. Several may be correct; in a multiple-choice question the wrong ones are listed too."""

    text: str
    correct: bool = True


@dataclass(frozen=True, slots=True)
class Instance:
    """One data point. `split` is train (a source of shots), valid or test (both are evaluated, as in HELM)."""

    input: str
    references: tuple[Reference, ...]
    split: str
    id: str = ""

    @property
    def correct(self) -> tuple[Reference, ...]:
        return tuple(reference for reference in self.references if reference.correct)

    @property
    def label(self) -> str | None:
        """The text of the first correct reference; None where there is none."""
        return next((reference.text for reference in self.references if reference.correct), None)


def number_instances(instances: list[Instance]) -> list[Instance]:
    """Give `id0`, `id1`, ... in order to all instances unless every one has its own id already (HELM's rule)."""
    if all(instance.id for instance in instances):
        return instances
    return [replace(instance, id=f"id{place}") for place, instance in enumerate(instances)]
