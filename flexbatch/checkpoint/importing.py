"""Bring a checkpoint in another published form into Hugging Face safetensors: streamed, resumable, hashed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from flexbatch.checkpoint.architecture import config_from_mapping, expected_tensors
from flexbatch.checkpoint.hub import TOKENIZER_FILES
from flexbatch.checkpoint.layouts import Source, open_source
from flexbatch.checkpoint.metaseq import derive_config, fit_vocabulary
from flexbatch.checkpoint.placing import place
from flexbatch.checkpoint.shard_writer import PlannedShard, file_sha256, plan_shards, write_error, write_shard
from flexbatch.checkpoint.stored import StoredTensor
from flexbatch.checkpoint.tokenizer import check_tokenizer, has_tokenizer
from flexbatch.errors import CapacityError, LockedError, ModelError, OutputError

logger = logging.getLogger(__name__)

MANIFEST = "import-manifest.json"
SHARD_BYTES = 4 * 1024**3
_SPARE_BYTES = 64 * 1024**2

Report = Callable[[str], None]


@dataclass
class _Manifest:
    """What an import has done so far: sha256 by file name; `identity` is that of source and plan."""

    file: Path
    identity: str
    source: str
    layout: str
    sha256: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def save(self) -> None:
        fields = {
            "format": 1,
            "source": self.source,
            "layout": self.layout,
            "identity": self.identity,
            "complete": self.complete,
            "sha256": self.sha256,
        }
        temporary = self.file.with_name(f".{self.file.name}.partial")
        temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.file)


def import_checkpoint(
    source: Path,
    target: Path,
    *,
    layout: str = "auto",
    config: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report = logger.info,
) -> Path:
    """Write the checkpoint `source` as safetensors shards with index, config and tokenizer into `target`.

    `layout` is auto, bin, numpy or metaseq. `config` are the fields of a Transformers config; without it the source's
    config.json is used, or (OPT only) the config is read off the shapes. `tokenizer` is a folder; without it the
    source's own files are taken, if it has any. Tensors keep their types. Peak memory is a few tensors. Run again
    after an interruption it keeps the shards whose hashes are right. Returns `target`.

    ModelError: unreadable, refused or unsupported source, tensors missing, extra or mis-shaped, foreign tokenizer.
    CapacityError: no space (checked before it starts). OutputError: `target` belongs to something else.
    """
    opened = open_source(source, layout, config)
    transformers_config = _config(opened, config)
    tensors = opened.tensors
    if opened.pads_vocabulary:
        tensors = fit_vocabulary(tensors, int(transformers_config.vocab_size))
    placed = list(place(tensors, expected_tensors(transformers_config), str(source)).values())
    tokenizer = tokenizer or (opened.folder if has_tokenizer(opened.folder) else None)
    if tokenizer is not None:
        check_tokenizer(tokenizer, int(transformers_config.get_text_config().vocab_size))
    shards = plan_shards(placed, shard_bytes)
    with _locked(target):
        manifest = _manifest(target, opened, shards)
        if not manifest.complete:
            _write_shards(target, shards, manifest, report)
            _write_companions(target, shards, manifest, opened, transformers_config, config is None, tokenizer)
    report(
        f"{target} holds {sum(tensor.nbytes for tensor in placed) / 1e9:.2f} GB in {len(placed)} tensors"
        + ("." if tokenizer is not None else "; no tokenizer was found: name one with model.tokenizer=.")
    )
    return target


def is_complete(folder: Path) -> bool:
    """Whether `folder` is the result of a finished import."""
    fields = _read_manifest(folder / MANIFEST)
    return fields is not None and bool(fields.get("complete"))


def verify_import(folder: Path) -> int:
    """Compare every file of an import with its hash in the manifest; how many there are. ModelError names a bad one."""
    fields = _read_manifest(folder / MANIFEST)
    if fields is None:
        raise ModelError(f"{folder} has no readable {MANIFEST}.", remedy="Give a folder that `import` made.")
    if not fields.get("complete"):
        raise ModelError(f"The import into {folder} was not finished.", remedy="Run the same import again.")
    for name, sha256 in fields["sha256"].items():
        if not (folder / name).exists() or file_sha256(folder / name) != sha256:
            raise ModelError(
                f"{folder / name} is missing or not as it was imported.",
                remedy="Delete the folder and import it again.",
            )
    return len(fields["sha256"])


def _config(opened: Source, fields: Mapping[str, Any] | None) -> PreTrainedConfig:
    if fields is not None:
        return config_from_mapping(fields, "the given config")
    if (opened.folder / "config.json").is_file():
        raw = json.loads((opened.folder / "config.json").read_text(encoding="utf-8"))
        return config_from_mapping(raw, str(opened.folder / "config.json"))
    if opened.layout == "bin":
        raise ModelError(
            f"{opened.folder} has no config.json.",
            remedy="Fetch it from where the weights come from, or name a config with --config.",
        )
    return derive_config(opened.tensors)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = (target / ".import-lock").open("w")
    except OSError as error:
        raise write_error(target, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LockedError(
                f"Another import into {target} is running.", remedy="Wait for it, or choose another target."
            ) from error
        yield
    (target / ".import-lock").unlink(missing_ok=True)


def _manifest(target: Path, opened: Source, shards: Sequence[PlannedShard]) -> _Manifest:
    """The manifest of this import: new, or the one of an earlier attempt at the same."""
    plan = [[shard.name, [_mark(tensor) for tensor in shard.tensors]] for shard in shards]
    marks = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in opened.files]
    identity = hashlib.sha256(json.dumps([marks, plan]).encode()).hexdigest()
    manifest = _Manifest(target / MANIFEST, identity, str(opened.folder.resolve()), opened.layout)
    earlier = _read_manifest(manifest.file)
    if earlier is None:
        others = [file.name for file in target.iterdir() if not file.name.startswith(".")]
        if others:
            raise OutputError(
                f"{target} is not empty ({', '.join(sorted(others)[:3])}) and no import of ours.",
                remedy="Choose another target folder, or empty this one.",
            )
    elif earlier.get("identity") != identity:
        raise OutputError(
            f"{target} holds an import of {earlier.get('source')}, or of files that have changed since.",
            remedy="Choose another target folder, or delete this one.",
        )
    else:
        manifest.sha256 = dict(earlier.get("sha256", {}))
        manifest.complete = bool(earlier.get("complete"))
    return manifest


def _mark(tensor: StoredTensor) -> list[object]:
    return [tensor.name, list(tensor.shape), str(tensor.dtype)]


def _read_manifest(file: Path) -> dict[str, Any] | None:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return fields if isinstance(fields, dict) else None


def _write_shards(target: Path, shards: Sequence[PlannedShard], manifest: _Manifest, report: Report) -> None:
    left = [shard for shard in shards if not _is_done(target, shard, manifest)]
    _check_space(target, sum(shard.nbytes for shard in left))
    manifest.save()
    for number, shard in enumerate(left, start=1 + len(shards) - len(left)):
        report(f"Writing {shard.name} ({number} of {len(shards)}, {shard.nbytes / 1e9:.2f} GB)")
        manifest.sha256[shard.name] = write_shard(target, shard)
        manifest.save()


def _is_done(target: Path, shard: PlannedShard, manifest: _Manifest) -> bool:
    known = manifest.sha256.get(shard.name)
    file = target / shard.name
    return known is not None and file.exists() and file_sha256(file) == known


def _check_space(target: Path, nbytes: int) -> None:
    free = shutil.disk_usage(target).free
    if nbytes and nbytes + _SPARE_BYTES > free:
        raise CapacityError(
            f"The import needs {nbytes / 1e9:.2f} GB in {target}; {free / 1e9:.2f} GB are free.",
            remedy="Free some space, or choose a target on another disk.",
        )


def _write_companions(
    target: Path,
    shards: Sequence[PlannedShard],
    manifest: _Manifest,
    opened: Source,
    config: PreTrainedConfig,
    use_own_config: bool,
    tokenizer: Path | None,
) -> None:
    """Index, config and tokenizer: written last, so that a folder without them is known to be unfinished."""
    written = []
    try:
        if len(shards) > 1:
            index = target / "model.safetensors.index.json"
            index.write_text(json.dumps(_index(shards), indent=1) + "\n", encoding="utf-8")
            written.append(index.name)
        for name in TOKENIZER_FILES:
            if tokenizer is not None and (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, target / name)
                written.append(name)
        if (opened.folder / "generation_config.json").is_file():
            shutil.copyfile(opened.folder / "generation_config.json", target / "generation_config.json")
            written.append("generation_config.json")
        if use_own_config and (opened.folder / "config.json").is_file():
            shutil.copyfile(opened.folder / "config.json", target / "config.json")
        else:
            config.save_pretrained(str(target))
        written.append("config.json")
    except OSError as error:
        raise write_error(target, error) from error
    manifest.sha256.update((name, file_sha256(target / name)) for name in written)
    manifest.complete = True
    manifest.save()


def _index(shards: Sequence[PlannedShard]) -> dict[str, Any]:
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
