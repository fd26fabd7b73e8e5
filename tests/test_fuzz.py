"""A few models of random configurations; `python -m benchmarks.fuzz` runs hundreds."""

import pytest

from benchmarks.fuzz import draw, outcome

# The last four found a mistake once, in the table that they are compared with.
SEEDS = (*range(8), 38, 39, 54, 171)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_model_is_measured_rightly(seed: int) -> None:
    found = outcome(draw(seed))
    assert found.ended == "right", found
