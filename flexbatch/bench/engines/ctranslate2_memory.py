"""CTranslate2 with the whole model in memory, in its own form, which is made once from the checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from flexbatch.bench.engines.meter import Meter
from flexbatch.bench.trial import Outcome, Trial, digest_of, read_prompts
from flexbatch.bench.workloads import sorted_batches
from flexbatch.errors import EngineError


def run(trial: Trial) -> Outcome:
    require_package()
    import ctranslate2

    prompts = read_prompts(Path(trial.prompts), trial.rows)
    meter = Meter()
    generator = ctranslate2.Generator(
        str(converted_folder(trial)), device="cpu", compute_type=trial.dtype, intra_threads=torch.get_num_threads()
    )
    tokens: list[list[int]] = [[] for _ in prompts.token_ids]
    meter.start()
    for batch in sorted_batches(prompts.lengths, trial.batch):
        results = generator.generate_batch(
            [[str(token) for token in prompts.token_ids[row]] for row in batch],
            max_length=trial.new_tokens,
            min_length=trial.new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        for row, result in zip(batch, results, strict=True):
            tokens[row] = result.sequences_ids[0]
    return Outcome(
        trial.engine,
        rows=len(tokens),
        batch=trial.batch,
        tokens=sum(map(len, tokens)),
        seconds=meter.seconds,
        setup_seconds=meter.setup_seconds,
        read_bytes=meter.read_bytes,
        processor_seconds=meter.processor_seconds,
        digest=digest_of(tokens),
        details={"compute_type": generator.compute_type},
    )


def convert(trial: Trial) -> Outcome:
    """Makes CTranslate2's form of the checkpoint, unless it is there."""
    require_package()
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        """Asks for no tokenizer: the benchmark's tokens are numbers."""

        def load_tokenizer(self, *_: Any, **__: Any) -> NumberVocabulary:
            return NumberVocabulary(int(self.config.vocab_size))

        def load_model(self, model_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            model = model_class.from_pretrained(model_name_or_path, **kwargs)
            self.config = model.config
            return model

    target = converted_folder(trial)
    if not (target / "model.bin").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(".partial")
        try:
            Converter(trial.model).convert(str(beside), quantization=trial.dtype, force=True)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise EngineError(f"not run: CTranslate2 cannot convert this model: {error}") from error
        beside.replace(target)
    return Outcome(trial.engine)


def converted_folder(trial: Trial) -> Path:
    return Path(trial.cache_dir) / "bench" / "ctranslate2" / f"{Path(trial.model).name}-{trial.dtype}"


def require_package() -> None:
    if importlib.util.find_spec("ctranslate2") is None:
        raise EngineError("not run: CTranslate2 is not installed here (pip install 'flexbatch[bench]').")


class NumberVocabulary:
    """As much of a tokenizer as the converter asks for: token 17 is written `17`."""

    bos_token, eos_token, unk_token = "0", "2", "3"

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self._size)}
