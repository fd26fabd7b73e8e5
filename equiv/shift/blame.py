"""Which operation of which module it was, for messages."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from equiv.errors import ForwardModeError

_OTHERWISE = (
    'Make it of operations that have one, or pass `derivative="central"` to '
    "`equiv.check` or `equiv.shifts` to accept finite differences there."
)
# Of PyTorch's own words, which may go on about where to file issues.
_LONGEST = 160


def blamed(error: BaseException, model: nn.Module) -> str:
    """The operation in which an error came up and the module that it is in, as text.

    They are read off the frames that the error passed through.
    """
    names = {id(module): name for name, module in model.named_modules()}
    module, function = "", ""
    cause: BaseException | None = error
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None:
            inside: Mapping[str, Any] = trace.tb_frame.f_locals
            own, kind = inside.get("self"), inside.get("cls")
            if isinstance(own, nn.Module) and id(own) in names:
                name = names[id(own)] or "the model"
                module = f"`{name}` ({type(own).__name__})"
            if isinstance(kind, type) and issubclass(kind, torch.autograd.Function):
                function = f"`{kind.__name__}`"
            trace = trace.tb_next
        cause = cause.__cause__
    operation = function or _operation(str(error)) or "An operation"
    return f"{operation} in {module or f'`{type(model).__name__}`'}"


def refusal(blame: str, why: str) -> ForwardModeError:
    """The error for an operation that has no derivative in any way.

    Args:
        blame: What `blamed` says.
        why: PyTorch's words about the last way that was tried.
    """
    short = " ".join(why.split())[:_LONGEST].rstrip(".")
    return ForwardModeError(
        f"{blame} has no forward-mode derivative, and two reverse passes do not give "
        f"it either ({short}). {_OTHERWISE}"
    )


def hidden(blame: str) -> ForwardModeError:
    """The error for an operation that PyTorch does not see."""
    return ForwardModeError(
        f"{blame} leaves PyTorch, for numpy perhaps, so it has no derivative. "
        f"{_OTHERWISE}"
    )


def silent(module: str, share: float) -> ForwardModeError:
    """The error for a module whose derivative is wrong, and does not say so.

    Args:
        module: Its name and class, or where it is.
        share: How far the derivative is off, of the shift.
    """
    return ForwardModeError(
        f"The derivative of {module} is not that of what it computes: forward mode and "
        f"a central difference along the update differ by {share:.0%}. Something in it "
        "has a wrong rule or none (a custom operation, `detach`, `no_grad`). "
        f"{_OTHERWISE}"
    )


def _operation(message: str) -> str:
    found = message.partition("forward AD with ")[2].split(" ", 1)[0]
    return f"`{found}`" if found else ""
