"""A model as a list of stages: embed, block 0 … L-1, head; or one stage for a module.

A stage is a pure function of its parameters and its input, and returns its output and
the activations at its sites. Hugging Face models are cut without touching their code:
each block's `forward` is replaced by a stub that records how it is called and hands
the hidden state on; the model runs once; the forwards are put back. Masks, rotary
tables and flags of every block are then known exactly (they differ per layer in some
families).

Symbols: `tensors` maps full parameter and buffer names to values in the compute
dtype; `low` maps weight names to factors (left, right) of an update that is applied
beside its weight, never as a dense matrix: W x + t · left (right x).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equiv.errors import EquivError, InputsError, SiteError, UnsupportedModelError
from equiv.model.batches import POSITIONAL, Batch
from equiv.model.factors import Factors, forward_with_factors
from equiv.model.families import Blocks, find_blocks
from equiv.model.guard import kept
from equiv.model.precision import arithmetic
from equiv.model.sites import (
    EMBED,
    LOGITS,
    OUTPUT,
    SITES,
    Place,
    first_tensor,
    is_activation,
    with_first,
)

Steer = Mapping[str, Callable[[Tensor], Tensor]]
Sites = dict[str, Tensor]
Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]  # block → how it is called


class _ReachedBlocks(Exception):
    """Raised by the last stub: what follows the blocks need not be computed."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class UnusedFactorsError(Exception):
    """Low-rank factors whose weight was not used by a plain call of its module."""

    def __init__(self, names: set[str]) -> None:
        self.names = names


@dataclass(frozen=True)
class Stage:
    """One stage of a model.

    Attributes:
        name: "embed", "block", "head" or "module".
        layer: Index of the block; the number of blocks for the head.
        names: Full names of its parameters and buffers.
        sites: Sites inside it whose activations it returns.
        output: The name its output goes by among the activations.
    """

    name: str
    layer: int
    names: tuple[str, ...]
    sites: tuple[str, ...]
    output: str


@dataclass
class _Active:
    """What the hooks do during one run of a stage."""

    seen: Sites = field(default_factory=dict)
    steer: Steer = field(default_factory=dict)
    low: Factors = field(default_factory=dict)
    scale: Tensor | float = 0.0
    at: float = 0.0
    applied: set[str] = field(default_factory=set)


class StagedModel:
    """A model cut into stages for a fixed list of batches; use `staged(...)`."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], dtype: torch.dtype
    ) -> None:
        self.model = model
        self.batches = list(batches)
        self.dtype = dtype
        self.blocks: Blocks | None = find_blocks(model)
        self.parameters = dict(model.named_parameters())
        # Tied names are one tensor here; `functional_call` ties them again.
        self.tensors_of_model = {**self.parameters, **dict(model.named_buffers())}
        self.calls: list[Calls] = []
        self.stages: list[Stage] = []
        self.output_site = OUTPUT  # or LOGITS, once cut
        self._active = _Active()
        self._modules = dict(model.named_modules())
        self._owner: dict[nn.Module, str] = {}

    @property
    def num_layers(self) -> int:
        """Number of blocks; 1 for a module that is one stage."""
        return len(self.blocks.modules) if self.blocks else 1

    @property
    def layers(self) -> range:
        """Indices of the blocks."""
        return range(self.num_layers)

    def tensors(self, stage: Stage) -> dict[str, Tensor]:
        """The stage's parameters and buffers in the compute dtype, by full name."""
        made = {name: self._cast(self.tensors_of_model[name]) for name in stage.names}
        # A forward may write into buffers: never into the caller's.
        return {n: t if n in self.parameters else t.clone() for n, t in made.items()}

    def notebooks(
        self, stage: Stage, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Buffers that the code around the blocks may write into during a run.

        Some rotary embeddings do. `jvp` allows that for its own arguments only, so they
        have to be among these, with a tangent of zero.
        """
        return {
            name: value
            for name, value in tensors.items()
            if stage.name in ("embed", "head")
            and name not in self.parameters
            and value.is_floating_point()
        }

    def run(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        hidden: Tensor | None,
        batch: int,
        *,
        low: Factors | None = None,
        scale: Tensor | float = 0.0,
        at: float = 0.0,
        steer: Steer | None = None,
    ) -> tuple[Tensor, Sites]:
        """Run one stage.

        Args:
            stage: The stage.
            tensors: Its parameters and buffers, by full name.
            hidden: The stage's input [batch, seq, d]; `None` for the first stage.
            batch: Which batch.
            low: Low-rank updates applied at `scale`.
            scale: t; under `jvp` it carries a tangent.
            at: t as a number.
            steer: Added at the site: site → function of the site's activation.

        Returns:
            The stage's output and the activations at its sites, before steering.
        """
        self._active = _Active({}, steer or {}, low or {}, scale, at)
        if stage.name == "block":
            output = self._run_block(stage, tensors, hidden, batch)
        elif stage.name == "embed":
            output = self._run_embed(tensors, batch)
        elif stage.name == "head":
            assert hidden is not None
            output = self._run_head(tensors, hidden, batch)
        else:
            output = _model_output(self._forward(tensors, batch))
        unused = set(self._active.low) - self._active.applied
        if unused:
            raise UnusedFactorsError(unused)
        seen = {site: self._active.seen[site] for site in stage.sites}
        return output, {**seen, stage.output: output} if stage.name != "block" else seen

    def _run_block(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        hidden: Tensor | None,
        batch: int,
    ) -> Tensor:
        assert self.blocks is not None and hidden is not None
        prefix = f"{self.blocks.path}.{stage.layer}."
        args, kwargs = self.calls[batch][stage.layer]
        own = {name.removeprefix(prefix): value for name, value in tensors.items()}
        block = self.blocks.modules[stage.layer]
        return first_tensor(functional_call(block, own, (hidden, *args), kwargs))

    def _run_embed(
        self,
        tensors: Mapping[str, Tensor],
        batch: int,
        record: Calls | None = None,
    ) -> Tensor:
        with self._stubs(record, enter=None):
            try:
                self._forward(tensors, batch)
            except _ReachedBlocks as reached:
                return reached.hidden
        raise UnsupportedModelError(
            f"{type(self.model).__name__} does not run its blocks in `forward`."
        )

    def _run_head(
        self, tensors: Mapping[str, Tensor], hidden: Tensor, batch: int
    ) -> Tensor:
        with self._stubs(None, enter=hidden):
            return _model_output(self._forward(tensors, batch))

    def _forward(self, tensors: Mapping[str, Tensor], batch: int) -> object:
        arguments = {
            name: self._cast(value) if isinstance(value, Tensor) else value
            for name, value in self.batches[batch].arguments.items()
        }
        args = (arguments.pop(POSITIONAL),) if POSITIONAL in arguments else ()
        with kept(self.model):
            return functional_call(self.model, dict(tensors), args, arguments)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype) if tensor.is_floating_point() else tensor

    @contextmanager
    def _stubs(
        self,
        record: Calls | None,
        enter: Tensor | None,
    ) -> Iterator[None]:
        """Blocks that hand the hidden state on.

        With `enter` the last block returns it and the head runs; without, the last
        block ends the run.
        """
        assert self.blocks is not None
        last = len(self.blocks.modules) - 1

        def stub(index: int) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if record is not None:
                    record[index] = (args, kwargs)
                if index < last:
                    return hidden_states
                if enter is None:
                    raise _ReachedBlocks(hidden_states)
                return enter

            return forward

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks.modules):
                stack.enter_context(_replaced_forward(block, stub(index)))
            yield

    def cut(self, sites: Sequence[str] | None) -> None:
        """Make the stages; run the embedding of every batch to see the blocks' calls.

        Raises:
            SiteError: If a site does not exist.
        """
        if self.blocks is None:
            self._cut_module(sites)
            return
        if unknown := [site for site in sites or () if site not in SITES]:
            raise SiteError(f"Expected sites in {', '.join(SITES)}, got {unknown}.")
        inside = [self._names_under(f"{self.blocks.path}.{i}.") for i in self.layers]
        blocks = {name for names in inside for name in names}
        outside = tuple(n for n in self.tensors_of_model if n not in blocks)
        embed = Stage("embed", -1, outside, (), EMBED)
        tensors = self.tensors(embed)
        for batch in range(len(self.batches)):
            self.calls.append({})
            hidden = self._run_embed(tensors, batch, record=self.calls[batch])
        with self._stubs(None, hidden):
            output = self._forward(tensors, len(self.batches) - 1)
        self.output_site = LOGITS if hasattr(output, LOGITS) else OUTPUT
        self.stages = [
            embed,
            *(Stage("block", i, inside[i], SITES, "block_out") for i in self.layers),
            Stage("head", self.num_layers, outside, (), self.output_site),
        ]

    def _names_under(self, prefix: str) -> tuple[str, ...]:
        return tuple(name for name in self.tensors_of_model if name.startswith(prefix))

    def _cut_module(self, sites: Sequence[str] | None) -> None:
        outputs, distinct = self._module_outputs()
        if unknown := [site for site in sites or () if site not in outputs]:
            raise SiteError(
                f"Expected sites among {', '.join(outputs) or 'none'} (submodules that "
                f"are called once and return one floating tensor), got {unknown}."
            )
        names = tuple(self.tensors_of_model)
        chosen = distinct if sites is None else tuple(sites)
        # A submodule may be called "output" too.
        self.output_site = OUTPUT if OUTPUT not in self._modules else f"model {OUTPUT}"
        self.stages = [Stage("module", 0, names, chosen, self.output_site)]

    def _module_outputs(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Submodules that are called once and return an activation; the distinct ones.

        Some hand on what they got (dropout, identity), or what becomes the model's
        output; tensors changed in place since then are other activations.
        """
        calls: dict[str, list[tuple[object, int]]] = {}

        def hook_of(name: str) -> Callable[..., None]:
            return lambda _m, _a, out: calls.setdefault(name, []).append(
                (out, _version(out))
            )

        with ExitStack() as stack:
            for name, module in self._modules.items():
                if name:
                    handle = module.register_forward_hook(hook_of(name))
                    stack.callback(handle.remove)
            tensors = {n: self._cast(t) for n, t in self.tensors_of_model.items()}
            final = _model_output(self._forward(tensors, 0))
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

    def place(self, layer: int, site: str) -> Place:
        """Where a site is in the modules."""
        if self.blocks is not None:
            return self.blocks.place(layer, site)
        return Place(self._modules[site], "output")

    @contextmanager
    def ready(self, low_names: Sequence[str]) -> Iterator[None]:
        """Make stages runnable: the arithmetic, and hooks for sites and factors."""
        with arithmetic(self.dtype), ExitStack() as stack:
            for name in low_names:
                module = self._modules[name.rpartition(".")[0]]
                beside = self._forward_beside(name, module)
                stack.enter_context(_replaced_forward(module, beside))
            for stage in self.stages:
                for site in stage.sites:
                    place = self.place(stage.layer, site)
                    stack.callback(self._site_hook(place, site).remove)
            yield

    def _site_hook(self, place: Place, site: str) -> Any:
        in_place = self.blocks is None  # a ReLU(inplace=True) may come next

        def at(activation: Tensor) -> Tensor:
            self._active.seen[site] = activation.clone() if in_place else activation
            steer = self._active.steer.get(site)
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

    def _forward_beside(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The module's forward; with the update beside its weight when there is one."""
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            active = self._active
            if name not in active.low:
                return plain(*args, **kwargs)
            active.applied.add(name)
            beside = forward_with_factors(
                module, active.low[name], active.scale, active.at
            )
            return beside(*args, **kwargs)

        return forward


def _described(batch: Batch) -> str:
    """The arguments of a call with their shapes, for messages."""
    return ", ".join(
        f"{name or 'input'} {tuple(value.shape)}"
        for name, value in batch.arguments.items()
        if isinstance(value, Tensor)
    )


def _version(output: object) -> int:
    """How often a tensor has been changed in place."""
    return output._version if isinstance(output, Tensor) else 0


@contextmanager
def staged(
    model: nn.Module,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    *,
    sites: Sequence[str] | None = None,
    low_names: Sequence[str] = (),
) -> Iterator[StagedModel]:
    """Cut a model into stages; nothing of it is left on the model afterwards.

    Args:
        model: The model, ready to be measured (see `guard.measured`).
        batches: The batches that will be run.
        dtype: Compute dtype; parameters are cast stage by stage.
        sites: Sites to capture; `None` means all.
        low_names: Weights that will be given low-rank updates.

    Raises:
        InputsError: If the model cannot be run on the batches.
        SiteError: If a site does not exist.
    """
    cut = prepared(model, batches, dtype, sites)
    with cut.ready(low_names):
        yield cut


def prepared(
    model: nn.Module,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    sites: Sequence[str] | None,
) -> StagedModel:
    """A model cut into stages, to be run inside `ready`; arguments as for `staged`."""
    with arithmetic(dtype):
        cut = StagedModel(model, batches, dtype)
        try:
            cut.cut(sites)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            if isinstance(error, EquivError):
                raise
            raise InputsError(
                f"{type(model).__name__} cannot be run on these inputs "
                f"({_described(batches[0])}): {str(error).rstrip('.')}."
            ) from error
    return cut


@contextmanager
def _replaced_forward(
    module: nn.Module, forward: Callable[..., Tensor]
) -> Iterator[None]:
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def _model_output(output: object) -> Tensor:
    """Logits, else the last hidden state, else the (first) tensor."""
    for name in (LOGITS, "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return first_tensor(output)
