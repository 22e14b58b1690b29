"""`model.path` to a model that can run, or a message that says what is wrong with it and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from flexbatch.checkpoint.importing import MANIFEST
from flexbatch.checkpoint.resolve import resolve_model
from flexbatch.checkpoint.tokenizer import load_tokenizer
from flexbatch.config import ModelConfig
from flexbatch.errors import ModelError
from tests.checkpoint.layouts import VOCABULARY, save_bin_shards, small_opt


def save_tokenizer(folder: Path, tokens: int, added: int = 0) -> None:
    tokenizer = Tokenizer(WordLevel({f"word{number}": number for number in range(tokens)}, unk_token="word0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0")
    fast.add_tokens([f"added{number}" for number in range(added)])
    fast.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_opt().save_pretrained(tmp_path / "small-opt")
    save_tokenizer(tmp_path / "small-opt", VOCABULARY)
    return tmp_path / "small-opt"


def model(path: Any, tmp_path: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(name="test", path=str(path), cache_dir=str(tmp_path / "cache"), **fields)


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_folder_with_safetensors_is_found_with_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    found = resolve_model(model(folder, tmp_path))
    assert found.folder == folder
    assert found.tokenizer == folder
    assert found.config.model_type == "opt"
    assert found.index is not None
    assert "model.decoder.layers.0.fc1.weight" in found.index.entries
    assert load_tokenizer(found.require_tokenizer())("word7").input_ids == [7]


def test_a_folder_without_config_says_what_it_holds(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json \(it holds .*\n.*flexbatch import"):
        resolve_model(model(folder, tmp_path))


def test_a_config_that_is_no_json_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        resolve_model(model(folder, tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, r"'lama' is unknown to the installed Transformers.*\n.*llama"),
        ({"model_type": "opt2", "auto_map": {"AutoModel": "code.Model"}}, r"code of its own.*never runs"),
        ({"model_type": "bert-generations"}, r"Nearest supported types: bert-generation"),
        ({"model_type": "t5"}, r"encoder-decoder"),
        ({"model_type": "clip"}, r"'clip' is no causal language model"),
        ({"model_type": None}, r"no model_type"),
        ({"hidden_size": "wide"}, r"cannot be used: .*hidden_size"),
    ],
)
def test_an_architecture_that_cannot_run_is_refused_before_any_weight_is_read(
    folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    change_config(folder, **fields)
    (folder / "model.safetensors").write_bytes(b"not to be read")
    with pytest.raises(ModelError, match=message):
        resolve_model(model(folder, tmp_path))


def test_a_truncated_safetensors_file_is_named(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        resolve_model(model(folder, tmp_path))


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_named(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder, VOCABULARY, added=3)
    with pytest.raises(
        ModelError, match=rf"'added2' has id {VOCABULARY + 2}.*ends at {VOCABULARY - 1}.*\n.*model\.tokenizer"
    ):
        resolve_model(model(folder, tmp_path))


def test_a_tokenizer_of_another_folder_can_be_named(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "other", 50)
    found = resolve_model(model(folder, tmp_path, tokenizer=str(tmp_path / "other")))
    assert found.tokenizer == tmp_path / "other"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        resolve_model(model(folder, tmp_path, tokenizer=str(tmp_path / "empty")))


def test_a_broken_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be read"):
        resolve_model(model(folder, tmp_path))


def test_a_missing_folder_is_told_about_import_and_dummy_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such folder.*\n.*flexbatch import SOURCE .*opt-175b"):
        resolve_model(model(tmp_path / "checkpoints" / "opt-175b", tmp_path))


def test_a_name_that_is_neither_folder_nor_cached_names_the_path_to_use(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"facebook/opt-125m.*\n.*model\.path=FOLDER"):
        resolve_model(model("facebook/opt-125m", tmp_path), offline=True)


def test_a_bin_folder_is_imported_once_on_first_use(tmp_path: Path) -> None:
    opt = small_opt()
    names = [name for name in opt.state_dict() if name != "lm_head.weight"]
    save_bin_shards(opt, tmp_path / "bin", [names[:9], names[9:]], index=True)
    save_tokenizer(tmp_path / "bin", VOCABULARY)
    lines: list[str] = []
    first = resolve_model(model(tmp_path / "bin", tmp_path), report=lines.append)
    assert first.index is not None
    assert any("importing" in line for line in lines)
    assert first.folder is not None
    assert (tmp_path / "cache") in first.folder.parents
    assert first.tokenizer == first.folder
    lines.clear()
    assert resolve_model(model(tmp_path / "bin", tmp_path), report=lines.append).folder == first.folder
    assert not lines


def test_an_import_that_was_not_finished_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"complete": False, "sha256": {}}))
    with pytest.raises(ModelError, match=r"not finished.*\n.*import"):
        resolve_model(model(folder, tmp_path))


def test_dummy_weights_need_neither_folder_nor_hub_but_a_tokenizer_to_run(tmp_path: Path) -> None:
    fields = small_opt().config.to_dict()
    found = resolve_model(model("facebook/nothing", tmp_path, weights="dummy", config=fields), offline=True)
    assert found.folder is None
    assert found.index is None
    assert found.config.hidden_size == 16
    with pytest.raises(ModelError, match=r"model\.tokenizer=FOLDER"):
        found.require_tokenizer()


def test_dummy_weights_take_the_shapes_of_a_folder_that_is_there(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    found = resolve_model(model(folder, tmp_path, weights="dummy"))
    assert found.config.vocab_size == VOCABULARY
    assert found.index is None
    assert found.tokenizer == folder


@pytest.mark.realdata
def test_the_real_opt_tokenizer_fits_every_opt(realdata: Path, tmp_path: Path) -> None:
    from flexbatch.composition import load_config

    overrides = ["model=opt-175b", "model.weights=dummy", f"model.tokenizer={realdata / 'opt-tokenizer'}"]
    config = load_config([*overrides, f"model.cache_dir={tmp_path}"]).model
    found = resolve_model(config, offline=True)
    assert found.tokenizer == realdata / "opt-tokenizer"
    assert found.config.num_hidden_layers == 96


@pytest.mark.realdata
def test_a_real_trained_model_is_found(realdata: Path, tmp_path: Path) -> None:
    found = resolve_model(model(realdata / "stories260k", tmp_path))
    assert found.index is not None
    assert found.tokenizer == realdata / "stories260k"
