"""Is the model as sure as it is right? Calibration from real log-probabilities, with HELM's definitions.

HELM uses the `uncertainty-calibration` package (Kumar et al., 2019, arXiv 1909.10155); the few functions that matter
are stated here with numpy and scikit-learn, and tested against it.
`confidence` float64 (n,): the probability that the model gave its answer. `correct` int64 (n,): 1 or 0.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def calibration_metrics(confidence: Floats, correct: Ints) -> dict[str, float]:
    """All of HELM's calibration statistics for n >= 1 instances; Platt scaling needs both right and wrong answers."""
    statistics = {
        "ece_10_bin": expected_calibration_error(confidence, correct, equal_mass_edges(confidence, 10)),
        "ece_1_bin": expected_calibration_error(confidence, correct, np.array([1.0])),
        "selective_cov_acc_area": selective_area(confidence, correct),
        "selective_acc@10": selective_accuracy(confidence, correct),
    }
    if correct.all() or not correct.any():
        return {**statistics, "platt_ece_10_bin": 0.0, "platt_ece_1_bin": 0.0}
    scaled, coefficient, intercept = platt_scaled(confidence, correct)
    return {
        **statistics,
        "platt_coef": coefficient,
        "platt_intercept": intercept,
        "platt_ece_10_bin": expected_calibration_error(scaled, correct, equal_mass_edges(scaled, 10)),
        "platt_ece_1_bin": expected_calibration_error(scaled, correct, np.array([1.0])),
    }


def expected_calibration_error(confidence: Floats, correct: Ints, edges: Floats) -> float:
    """Mean over the bins, weighted by their size, of |mean confidence - accuracy|. `edges` are upper ends."""
    bins = np.minimum(np.searchsorted(edges, confidence), len(edges) - 1)
    error = 0.0
    for number in range(len(edges)):
        inside = bins == number
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return float(error)


def equal_mass_edges(confidence: Floats, bins: int) -> Floats:
    """Edges half-way between neighbours, so that each bin holds about as many instances; equal edges become one."""
    groups = np.array_split(np.sort(confidence), min(bins, len(confidence)))
    middles = [(left[-1] + right[0]) / 2.0 for left, right in pairwise(groups)]
    return np.unique([*middles, 1.0])


def selective_area(confidence: Floats, correct: Ints) -> float:
    """Area under the curve of accuracy over coverage, the most confident answers first."""
    return float(np.mean(_running_accuracy(confidence, correct)))


def selective_accuracy(confidence: Floats, correct: Ints) -> float:
    """Accuracy on the tenth of the answers in which the model is most confident."""
    return float(_running_accuracy(confidence, correct)[int(0.1 * len(correct))])


def _running_accuracy(confidence: Floats, correct: Ints) -> Floats:
    """Equally confident answers stay in their order. The library leaves it to numpy, which orders them otherwise on a
    processor with AVX-512 than on one without."""
    ordered = correct[np.argsort(-confidence, kind="stable")]
    accuracy: Floats = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return accuracy


def platt_scaled(confidence: Floats, correct: Ints) -> tuple[Floats, float, float]:
    """Confidence after a logistic fit on its log-odds, with the fit's coefficient and intercept."""
    from sklearn.linear_model import LogisticRegression  # slow to import, so only where it is asked for

    clipped = np.clip(confidence, 1e-12, 1 - 1e-12)
    odds = np.log(clipped / (1 - clipped))
    fit = LogisticRegression(C=1e10, solver="lbfgs").fit(odds[:, None], correct)
    coefficient, intercept = float(fit.coef_[0][0]), float(fit.intercept_[0])
    return 1 / (1 + np.exp(-(odds * coefficient + intercept))), coefficient, intercept
