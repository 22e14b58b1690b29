"""Fewer bits cost no more than promised, on a trained model; the table of the benchmark page can be made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from flexbatch.bench.quality import FORMS, FULL, OWN_TEXT, REFERENCE, Quality, measure_quality, write_quality
from flexbatch.composition import load_config
from flexbatch.config import Config
from flexbatch.errors import ConfigError

WIKI = "test.txt"


def settings(realdata: Path, folder: Path, *more: str) -> Config:
    return load_config(
        [
            "bench.workload=quality", "model=hf", f"model.path={realdata / 'stories260k'}", "bench.rows=12",
            f"bench.text={realdata / 'wikitext2' / 'test.txt'}", f"model.cache_dir={folder}", *more,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Quality]:
    config = settings(realdata, tmp_path_factory.mktemp("quality"), "bench.prompt_tokens=256")
    return {(each.form, each.text): each for each in measure_quality(config, Console(quiet=True))}


pytestmark = pytest.mark.realdata


def test_full_precision_reads_its_own_text_well_and_other_text_badly(
    measured: dict[tuple[str, str], Quality],
) -> None:
    assert 3 < measured[FULL, OWN_TEXT].perplexity < 6
    assert 100 < measured[FULL, WIKI].perplexity < 400
    assert measured[FULL, WIKI].tokens == 12 * 255


@pytest.mark.parametrize("text", [OWN_TEXT, WIKI])
@pytest.mark.parametrize(
    ("form", "most", "agreement"),
    [
        ("int8 compute (W8A8)", 0.005, 0.9),
        ("8-bit weights", 0.005, 0.95),
        ("8-bit KV", 0.005, 0.93),
        ("4-bit KV (keys in 8)", 0.02, 0.9),
    ],
)
def test_fewer_bits_change_perplexity_by_no_more_than_promised(
    form: str, most: float, agreement: float, text: str, measured: dict[tuple[str, str], Quality]
) -> None:
    found = measured[form, text]
    assert 0 < abs(found.perplexity_change) < most
    assert agreement < found.agreement < 1


@pytest.mark.parametrize("text", [OWN_TEXT, WIKI])
def test_four_bit_weights_are_as_good_as_rounding_to_nearest_in_groups_of_32(
    text: str, measured: dict[tuple[str, str], Quality]
) -> None:
    ours, reference = measured["4-bit weights", text], measured[REFERENCE, text]
    assert ours.perplexity < reference.perplexity * 1.01  # float16 scales round a few weights otherwise, at random
    assert ours.agreement > reference.agreement - 0.01


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- quality:begin -->\nold\n<!-- quality:end -->\nafter\n")
    one = Quality(FULL, OWN_TEXT, 1000, 4.0, 0.0, 1.0)
    write_quality(page, [one, replace(one, form="8-bit KV", perplexity=4.1, perplexity_change=0.025, agreement=0.9)])
    text = page.read_text()
    assert "| 8-bit KV | its own text | 1,000 | 4.1000 | +2.50% | 90.00% |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="has no place for the table"):
        write_quality(page, [one])


def test_a_text_that_is_too_short_is_refused(realdata: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time")
    config = settings(realdata, tmp_path, "bench.prompt_tokens=64", f"bench.text={tmp_path / 'short.txt'}")
    with pytest.raises(ConfigError, match="less than a window"):
        measure_quality(replace(config, bench=replace(config.bench, rows=1)), Console(quiet=True), {FULL: FORMS[FULL]})
