"""Whether functions with derivatives of their own are composed of PyTorch's instead.

Attention and low-rank updates have hand-written derivatives of first order, forward and
reverse. What differentiates a derivative needs them made of operations that have all
orders: slower, and the same function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_COMPOSED: ContextVar[bool] = ContextVar("composed", default=False)


@contextmanager
def composed() -> Iterator[None]:
    """Inside, they are composed."""
    token = _COMPOSED.set(True)
    try:
        yield
    finally:
        _COMPOSED.reset(token)


def is_composed() -> bool:
    """Whether this runs inside `composed`."""
    return _COMPOSED.get()
