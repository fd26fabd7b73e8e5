"""Breaking one function of a claim's file, to see that the claim then fails."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest

from equiv.theory import claims
from equiv.theory.toys import Tensors

# Number of the claim, name of a function of its file, how it is broken.
Broken = tuple[int, str, Callable[[Any], Any]]


def module_of(number: int) -> ModuleType:
    """The file of a claim."""
    names = [found.name for found in pkgutil.iter_modules(claims.__path__)]
    (name,) = [name for name in names if name.startswith(f"claim_{number:02}_")]
    return importlib.import_module(f"{claims.__name__}.{name}")


def each(cases: Sequence[Broken]) -> pytest.MarkDecorator:
    """A test for each, as its argument `case`."""
    ids = [f"{number} {name} {n}" for n, (number, name, _) in enumerate(cases)]
    return pytest.mark.parametrize("case", cases, ids=ids)


def break_one(monkeypatch: pytest.MonkeyPatch, case: Broken) -> int:
    """Replace the function by the broken one, and say whose it is."""
    number, name, broken = case
    module = module_of(number)
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    return number


def scaled(found: Any, by: float = 1e-6) -> Any:
    """Off by a millionth: ten thousand times the tolerance of an identity."""
    if isinstance(found, Tensors):
        return type(found)(*(scaled(tensor, by) for tensor in found))
    if isinstance(found, tuple):
        return tuple(scaled(part, by) for part in found)
    if isinstance(found, dict):
        return {key: scaled(value, by) for key, value in found.items()}
    if isinstance(found, int):
        return found + 1
    return found * (1 + by)


def off(original: Callable[..., Any], by: float = 1e-6) -> Callable[..., Any]:
    """A function whose result is off."""
    return lambda *args, **kwargs: scaled(original(*args, **kwargs), by)
