"""Answers prompts from a file, for a program that cannot have flexbatch in its own environment.

    python -m flexbatch.integrations.worker PROMPTS.jsonl ANSWERS.jsonl FOLDER MODEL [key=value ...]

A line of PROMPTS is a JSON object:

    prompt                           the text
    max_tokens, temperature, top_p   as in `generation`; `seed` is used as it is
    stop                             a list of texts
    echo                             true scores the prompt itself instead of generating; `max_tokens` is then 0
    chat                             true: through the tokenizer's chat template; false: as it stands; null: through
                                     it where there is one

A line of ANSWERS answers the same line of PROMPTS: `text`, `tokens` (a list of [text, log-probability]) and
`finish_reason` (`endoftext`, `stop` or `length`). What is generated is whole: a stop string that ended it is still
there, the end-of-sequence token is not. FOLDER keeps what is done: the same command goes on where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flexbatch.errors import ConfigError, FlexbatchError
from flexbatch.torch_environment import prepare_torch


def main(arguments: Sequence[str]) -> int:
    try:
        if len(arguments) < 4:
            raise ConfigError(
                "PROMPTS, ANSWERS, FOLDER and MODEL must be given.", remedy="Then come key=value options."
            )
        prompts, answers, folder, model, *overrides = arguments
        prepare_torch()

        from flexbatch.integrations.answering import answer_file

        answer_file(Path(prompts), Path(answers), Path(folder), model, overrides)
    except FlexbatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
