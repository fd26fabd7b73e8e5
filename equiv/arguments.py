"""Checks of arguments at the door, shared by the public calls.

Each returns the value in the one type that is used inside, or raises an error that
names the argument, what was expected and what came.
"""

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiv.errors import ArgumentError, InputsError, SiteError

_DTYPES = (torch.float32, torch.float64)


def as_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """An integer in low…high, of any integer type.

    Raises:
        ArgumentError: If it is none; truth values are none.

    Example:
        >>> as_integer("rank", torch.tensor(8), 1)
        8
    """
    found = index_of(value)
    if found is None or found < low or (high is not None and found > high):
        bounds = f">= {low}" if high is None else f"in {low}…{high}"
        raise ArgumentError(
            f"Expected `{name}` to be an integer {bounds}, got {shown(value)}."
        )
    return found


def as_seed(value: object) -> int:
    """A seed that every generator takes.

    Raises:
        ArgumentError: If it is no integer in 0…2⁶³ − 1.
    """
    return as_integer("seed", value, 0, 2**63 - 1)


def as_rank(value: object) -> int | None:
    """The rank of a map; `None` for full rank.

    Raises:
        ArgumentError: If it is neither `None` nor an integer >= 1.
    """
    return None if value is None else as_integer("rank", value, 1)


def as_ridge(value: object) -> float:
    """A relative ridge.

    Raises:
        ArgumentError: If it is no finite number >= 0.
    """
    return as_number(
        "ridge", value, "a finite number >= 0", lambda found: 0 <= found < math.inf
    )


def as_number(
    name: str,
    value: object,
    expected: str = "a finite number",
    holds: Callable[[float], bool] = math.isfinite,
) -> float:
    """A real number for which `holds` is true; `expected` says so in words.

    Raises:
        ArgumentError: If it is none.
    """
    found: Any = value
    if isinstance(value, Tensor) and value.numel() == 1:
        found = value.item()
    real = isinstance(found, Real) and not isinstance(found, bool)
    if not real or not holds(float(found)):
        raise ArgumentError(f"Expected `{name}` to be {expected}, got {shown(value)}.")
    return float(found)


def as_choice(name: str, value: object, known: Sequence[str]) -> str:
    """One of the known words.

    Raises:
        ArgumentError: If it is none of them.
    """
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(
            f"Expected `{name}` in {', '.join(known)}, got {shown(value)}."
        )
    return value


def as_names(name: str, value: object, example: Sequence[str]) -> tuple[str, ...]:
    """A sequence of names, each once.

    Raises:
        ArgumentError: If it is a string, no sequence, or holds something else.
    """
    found = _entries(value if isinstance(value, Sequence) else None)
    if isinstance(value, str) or not all(isinstance(entry, str) for entry in found):
        raise ArgumentError(
            f"Expected `{name}` to be a tuple of names such as {tuple(example)!r}, got "
            f"{shown(value)}."
        )
    return tuple(dict.fromkeys(found))


def as_integers(name: str, value: object) -> tuple[int, ...]:
    """Integers from any iterable: a list, a range, an array, a tensor.

    Raises:
        ArgumentError: If it is no iterable, or one of something else.
    """
    found = [index_of(entry) for entry in _entries(value)]
    if None in found:
        raise ArgumentError(
            f"Expected `{name}` to be integers, as in [0, 1], got {shown(value)}."
        )
    return tuple(entry for entry in found if entry is not None)


def as_layers(value: object, count: int) -> tuple[int, ...] | None:
    """Indices of blocks, each once; `None` stands for all.

    Raises:
        ArgumentError: If it holds something else than integers.
        SiteError: If it is empty or the model has no such block.

    Example:
        >>> as_layers(range(1, 3), count=4)
        (1, 2)
    """
    if value is None:
        return None
    found = as_integers("layers", value)
    if not found or not set(found) <= set(range(count)):
        raise SiteError(
            f"Expected `layers` within 0…{count - 1}, or None for all, got "
            f"{shown(list(found))}."
        )
    return tuple(dict.fromkeys(found))


def as_dtype(value: object) -> torch.dtype:
    """A dtype that shifts can be measured in.

    Raises:
        ArgumentError: If it is another, or no dtype of torch.
    """
    if isinstance(value, torch.dtype):
        if value in _DTYPES:
            return value
        why = "others are too coarse to tell a shift from rounding"
    else:
        named = getattr(torch, str(value), None)
        meant = named if named in _DTYPES else torch.float32
        why = f"pass `dtype={meant}`"
    raise ArgumentError(
        f"Expected `dtype` torch.float32 or torch.float64, got {shown(value)}: {why}."
    )


def as_tensor(name: str, value: object) -> Tensor:
    """A dense tensor of an input: itself, or made from an array or nested lists.

    Raises:
        InputsError: If it is not rectangular, not numeric or not dense.

    Example:
        >>> as_tensor("input_ids", [[3, 9], [5, 6]]).shape
        torch.Size([2, 2])
    """
    made = value if isinstance(value, Tensor) else _converted(value)
    if made is None:
        raise InputsError(
            f"Expected `{name}` to be a tensor, or a rectangular array or nested list "
            f"of numbers, got {_kind(value)}. Tokenise with `padding=True, "
            'return_tensors="pt"`, or convert with `torch.as_tensor`.'
        )
    if made.layout != torch.strided or made.is_nested:
        raise InputsError(
            f"Expected `{name}` to be a dense tensor, got layout {made.layout}: call "
            "`.to_dense()`, or pad nested tensors."
        )
    return made


def shown(value: object) -> str:
    """The value as messages show it: short."""
    return reprlib.repr(value)


def index_of(value: Any) -> int | None:
    """The integer that a value is, else `None`; truth values are no integers."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _entries(value: Any) -> list[Any]:
    """What an iterable holds; anything else counts as holding `None`."""
    scalar = getattr(value, "ndim", 1) == 0  # arrays of no axis only look iterable
    return list(value) if isinstance(value, Iterable) and not scalar else [None]


def _converted(value: Any) -> Tensor | None:
    """A tensor of an array or nested list of numbers; `None` if it is no such thing."""
    try:
        if isinstance(value, (list, tuple)) and value and _all_tensors(value):
            return torch.stack(list(value))
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}
    wide = kinds.get(array.dtype.kind)
    # A copy: torch takes no read-only arrays, foreign byte orders or negative strides.
    return None if wide is None else torch.from_numpy(np.array(array, dtype=wide))


def _all_tensors(value: Iterable[object]) -> bool:
    return all(isinstance(entry, Tensor) for entry in value)


def _kind(value: Any) -> str:
    """The type of a value and of what it holds, for messages."""
    name = type(value).__name__
    if isinstance(value, np.ndarray):
        return f"{name} of {value.dtype}, shape {value.shape}"
    if not isinstance(value, (list, tuple)):
        return name
    inside = " or ".join(sorted({type(entry).__name__ for entry in value}))
    sizes = {len(entry) for entry in value if isinstance(entry, (list, tuple))}
    lengths = f" of lengths {min(sizes)}…{max(sizes)}" if len(sizes) > 1 else ""
    return f"{name} of {inside or 'nothing'}{lengths}"
