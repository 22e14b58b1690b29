"""Text metrics: a prediction against one reference, with HELM 0.5.16's definitions.

Each function takes (reference, prediction) and returns a number from 0 to 1. `tests/evaluation/test_metrics.py` holds
values that HELM's own implementation gave on 1,000 pairs; here they come out the same, bit for bit.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Final

TextMetric = Callable[[str, str], float]

_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_NUMBER: Final = re.compile(r"-?[\d,]+(?:.\d+)?")


def normalize(text: str, articles: bool = True) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces (the QuAC and SQuAD normalisation)."""
    text = text.lower().translate(_PUNCTUATION)
    if articles:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split())


def exact_match(reference: str, prediction: str) -> float:
    return float(bool(prediction) and reference.strip() == prediction.strip())


def quasi_exact_match(reference: str, prediction: str) -> float:
    return float(bool(prediction) and normalize(reference) == normalize(prediction))


def quasi_leave_articles_exact_match(reference: str, prediction: str) -> float:
    return float(bool(prediction) and normalize(reference, articles=False) == normalize(prediction, articles=False))


def prefix_exact_match(reference: str, prediction: str) -> float:
    """The prediction begins with the reference."""
    return float(bool(prediction) and prediction.strip().startswith(reference.strip()))


def quasi_prefix_exact_match(reference: str, prediction: str) -> float:
    return float(bool(prediction) and normalize(prediction).startswith(normalize(reference)))


def exact_match_indicator(reference: str, prediction: str) -> float:
    """The last words are the same."""
    return exact_match(reference.rsplit(" ", maxsplit=1)[-1].strip(), prediction.rsplit(" ", maxsplit=1)[-1].strip())


def final_number_exact_match(reference: str, prediction: str) -> float:
    return exact_match(_final_number(reference), _final_number(prediction))


def _final_number(text: str) -> str:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def f1_score(reference: str, prediction: str) -> float:
    """Harmonic mean of precision and recall over the sets of normalised words."""
    gold, found = set(normalize(reference).split()), set(normalize(prediction).split())
    if not gold or not found:
        return 0.0
    common = len(gold & found)
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(gold)
    return 1.0 / (0.5 / precision + 0.5 / recall)


def _stated_set(text: str) -> set[str]:
    """The items of a sentence such as "The dog is big and red."; "Nothing." is the empty set."""
    if text == "Nothing.":
        return set()
    return set(text.replace(".", "").split(" is ")[-1].split(" and "))


def _sets(reference: str, prediction: str) -> tuple[set[str], set[str]]:
    return _stated_set(reference), _stated_set(prediction.split("\n", maxsplit=1)[0])


def exact_set_match(reference: str, prediction: str) -> float:
    gold, found = _sets(reference, prediction)
    return float(gold == found)


def iou_set_match(reference: str, prediction: str) -> float:
    gold, found = _sets(reference, prediction)
    return len(gold & found) / len(gold | found) if gold else float(gold == found)


def f1_set_match(reference: str, prediction: str) -> float:
    gold, found = _sets(reference, prediction)
    return 2 * len(gold & found) / (len(gold) + len(found)) if gold else float(gold == found)


def _rouge(kind: str) -> TextMetric:
    """F-measure of the rouge-score package with Porter stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, so only where it is asked for

    scorer = RougeScorer([kind], use_stemmer=True)

    def score(reference: str, prediction: str) -> float:
        return float(scorer.score(reference, prediction)[kind].fmeasure)

    return score


_PLAIN: Final[dict[str, TextMetric]] = {
    function.__name__: function
    for function in (
        *(exact_match, quasi_exact_match, quasi_leave_articles_exact_match),
        *(prefix_exact_match, quasi_prefix_exact_match, exact_match_indicator, final_number_exact_match),
        *(f1_score, exact_set_match, iou_set_match, f1_set_match),
    )
}
_ROUGE: Final = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
TEXT_METRICS: Final = (*_PLAIN, *_ROUGE)
SET_METRICS: Final = ("exact_set_match", "iou_set_match", "f1_set_match")


def load_metric(name: str) -> TextMetric:
    """The metric of that name, with everything that it needs already loaded. KeyError for an unknown name."""
    return _PLAIN[name] if name in _PLAIN else _rouge(_ROUGE[name])
