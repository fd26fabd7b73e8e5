"""What lies around the blocks: the embedding, the bridge and the head.

They are run by the model's own `forward`, with stubs in place of the blocks: nothing of
its code is repeated here.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equiv.errors import UnsupportedModelError
from equiv.model.batches import POSITIONAL, Batch
from equiv.model.beside import beside_the_stream
from equiv.model.blocks import Blocks
from equiv.model.guard import kept
from equiv.model.memory import packed, parted
from equiv.model.packed import unpacked
from equiv.model.stubs import Calls, ReachedBlocks, reached, stubs


class Around:
    """Runs a model around its blocks; arguments as of `StagedModel`.

    Attributes:
        calls: Per batch, how each block is called; known once `see` has run.
        sources: Per batch, how many tokens an encoder before a decoder reads.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks | None,
        batches: Sequence[Batch],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.batches, self.dtype = model, batches, dtype
        self.stacks: tuple[Blocks, ...] = () if blocks is None else blocks.stacks
        self.calls: list[Calls] = []
        self.sources: list[int] = []
        self._entered: Tensor | None = None  # some input of the bridge, to try it on

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor of the model in the compute dtype."""
        if not tensor.is_floating_point():
            return tensor
        return unpacked(tensor).to(self.dtype)

    def forward(self, tensors: Mapping[str, Tensor], batch: int) -> object:
        """What the model returns for a batch, with these parameters and buffers."""
        arguments = {
            name: self.cast(value) if isinstance(value, Tensor) else value
            for name, value in self.batches[batch].arguments.items()
        }
        args = (arguments.pop(POSITIONAL),) if POSITIONAL in arguments else ()
        with kept(self.model):
            return functional_call(self.model, dict(tensors), args, arguments)

    def embed(
        self, tensors: Mapping[str, Tensor], batch: int, record: Calls | None = None
    ) -> Tensor:
        """The first block's input; `record` gets how the blocks are called."""
        with stubs(self.stacks[0], record):
            return self._reached(tensors, batch).hidden

    def bridge(
        self,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        batch: int,
        record: Calls | None = None,
    ) -> Tensor:
        """From what the encoder's blocks give to what the decoder's are given."""
        encoder, decoder = self.stacks
        with stubs(encoder, enter=hidden), stubs(decoder, record):
            found = self._reached(tensors, batch)
        if found.memory is None:
            raise UnsupportedModelError(
                f"The decoder of {type(self.model).__name__} is not given what its "
                "encoder returns: pass the stack that the update is in."
            )
        return packed(found.memory, found.hidden)

    def head(
        self,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        memory: Tensor | None,
        batch: int,
    ) -> object:
        """What the model makes of what its last block gives."""
        given = (hidden,) if memory is None else (memory, hidden)
        with ExitStack() as stack:
            for blocks, enter in zip(self.stacks, given, strict=True):
                stack.enter_context(stubs(blocks, enter=enter))
            return self.forward(tensors, batch)

    def see(self, tensors: Mapping[str, Tensor]) -> object:
        """Run what lies around the blocks on every batch, and see how they are called.

        Args:
            tensors: Parameters and buffers outside the blocks, by name.

        Returns:
            What the model returns for the last batch, as if its blocks did nothing.
        """
        hidden, memory = torch.empty(0), None
        for batch in range(len(self.batches)):
            self.calls.append({})
            hidden = self.embed(tensors, batch, self.calls[batch])
            if len(self.stacks) > 1:
                self._entered = hidden if batch == 0 else self._entered
                self.sources.append(hidden.shape[1])
                calls: Calls = {}
                stream = self.bridge(tensors, hidden, batch, calls)
                memory, hidden = parted(stream, hidden.shape[1])
                first = len(self.stacks[0].modules)
                self.calls[batch] |= {first + i: call for i, call in calls.items()}
        return self.head(tensors, hidden, memory, len(self.batches) - 1)

    def beside(
        self, stage: str, names: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> list[str]:
        """Those parameters that reach the blocks beside the stream.

        Args:
            stage: "embed", or "bridge": which blocks.
            names: The parameters in question.
            tensors: Parameters and buffers outside the blocks, by name.
        """
        first = len(self.stacks[0].modules)
        own = (
            range(first)
            if stage == "embed"
            else range(first, first + len(self.calls[0]))
        )

        def run(moved: Mapping[str, Tensor], calls: Calls) -> None:
            if stage == "embed":
                self.embed(moved, 0, calls)
            else:
                assert self._entered is not None
                self.bridge(moved, self._entered, 0, calls)

        base = {i - own.start: call for i, call in self.calls[0].items() if i in own}
        return beside_the_stream(names, tensors, base, run)

    def _reached(self, tensors: Mapping[str, Tensor], batch: int) -> ReachedBlocks:
        """What the stubs of the blocks are given."""
        return reached(self.model, lambda: self.forward(tensors, batch))
