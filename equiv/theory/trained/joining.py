"""Results of several seeds as one table: every figure becomes a list over seeds."""

from collections.abc import Mapping, Sequence

from equiv.theory.values import Value


def joined(rows: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Mappings of one shape as one mapping, with a list over them at each leaf.

    Example:
        >>> joined([{"a": {"b": 1}, "c": [1, 2]}, {"a": {"b": 3}, "c": [4, 5]}])
        {'a': {'b': [1, 3]}, 'c': [[1, 2], [4, 5]]}
    """
    return {
        key: joined([row[key] for row in rows])
        if isinstance(rows[0][key], Mapping)
        else [row[key] for row in rows]
        for key in rows[0]
    }
