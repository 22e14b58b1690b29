"""Every file of conf/model has the published shapes: parameters counted by Transformers itself, to the unit."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexbatch.checkpoint.architecture import config_from_mapping, expected_tensors
from flexbatch.config import ModelConfig

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"

# Parameter counts as the hub (safetensors metadata, sizes in the index files) and the model cards give them; tied
# tensors once.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "codegen-350m-mono": 356_712_448,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-medium-4k": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-j-6b": 6_050_882_784,
    "falcon-7b": 6_921_720_704,
    "mpt-7b": 6_649_286_656,
}

# For these no count to the unit was at hand: it is computed here from the widths that the papers publish (OPT, table 1;
# Galactica, table 1; CodeGen, table 5), by each architecture's own arithmetic and not by Transformers.


def opt_parameters(hidden: int, layers: int, vocabulary: int = 50272) -> int:
    outside = (vocabulary + 2050 + 2) * hidden
    return outside + layers * (4 * (hidden + 1) * hidden + 2 * 4 * hidden * hidden + 5 * hidden + 4 * hidden)


def codegen_parameters(width: int, layers: int) -> int:
    outside = 51200 * width + 51200 * (width + 1) + 2 * width
    return outside + layers * (4 * width * width + 2 * width + 8 * width * width + 5 * width)


COMPUTED = {
    "opt-66b": opt_parameters(9216, 64),
    "opt-175b": opt_parameters(12288, 96),
    **{f"opt-iml-{kind}1.3b": opt_parameters(2048, 24) for kind in ("", "max-")},
    **{f"opt-iml-{kind}30b": opt_parameters(7168, 48) for kind in ("", "max-")},
    "galactica-125m": opt_parameters(768, 12, 50000),
    "galactica-1.3b": opt_parameters(2048, 24, 50000),
    "galactica-6.7b": opt_parameters(4096, 32, 50000),
    "galactica-30b": opt_parameters(7168, 48, 50000),
    "galactica-120b": opt_parameters(10240, 96, 50000),
    **{f"codegen-350m-{data}": codegen_parameters(1024, 20) for data in ("multi", "nl")},
    **{f"codegen-2b-{data}": codegen_parameters(2560, 32) for data in ("mono", "multi", "nl")},
    **{f"codegen-6b-{data}": codegen_parameters(4096, 33) for data in ("mono", "multi", "nl")},
    **{f"codegen-16b-{data}": codegen_parameters(6144, 34) for data in ("mono", "multi", "nl")},
    # Falcon: two norms, 8 groups of keys and values of 64; MPT: no biases, norms without shift.
    "falcon-40b": 65024 * 8192 + 2 * 8192 + 60 * (8192 * (8192 + 2 * 8 * 64) + 9 * 8192**2 + 4 * 8192),
    "mpt-30b": 50432 * 7168 + 7168 + 48 * (12 * 7168**2 + 2 * 7168),
}

COUNTS = PUBLISHED | COMPUTED
WITHOUT_CONFIG = {"hf", "opt-tiny"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def count_parameters(shapes: str) -> int:
    """Parameters of the config that `shapes` is the text of (equal ones are built once)."""
    fields = yaml.safe_load(shapes)
    model = expected_tensors(config_from_mapping(fields, "model.config")).model
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_model_file_is_checked() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} - WITHOUT_CONFIG == set(COUNTS)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_the_shapes_are_the_published_ones(name: str) -> None:
    fields = read(name)
    assert count_parameters(yaml.safe_dump(fields["config"])) == COUNTS[name]
    assert fields["name"] == name
    assert set(fields) <= {field.name for field in dataclasses.fields(ModelConfig)}


def test_opt_175b_is_the_shape_of_the_paper() -> None:
    config = read("opt-175b")["config"]
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]) == (96, 12288, 96)
    assert (config["ffn_dim"], config["vocab_size"], config["max_position_embeddings"]) == (49152, 50272, 2048)


def test_the_name_of_any_other_model_is_the_last_part_of_its_path() -> None:
    from flexbatch.composition import load_config

    for path in ("facebook/opt-125m", "/data/models/opt-125m/"):
        assert load_config(["model=hf", f"model.path={path}"]).model.name == "opt-125m"
