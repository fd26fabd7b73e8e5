"""A model as a list of stages: embed, block 0 … L-1, head; or one stage for a module.

An encoder–decoder has one more, the bridge: the encoder's last norm and the decoder's
embedding, between the blocks of the two; what is handed on from there is described in
`memory.py`.

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

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equiv.errors import SiteError, UnsupportedModelError
from equiv.model.around import Around
from equiv.model.batches import Batch
from equiv.model.blocks import Blocks
from equiv.model.factors import Factors
from equiv.model.hooks import Hooks, outputs_of
from equiv.model.memory import NAME as MEMORY
from equiv.model.memory import packed, parted
from equiv.model.position_bias import position_bias, sharing
from equiv.model.precision import arithmetic
from equiv.model.routing import Routing, chosen_experts, routers
from equiv.model.sites import (
    EMBED,
    LOGITS,
    OUTPUT,
    STREAM,
    Place,
    Site,
    Sites,
    Steer,
    check_flow,
    first_tensor,
    model_output,
    read_and_written,
)
from equiv.model.stage import Stage as Stage
from equiv.model.stage import block_stage
from equiv.model.stubs import replaced_forward


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
        self.stages: list[Stage] = []
        self.output_site = OUTPUT  # or LOGITS, once cut
        self._in_stream: set[tuple[str, str]] = set()  # known to reach blocks by it
        self._around = Around(model, blocks, self.batches, dtype)
        self._hooks = Hooks()
        self.gates = routers(blocks) if blocks is not None else {}  # layer → router
        self.chosen: Routing = {}  # in the last run
        self._modules = dict(model.named_modules())

    @property
    def num_layers(self) -> int:
        """Number of blocks; 1 for a module that is one stage."""
        return len(self.blocks.modules) if self.blocks else 1

    @property
    def layers(self) -> range:
        """Indices of the blocks."""
        return range(self.num_layers)

    def mask(self, stage: Stage, batch: int) -> Tensor:
        """The tokens of a stage that count, bool [batch, seq]."""
        own = self.batches[batch]
        return own.mask if own.source is None or not stage.encodes else own.source

    def layers_with(self, site: str) -> range | tuple[int, ...]:
        """The layers that have a site, read->write or not."""
        return self.layers if self.blocks is None else self.blocks.layers_with(site)

    def decodes(self, layer: int) -> bool:
        """Whether a layer, or the output, lies behind an encoder."""
        return self.blocks is not None and layer >= self.blocks.first > 0

    def tensors(self, stage: Stage) -> dict[str, Tensor]:
        """The stage's parameters and buffers in the compute dtype, by full name."""
        made = {
            name: self._around.cast(self.tensors_of_model[name]) for name in stage.names
        }
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
            if stage.name in ("embed", "bridge", "head")
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
            hidden: The stage's input [batch, seq, d], in a decoder with what the
                encoder gave before it; `None` for the first stage.
            batch: Which batch.
            low: Low-rank updates applied at `scale`.
            scale: t; under `jvp` it carries a tangent.
            at: t as a number.
            steer: Added at a site: site, or read->write → function of what is read.

        Returns:
            The stage's output and the activations at its sites, before steering.
        """
        memory = None
        if stage.name in ("block", "head") and hidden is not None:
            memory, hidden = self.parted(stage, hidden, batch)
        joined = self.blocks.joined(stage.layer) if self.blocks is not None else ""
        self._hooks.begin(
            steer or {}, low or {}, scale, at, hidden=hidden, joined=joined
        )
        self.chosen.clear()
        if stage.name == "module":
            output = model_output(self._around.forward(tensors, batch))
        elif stage.name == "embed":
            output = self._around.embed(tensors, batch)
        else:
            assert hidden is not None
            output = self._run_inside(stage, tensors, hidden, memory, batch)
        self._hooks.check_applied()
        seen = {site: self._hooks.writes.seen[site] for site in stage.sites}
        return output, {
            **seen,
            stage.output: output,
        } if stage.output not in seen else seen

    def parted(
        self, stage: Stage, stream: Tensor, batch: int
    ) -> tuple[Tensor | None, Tensor]:
        """What the encoder gave, in stages behind it, and the stage's own stream."""
        sources = self._around.sources
        if stage.encodes or not sources:
            return None, stream
        return parted(stream, sources[batch])

    def _run_inside(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        memory: Tensor | None,
        batch: int,
    ) -> Tensor:
        """A stage behind the first, on its own stream and the encoder's output."""
        if stage.name == "bridge":
            return self._around.bridge(tensors, hidden, batch)
        if stage.name == "head":
            return model_output(self._around.head(tensors, hidden, memory, batch))
        output = self._run_block(stage, tensors, hidden, memory, batch)
        return output if memory is None else packed(memory, output)

    def whole(self, batch: int) -> Tensor:
        """What the model returns when it is run as it is."""
        tensors = {n: self._around.cast(t) for n, t in self.tensors_of_model.items()}
        return model_output(self._around.forward(tensors, batch))

    def _run_block(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        memory: Tensor | None,
        batch: int,
    ) -> Tensor:
        assert self.blocks is not None
        prefix = f"{self.blocks.name(stage.layer)}."
        args, kwargs = self._around.calls[batch][stage.layer]
        if memory is not None:
            kwargs = {**kwargs, MEMORY: memory}
        if shared := sharing(self.blocks, stage.layer):
            attention, length = self._modules[shared], hidden.shape[1]
            bias = position_bias(attention, shared, tensors, length)
            kwargs = {**kwargs, "position_bias": bias}
        own = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        block = self.blocks.modules[stage.layer]
        return first_tensor(functional_call(block, own, (hidden, *args), kwargs))

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
            for layer in self.blocks.layers_with(site):
                self.blocks.place(layer, Site(site).read)
                self.blocks.place(layer, Site(site).write)
        inside = [self._names_under(f"{self.blocks.name(i)}.") for i in self.layers]
        blocks = {name for names in inside for name in names}
        outside = tuple(n for n in self.tensors_of_model if n not in blocks)
        pair = self.blocks.encoder is not None
        embed = Stage("embed", -1, outside, (), EMBED, pair)
        output = self._around.see(self.tensors(embed))
        self.output_site = LOGITS if hasattr(output, LOGITS) else OUTPUT
        asked = (*self.blocks.sites, *read_and_written(sites or ()))
        stages = [block_stage(self.blocks, i, inside[i], asked) for i in self.layers]
        if pair:
            stages.insert(self.blocks.first, Stage("bridge", -1, outside, (), STREAM))
        head = Stage("head", self.num_layers, outside, (), self.output_site)
        self.stages = [embed, *stages, head]

    def check_update(self, stage: Stage, names: Iterable[str]) -> None:
        """Refuse an update of what reaches the blocks beside the stream.

        Args:
            stage: The embedding, or the bridge.
            names: Parameters outside the blocks that it changes.

        Raises:
            UnsupportedModelError: If one of these does.
        """
        asked = {name for name in names if (stage.name, name) not in self._in_stream}
        if self.blocks is None or not asked:
            return
        self._hooks.begin({}, {}, 0.0, 0.0)  # no longer as in the run before
        lost = self._around.beside(stage.name, sorted(asked), self.tensors(stage))
        if lost:
            raise UnsupportedModelError(
                f"`{lost[0]}` of {type(self.model).__name__} reaches the blocks beside "
                "the stream: no site sees all of what an update of it does. Restrict "
                "the update to other weights."
            )
        self._in_stream |= {(stage.name, name) for name in asked}

    def _names_under(self, prefix: str) -> tuple[str, ...]:
        return tuple(name for name in self.tensors_of_model if name.startswith(prefix))

    def _cut_module(self, sites: Sequence[str] | None) -> None:
        tensors = {n: self._around.cast(t) for n, t in self.tensors_of_model.items()}
        outputs, distinct = outputs_of(
            self._modules, lambda: model_output(self._around.forward(tensors, 0))
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
            for name in read_and_written([site]):
                self.blocks.place(layer, name)
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
            self.chosen = stack.enter_context(chosen_experts(self.gates))
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
