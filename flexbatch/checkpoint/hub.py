"""Models on the Hugging Face hub: only the files that are needed, resumed downloads, offline mode, plain errors."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flexbatch.errors import CapacityError, ModelError

logger = logging.getLogger(__name__)

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")

# huggingface_hub raises its HTTP library's errors as they are, and that library is not the same in all its releases.
_HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    kind
    for kind in HfHubHTTPError.__mro__
    if kind.__module__.split(".")[0].startswith("httpx") and issubclass(kind, Exception)
)
_UNREACHABLE: tuple[type[Exception], ...] = (
    *_HTTP_ERRORS,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    HfHubHTTPError,
)
_NOT_CACHED: tuple[type[Exception], ...] = (*_UNREACHABLE, HFValidationError)

Report = Callable[[str], None]


def needed_files(names: Sequence[str], repository: str, *, weights: bool = True) -> list[str]:
    """Those of a repository's file names that flexbatch reads: safetensors where there are some, else `.bin`.

    ModelError if `weights` are wanted and there are none of either kind.
    """
    wanted = _matching(names, CONFIG_FILES) + _matching(names, TOKENIZER_FILES)
    if not weights:
        return wanted
    found = _matching(names, SAFETENSORS_FILES) or _matching(names, BIN_FILES)
    if not any(name.endswith((".safetensors", ".bin")) for name in found):
        others = [
            name for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".pth", ".safetensors"))
        ]
        raise ModelError(
            f"{repository} on the hub has no model*.safetensors and no pytorch_model*.bin"
            + (f"; it has {', '.join(others[:3])}." if others else "."),
            remedy="Choose a repository with Transformers weights (GGUF and adapter files cannot be read).",
        )
    return wanted + found


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def hub_folder(
    repository: str,
    revision: str,
    cache_dir: Path,
    *,
    weights: bool = True,
    offline: bool | None = None,
    endpoint: str | None = None,
    report: Report = logger.info,
) -> Path:
    """The folder of `repository` at `revision` on this machine; what is missing of it is downloaded first.

    With `weights=False` only config and tokenizer. Files are kept where HF_HOME or HF_HUB_CACHE says, else under
    `cache_dir/hub`. `offline` (default: HF_HUB_OFFLINE) uses only what is there already; so does an unreachable hub.
    ModelError: no such repository or revision, gated, unreachable and not cached. CapacityError: no space.
    """
    cache = hub_cache(cache_dir)
    if offline if offline is not None else constants.HF_HUB_OFFLINE:
        return _cached(repository, revision, cache, "offline mode is on")
    with _plain_errors(repository, revision):
        try:
            info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True, timeout=20)
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            raise
        except _UNREACHABLE as error:
            return _cached(repository, revision, cache, _one_line(error))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        files = needed_files(list(sizes), repository, weights=weights)
        missing = [name for name in files if not _in_cache(repository, name, cache, info.sha)]
        _check_space(repository, sum(sizes[name] for name in missing), cache)
        if missing:
            total = sum(sizes[name] for name in missing)
            report(f"Fetching {len(missing)} files of {repository} ({total / 1e9:.2f} GB) into {cache}")
        folder = snapshot_download(
            repository, revision=revision, cache_dir=cache, allow_patterns=files, endpoint=endpoint
        )
    return Path(folder)


def hub_cache(cache_dir: Path) -> Path:
    """The user's own hub cache if the environment names one, else a folder of ours."""
    if os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME"):
        return Path(constants.HF_HUB_CACHE)
    return cache_dir.expanduser() / "hub"


def _in_cache(repository: str, name: str, cache: Path, commit: str | None) -> bool:
    return isinstance(try_to_load_from_cache(repository, name, cache_dir=cache, revision=commit), str)


def _check_space(repository: str, nbytes: int, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if nbytes > free:
        raise CapacityError(
            f"{repository} needs {nbytes / 1e9:.1f} GB in {cache}; {free / 1e9:.1f} GB are free.",
            remedy="Free some space, or name another folder with model.cache_dir=.",
        )


def _cached(repository: str, revision: str, cache: Path, reason: str) -> Path:
    """What an earlier download left. Shards that are missing from it are found when the weights are indexed."""
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache,
            local_files_only=True,
            allow_patterns=["config.json"],
        )
    except _NOT_CACHED as error:
        raise ModelError(
            f"{repository} (revision {revision}) is neither a folder here nor in {cache}, "
            f"and the hub could not be asked: {reason}.",
            remedy="Give a folder with the model: model=hf model.path=FOLDER; or try again with a connection.",
        ) from error
    logger.info("Using %s as downloaded earlier (%s)", repository, reason)
    return Path(folder)


@contextmanager
def _plain_errors(repository: str, revision: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{repository} on the hub is gated: its owner wants terms accepted first.",
            remedy=f"Accept them at https://huggingface.co/{repository}, then log in with `hf auth login` "
            "(or set HF_TOKEN); or give a folder that holds the model: model.path=FOLDER.",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{repository} on the hub has no revision {revision!r}.",
            remedy="Correct model.revision= (a branch, tag or commit; the default is main).",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{repository!r} is neither a folder here nor a model on the hub (or it is private).",
            remedy="Correct model.path=, or log in with `hf auth login` if the model is private.",
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"{repository} on the hub lost a file while it was fetched: {_one_line(error)}.",
            remedy="Run the same command again.",
        ) from error
    except _UNREACHABLE as error:
        raise ModelError(
            f"The download of {repository} broke off: {_one_line(error)}.",
            remedy="Run the same command again: it goes on where it stopped. Or give a folder: model.path=FOLDER.",
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CapacityError(
                f"The disk is full while {repository} is fetched.",
                remedy="Free some space and run the same command again, or name another folder with model.cache_dir=.",
            ) from error
        raise ModelError(
            f"{repository} could not be fetched: {_one_line(error)}.",
            remedy="Run the same command again, or give a folder with the model: model.path=FOLDER.",
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
