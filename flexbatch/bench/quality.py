"""What fewer bits cost: perplexity, and how often the likeliest next token stays the same, against full precision.

Texts are cut into windows of equal length that start with the tokenizer's first token. Every position but the first of
every window counts, in one call of the engine, so that what is measured is what a job computes.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from flexbatch.config import Config
from flexbatch.engine.engine import Engine
from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.model import build
from flexbatch.engine.opening import Checkpoint, EngineOptions, Limits, open_engine
from flexbatch.engine.packed_sources import GROUP_SIZE
from flexbatch.errors import ConfigError
from flexbatch.memory.direct_io import PAGE, AlignedBuffer, BufferedReader
from flexbatch.memory.quantization import quantizable
from flexbatch.memory.safetensors_header import TensorEntry
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.plan.policy import Policy
from flexbatch.records import Request, Sampling
from flexbatch.stages.model import Model, find_model

FULL = "full precision"
REFERENCE = "4-bit weights, float32 scales (reference)"
FORMS: Mapping[str, Policy] = {
    FULL: Policy(),
    "int8 compute (W8A8)": Policy(compute="int8"),
    "8-bit weights": Policy(weight_bits=8),
    "4-bit weights": Policy(weight_bits=4),
    REFERENCE: Policy(),
    "8-bit KV": Policy(kv_bits=8),
    "4-bit KV (keys in 8)": Policy(kv_bits=4),
    "int8 compute, 8-bit KV": Policy(compute="int8", kv_bits=8),
    "4-bit weights, 4-bit KV (keys in 8)": Policy(weight_bits=4, kv_bits=4),
}
OWN_TEXT = "its own text"
LARGEST_REFERENCE = 2 << 30
MARKED = re.compile(r"(<!-- quality:begin -->\n).*?(<!-- quality:end -->)", re.DOTALL)

Windows = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Quality:
    """One way of computing on one text. `perplexity_change` is relative; `agreement` the share of positions at which
    the likeliest next token is that of full precision."""

    form: str
    text: str
    tokens: int
    perplexity: float
    perplexity_change: float
    agreement: float


def measure_quality(config: Config, console: Console, forms: Mapping[str, Policy] = FORMS) -> list[Quality]:
    """Every form on text that the model writes itself (sampled at temperature 1) and on `bench.text`, if given."""
    model = find_model(config)
    folder = Path(config.model.cache_dir).expanduser()
    checkpoint = model.checkpoint(folder)
    with tempfile.TemporaryDirectory(prefix="flexbatch-quality-") as scratch:
        bench = Bench(config, model, folder, Path(scratch))
        texts = {OWN_TEXT: bench.own_windows(checkpoint)}
        if config.bench.text:
            texts[Path(config.bench.text).name] = bench.windows_of(Path(config.bench.text))
        measured: list[Quality] = []
        before: dict[str, tuple[float, torch.Tensor]] = {}
        for form, policy in forms.items():
            source = checkpoint
            if form == REFERENCE:
                if sum(entry.nbytes for entry in checkpoint.entries.values()) > LARGEST_REFERENCE:
                    continue
                source = rounded(checkpoint, Path(scratch) / "rounded")
            with console.status(form):
                for name, (loss, likeliest) in bench.run(source, policy, texts).items():
                    full_loss, full_likeliest = before.setdefault(name, (loss, likeliest))
                    measured.append(
                        Quality(
                            form=form,
                            text=name,
                            tokens=likeliest.numel(),
                            perplexity=math.exp(loss),
                            perplexity_change=math.exp(loss - full_loss) - 1.0,
                            agreement=float((likeliest == full_likeliest).double().mean()),
                        )
                    )
    return measured


class Bench:
    """What all forms have in common."""

    def __init__(self, config: Config, model: Model, folder: Path, scratch: Path) -> None:
        self._config, self._model, self._folder, self._scratch = config, model, folder, scratch
        wanted = config.bench.prompt_tokens
        self._width = min(wanted, model.context_tokens) if model.context_tokens else wanted
        first = model.tokenizer.bos_token_id
        self._start: tuple[int, ...] = () if first is None else (first,)

    def own_windows(self, checkpoint: Checkpoint) -> Windows:
        """What the model itself says, one window for each seed."""
        start = self._start or (0,)
        length = self._width - len(start)
        requests = (
            Request(seed, start, Sampling(max_new_tokens=length, min_new_tokens=length, temperature=1.0, seed=seed))
            for seed in range(self._config.bench.rows)
        )
        engine = self._engine(checkpoint, Policy(slots=self._config.bench.rows))
        try:
            done = {c.index: c.token_ids for result in engine.run(requests) for c in result.completions}
        finally:
            engine.close()
        return [start + done[index] for index in sorted(done)]

    def windows_of(self, file: Path) -> Windows:
        """The text from its beginning, in windows one after the other."""
        try:
            text = file.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"bench.text={file} cannot be read: {error}", remedy="Name a plain text file.") from error
        own = self._width - len(self._start)
        ids = self._model.tokenizer(text[: 40 * own * self._config.bench.rows], add_special_tokens=False)["input_ids"]
        pieces = (tuple(ids[at : at + own]) for at in range(0, len(ids) - own + 1, own))
        windows = [self._start + piece for piece in pieces][: self._config.bench.rows]
        if not windows:
            raise ConfigError(
                f"bench.text={file} has {len(ids)} tokens, less than a window of bench.prompt_tokens={own}.",
                remedy="Name a longer text, or set bench.prompt_tokens lower.",
            )
        return windows

    def run(
        self, checkpoint: Checkpoint, policy: Policy, texts: Mapping[str, Windows]
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Mean negative log-likelihood and the likeliest next tokens, of each text."""
        engine = self._engine(checkpoint, policy)
        try:
            return {name: _scored(engine, windows) for name, windows in texts.items()}
        finally:
            engine.close()

    def _engine(self, checkpoint: Checkpoint, policy: Policy) -> Engine:
        model = self._model
        return open_engine(
            checkpoint,
            replace(policy, prefix_sharing=False),
            Limits(disk_folder=self._scratch),
            Vocabulary(model.tokenizer, model.end_tokens),
            EngineOptions(
                span=self._width + 1,
                dtype=model.dtype,
                device=model.device,
                reader="buffered",
                packed_folder=self._folder / "packed",
            ),
        )


def _scored(engine: Engine, windows: Windows) -> tuple[float, torch.Tensor]:
    loss, likeliest = 0.0, []
    for some in _batches(windows):
        logits = engine.logits(some)[:, :-1]
        targets = torch.tensor(some, device=logits.device)[:, 1:]
        chosen = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
        loss -= float(chosen.double().sum())
        likeliest.append(logits.argmax(-1).cpu())
    positions = torch.cat([each.flatten() for each in likeliest])
    return loss / positions.numel(), positions


def _batches(windows: Windows, tokens: int = 2048) -> Iterator[Windows]:
    step = max(1, tokens // len(windows[0]))
    for first in range(0, len(windows), step):
        yield windows[first : first + step]


def rounded(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the matrices that `weight_bits=4` packs rounded to nearest in asymmetric groups whose scale
    and minimum are float32: what packed weights are measured against."""
    stepped = build(checkpoint.config, torch.float32)
    packed = {
        f"{stop.name}.{name}"
        for stop in stepped.stops
        if stop.layer is not None
        for name, value in stop.module.named_parameters()
        if quantizable(value.shape, GROUP_SIZE)
    }
    folder.mkdir()
    tensors = {name: _read(entry) for name, entry in checkpoint.entries.items()}
    save_file(
        {name: _round(tensor) if name in packed else tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    return replace(checkpoint, entries=SafetensorsIndex.of_file(folder / "model.safetensors").entries)


def _round(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.float().view(*weight.shape[:-1], -1, GROUP_SIZE)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    return (((groups - low) / step).round() * step + low).view(weight.shape).to(weight.dtype)


def _read(entry: TensorEntry) -> torch.Tensor:
    buffer = AlignedBuffer(-(-entry.nbytes // PAGE) * PAGE + 2 * PAGE)
    reader = BufferedReader()
    try:
        start = reader.read(entry.file, entry.offset, entry.nbytes, buffer, 0)
    finally:
        reader.close()
    return buffer.view(start, entry.torch_dtype, entry.shape).clone()


def print_quality(console: Console, title: str, measured: Sequence[Quality]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("form", "text") else "right")
    for each in measured:
        table.add_row(*_cells(each))
    console.print(table)


COLUMNS = ("form", "text", "tokens", "perplexity", "change", "top-1 agreement")


def _cells(each: Quality) -> list[str]:
    full = each.form == FULL
    return [
        each.form,
        each.text,
        f"{each.tokens:,}",
        f"{each.perplexity:.4f}",
        "" if full else f"{each.perplexity_change:+.2%}",
        "" if full else f"{each.agreement:.2%}",
    ]


def write_quality(document: Path, measured: Sequence[Quality]) -> None:
    """Puts the table between the document's `<!-- quality:begin -->` and `<!-- quality:end -->`."""
    rows = [list(COLUMNS), ["---", "---", "---:", "---:", "---:", "---:"], *map(_cells, measured)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    try:
        text, found = MARKED.subn(rf"\g<1>\n{table}\n\n\g<2>", document.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"bench.document={document} cannot be read: {error}", remedy="Name a Markdown file."
        ) from error
    if not found:
        raise ConfigError(
            f"bench.document={document} has no place for the table.",
            remedy="Put a line <!-- quality:begin --> and a line <!-- quality:end --> where it belongs.",
        )
    document.write_text(text, encoding="utf-8")


def as_records(measured: Sequence[Quality]) -> list[dict[str, Any]]:
    """For the last line of JSON."""
    return [
        {
            "form": each.form,
            "text": each.text,
            "tokens": each.tokens,
            "perplexity": each.perplexity,
            "perplexity_change": each.perplexity_change,
            "top_1_agreement": each.agreement,
        }
        for each in measured
    ]
