"""The generated tasks are deterministic, well posed and kept apart from the evaluation."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.embedded.instances import (
    draw,
    facts_choice,
    field_extraction,
    fits,
    held_out,
    pattern_match,
    record_extraction,
    summary,
    variable_substitution,
)
from flexbatch.embedded.tasks import TASKS, evaluation_examples, training_example

seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_same_seed_gives_the_same_instances(name: str) -> None:
    first, second = Random(5), Random(5)
    drawn = [TASKS[name].generator(first) for _ in range(50)]
    assert drawn == [TASKS[name].generator(second) for _ in range(50)]
    assert len(set(drawn)) > 40


@settings(deadline=None)
@given(seeds)
def test_exactly_one_rule_of_a_pattern_match_fits_its_result(seed: int) -> None:
    instance = pattern_match(Random(seed))
    rules, result = instance.input.removeprefix("Rules: ").split(" | Result: ")
    fitting = [rule for rule in rules.split(" | ") if fits(rule.split(), result.split())]
    assert fitting == [instance.answer]


@settings(deadline=None)
@given(seeds)
def test_the_result_of_a_substitution_fits_its_rule(seed: int) -> None:
    instance = variable_substitution(Random(seed))
    rule = instance.input.removeprefix("Rules: ").split(" | ")[0]
    assert fits(rule.split(), instance.answer.split())


@settings(deadline=None)
@given(seeds)
def test_a_choice_has_four_different_answers_and_its_facts_state_the_right_one(seed: int) -> None:
    instance = facts_choice(Random(seed))
    assert len(set(instance.references)) == 4
    facts, _, asked = instance.input.rpartition(". ")
    words = set(asked.rstrip("?").split())
    stating = [fact for fact in facts.split(".") if instance.answer in fact.split()]
    assert any(words & set(fact.split()) for fact in stating)


@settings(deadline=None)
@given(seeds)
def test_extracted_values_stand_in_their_document(seed: int) -> None:
    record = record_extraction(Random(seed))
    assert all(value in record.input for value in json.loads(record.answer).values())
    field = field_extraction(Random(seed))
    assert field.answer in field.input
    article = summary(Random(seed))
    assert article.input.startswith(article.answer)


@settings(deadline=None)
@given(seeds, st.sampled_from(sorted(TASKS)))
def test_training_prompts_never_hold_an_instance_of_the_evaluation(seed: int, name: str) -> None:
    task = TASKS[name]
    assert held_out(draw(task.generator, Random(seed), evaluation=True))
    assert not held_out(draw(task.generator, Random(seed), evaluation=False))
    example = training_example(Random(seed), task, 3)
    assert all(asked.prompt != example.prompt for asked in evaluation_examples(task, 5, 0, 7))
