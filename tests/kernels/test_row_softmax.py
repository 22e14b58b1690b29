"""The softmax of one query's scores, as kernels make it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexbatch.kernels.row_softmax import room, weigh


def weighed(scores: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, float]:
    """What becomes of the scores from `start` on, and the sum."""
    memory = room(len(scores))
    memory[:] = np.nan  # whatever lay there
    memory[start : len(scores)] = scores[start:].numpy()
    highest = np.float32(scores[start:].max())
    total = weigh(memory, start, len(scores), highest)
    return torch.from_numpy(memory[start : len(scores)]), float(total)


def test_the_exponential_is_that_of_the_library() -> None:
    scores = torch.linspace(-86, 0, 4001)
    wanted = scores.double().exp()
    # The score times log2(e) is rounded first.
    assert ((weighed(scores)[0] - wanted).abs() <= wanted * (4e-7 - 1e-7 * scores)).all()


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 540])
@pytest.mark.parametrize("start", [0, 1, 13, 16, 200])
def test_the_sum_is_that_of_the_columns_from_the_start_on(columns: int, start: int) -> None:
    scores = torch.randn(start + columns, generator=torch.Generator().manual_seed(columns)) * 5
    made, total = weighed(scores, start)
    wanted = (scores[start:].double() - scores[start:].max()).exp()
    torch.testing.assert_close(made.double(), wanted, rtol=6e-6, atol=1e-37)
    assert total == pytest.approx(float(wanted.sum()), rel=1e-6)


def test_what_may_not_be_seen_has_next_to_no_share() -> None:
    scores = torch.tensor([1.0, -1e30, torch.finfo(torch.float32).min, 0.0])
    made, total = weighed(scores)
    assert (made[1:3] < 1e-37).all()
    assert total == pytest.approx(1 + float(np.exp(-1)))


def test_what_is_no_number_is_not_hidden() -> None:
    memory = room(3)
    memory[:3] = [1.0, np.nan, 0.0]
    assert np.isnan(weigh(memory, 0, 3, np.float32(1.0)))
