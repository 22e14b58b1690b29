"""Long texts in windows that a model can read, each token predicted once: rolling perplexity, as HELM does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def windows(prefix: Sequence[int], tokens: Sequence[int], room: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Pairs (prompt of at most `room` tokens, how many of its last tokens are scored).

    The first window begins with `prefix` (the special tokens), so that the first token is predicted too; without any
    prefix it has nothing before it and is not scored. Every later window scores what comes next and fills up with as
    many tokens before that as fit, at least one.
    """
    first = min(len(tokens), room - len(prefix))
    scored = first if prefix else first - 1
    if scored > 0:
        yield (*prefix, *tokens[:first]), scored
    done = first
    while done < len(tokens):
        end = min(len(tokens), done + room - 1)
        yield tuple(tokens[max(0, end - room) : end]), end - done
        done = end
