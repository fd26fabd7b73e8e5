"""ListOps: values by a second, independent evaluator; splits that never meet."""

import statistics
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equiv.tasks.listops import (
    MAX_TOKENS,
    OPERATORS,
    evaluate,
    generate,
    is_held_out,
)


def value(text: str) -> int:
    """By Python's own parser: `[MAX 3 4 ]` becomes `MAX((3, 4,))`."""
    code = text
    for name in OPERATORS:
        code = code.replace(f"[{name}", f"{name}((")
    code = code.replace(" ]", " ,)) ,").rstrip(",")
    words = [w + "," if w.isdigit() else w for w in code.split()]
    names = {
        "MAX": max,
        "MIN": min,
        "MED": statistics.median_low,
        "SM": lambda a: sum(a) % 10,
        "LAST": lambda a: a[-1],
        "RNG": lambda a: max(a) - min(a),
    }
    return eval(" ".join(words).replace(",,", ",").replace(", ,", ","), names)


@given(st.integers(0, 2**16))
def test_values_agree_with_a_second_evaluator(seed: int) -> None:
    for example in islice(generate(tuple(OPERATORS), seed), 20):
        assert example.answer == value(example.text)
        assert evaluate(example.text) == example


@given(st.integers(0, 2**16))
def test_expressions_are_small_and_nested_once(seed: int) -> None:
    for example in islice(generate(tuple(OPERATORS), seed), 20):
        assert 4 <= len(example.tokens) <= MAX_TOKENS
        depth, deepest = 0, 0
        for token in example.tokens:
            depth += token.startswith("[") - (token == "]")
            deepest = max(deepest, depth)
        assert depth == 0 and deepest <= 2
        closing = [v is not None for v in example.values]
        assert closing == [token == "]" for token in example.tokens]


def test_training_and_held_out_never_meet() -> None:
    train = {e.text for e in islice(generate(["MAX", "SM"], 0), 3000)}
    held = {e.text for e in islice(generate(["MAX", "SM"], 0, held_out=True), 500)}
    assert not train & held
    assert all(is_held_out(text) for text in held)


def test_known_values() -> None:
    assert evaluate("[MED 1 9 ]").answer == 1
    assert evaluate("[RNG 2 [MAX 9 1 ] 4 ]").answer == 7
    assert evaluate("[LAST 2 [SM 9 9 ] ]").answer == 8


@pytest.mark.parametrize("text", ["", "3", "[MAX 3", "[MAX 3 4 ] ]", "[FOO 3 ]"])
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        evaluate(text)
