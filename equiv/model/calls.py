"""Notes on a module's method: told before and after every call, as long as they last.

They also make hooks reach compiled code. PyTorch guards no empty list of hooks
(`torch._dynamo.config.skip_nnmodule_hook_guards`), so a module that was compiled and
run before a hook came goes on without it, silently. It does guard that a module's
`forward` is its class's. A note on `forward` puts one on the module itself: graphs that
were made without it no longer match while the note is there, and match again when it
is gone.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class Note:
    """A note on the calls of a module; by itself it only makes them noticed.

    Attributes:
        listens: Whether it is told when calls begin and end.
    """

    listens = False

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """A call begins, with these arguments by name."""

    def end(self) -> None:
        """The call that began last is over, by return or exception."""


class _Noted:
    """The notes on one method of one module, and the method as it was."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        self.own = vars(module).get(method)
        self.plain: Callable[..., Any] = getattr(type(module), method)
        self.names = tuple(inspect.signature(getattr(module, method)).parameters)
        self.notes: list[Note] = []

    def put(self) -> None:
        """Put the noted method on the module."""
        noted = self

        @functools.wraps(getattr(self.module, self.method))
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return noted.call(module, args, kwargs)

        call.noted = self  # type: ignore[attr-defined]
        # A bound method, which `copy.deepcopy` binds to the copy.
        vars(self.module)[self.method] = types.MethodType(call, self.module)

    def call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The method as it was, between what is told to the notes."""
        told = [note for note in self.notes if note.listens]
        if not told:
            return self._plain(module, args, kwargs)
        begun: list[Note] = []
        try:
            for note in told:
                note.begin(dict(zip(self.names, args, strict=False)) | kwargs)
                begun.append(note)
            return self._plain(module, args, kwargs)
        finally:
            for note in begun:
                note.end()

    def _plain(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return self.plain(module, *args, **kwargs)

    def drop(self, note: Note) -> None:
        """Take a note away; with the last one the method is as it was."""
        self.notes.remove(note)
        if not self.notes and _noted(self.module, self.method) is self:
            if self.own is None:
                del vars(self.module)[self.method]
            else:
                vars(self.module)[self.method] = self.own


def note_calls(module: nn.Module, method: str, note: Note) -> Callable[[], None]:
    """Put a note on a method of a module.

    Args:
        module: The module.
        method: Its method: "forward", or "generate".
        note: What is told.

    Returns:
        A function that takes the note away again, in whatever order.

    Example:
        >>> import torch
        >>> class Count(Note):
        ...     calls, listens = 0, True
        ...     def begin(self, arguments):
        ...         self.calls += len(arguments["input"])
        >>> layer, count = nn.Linear(2, 2), Count()
        >>> remove = note_calls(layer, "forward", count)
        >>> _ = layer(torch.ones(3, 2))
        >>> remove()
        >>> count.calls, "forward" in vars(layer)
        (3, False)
    """
    noted = _noted(module, method)
    if noted is None:
        noted = _Noted(module, method)
        noted.put()
    noted.notes.append(note)
    return functools.partial(noted.drop, note)


def _noted(module: nn.Module, method: str) -> _Noted | None:
    """The notes that are on a method now, if it is a noted one."""
    own = vars(module).get(method)
    return getattr(getattr(own, "__func__", None), "noted", None)
