"""Every option that a user can set: one dataclass per config group, one line of documentation each.

The dataclasses are the Hydra schema (a frozen dataclass fails to compose in Hydra 1.3, and `Literal` is rejected, so
both are plain here). `composition.load_config` fills them, `validation.check` holds them to the rules that stand here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from flexbatch.errors import ConfigError


def option(default: Any, doc: str, **rules: Any) -> Any:
    """A config field with its one line of documentation; mutable defaults are copied for each instance.

    Rules that `validation.check` holds it to: `one_of` (values), `least` and `most` (numbers), `bytes` (a size such as
    3GiB, or auto), `count` (a whole number from 1, or auto), `not_empty`. In a `path` a leading `~` is the home folder.
    With `verbatim` the command line's text is taken as it stands: no `${...}` is looked for in it (templates, regular
    expressions).
    """
    metadata = {"doc": doc, **rules}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_UNITS = {unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str, *, key: str = "") -> int:
    """`3GiB`, `512 MiB`, `1.5GB`, `4096` to bytes. ConfigError names `key`."""
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise ConfigError(
            f"{key or 'a size'}: {text!r} is not a number of bytes.",
            remedy="Write a size such as 3GiB, 512MiB, 1.5GB or a plain number of bytes.",
        )
    number, prefix, binary = match.groups()
    unit = _UNITS[prefix.lower()]
    if binary and prefix:
        unit = 1024 ** ("kmgt".index(prefix.lower()) + 1)
    return int(float(number) * unit)


@dataclass
class JobConfig:
    name: str = option("generate", "name of the job; part of the default output folder")
    kind: str = option(
        "generate",
        "generate, helm_eval, extract or summarize: how prompts are made and scored",
        one_of=("generate", "helm_eval", "extract", "summarize"),
    )
    scenarios: dict[str, Any] = option({}, "helm_eval: scenarios by name, each with its adapter, metrics and data")
    trials: int = option(1, "helm_eval: how many draws of the few-shot examples", least=1)
    schema: Any = option(None, "extract: a JSON Schema (mapping or file), or a list of field names")
    regex: str = option(
        "", "extract: a regular expression that the completion must match, instead of a schema", verbatim=True
    )
    choices: list[str] = option(
        [], "extract: the strings from which the completion must be one, instead of a schema", verbatim=True
    )
    constrain: bool = option(True, "extract: constrain decoding so that the output always parses and validates")
    gold: dict[str, str] = option({}, "extract: field name to the source column that holds its true value")
    reference: str = option("", "summarize: the source column that holds the reference summary")


@dataclass
class ModelConfig:
    name: str = option(MISSING, "name of the model; part of the default output folder")
    path: str = option(MISSING, "a folder with config, safetensors and tokenizer, or a hub id", path=True)
    revision: str = option("main", "hub revision: a branch, tag or commit")
    tokenizer: str = option("", "folder or hub id of the tokenizer, where it is not the model's own", path=True)
    dtype: str = option(
        "auto",
        "auto (as stored), bfloat16, float16 or float32: the type that the maths runs in",
        one_of=("auto", "bfloat16", "float16", "float32"),
    )
    weights: str = option(
        "checkpoint", "checkpoint, or dummy: random weights at the true shapes", one_of=("checkpoint", "dummy")
    )
    allow_dummy_scores: bool = option(False, "score what dummy weights say, to try a scored job; it means nothing")
    config: dict[str, Any] = option(
        {}, "a Transformers config in place (with model_type), for dummy weights without a folder"
    )
    cache_dir: str = option(
        "~/.cache/flexbatch", "where hub files, packed weights and dummy layers are kept", path=True
    )


@dataclass
class DatasetConfig:
    name: str = option("", "name of the dataset, for the record only")
    path: Any = option("", "file, folder, glob, list of these, fsspec URL, or hub id", path=True)
    format: str = option(
        "auto",
        "auto, arrow, parquet, jsonl, csv, saved (a `datasets` folder) or hub",
        one_of=("auto", "arrow", "parquet", "jsonl", "csv", "saved", "hub"),
    )
    split: str = option(
        "", "split of a hub dataset or saved DatasetDict; for files, rows whose `split` column has this value"
    )
    id_column: str = option("", "column that identifies rows; empty: shard and row number")
    limit: int = option(0, "run only the first so many rows; 0 runs all", least=0)


@dataclass
class PromptConfig:
    template: str = option(
        "{{ text }}", "Jinja template of the prompt (sandboxed); the row's columns are its variables", verbatim=True
    )
    template_file: str = option("", "file with the template, instead of `template`", path=True)
    max_tokens: int = option(512, "longest prompt, in tokens", least=1)
    padding: str = option(
        "bucket", "bucket (a micro-batch is as long as its longest row) or max_length", one_of=("bucket", "max_length")
    )
    truncation: str = option(
        "left", "left, right, or error: what happens to a prompt over max_tokens", one_of=("left", "right", "error")
    )
    shots: list[Any] = option([], "few-shot examples put before each prompt: a list of rows, or a dataset path")
    shot_count: int = option(0, "how many of the shots to use; 0 uses all that are given", least=0)
    shot_template: str = option(
        "", "Jinja template of one example; empty: `template` with the answer appended", verbatim=True
    )
    shot_separator: str = option("\n\n", "text between examples and before the prompt", verbatim=True)
    chat_template: bool = option(False, "wrap the prompt with the tokenizer's chat template")
    system: str = option("", "system message for the chat template", verbatim=True)
    special_tokens: bool = option(True, "let the tokenizer add its special tokens (such as OPT's leading </s>)")
    window: int = option(1024, "rows that are sorted by length together; part of the job's fixed order", least=1)


@dataclass
class GenerationConfig:
    max_new_tokens: int = option(32, "most tokens generated for a prompt", least=1)
    min_new_tokens: int = option(0, "fewest tokens generated before the end-of-sequence token is allowed", least=0)
    temperature: float = option(0.0, "0 is greedy; otherwise logits are divided by it and sampled", least=0.0)
    top_p: float = option(1.0, "sample from the smallest set of tokens with this probability mass", least=0.0, most=1.0)
    top_k: int = option(0, "sample from the k likeliest tokens; 0 uses all", least=0)
    seed: int = option(0, "seed; each row derives its own, so that a row's result does not depend on its batch")
    stop: list[str] = option([], "strings that end a completion (not included in it)", verbatim=True)
    logprobs: bool = option(False, "record the log-probability of every completion token")
    num_completions: int = option(1, "completions for each row", least=1)


@dataclass
class OffloadConfig:
    policy: str = option("auto", "auto (the plan chooses) or manual (`percent` says)", one_of=("auto", "manual"))
    percent: list[float] = option(
        [], "weights on device, on host, KV on device, on host, hidden states on device, on host", least=0.0, most=100.0
    )
    device: str = option("auto", "auto, cpu, cuda:0 or mps")
    device_memory: str = option("auto", "limit on device memory, such as 3GiB", bytes=True)
    host_memory: str = option("auto", "limit on main memory, such as 16GiB", bytes=True)
    disk_dir: str = option(
        "", "folder for KV cache and hidden states on disk; empty: inside the output folder", path=True
    )
    weight_bits: int = option(16, "16 (as stored), 8 or 4: bits of a weight", one_of=(16, 8, 4))
    kv_bits: int = option(
        16, "16 (the compute type), 8, or 4 (values; keys then have 8): bits of a cached number", one_of=(16, 8, 4)
    )
    compute: str = option("auto", "auto (the model's dtype), or int8: W8A8 on the CPU", one_of=("auto", "int8"))
    prefix_sharing: bool = option(True, "compute and keep the KV of shared prompt prefixes once")
    slots: Any = option("auto", "rows in flight; auto: of the job's longest rows, and more of shorter ones", count=True)
    prefill_tokens: Any = option("auto", "prompt tokens prefilled per pass", count=True)
    lookup: bool = option(
        True,
        "where passes wait for weights, guess what rows go on with from what was said; never changes the answer in "
        "float32",
    )
    prefetch_bytes: str = option("auto", "budget for weights read ahead of use, such as 512MiB", bytes=True)
    reader: str = option(
        "auto",
        "auto (measured at start-up), direct or buffered: how weights are read from disk",
        one_of=("auto", "direct", "buffered"),
    )
    blocked_file: str = option(
        "auto",
        "a copy of streamed bfloat16 weights in the order in which the processor multiplies them, in model.cache_dir: "
        "auto (where the job gains more by it than making it takes), always or never",
        one_of=("auto", "always", "never"),
    )
    compressed_file: str = option(
        "auto",
        "a copy of streamed bfloat16 weights that takes some 0.7 of their bytes and loses nothing, in model.cache_dir: "
        "auto (where the job gains more by it than making it takes), always or never; on the CPU, where weights stream",
        one_of=("auto", "always", "never"),
    )
    compressed_cache: str = option(
        "auto",
        "keep the KV cache in some 0.78 of its bytes without loss, where it is bfloat16 on the CPU: auto (where the "
        "plan is faster by it), always or never",
        one_of=("auto", "always", "never"),
    )
    trace: str = option("", "write a Chrome/Perfetto trace of the run to this file", path=True)


@dataclass
class HardwareConfig:
    name: str = option("auto", "auto measures this machine; other hardware files are for `plan`")
    profile: dict[str, Any] = option({}, "the figures of a machine, in bytes, seconds and FLOPs")


@dataclass
class OutputConfig:
    dir: str = option("outputs/${job.name}/${model.name}", "the run's folder", not_empty=True, path=True)
    columns: list[str] = option([], "source columns to carry over into the output")
    part_rows: int = option(256, "rows of one Parquet part; part of the job's fixed order", least=1)
    journal_seconds: float = option(20.0, "at most this long between two saves of the tokens in flight", least=0.0)


@dataclass
class ClusterConfig:
    name: str = option("local", "local: one process on one machine", one_of=("local",))


@dataclass
class BenchConfig:
    workload: str = option(
        "random",
        "random (no shared tokens), fewshot (shared_tokens in common), mixed (real lengths), scaling (row_counts), or "
        "quality (what fewer bits cost)",
        one_of=("random", "fewshot", "mixed", "scaling", "quality"),
    )
    rows: int = option(64, "bench: prompts", least=1)
    prompt_tokens: int = option(512, "bench: tokens of a prompt (of the longest one for mixed)", least=2)
    new_tokens: int = option(32, "bench: tokens that every engine generates for every prompt", least=1)
    shared_tokens: int = option(400, "bench: leading tokens that all prompts of fewshot share", least=0)
    memory: str = option("2.5GiB", "bench: memory limit of every engine's process, page cache included", bytes=True)
    peers: list[str] = option(
        ["accelerate", "transformers", "ctranslate2", "deepspeed"],
        "bench: the engines that flexbatch is compared with",
        one_of=("accelerate", "transformers", "ctranslate2", "deepspeed"),
    )
    batches: list[int] = option([8, 16, 24, 32], "bench: batch sizes of a peer to try, until they get slower", least=1)
    peer_rows: int = option(0, "bench: rows that a peer runs at its best batch size; 0: all", least=0)
    peer_dtype: str = option(
        "auto",
        "bench: the type that peers compute in; auto: float32 where a CPU is slow in the model's, else that",
        one_of=("auto", "bfloat16", "float16", "float32"),
    )
    lookup: bool = option(
        False, "bench: what offload.lookup is for flexbatch's runs; random weights repeat themselves, so it is left off"
    )
    repeats: int = option(1, "bench: runs of every engine, in turn; ratios are medians", least=1)
    policies: int = option(
        0, "bench: hand-made policies to run beside the automatic one, in place of peers; 0: none", least=0
    )
    row_counts: list[int] = option([10, 100, 1000, 10000], "bench: rows of the runs of scaling", least=1)
    timeout: float = option(3600.0, "bench: seconds after which an engine's run is given up", least=1.0)
    text: str = option("", "quality: a plain text file to score, beside what the model writes itself", path=True)
    document: str = option("", "quality: a Markdown file whose marked table is written anew", path=True)


@dataclass
class ChatConfig:
    template: str = option(
        "auto",
        "chat: auto, tokenizer (its own chat template), or human (Human: and Assistant: before the turns, as for OPT)",
        one_of=("auto", "tokenizer", "human"),
    )
    context: Any = option("auto", "chat: most tokens of a conversation; auto: the model's, up to 4096", count=True)
    lookup: bool = option(True, "chat: guess what comes next from what was said; never changes the answer in float32")


@dataclass
class Config:
    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
