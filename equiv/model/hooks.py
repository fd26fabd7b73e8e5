"""What happens inside the modules while a stage runs: sites are read and steered."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equiv.errors import ArgumentError
from equiv.model.factors import Factors, UnusedFactorsError, forward_with_factors
from equiv.model.sites import (
    Place,
    Site,
    Sites,
    Steer,
    activation_of,
    first_tensor,
    with_first,
)

# (h at the write site, what was seen at the sites so far) → h with what is added
Combine = Callable[[Tensor, Sites], Tensor]


class Writes:
    """What is added at the sites of one block while it runs once.

    A steer reads an activation as the block computes it, before what steering adds at
    that very site; what was added at earlier sites is in it.

    Attributes:
        by_site: Site that is written → what is done there.
        joined: See `Blocks.joined`.
        seen: Activations at the sites that the run has passed, before steering.
    """

    def __init__(self, by_site: Mapping[str, Combine], *, joined: str = "") -> None:
        self.by_site, self.joined = by_site, joined
        self.seen: Sites = {}
        self._stream: Tensor | None = None  # in front of the next sub-layer

    def enter(self, hidden: Tensor | None) -> None:
        """Start a run with the block's input."""
        self.seen, self._stream = {}, hidden

    def leave(self) -> None:
        """The run is over: hold on to no activation."""
        self.seen, self._stream = {}, None

    def at(self, site: str, activation: Tensor, *, in_place: bool = False) -> Tensor:
        """The activation with what is added at a site; `in_place`: see `Hooks`."""
        self.seen.setdefault(site, activation.clone() if in_place else activation)
        if site == "resid_mid" and self.joined:
            return activation  # written where the last write is, below
        activation = self._changed(site, activation)
        joins = self.joined and "resid_mid" in self.by_site
        if joins and site in ("attn_out", "cross_out"):
            if self._stream is None:
                raise ArgumentError(
                    "`resid_mid` is steered in a forward of a whole block, but a part "
                    "of it ran alone, or once more for a checkpointed gradient."
                )
            self._stream = self._stream + activation
            if site == self.joined:
                self.seen["resid_mid"] = self._stream
                activation = self._changed("resid_mid", activation)
        return activation

    def _changed(self, site: str, activation: Tensor) -> Tensor:
        change = self.by_site.get(site)
        return activation if change is None else change(activation, self.seen)


class Hooks:
    """Reads and steers sites, and applies low-rank updates beside their weights.

    They are put on the modules once; `begin` says what they do during one run.

    Attributes:
        writes: What is seen and added during this run.
    """

    def __init__(self) -> None:
        self.begin({}, {}, 0.0, 0.0)

    def begin(
        self,
        steer: Steer,
        low: Factors,
        scale: Tensor | float,
        at: float,
        *,
        hidden: Tensor | None = None,
        joined: str = "",
    ) -> None:
        """Start a run; for the arguments see `StagedModel.run`."""
        by_site: dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]] = {}
        for key, function in steer.items():
            site = Site(key)
            by_site.setdefault(site.write, []).append((site.read, function))
        added = {site: _adding(steers) for site, steers in by_site.items()}
        self.writes = Writes(added, joined=joined)
        self.writes.enter(hidden)
        self._low, self._scale, self._at = low, scale, at
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
        return hook_on(place, lambda h: self.writes.at(site, h, in_place=in_place))

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


def _adding(steers: Sequence[tuple[str, Callable[[Tensor], Tensor]]]) -> Combine:
    def add(h: Tensor, seen: Sites) -> Tensor:
        for read, function in steers:
            h = h + function(seen[read])
        return h

    return add


def hook_on(place: Place, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Put a hook on a place that replaces the activation there by a function of it."""
    if place.shaped_by is not None:
        return _hook_on_flat(place, place.shaped_by, change)
    change = _unscaled(place, change)
    if place.side == "output":
        return place.module.register_forward_hook(
            lambda _m, _a, out: with_first(out, change(first_tensor(out)))
        )

    def before(
        _m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return place.module.register_forward_pre_hook(before, with_kwargs=True)


def _unscaled(
    place: Place, change: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The change of what a module gives, from that of what is added to the stream."""
    if place.in_place:  # what was seen must not be what the block changes next
        return lambda given: change(given).clone()
    if place.scale == 1:
        return change

    def scaled(given: Tensor) -> Tensor:
        added = given * place.scale
        # Not change(added) / scale: what is not steered stays as it is, bit for bit.
        return given + (change(added) - added) / place.scale

    return scaled


class _Pair(RemovableHandle):
    """Two hooks that go together; known by the first."""

    def __init__(self, first: RemovableHandle, second: RemovableHandle) -> None:
        self.__dict__.update(vars(first))
        self._second = second

    def remove(self) -> None:
        super().remove()
        self._second.remove()


def _hook_on_flat(
    place: Place, shaped_by: nn.Module, change: Callable[[Tensor], Tensor]
) -> RemovableHandle:
    """A hook on what a block keeps as [batch · seq, d]: it sees [batch, seq, d]."""
    shape: list[int] = []

    def note(hidden: Tensor) -> Tensor:
        shape[:] = hidden.shape[:-1]
        return hidden

    def reshaped(flat: Tensor) -> Tensor:
        return change(flat.view(*shape, flat.shape[-1])).view(flat.shape)

    noting = hook_on(Place(shaped_by, "input"), note)
    return _Pair(hook_on(replace(place, shaped_by=None), reshaped), noting)


def ahead_of_recorders(module: nn.Module, handle: RemovableHandle) -> None:
    """Let a hook on a module's output run before those of Transformers that record it.

    Transformers puts hooks on the blocks the first time `output_hidden_states` is asked
    for, and leaves them there. What they record would be steered or not, according to
    who came first. The order of all other hooks stays.
    """
    hooks = module._forward_hooks
    order = [number for number in hooks if number != handle.id]
    recorder = next((n for n in order if _records(hooks[n])), None)
    if recorder is not None:
        for number in order[order.index(recorder) :]:
            hooks.move_to_end(number)  # type: ignore[attr-defined]


def _records(hook: object) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


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
    calls: dict[str, list[tuple[Tensor | None, int]]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _arguments: object, out: object) -> None:
            found = activation_of(out)
            calls.setdefault(name, []).append((found, _version(found)))

        return note

    with ExitStack() as stack:
        for name, module in modules.items():
            if name:
                handle = module.register_forward_hook(hook_of(name))
                stack.callback(handle.remove)
        final = run()
    once = {
        name: (id(found[0][0]), found[0][1])
        for name, found in calls.items()
        if len(found) == 1 and found[0][0] is not None
    }
    seen, distinct = {(id(final), _version(final))}, []
    for name, identity in once.items():
        if identity not in seen:
            seen.add(identity)
            distinct.append(name)
    return tuple(once), tuple(distinct)


def _version(activation: Tensor | None) -> int:
    """How often a tensor has been changed in place."""
    return 0 if activation is None else activation._version
