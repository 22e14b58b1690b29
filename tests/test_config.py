"""From arguments to a checked Config."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flexbatch.composition import as_yaml, bundled, group_options, load_config, save_config
from flexbatch.config import Config, ModelConfig, parse_bytes
from flexbatch.errors import ConfigError
from flexbatch.overrides import convert, find_key, keys
from flexbatch.validation import check

BASE = ["job=mine", "model=mine"]


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own folder: one job that changes another group's option and values, one model."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "job").mkdir()
    (folder / "model").mkdir()
    (folder / "job" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /prompt: chat\n"
        "job: {name: mine, kind: generate}\n"
        "dataset: {path: rows.jsonl}\nprompt: {template: 'Say {{ text }}'}\ngeneration: {max_new_tokens: 5}\n"
    )
    (folder / "job" / "wrong.yaml").write_text("# @package _global_\njob: {nmae: wrong}\n")
    (folder / "model" / "mine.yaml").write_text("name: mine\npath: ${model_dir:}/mine\n")
    return folder


def load(config_dir: Path, *overrides: str) -> Config:
    return load_config([*BASE, *overrides], config_dir)


def refusal(config_dir: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(config_dir, *overrides)
    return caught.value


def test_a_job_sets_values_of_other_groups_and_chooses_their_options(config_dir: Path) -> None:
    config = load(config_dir)
    assert config.prompt.template == "Say {{ text }}"
    assert config.prompt.chat_template
    assert config.generation.max_new_tokens == 5
    assert config.output.dir == "outputs/mine/mine"


def test_the_command_line_wins_over_the_job(config_dir: Path) -> None:
    config = load(config_dir, "generation.max_new_tokens=9", "prompt=default", "job.name=other")
    assert config.generation.max_new_tokens == 9
    assert not config.prompt.chat_template
    assert config.output.dir == "outputs/other/mine"


@pytest.mark.parametrize(
    "text",
    [
        "{{ text }}",
        "Price: ${{ amount }}",
        "a=b, c: [d] {e}",
        "{% for x in y %}{{ x }}{% endfor %}",
        "#no comment",
        "~",
    ],
)
def test_a_template_is_taken_as_it_stands(config_dir: Path, text: str) -> None:
    assert load(config_dir, f"prompt.template={text}").prompt.template == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_a_value_for_a_text_option(text: str) -> None:
    quoted = f'"{text}"'
    assert convert(find_key("prompt.template"), quoted) == text


@pytest.mark.parametrize("path", ["data(1).csv", "../x/*.parquet", "user/set-1.0", "2024", "a b.jsonl", "x[0-9].csv"])
def test_a_dataset_path_needs_no_quoting_beyond_the_shell(config_dir: Path, path: str) -> None:
    assert load(config_dir, f"dataset.path={path}").dataset.path == path


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ('generation.stop=["\\n", "END"]', ["\n", "END"]),
        ("generation.stop=END", ["END"]),
        ("output.columns=[title,year]", ["title", "year"]),
        ("offload.percent=[20,80,0,100,0,100]", [20.0, 80.0, 0.0, 100.0, 0.0, 100.0]),
        ("offload.percent=20,80,0,100,0,100", [20.0, 80.0, 0.0, 100.0, 0.0, 100.0]),
        ("dataset.path=[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("job.gold={total:Total}", {"total": "Total"}),
        ("job.gold.total=Total", {"total": "Total"}),
        ("job.schema=[company, total]", ["company", "total"]),
        ("generation.logprobs=true", True),
        ("generation.temperature=1e-1", 0.1),
        ("offload.slots=12", 12),
        ("offload.slots=auto", "auto"),
        ("model.revision=1.0", "1.0"),
        ("++generation.seed=7", 7),
    ],
)
def test_values_are_read_as_their_options_type(config_dir: Path, argument: str, expected: object) -> None:
    manual = ["offload.policy=manual"] if "percent" in argument else []
    config = load(config_dir, argument, *manual)
    group, field = argument.lstrip("+").split("=")[0].split(".")[:2]
    assert getattr(getattr(config, group), field) == expected


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("promt.template=x", "Did you mean prompt.template?"),
        ("max_new_tokens=3", "Did you mean generation.max_new_tokens?"),
        ("modle=opt-13b", "Did you mean model?"),
        ("model=opt-12b", "Did you mean opt-13b?"),
        ("prompt=chatt", "Did you mean chat?"),
        ("prompt.padding=buckt", "Did you mean bucket?"),
        ("offload.device=cud", "Did you mean cuda?"),
        ("job.wrong", "not of the form key=value"),
        ("hydra.run.dir=x", "output.dir"),
        ("generation.max_new_tokens=many", "whole number"),
        ("generation.max_new_tokens=0", "at least 1"),
        ("generation.max_new_tokens=1.5", "whole number"),
        ("generation.temperature=-1", "at least 0"),
        ("generation.top_p=1.5", "at most 1"),
        ("generation.top_p=0", "more than 0"),
        ("generation.logprobs=maybe", "true or"),
        ("generation.min_new_tokens=10", "generation.max_new_tokens=5"),
        ('generation.stop=["a",""]', "empty stop string"),
        ("generation.stop=[a", "Write a list as"),
        ("generation.num_completions=3", "temperature"),
        ("offload.percent=[a,b]", "number"),
        ("offload.policy=manual", "6 numbers"),
        ("offload.percent=[100,0,100,0,100,0]", "offload.policy=manual"),
        ("offload.weight_bits=5", "16, 8 or 4"),
        ("offload.slots=0", "at least 1"),
        ("offload.slots=few", "at least 1"),
        ("offload.device_memory=3 apples", "3GiB"),
        ("prompt.truncation=middle", "left, right or error"),
        ("output.dir=", "the run's folder"),
        ("output.columns=[completion]", "twice"),
        ("output.columns=[a,a]", "twice"),
        ("dataset.path=", "dataset.path="),
        ("dataset.limit=-1", "at least 0"),
        ("job.kind=extract", "job.schema"),
        ("job.gold=x", "mapping"),
        ("model.path=???", "a folder with config"),
    ],
)
def test_a_wrong_argument_is_refused_with_key_value_and_remedy(config_dir: Path, argument: str, said: str) -> None:
    error = refusal(config_dir, argument)
    assert said in str(error)
    assert error.remedy
    assert error.exit_code == 2
    key, _, value = argument.partition("=")
    assert key in error.message or value in error.message


@pytest.mark.parametrize(
    ("percent", "said"),
    [("60,50,0,0,0,0", "weights"), ("0,0,101,0,0,0", "at most 100"), ("-1,0,0,0,0,0", "at least 0"), ("1,2,3", "3")],
)
def test_percentages_that_do_not_fit_are_refused(config_dir: Path, percent: str, said: str) -> None:
    error = refusal(config_dir, "offload.policy=manual", f"offload.percent=[{percent}]")
    assert "offload.percent" in str(error)
    assert said in str(error)


def test_template_and_template_file_together_are_refused(config_dir: Path) -> None:
    error = refusal(config_dir, "prompt.template=x", "prompt.template_file=y.j2")
    assert "prompt.template_file='y.j2'" in str(error)


def test_a_template_file_takes_the_place_of_the_jobs_template(config_dir: Path) -> None:
    config = load(config_dir, "prompt.template_file=y.j2")
    assert config.prompt.template_file == "y.j2"
    assert config.prompt.template != "Say {{ text }}"


def test_a_ready_made_job_on_other_data_forgets_the_columns_of_its_sample() -> None:
    config = load_config(["job=extract", "model=opt-125m", "dataset.path=mine.jsonl", "job.gold.total=Total"])
    assert config.dataset.id_column == ""
    assert config.output.columns == []
    assert config.job.gold == {"total": "Total"}
    assert load_config(["job=extract", "model=opt-125m"]).dataset.id_column == "id"
    kept = load_config(["job=extract", "model=opt-125m", "dataset.path=mine.jsonl", "output.columns=[total]"])
    assert kept.output.columns == ["total"]


def test_a_job_of_the_users_own_keeps_its_columns_on_other_data(config_dir: Path) -> None:
    (config_dir / "job" / "carrying.yaml").write_text(
        "# @package _global_\njob: {name: carrying, kind: generate}\noutput: {columns: [title]}\n"
    )
    config = load_config(["job=carrying", "model=mine", "dataset.path=other.csv"], config_dir)
    assert config.output.columns == ["title"]


@pytest.mark.parametrize("job", group_options("job", [bundled("conf")]))
def test_every_ready_made_job_composes_and_passes_the_checks(job: str) -> None:
    assert load_config([f"job={job}", "model=opt-125m"]).job.name == job


@pytest.mark.parametrize("model", group_options("model", [bundled("conf")]))
def test_every_model_file_has_the_name_of_its_file_and_only_known_keys(model: str) -> None:
    known = OmegaConf.structured(ModelConfig)
    merged = OmegaConf.merge(known, OmegaConf.load(bundled("conf") / "model" / f"{model}.yaml"))
    if model != "hf":
        assert merged.name == model
        assert merged.path


def test_a_wrong_key_in_a_config_file_is_named(config_dir: Path) -> None:
    with pytest.raises(ConfigError, match="nmae"):
        load_config(["job=wrong", "model=mine"], config_dir)


def test_a_missing_path_of_a_model_is_asked_for(config_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path is not set"):
        load_config(["job=mine", "model=hf"], config_dir)


def test_home_is_filled_in(config_dir: Path) -> None:
    assert load(config_dir, "dataset.path=~/rows.jsonl").dataset.path == str(Path.home() / "rows.jsonl")


@pytest.mark.parametrize("group", ["dataset", "prompt", "generation", "offload", "output", "cluster"])
def test_every_option_of_a_group_composes(config_dir: Path, group: str) -> None:
    for name in group_options(group, [bundled("conf")]):
        load(config_dir, f"{group}={name}")


def test_the_defaults_of_the_schema_pass_the_checks_but_for_what_must_be_given() -> None:
    config = Config()
    config.model.name, config.model.path, config.dataset.path = "m", "m", "rows.jsonl"
    check(config)


def test_every_option_is_documented_in_one_line() -> None:
    for key in keys():
        assert key.rules["doc"]
        assert "\n" not in key.rules["doc"]


def test_the_saved_configuration_holds_every_value(config_dir: Path, tmp_path: Path) -> None:
    config = load(config_dir, "prompt.template=${{ x }}")
    save_config(config, ["prompt.template=${{ x }}"], tmp_path)
    assert yaml.safe_load((tmp_path / ".hydra" / "config.yaml").read_text()) == dataclasses.asdict(config)
    assert yaml.safe_load((tmp_path / ".hydra" / "overrides.yaml").read_text()) == ["prompt.template=${{ x }}"]
    assert "${{ x }}" in as_yaml(config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3GiB", 3 * 2**30), ("512 MiB", 512 * 2**20), ("1.5GB", 1_500_000_000), ("4096", 4096), ("2k", 2000)],
)
def test_sizes_are_read_in_both_systems(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected
