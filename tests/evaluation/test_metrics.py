from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from flexbatch.evaluation.calibration import calibration_metrics
from flexbatch.evaluation.metrics import TEXT_METRICS, load_metric
from tests.evaluation.golden.pairs import pairs

GOLDEN = Path(__file__).parent / "golden"
TEXT = json.loads((GOLDEN / "text_metrics.json").read_text())
CASES = json.loads((GOLDEN / "calibration.json").read_text())["cases"]
SELECTIVE = {"selective_cov_acc_area", "selective_acc@10"}


def test_the_random_pairs_are_those_that_helm_was_given() -> None:
    assert hashlib.sha256(json.dumps(pairs()).encode()).hexdigest() == TEXT["pairs"]
    assert TEXT["versions"]["crfm-helm"] == "0.5.16"


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_text_metric_equals_helm_on_a_thousand_pairs(name: str) -> None:
    metric = load_metric(name)
    assert [metric(reference, prediction) for reference, prediction in pairs()] == TEXT["values"][name]


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_the_pairs_tell_right_from_wrong(name: str) -> None:
    values = TEXT["values"][name]
    assert min(values) == 0
    assert max(values) == 1
    assert 100 < sum(values) < 900


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(len(case["correct"])))
def test_calibration_equals_the_library_that_helm_uses(case: dict[str, object]) -> None:
    confidence, correct, expected = np.array(case["confidence"]), np.array(case["correct"]), case["values"]
    found = calibration_metrics(confidence, correct)
    assert isinstance(expected, dict)
    assert found.keys() == expected.keys()
    # The library's own figures depend on how numpy orders equally confident answers on the processor at hand.
    ordered = expected.keys() & SELECTIVE if len(set(confidence)) < len(confidence) else set()
    worst, best = (
        calibration_metrics(confidence[order], correct[order])
        for order in (np.lexsort((correct, -confidence)), np.lexsort((-correct, -confidence)))
    )
    for name, value in expected.items():
        if name in ordered:
            assert worst[name] - 1e-9 <= min(value, found[name]), name
            assert max(value, found[name]) <= best[name] + 1e-9, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_of_equally_confident_answers_the_first_counts_first_on_any_processor() -> None:
    confidence, correct = np.full(40, 0.5), np.array([1] * 4 + [0] * 36)
    assert calibration_metrics(confidence, correct)["selective_acc@10"] == 0.8
