"""The job's work: prompts in their fixed order, what is written for each, and what of all that changes results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from flexbatch.config import Config, JobConfig
from flexbatch.data.batcher import Placed, job_order, split_parts
from flexbatch.data.columns import ColumnType
from flexbatch.data.prompts import PromptBuilder
from flexbatch.data.reader import Source
from flexbatch.engine.engine import Constraint
from flexbatch.errors import ConfigError
from flexbatch.evaluation.evaluation import COLUMNS, Evaluation, build_evaluation
from flexbatch.evaluation.fitting import Limits
from flexbatch.evaluation.row_scores import Extraction, RowScorer, build_row_scorer
from flexbatch.overrides import keys
from flexbatch.records import Prompt
from flexbatch.stages.model import Model
from flexbatch.validation import refuse_unused

SCANNED_ROWS = 32768
"""Jobs up to this long are read once before they start, for the plan: it then knows the longest prompt."""
BUILD_ROWS = 256  # rows rendered and tokenized in one call

# Options that a job of scenarios does read, of the groups that its scenarios otherwise decide.
READ_BY_SCENARIOS = (
    "prompt.max_tokens", "prompt.special_tokens", "prompt.window", "prompt.padding", "generation.seed",
)  # fmt: skip
SET_BY_SCENARIOS = tuple(
    key.name
    for key in keys()
    if key.name.startswith(("dataset.", "prompt.", "generation.")) and key.name not in READ_BY_SCENARIOS
)


@dataclass(frozen=True, slots=True)
class Scan:
    """What the first prompts of a job look like, in its order; all of them if `complete`.

    `lengths` are tokens of prompts that can be run, `new` the most that each generates (1 where it is only scored: a
    row that ends at its prefill), `shared` how many of them belong to a prefix group (`groups` of them). `longest_own`
    is the longest prompt without its prefix.
    """

    lengths: tuple[int, ...]
    new: tuple[int, ...]
    shared: tuple[int, ...]
    groups: int
    longest_own: int
    complete: bool


@dataclass(frozen=True)
class Work:
    """What is to be run. `prompts()` streams it from the start, each time in the same order.

    `total` is the number of output rows, None where nobody can know it. `longest_prompt` and `longest_new` bound
    every row's tokens. `identity` goes into the run's fingerprint.
    """

    prompts: Callable[[], Iterator[Prompt]]
    total: int | None
    longest_prompt: int
    longest_new: int
    carried: Mapping[str, ColumnType]
    identity: Mapping[str, Any]
    window: int
    part_rows: int
    several_completions: bool = False
    evaluation: Evaluation | None = None
    scorer: RowScorer | None = None
    constraints: Mapping[str, Constraint] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())

    def placed(self) -> Iterator[Placed]:
        """Every prompt with its place in the job's order."""
        return split_parts(job_order(self.prompts(), self.window), self.part_rows)

    @cached_property
    def scan(self) -> Scan:
        """Reads ahead for the plan: all prompts of a job of moderate length, the first windows of a longer one."""
        complete = self.total is not None and self.total <= SCANNED_ROWS
        rows = SCANNED_ROWS if complete else min(SCANNED_ROWS, 2 * self.window)
        lengths, new, shared, groups = list[int](), list[int](), list[int](), set[int]()
        for item in itertools.islice(self.placed(), rows):
            prompt = item.prompt
            if not prompt.error:
                lengths.append(len(prompt.token_ids))
                new.append(1 if prompt.score_tokens else prompt.sampling.max_new_tokens)
                shared.append(prompt.shared_tokens)
                groups |= {hash(prompt.token_ids[: prompt.shared_tokens])} if prompt.shared_tokens else set()
        longest_own = max((length - part for length, part in zip(lengths, shared, strict=True)), default=1)
        return Scan(tuple(lengths), tuple(new), tuple(shared), len(groups), longest_own, complete)


def describe_work(config: Config, model: Model) -> Work:
    """Opens the dataset or the scenarios and checks everything that can be wrong for all rows."""
    if config.job.kind == "helm_eval":
        return _evaluation_work(config, model)
    return _dataset_work(config, model)


def _dataset_work(config: Config, model: Model) -> Work:
    if not config.dataset.path:
        raise ConfigError("dataset.path is empty.", remedy="Name the data: dataset.path=FILE-FOLDER-GLOB-or-hub-id.")
    source = Source.open(config.dataset)
    longest_new = config.generation.max_new_tokens
    longest, notes = _longest_prompt(config, model, longest_new)
    scorer = build_row_scorer(config.job)
    for name in scorer.source_columns if scorer else ():
        if name not in source.columns:
            key = "job.reference" if config.job.kind == "summarize" else "job.gold"
            raise ConfigError(
                f"{key}: the dataset has no column {name!r}.", remedy=f"The columns are: {', '.join(source.columns)}."
            )
    wanted = dict.fromkeys([*config.output.columns, *(scorer.source_columns if scorer else ())])
    constraints = _constraints(scorer, config, model)
    constraint = next(iter(constraints), "")
    prompt_config = replace(config.prompt, max_tokens=longest)
    builder = PromptBuilder(
        prompt_config, config.generation, model.tokenizer, columns=source.columns, carried=list(wanted)
    )

    def prompts() -> Iterator[Prompt]:
        rows = source.rows()
        while block := list(itertools.islice(rows, BUILD_ROWS)):
            yield from (replace(prompt, constraint=constraint) for prompt in builder.build(block))

    described = source.describe()
    count = config.generation.num_completions
    return Work(
        prompts=prompts,
        total=None if described.rows is None else described.rows * count,
        longest_prompt=longest,
        longest_new=longest_new,
        carried={name: source.columns[name] for name in wanted},
        identity={
            "dataset": described.fingerprint() | _subset(config.dataset, "split", "id_column", "limit"),
            "target": _target(config.job),
            "prompt": asdict(prompt_config) | builder.identity,
        },
        window=config.prompt.window,
        part_rows=config.output.part_rows,
        several_completions=count > 1,
        scorer=scorer,
        constraints=constraints,
        notes=notes,
    )


def _evaluation_work(config: Config, model: Model) -> Work:
    refuse_unused(
        config,
        SET_BY_SCENARIOS,
        because=f"the scenarios of job={config.job.name} bring their own data, templates and lengths",
        remedy="Leave it out. job.scenarios.NAME.adapter.max_eval_instances limits the rows of a scenario.",
    )
    evaluation = build_evaluation(config.job, seed=config.generation.seed, special_tokens=config.prompt.special_tokens)
    longest_new = max(scenario.spec.max_tokens for scenario in evaluation.scenarios)
    limits = Limits(config.prompt.max_tokens, model.context_tokens)
    longest = max([config.prompt.max_tokens, *(scenario.prompt_tokens + 8 for scenario in evaluation.scenarios)])
    if model.context_tokens:
        longest = min(longest, model.context_tokens)
    return Work(
        prompts=lambda: evaluation.prompts(model.tokenizer, limits),
        total=evaluation.count(),
        longest_prompt=longest,
        longest_new=longest_new,
        carried={name: ColumnType.parse(kind) for name, kind in COLUMNS.items()},
        identity={"evaluation": evaluation.digest, "limits": asdict(limits)},
        window=config.prompt.window,
        part_rows=config.output.part_rows,
        evaluation=evaluation,
    )


def _constraints(scorer: RowScorer | None, config: Config, model: Model) -> dict[str, Constraint]:
    """The decoding constraint of an extraction, by the name that its prompts carry."""
    if not isinstance(scorer, Extraction) or not scorer.constrain:
        return {}
    from flexbatch.evaluation.constraints import compile_constraint

    made = compile_constraint(
        scorer.target,
        model.tokenizer,
        vocabulary_size=model.config.get_text_config().vocab_size,
        max_new_tokens=config.generation.max_new_tokens,
        end_tokens=sorted(model.end_tokens),
    )
    return {"target": made}


def _longest_prompt(config: Config, model: Model, longest_new: int) -> tuple[int, tuple[str, ...]]:
    """`prompt.max_tokens`, or what the model's positions leave beside the completion."""
    wanted, positions = config.prompt.max_tokens, model.context_tokens
    if not positions or wanted + longest_new <= positions:
        return wanted, ()
    room = positions - longest_new
    if room < 1:
        raise ConfigError(
            f"generation.max_new_tokens is {longest_new}, but the model has {positions} positions in all.",
            remedy=f"Set generation.max_new_tokens below {positions}.",
        )
    return room, (f"prompts are cut to {room} tokens: of {positions} positions, {longest_new} are generated",)


def _target(job: JobConfig) -> dict[str, Any]:
    """What an extraction is held to."""
    return _subset(job, "schema", "regex", "choices", "constrain") if job.kind == "extract" else {}


def _subset(record: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}
