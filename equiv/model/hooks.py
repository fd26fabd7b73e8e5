"""What happens inside the modules while a stage runs: sites are read and steered."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equiv.model.factors import Factors, UnusedFactorsError, forward_with_factors
from equiv.model.sites import (
    Place,
    Sites,
    Steer,
    first_tensor,
    is_activation,
    with_first,
)


class Hooks:
    """Reads and steers sites, and applies low-rank updates beside their weights.

    They are put on the modules once; `begin` says what they do during one run.

    Attributes:
        seen: Activations at the sites that the run has passed, before steering.
    """

    def __init__(self) -> None:
        self.begin({}, {}, 0.0, 0.0)

    def begin(
        self, steer: Steer, low: Factors, scale: Tensor | float, at: float
    ) -> None:
        """Start a run; for the arguments see `StagedModel.run`."""
        self.seen: Sites = {}
        self._steer, self._low, self._scale, self._at = steer, low, scale, at
        self._applied: set[str] = set()

    def check_applied(self) -> None:
        """Check at the end of a run that every low-rank update was applied.

        Raises:
            UnusedFactorsError: If one was not.
        """
        if unused := set(self._low) - self._applied:
            raise UnusedFactorsError(unused)

    def on_site(self, place: Place, site: str, *, in_place: bool) -> RemovableHandle:
        """Put a hook on a site; `in_place`: what it sees may be changed later."""

        def at(activation: Tensor) -> Tensor:
            self.seen[site] = activation.clone() if in_place else activation
            steer = self._steer.get(site)
            return activation if steer is None else activation + steer(activation)

        if place.side == "output":
            return place.module.register_forward_hook(
                lambda _m, _a, out: with_first(out, at(first_tensor(out)))
            )

        def before(
            _m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (at(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": at(kwargs["hidden_states"])}

        return place.module.register_forward_pre_hook(before, with_kwargs=True)

    def beside(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The module's forward; with the update beside its weight when there is one."""
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if name not in self._low:
                return plain(*args, **kwargs)
            self._applied.add(name)
            made = forward_with_factors(module, self._low[name], self._scale, self._at)
            return made(*args, **kwargs)

        return forward


def outputs_of(
    modules: Mapping[str, nn.Module], run: Callable[[], Tensor]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Submodules that are called once and return an activation; the distinct ones.

    Some hand on what they got (dropout, identity), or what becomes the model's output;
    tensors changed in place since then are other activations.

    Args:
        modules: By name; the model itself is "".
        run: Runs the model once and returns its output.
    """
    calls: dict[str, list[tuple[object, int]]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _m, _a, out: calls.setdefault(name, []).append(
            (out, _version(out))
        )

    with ExitStack() as stack:
        for name, module in modules.items():
            if name:
                handle = module.register_forward_hook(hook_of(name))
                stack.callback(handle.remove)
        final = run()
    once = {
        name: (id(found[0][0]), found[0][1])
        for name, found in calls.items()
        if len(found) == 1 and is_activation(found[0][0])
    }
    seen, distinct = {(id(final), _version(final))}, []
    for name, identity in once.items():
        if identity not in seen:
            seen.add(identity)
            distinct.append(name)
    return tuple(once), tuple(distinct)


def _version(output: object) -> int:
    """How often a tensor has been changed in place."""
    return output._version if isinstance(output, Tensor) else 0
