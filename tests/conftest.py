"""Markers and fixtures for every test. Real data is looked for, never needed: without it its tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def realdata_folder() -> Path | None:
    """`FLEXBATCH_REALDATA`, then `../shared/realdata` beside the checkout."""
    named = os.environ.get("FLEXBATCH_REALDATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "realdata"
    return folder if folder.is_dir() else None


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_realdata = pytest.mark.skip(reason="no real data: set FLEXBATCH_REALDATA, or put it at ../shared/realdata")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("realdata") and realdata_folder() is None:
            item.add_marker(no_realdata)
        if item.get_closest_marker("gpu") and not has_cuda():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real data; skips the test where there is none."""
    folder = realdata_folder()
    if folder is None:
        pytest.skip("no real data: set FLEXBATCH_REALDATA, or put it at ../shared/realdata")
    return folder
