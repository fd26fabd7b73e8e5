"""By how much a block makes an error in the stream grow, token by token.

Symbols: J the Jacobian of a block's output in its input, over all tokens together; v a
random change of the input, independent and alike at every token; ρ the root mean square
of the input at a token.

    gain    ‖(J v)_t‖ / ‖v_t‖         excess  ‖((J − 1) v)_t‖ / ‖v_t‖

both as root mean squares over v. The block is h + G(N h) with a norm N, so that the
excess has the factor 1/ρ; the gain has the stream's own 1 besides.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp

from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.stages import Stage, StagedModel, staged

DRAWS = 16
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Gain:
    """One block's gains, each [tokens], float64.

    Attributes:
        rho: Root mean square of the block's input.
        gain: Of the block.
        excess: Of the block without its skip.
    """

    rho: Tensor
    gain: Tensor
    excess: Tensor


def gains(
    model: nn.Module, inputs: object, seed: int, draws: int = DRAWS
) -> list[Gain]:
    """The gains of every block at every token that counts, in float64.

    Args:
        model: A model of a known family.
        inputs: As for `equiv.check`, tokenised.
        seed: Draws the changes.
        draws: How many there are.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, list[list[Tensor]]] = {}
    with measured(model):
        batches = from_inputs(model, inputs, None)
        with staged(model, batches, torch.float64, sites=("block_out",)) as cut:
            for batch, entry in enumerate(batches):
                for stage, h, run in _blocks(cut, batch):
                    square = torch.zeros(2, *entry.mask.shape, dtype=torch.float64)
                    for _ in range(draws):
                        v = torch.randn(h.shape, generator=generator, dtype=h.dtype)
                        moved = jvp(run, (h,), (v,))[1]
                        square[0] += moved.square().mean(-1)
                        square[1] += (moved - v).square().mean(-1)
                    rho = h.square().mean(-1).sqrt()
                    own = rho, *(square / draws).sqrt()
                    kept = [part[entry.mask] for part in own]
                    found.setdefault(stage.layer, []).append(kept)
    return [
        Gain(*(torch.cat(parts) for parts in zip(*found[layer], strict=True)))
        for layer in sorted(found)
    ]


def _blocks(
    cut: StagedModel, batch: int
) -> Iterator[tuple[Stage, Tensor, Callable[[Tensor], Tensor]]]:
    """Every block with its input and itself as a function of that input."""
    hidden = None
    for stage in cut.stages:
        tensors = cut.tensors(stage)
        if stage.name == "block":
            assert hidden is not None
            yield (
                stage,
                hidden,
                lambda h, s=stage, t=tensors: cut.run(s, t, h, batch)[0],
            )
        hidden, _ = cut.run(stage, tensors, hidden, batch)
