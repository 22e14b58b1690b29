"""`python -m flexbatch import SOURCE TARGET`: published weights into safetensors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flexbatch.checkpoint.importing import SHARD_BYTES, import_checkpoint, verify_import
from flexbatch.checkpoint.layouts import LAYOUTS
from flexbatch.checkpoint.resolve import find_folder, read_config_fields
from flexbatch.checkpoint.tokenizer import has_tokenizer
from flexbatch.composition import bundled
from flexbatch.config import ModelConfig, parse_bytes
from flexbatch.errors import ConfigError, ModelError

_EXAMPLES = """examples:
  flexbatch import ./opt-6.7b-bin ./checkpoints/opt-6.7b
  flexbatch import ./opt-30b-np ./checkpoints/opt-30b --config opt-30b --tokenizer facebook/opt-125m
  flexbatch import ./175b/checkpoint_last ./checkpoints/opt-175b --config opt-175b --tokenizer facebook/opt-125m
  flexbatch import --verify ./checkpoints/opt-175b
"""


def import_command(arguments: list[str]) -> int:
    """Run `import` with the command line's `arguments` (without the verb). 0, or a FlexbatchError."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.verify:
        if options.target is not None:
            parser.error("--verify takes one folder")
        count = verify_import(Path(options.source).expanduser())
        print(f"{options.source}: {count} files are as they were imported.")
        return 0
    if options.target is None:
        parser.error("the following arguments are required: TARGET")
    cache_dir = Path(options.cache_dir)
    import_checkpoint(
        Path(options.source).expanduser(),
        Path(options.target).expanduser(),
        layout=options.format,
        config=_config_fields(options.config, cache_dir) if options.config else None,
        tokenizer=_tokenizer_folder(options.tokenizer, cache_dir) if options.tokenizer else None,
        shard_bytes=parse_bytes(options.shard_size, key="--shard-size"),
        report=lambda line: print(line, flush=True),
    )
    print(f"Run it with: model=hf model.path={options.target}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexbatch import",
        description="Bring published weights into Hugging Face safetensors, once. Streams tensor by tensor; "
        "run it again after an interruption and it goes on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder with the weights; for metaseq also one file, or the start of their names",
    )
    parser.add_argument("target", metavar="TARGET", nargs="?", help="folder to make")
    parser.add_argument(
        "--format",
        choices=LAYOUTS,
        default="auto",
        help="bin (pytorch_model*.bin), numpy (one file per tensor), metaseq",
    )
    parser.add_argument(
        "--config", default="", help="a model of conf/model (opt-175b), a folder or file with config.json, or a hub id"
    )
    parser.add_argument("--tokenizer", default="", help="folder or hub id of the tokenizer, where SOURCE has none")
    parser.add_argument(
        "--shard-size", default=f"{SHARD_BYTES // 1024**3}GiB", help="most bytes of one file (default: %(default)s)"
    )
    default_cache = str(ModelConfig.cache_dir)
    parser.add_argument("--cache-dir", default=default_cache, help="where hub files are kept (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare an imported folder (SOURCE) with its hashes")
    return parser


def _config_fields(name: str, cache_dir: Path) -> Mapping[str, Any]:
    """The fields of a Transformers config that the user names in one of four ways."""
    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return read_config_fields(path)
    group_file = bundled("conf") / "model" / f"{name}.yaml"
    if group_file.is_file():
        fields = _read_file(group_file).get("config")
        if isinstance(fields, dict) and fields:
            return fields
    return read_config_fields(find_folder(name, "main", cache_dir, weights=False))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config={path} cannot be read: {error}.", remedy="Give a config.json.") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--config={path} holds no mapping.", remedy="Give a config.json.")
    return fields


def _tokenizer_folder(name: str, cache_dir: Path) -> Path:
    folder = find_folder(name, "main", cache_dir, weights=False)
    if not has_tokenizer(folder):
        raise ModelError(
            f"--tokenizer={name}: {folder} holds no tokenizer.", remedy="Give one with tokenizer.json or vocab.json."
        )
    return folder
