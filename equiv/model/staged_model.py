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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equiv.errors import SiteError, UnsupportedModelError
from equiv.model.batches import POSITIONAL, Batch
from equiv.model.beside import beside_the_stream
from equiv.model.blocks import Blocks
from equiv.model.factors import Factors
from equiv.model.guard import kept
from equiv.model.hooks import Hooks, outputs_of
from equiv.model.precision import arithmetic
from equiv.model.sites import (
    EMBED,
    FLOW,
    LOGITS,
    OUTPUT,
    Place,
    Site,
    Sites,
    Steer,
    check_flow,
    first_tensor,
    model_output,
    read_and_written,
)
from equiv.model.stubs import Calls, ReachedBlocks, replaced_forward, stubs


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


class StagedModel:
    """A model cut into stages for a fixed list of batches; use `staged(...)`."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks | None,
        batches: Sequence[Batch],
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.batches = list(batches)
        self.dtype = dtype
        self.blocks = blocks
        self.parameters = dict(model.named_parameters())
        # Tied names are one tensor here; `functional_call` ties them again.
        self.tensors_of_model = {**self.parameters, **dict(model.named_buffers())}
        self.calls: list[Calls] = []
        self.stages: list[Stage] = []
        self.output_site = OUTPUT  # or LOGITS, once cut
        self._in_stream: set[str] = set()  # parameters that reach no block beside it
        self._hooks = Hooks()
        self._modules = dict(model.named_modules())

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
            steer: Added at a site: site, or read->write → function of what is read.

        Returns:
            The stage's output and the activations at its sites, before steering.
        """
        self._hooks.begin(
            steer or {},
            low or {},
            scale,
            at,
            hidden=hidden,
            joins_middle=bool(self.blocks and self.blocks.joins_middle),
        )
        if stage.name == "block":
            output = self._run_block(stage, tensors, hidden, batch)
        elif stage.name == "embed":
            output = self._run_embed(tensors, batch)
        elif stage.name == "head":
            assert hidden is not None
            output = self._run_head(tensors, hidden, batch)
        else:
            output = model_output(self._forward(tensors, batch))
        self._hooks.check_applied()
        seen = {site: self._hooks.writes.seen[site] for site in stage.sites}
        return output, {**seen, stage.output: output} if stage.name != "block" else seen

    def whole(self, batch: int) -> Tensor:
        """What the model returns when it is run as it is."""
        tensors = {n: self._cast(t) for n, t in self.tensors_of_model.items()}
        return model_output(self._forward(tensors, batch))

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
        assert self.blocks is not None
        with stubs(self.blocks, record):
            try:
                self._forward(tensors, batch)
            except ReachedBlocks as reached:
                return reached.hidden
        raise UnsupportedModelError(
            f"{type(self.model).__name__} does not run its blocks in `forward`."
        )

    def _run_head(
        self, tensors: Mapping[str, Tensor], hidden: Tensor, batch: int
    ) -> Tensor:
        assert self.blocks is not None
        with stubs(self.blocks, enter=hidden):
            return model_output(self._forward(tensors, batch))

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

    def cut(self, sites: Sequence[str] | None) -> None:
        """Make the stages; run the embedding of every batch to see the blocks' calls.

        Raises:
            SiteError: If a site does not exist.
        """
        if self.blocks is None:
            self._cut_module(sites)
            return
        for site in sites or ():
            check_flow(Site(site))
            for layer in self.layers:
                self.blocks.place(layer, Site(site).read)
                self.blocks.place(layer, Site(site).write)
        asked = (*self.blocks.sites, *read_and_written(sites or ()))
        captured = tuple(name for name in FLOW if name in asked)
        inside = [self._names_under(f"{self.blocks.path}.{i}.") for i in self.layers]
        blocks = {name for names in inside for name in names}
        outside = tuple(n for n in self.tensors_of_model if n not in blocks)
        embed = Stage("embed", -1, outside, (), EMBED)
        tensors = self.tensors(embed)
        for batch in range(len(self.batches)):
            self.calls.append({})
            hidden = self._run_embed(tensors, batch, record=self.calls[batch])
        with stubs(self.blocks, enter=hidden):
            output = self._forward(tensors, len(self.batches) - 1)
        self.output_site = LOGITS if hasattr(output, LOGITS) else OUTPUT
        self.stages = [
            embed,
            *(Stage("block", i, inside[i], captured, "block_out") for i in self.layers),
            Stage("head", self.num_layers, outside, (), self.output_site),
        ]

    def check_update(self, names: Iterable[str]) -> None:
        """Refuse an update of what reaches the blocks beside the stream.

        Args:
            names: Parameters outside the blocks that it changes.

        Raises:
            UnsupportedModelError: If one of these does.
        """
        asked = set(names) - self._in_stream
        if self.blocks is None or not asked:
            return
        lost = beside_the_stream(
            sorted(asked),
            self.tensors(self.stages[0]),
            self.calls[0],
            lambda own, calls: self._run_embed(own, 0, calls),
        )
        if lost:
            raise UnsupportedModelError(
                f"`{lost[0]}` of {type(self.model).__name__} reaches the blocks beside "
                "the stream: no site sees all of what an update of it does. Restrict "
                "the update to other weights."
            )
        self._in_stream |= asked

    def _names_under(self, prefix: str) -> tuple[str, ...]:
        return tuple(name for name in self.tensors_of_model if name.startswith(prefix))

    def _cut_module(self, sites: Sequence[str] | None) -> None:
        tensors = {n: self._cast(t) for n, t in self.tensors_of_model.items()}
        outputs, distinct = outputs_of(
            self._modules, lambda: model_output(self._forward(tensors, 0))
        )
        chosen = distinct if sites is None else read_and_written(sites)
        if unknown := [site for site in chosen if site not in outputs]:
            raise SiteError(
                f"Expected sites among {', '.join(outputs) or 'none'} (submodules that "
                f"are called once and return one floating tensor), got {unknown}."
            )
        names = tuple(self.tensors_of_model)
        # A submodule may be called "output" too.
        self.output_site = OUTPUT if OUTPUT not in self._modules else f"model {OUTPUT}"
        self.stages = [Stage("module", 0, names, chosen, self.output_site)]

    def check_site(self, layer: int, site: str) -> None:
        """Refuse a (layer, site) that cannot be steered.

        Raises:
            SiteError: If there is none such.
        """
        if self.blocks is not None:
            self.blocks.block(layer)
            check_flow(Site(site))
        elif layer != 0:
            raise SiteError(f"Expected layer 0 of a plain module, got {layer}.")

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
                beside = self._hooks.beside(name, module)
                stack.enter_context(replaced_forward(module, beside))
            stack.enter_context(self.hooked(self.stages))
            yield

    @contextmanager
    def hooked(self, stages: Sequence[Stage]) -> Iterator[None]:
        """Hooks on the sites of some stages."""
        in_place = self.blocks is None  # a ReLU(inplace=True) may come next
        with ExitStack() as stack:
            for stage in stages:
                for site in stage.sites:
                    place = self.place(stage.layer, site)
                    handle = self._hooks.on_site(place, site, in_place=in_place)
                    stack.callback(handle.remove)
            yield
