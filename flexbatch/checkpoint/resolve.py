"""From `model.path` to a folder that can be streamed: a local folder, a hub model, a `.bin` folder imported once."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from flexbatch.checkpoint.architecture import config_from_mapping
from flexbatch.checkpoint.hub import BIN_FILES, hub_folder
from flexbatch.checkpoint.importing import MANIFEST, import_checkpoint, is_complete
from flexbatch.checkpoint.tokenizer import check_tokenizer, has_tokenizer
from flexbatch.config import ModelConfig
from flexbatch.errors import ModelError
from flexbatch.memory.safetensors_index import SafetensorsIndex

logger = logging.getLogger(__name__)

Report = Callable[[str], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelFolder:
    """A model found on this machine.

    `folder` holds config and weights (None: dummy weights of a config in place); `tokenizer` is the folder of its
    tokenizer (None: there is none here); `index` says where every tensor lies (None: dummy weights, which
    `dummy.dummy_index` makes in the type that the engine computes in).
    """

    name: str
    folder: Path | None
    config: PreTrainedConfig
    tokenizer: Path | None
    index: SafetensorsIndex | None

    def require_tokenizer(self) -> Path:
        """The tokenizer's folder; ModelError where there is none."""
        if self.tokenizer is None:
            raise ModelError(
                f"model {self.name} comes without a tokenizer here.",
                remedy="Name one with model.tokenizer=FOLDER-or-hub-id (all OPT models share one tokenizer).",
            )
        return self.tokenizer


def resolve_model(config: ModelConfig, *, offline: bool | None = None, report: Report = logger.info) -> ModelFolder:
    """Find (fetch, import) the model that `config` names. Reads no weights, but for a `.bin` folder's one import.

    ModelError: no folder and no hub model; no, broken or unsupported config; missing or corrupt shards; a tokenizer
    that does not fit. CapacityError: no space for what must be fetched.
    """
    if config.weights == "dummy":
        return _dummy_model(config, offline, report)
    folder = _find(config, offline, report, weights=True)
    transformers_config = read_config(folder)
    if not _has_safetensors(folder) and any(file for pattern in BIN_FILES for file in folder.glob(pattern)):
        folder = _imported(folder, Path(config.cache_dir).expanduser(), report)
    _check_finished_import(folder)
    index = SafetensorsIndex.open(folder)
    tokenizer = _tokenizer(config, folder, transformers_config, offline, report)
    return ModelFolder(config.name, folder, transformers_config, tokenizer, index)


def read_config(folder: Path) -> PreTrainedConfig:
    """The Transformers config in `folder`. ModelError if it is missing, not JSON, or of an unsupported architecture."""
    return config_from_mapping(read_config_fields(folder), str(folder / "config.json"))


def read_config_fields(folder: Path) -> dict[str, Any]:
    """The raw fields of `folder/config.json`."""
    file = folder / "config.json"
    if not file.is_file():
        others = sorted(path.name for path in folder.iterdir())[:5]
        raise ModelError(
            f"{folder} has no config.json" + (f" (it holds {', '.join(others)})." if others else " (it is empty)."),
            remedy="Give the folder of a Transformers model; other published forms are brought in with "
            "`python -m flexbatch import SOURCE TARGET`.",
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", remedy="Fetch this file again.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{file} is not a JSON object.", remedy="Fetch this file again.")
    return fields


def _dummy_model(config: ModelConfig, offline: bool | None, report: Report) -> ModelFolder:
    local = Path(config.path).expanduser()
    folder = local if (local / "config.json").is_file() else None
    if folder is None and not config.config:
        folder = _find(config, offline, report, weights=False)
    fields: Mapping[str, Any] = read_config_fields(folder) if folder else config.config
    where = str(folder / "config.json") if folder else "model.config"
    transformers_config = config_from_mapping(fields, where)
    tokenizer = _tokenizer(config, folder, transformers_config, offline, report)
    return ModelFolder(config.name, folder, transformers_config, tokenizer, None)


def _find(config: ModelConfig, offline: bool | None, report: Report, *, weights: bool) -> Path:
    return find_folder(
        config.path, config.revision, Path(config.cache_dir), weights=weights, offline=offline, report=report
    )


def find_folder(
    path: str,
    revision: str,
    cache_dir: Path,
    *,
    weights: bool,
    offline: bool | None = None,
    report: Report = logger.info,
) -> Path:
    """The folder of a local path or hub id. ModelError where there is neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(
            f"model.path={path} is a file.",
            remedy="Give the folder that holds config.json, the weights and the tokenizer.",
        )
    if not _HUB_ID.fullmatch(path):
        raise ModelError(
            f"model.path={path}: there is no such folder.",
            remedy=f"Give a folder with the model. Weights in another published form are brought there with "
            f"`python -m flexbatch import SOURCE {path}` (docs/models.md); model.weights=dummy needs none.",
        )
    return hub_folder(path, revision, cache_dir, weights=weights, offline=offline, report=report)


def _tokenizer(
    config: ModelConfig,
    folder: Path | None,
    transformers_config: PreTrainedConfig,
    offline: bool | None,
    report: Report,
) -> Path | None:
    found = _tokenizer_folder(config, folder, offline, report)
    if found is not None:
        check_tokenizer(found, int(transformers_config.get_text_config().vocab_size))
    return found


def _tokenizer_folder(config: ModelConfig, folder: Path | None, offline: bool | None, report: Report) -> Path | None:
    cache = Path(config.cache_dir)
    if config.tokenizer:
        named = find_folder(config.tokenizer, "main", cache, weights=False, offline=offline, report=report)
        if not has_tokenizer(named):
            raise ModelError(
                f"model.tokenizer={config.tokenizer}: {named} holds no tokenizer.",
                remedy="Give a folder or hub id with tokenizer.json, or vocab.json and merges.txt.",
            )
        return named
    if folder is not None:
        return folder if has_tokenizer(folder) else None
    try:
        fetched = find_folder(config.path, config.revision, cache, weights=False, offline=offline, report=report)
    except ModelError:
        return None  # Dummy weights need no hub; a job that must tokenize asks `require_tokenizer`.
    return fetched if has_tokenizer(fetched) else None


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists()


def _imported(folder: Path, cache_dir: Path, report: Report) -> Path:
    """The safetensors form of a `.bin` folder, made once and kept under `cache_dir/imported`."""
    shards = sorted({file for pattern in BIN_FILES for file in folder.glob(pattern)})
    marks = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in shards]
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), marks]).encode()).hexdigest()[:16]
    target = cache_dir / "imported" / f"{folder.resolve().name}-{digest}"
    if not is_complete(target):
        report(f"{folder} holds PyTorch .bin files; importing them once into {target}")
        import_checkpoint(folder, target, layout="bin", report=report)
    return target


def _check_finished_import(folder: Path) -> None:
    if (folder / MANIFEST).exists() and not is_complete(folder):
        raise ModelError(
            f"{folder} is an import that was not finished.",
            remedy="Run the same `python -m flexbatch import` command again: it goes on where it stopped.",
        )
