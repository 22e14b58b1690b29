"""Few-shot prompts in, scores out: HELM-style evaluation on the engine's own batches.

What the pipeline uses:

    evaluation = build_evaluation(config.job, seed=..., special_tokens=...)   raises all that is wrong, loads all
    evaluation.prompts(tokenizer, Limits(prompt_tokens, context_tokens))      Iterator[Prompt], before generation
    COLUMNS                                                                   types of the columns that prompts carry
    evaluation.score(rows, tokenizer).table() / .metrics()                    from the output's rows, after it

`rows` are mappings of the output's columns (those of every job and `COLUMNS`) to plain Python values, in any order: a
resumed run has the same rows as an uninterrupted one, so it has the same scores. `digest` belongs in the fingerprint.
"""

from flexbatch.evaluation.evaluation import COLUMNS, Evaluation, build_evaluation
from flexbatch.evaluation.fitting import Limits, Tokenizer
from flexbatch.evaluation.summary import Estimate, Scores, TableRow

__all__ = [
    "COLUMNS",
    "Estimate",
    "Evaluation",
    "Limits",
    "Scores",
    "TableRow",
    "Tokenizer",
    "build_evaluation",
]
