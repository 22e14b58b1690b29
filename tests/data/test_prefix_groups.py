"""Prefix groups: sound, disjoint, and worth nearly the most."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.data import prefix_groups
from flexbatch.data.batcher import job_order
from flexbatch.data.prefix_groups import LEAST_SAVING, LEAST_TOKENS, common_length, find_groups
from flexbatch.records import Prompt, Row

# Few tokens and long runs, so that prefixes are often shared.
runs = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=4)
prompt_ids = runs.map(lambda pairs: tuple(token for token, count in pairs for _ in range(count)))
prompt_lists = st.lists(prompt_ids, min_size=1, max_size=7)


def saving(groups: list[tuple[list[int], int]]) -> int:
    return sum((len(members) - 1) * tokens for members, tokens in groups)


@given(prompt_ids, prompt_ids)
def test_the_common_length_is_where_two_prompts_part(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    length = common_length(first, second)
    assert first[:length] == second[:length]
    assert length in (len(first), len(second)) or first[length] != second[length]


@given(prompt_lists)
def test_groups_are_disjoint_and_their_members_share_the_prefix_and_keep_a_token(
    prompts: list[tuple[int, ...]],
) -> None:
    groups = find_groups(prompts, [1] * len(prompts))
    members = [index for group, _ in groups for index in group]
    assert len(members) == len(set(members))
    for group, tokens in groups:
        assert len(group) > 1
        assert tokens >= LEAST_TOKENS
        assert len({prompts[index][:tokens] for index in group}) == 1
        assert all(len(prompts[index]) > tokens for index in group)


def best_saving(prompts: list[tuple[int, ...]], indices: tuple[int, ...]) -> int:
    """By trying every partition."""
    if not indices:
        return 0
    first, rest = indices[0], indices[1:]
    best = best_saving(prompts, rest)
    for size in range(1, len(rest) + 1):
        for others in combinations(rest, size):
            group = (first, *others)
            shared = min(common_length(prompts[a], prompts[b]) for a, b in combinations(group, 2))
            shared = min(shared, *(len(prompts[index]) - 1 for index in group))
            if shared >= LEAST_TOKENS and size * shared >= LEAST_SAVING:
                left = tuple(index for index in rest if index not in others)
                best = max(best, size * shared + best_saving(prompts, left))
    return best


@given(st.lists(prompt_ids, min_size=1, max_size=5))
def test_no_other_grouping_saves_a_third_more(prompts: list[tuple[int, ...]]) -> None:
    groups = find_groups(prompts, [1] * len(prompts))
    assert saving(groups) >= 0.75 * best_saving(prompts, tuple(range(len(prompts))))


def test_a_task_with_more_to_share_than_its_neighbours_keeps_to_itself_and_they_still_share() -> None:
    instructions, shots = tuple(range(200)), tuple(range(1000, 1200))
    with_shots = [(*instructions, *shots, 2000 + row) for row in range(10)]
    without = [(*instructions, 3000 + row) for row in range(10)]
    groups = find_groups([*with_shots, *without], [1] * 20)
    assert sorted((sorted(members), tokens) for members, tokens in groups) == [
        (list(range(10)), 400),
        (list(range(10, 20)), 200),
    ]


def test_few_shot_prompts_share_their_shots() -> None:
    shots = tuple(range(400))
    rows = [(*shots, 1000 + row, row) for row in range(20)] + [tuple(range(500, 520))]
    prompts = [Prompt(Row(str(i), "s", i, {}), ids) for i, ids in enumerate(rows)]
    order = list(job_order(prompts, 64))
    assert [prompt.shared_tokens for prompt in order] == [400] * 20 + [0]
    assert prefix_groups.LEAST_TOKENS < 400


def test_scored_tokens_stay_out_of_the_prefix() -> None:
    ids = tuple(range(100))
    prompts = [Prompt(Row(str(i), "s", i, {}), (*ids, 7, 8), score_tokens=2 + i % 2) for i in range(4)]
    assert all(
        prompt.shared_tokens <= len(prompt.token_ids) - prompt.score_tokens - 1 for prompt in job_order(prompts, 9)
    )
