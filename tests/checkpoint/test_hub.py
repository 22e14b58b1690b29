"""Models by hub id: only the needed files, once, resumed, and errors that say what to do instead."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexbatch.checkpoint import hub as hub_module
from flexbatch.checkpoint.hub import hub_folder, needed_files
from flexbatch.errors import CapacityError, ModelError
from tests.checkpoint.hub_server import Hub, hub_server
from tests.checkpoint.layouts import small_opt

REPOSITORY = "someone/small-opt"
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    small_opt().save_pretrained(folder, max_shard_size="20KB")
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md", "training_args.bin"):
        (folder / name).write_bytes(b"never fetched")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with hub_server({REPOSITORY: published}) as server:
        yield server


def test_only_the_needed_files_are_fetched_and_only_once(hub: Hub, tmp_path: Path) -> None:
    folder = hub_folder(REPOSITORY, "main", tmp_path, endpoint=hub.endpoint)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    assert not names & {"pytorch_model.bin", "tf_model.h5", "README.md", "training_args.bin"}
    fetched = len(hub.served)
    assert hub_folder(REPOSITORY, "main", tmp_path, endpoint=hub.endpoint) == folder
    assert len(hub.served) == fetched


def test_without_weights_only_config_and_tokenizer_are_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = hub_folder(REPOSITORY, "main", tmp_path, weights=False, endpoint=hub.endpoint)
    assert {file.name for file in folder.iterdir()} == {"config.json", "generation_config.json", "tokenizer.json"}
    again = hub_folder(REPOSITORY, "main", tmp_path, endpoint=hub.endpoint)
    assert (again / "model.safetensors.index.json").exists()


def test_bin_files_are_taken_where_there_are_no_safetensors() -> None:
    names = [
        "config.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "flax_model.msgpack",
    ]
    assert needed_files([*names, "pytorch_model.bin.index.json"], "x") == [*names[:3], "pytorch_model.bin.index.json"]


def test_a_repository_without_such_weights_says_what_it_has() -> None:
    with pytest.raises(ModelError, match=r"it has model-q4\.gguf"):
        needed_files(["config.json", "model-q4.gguf"], "someone/quantised")


def test_a_download_that_broke_off_goes_on_where_it_stopped(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # The client writes whole chunks only.
    hub.break_after = 9000
    for _ in range(40):
        try:
            folder = hub_folder(REPOSITORY, "main", tmp_path, endpoint=hub.endpoint)
            break
        except ModelError as error:
            assert "goes on where it stopped" in str(error)  # noqa: PT017
    assert any(first > 0 for _, first in hub.served)
    for file in hub.folders[REPOSITORY].glob("*.safetensors"):
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_offline_uses_what_was_fetched_before(hub: Hub, tmp_path: Path) -> None:
    folder = hub_folder(REPOSITORY, "main", tmp_path, endpoint=hub.endpoint)
    asked = len(hub.served)
    assert hub_folder(REPOSITORY, "main", tmp_path, offline=True, endpoint=hub.endpoint) == folder
    assert len(hub.served) == asked


def test_offline_without_an_earlier_download_names_the_path_to_use(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"offline mode is on.*\n.*model\.path=FOLDER"):
        hub_folder(REPOSITORY, "main", tmp_path, offline=True)


def test_an_unreachable_hub_names_the_path_to_use_but_serves_what_is_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"could not be asked.*\n.*model\.path=FOLDER"):
        hub_folder(REPOSITORY, "main", tmp_path, endpoint=UNREACHABLE)
    folder = hub_folder(REPOSITORY, "main", tmp_path, endpoint=hub.endpoint)
    assert hub_folder(REPOSITORY, "main", tmp_path, endpoint=UNREACHABLE) == folder


def test_a_revision_that_does_not_exist_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no revision 'v9'.*\n.*model\.revision"):
        hub_folder(REPOSITORY, "v9", tmp_path, endpoint=hub.endpoint)


def test_a_gated_model_says_how_to_get_in(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(REPOSITORY)
    with pytest.raises(ModelError, match=r"gated.*\n.*hf auth login"):
        hub_folder(REPOSITORY, "main", tmp_path, endpoint=hub.endpoint)


def test_a_model_that_does_not_exist_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder here nor a model on the hub"):
        hub_folder("someone/nothing", "main", tmp_path, endpoint=hub.endpoint)


def test_too_little_space_is_said_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(CapacityError, match="GB are free"):
        hub_folder(REPOSITORY, "main", tmp_path, endpoint=hub.endpoint)
    assert hub.served == []
