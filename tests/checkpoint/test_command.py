"""`python -m flexbatch import`: what the user types and reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.checkpoint.command import import_command
from flexbatch.errors import ConfigError, ModelError
from tests.checkpoint.layouts import metaseq_state, save_numpy_folder, small_opt
from tests.checkpoint.test_importing import assert_same_model
from tests.checkpoint.test_resolve import save_tokenizer


def test_import_and_verify_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_opt()
    save_numpy_folder(model, tmp_path / "opt-np")
    model.config.save_pretrained(tmp_path / "config")
    save_tokenizer(tmp_path / "tokenizer", 50)
    target = tmp_path / "target"
    arguments = [str(tmp_path / "opt-np"), str(target), "--config", str(tmp_path / "config")]
    assert import_command([*arguments, "--tokenizer", str(tmp_path / "tokenizer"), "--shard-size", "10kB"]) == 0
    assert f"model.path={target}" in capsys.readouterr().out
    assert_same_model(target, model)
    assert (target / "tokenizer.json").exists()
    assert import_command(["--verify", str(target)]) == 0
    assert "files are as they were imported" in capsys.readouterr().out


def test_a_config_can_be_named_by_its_entry_in_conf_model(tmp_path: Path) -> None:
    model = small_opt()
    (tmp_path / "source").mkdir()
    torch.save({"model": metaseq_state(model)}, tmp_path / "source" / "restored.pt")
    with pytest.raises(ModelError, match=r"tensors of OPTForCausalLM missing: model\.decoder\.layers\.3\."):
        import_command([str(tmp_path / "source"), str(tmp_path / "target"), "--config", "opt-125m"])


def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--config=.*config\.json cannot be read"):
        import_command([str(tmp_path), str(tmp_path / "target"), "--config", str(tmp_path / "config.json")])
