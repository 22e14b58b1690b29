"""A tokenizer beside its model: which files make one, and does it fit the vocabulary."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexbatch.errors import ModelError

# One of these is needed; the rest of a tokenizer's files are optional.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _VOCABULARIES)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """ModelError if the tokenizer in `folder` can give a token that a vocabulary of `vocab_size` has no row for."""
    text, token = _largest_token(folder)
    if token >= vocab_size:
        raise ModelError(
            f"The tokenizer in {folder} does not fit the model: its token {text!r} has id {token}, and the model's "
            f"vocabulary ends at {vocab_size - 1}.",
            remedy="Name the model's own tokenizer with model.tokenizer=FOLDER-or-hub-id.",
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. ModelError if its files cannot be read."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(folder, error) from error
    return tokenizer


def _largest_token(folder: Path) -> tuple[str, int]:
    file = folder / "tokenizer.json"
    if not file.exists():
        vocabulary = load_tokenizer(folder).get_vocab()
    else:
        try:
            vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        except Exception as error:  # The Rust library raises bare Exception.
            raise _unreadable(folder, error) from error
    return max(vocabulary.items(), key=lambda item: item[1], default=("", -1))


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"The tokenizer in {folder} cannot be read: {' '.join(str(error).split())[:300].rstrip('.')}.",
        remedy="Fetch its files again, or name another tokenizer with model.tokenizer=FOLDER-or-hub-id.",
    )
