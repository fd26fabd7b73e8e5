"""The derivative of a function along one direction, by whichever way it has one.

Symbols
    f       a function of tensors x; J its Jacobian at x
    v       the direction, shaped like x
    u       weights, shaped like f(x)

Forward mode gives f(x) and J v in one go. Where an operation has no forward rule, but a
reverse one that can itself be differentiated, two reverse passes give the same:

    g(u) = Jᵀ u  is linear in u, whatever u is;    its own reverse along v is  J v

A reverse rule that was written by hand need not be differentiable in x for that, only
in u, which it multiplies. What has neither is refused, by name.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from equiv.model.composed import composed

# How a derivative was had, as rows record it.
JVP, DOUBLE_BACKWARD, CENTRAL = "jvp", "double backward", "central"
# What a caller may ask for: forward mode (or the same by two reverse passes), or
# differences.
CHOICES = ("forward", "central")

# Words by which PyTorch says that a rule is missing.
_TRANSFORMS = "functorch transforms"
_HIDDEN = "doesn't have storage"
_REVERSE = (
    "once_differentiable",
    "derivative for",
    "autograd formula",
    _TRANSFORMS,
    _HIDDEN,
)

T = TypeVar("T")


class NoForwardRuleError(Exception):
    """An operation has no forward rule.

    Attributes:
        hidden: Whether the operation leaves PyTorch (for numpy, say), so that reverse
            mode would take it for a constant.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.hidden = _HIDDEN in message


class NoReverseRuleError(Exception):
    """An operation has no reverse rule; `hidden` as for `NoForwardRuleError`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.hidden = _HIDDEN in message


def forward(run: Callable[..., T], primals: Any, directions: Any) -> tuple[T, T]:
    """(f(x), J v) by forward mode.

    Args:
        run: f, of as many arguments as there are primals.
        primals: x: a tuple of tensors or mappings of them.
        directions: v, the same.

    Raises:
        NoForwardRuleError: If an operation has no forward rule.
    """
    try:
        return jvp(run, primals, directions)[:2]
    except NotImplementedError as error:
        raise NoForwardRuleError(str(error)) from error
    except RuntimeError as error:
        if _HIDDEN not in str(error) and _TRANSFORMS not in str(error):
            raise
        raise NoForwardRuleError(str(error)) from error


def twice_backward(run: Callable[..., T], primals: Any, directions: Any) -> tuple[T, T]:
    """The same by two reverse passes.

    Raises:
        NoReverseRuleError: If an operation cannot be differentiated so.
    """
    leaves, shape = tree_flatten(primals)
    along, _ = tree_flatten(directions)
    with torch.enable_grad(), composed():
        at = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        # Copies: what the model changes in place must not be a leaf.
        found = run(*tree_unflatten([leaf.clone() for leaf in at], shape))
        values, out_shape = tree_flatten(found)
        try:
            tangents = _along(values, at, along)
        except (RuntimeError, NotImplementedError) as error:
            raise NoReverseRuleError(str(error)) from error
    still = [value.detach() for value in values]
    return tree_unflatten(still, out_shape), tree_unflatten(tangents, out_shape)


def derived(run: Callable[..., T], primals: Any, directions: Any) -> tuple[T, T]:
    """(f(x), J v), by forward mode where it goes, else by two reverse passes.

    Raises:
        NoForwardRuleError: If neither goes.
    """
    try:
        return forward(run, primals, directions)
    except NoForwardRuleError as error:
        if error.hidden:
            raise
        try:
            return twice_backward(run, primals, directions)
        except NoReverseRuleError:
            raise error from None


def pullback(
    run: Callable[..., Tensor], *primals: Any
) -> Callable[[Tensor], tuple[Any, ...]]:
    """U ↦ Jᵀ u, for any number of u.

    Args:
        run: f, of as many arguments as there are primals, to one tensor.
        *primals: x, tensors or mappings of them.

    Raises:
        NoReverseRuleError: If an operation has no reverse rule; also when called.

    Example:
        >>> pull = pullback(lambda x: x**2, torch.tensor([3.0]))
        >>> pull(torch.ones(1))
        (tensor([6.]),)
    """
    try:
        pull = _reversed(lambda: vjp(run, *primals)[1])
    except NoReverseRuleError as error:
        if error.hidden:
            raise
        pull = _plain_pullback(run, primals)  # rules in the older style need that
    return lambda weights: _reversed(lambda: pull(weights))


def _plain_pullback(
    run: Callable[..., Tensor], primals: Any
) -> Callable[[Tensor], tuple[Any, ...]]:
    leaves, shape = tree_flatten(primals)
    with torch.enable_grad():
        at = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out = _reversed(lambda: run(*tree_unflatten([a.clone() for a in at], shape)))

    def pull(weights: Tensor) -> tuple[Any, ...]:
        found = torch.autograd.grad(
            out, at, weights, retain_graph=True, materialize_grads=True
        )
        return tree_unflatten(list(found), shape)

    return pull


def _along(values: list[Tensor], at: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """J v by the reverse of u ↦ Jᵀ u; zero where a value depends on nothing."""
    live = [value for value in values if value.requires_grad]
    weights = [torch.zeros_like(value).requires_grad_() for value in live]
    moved: dict[int, Tensor] = {}
    if live:
        back = torch.autograd.grad(
            live, at, weights, create_graph=True, allow_unused=True
        )
        pairs = [
            (grad, v)
            for grad, v in zip(back, along, strict=True)
            if grad is not None and grad.requires_grad
        ]
        _check_differentiable(grad for grad, _ in pairs)
        if pairs:
            pulled, directions = zip(*pairs, strict=True)
            made = torch.autograd.grad(
                pulled, weights, directions, materialize_grads=True
            )
            moved = {id(value): grad for value, grad in zip(live, made, strict=True)}
    return [moved.get(id(value), torch.zeros_like(value)).detach() for value in values]


def _check_differentiable(back: Iterable[Tensor]) -> None:
    """Refuse reverse rules that are marked as not to be differentiated.

    PyTorch leaves an error in the graph for them, which it raises only if it has to
    pass it; a way around it, such as a skip, would hide it.
    """
    waiting = [grad.grad_fn for grad in back]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Error" in node.name():
            raise RuntimeError("its reverse rule is marked as once_differentiable")
        waiting += [below for below, _ in node.next_functions]


def _reversed(run: Callable[[], T]) -> T:
    try:
        return run()
    except NotImplementedError as error:
        raise NoReverseRuleError(str(error)) from error
    except RuntimeError as error:
        if not any(word in str(error) for word in _REVERSE):
            raise
        raise NoReverseRuleError(str(error)) from error
