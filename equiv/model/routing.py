"""Mixtures of experts: which tokens an update sends to other experts.

A mixture's derivative holds inside the routing: as long as the chosen experts stay,
what they are weighted with included. Where the update, at its full size, sends a token
to another expert, the output jumps by what no derivative sees. So tokens are counted
whose set of chosen experts differs between two runs, layer by layer; the order within a
set and the weights may change as they like.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError, UnsupportedModelError
from equiv.model.blocks import Blocks

Routing = dict[int, Tensor]  # layer → bool [tokens, experts]: the chosen ones


def routers(blocks: Blocks) -> dict[int, nn.Module]:
    """Layer → the module that chooses experts; blocks without one are left out.

    Raises:
        UnsupportedModelError: If a block has more than one.
    """
    found: dict[int, nn.Module] = {}
    for layer, block in enumerate(blocks.modules):
        own = [(name, m) for name, m in block.named_modules() if _chooses(m)]
        if len(own) > 1:
            raise UnsupportedModelError(
                f"Expected one router in block {layer}, got "
                f"{', '.join(name for name, _ in own)}."
            )
        if own:
            found[layer] = own[0][1]
    return found


def _chooses(module: nn.Module) -> bool:
    """Whether it is a router: it says how many experts there are and it takes."""
    counts = getattr(module, "top_k", None), getattr(module, "num_experts", None)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return all(isinstance(n, int) for n in counts) and "weight" in own


@contextmanager
def chosen_experts(gates: Mapping[int, nn.Module]) -> Iterator[Routing]:
    """Inside, forwards fill in which experts each router chose for which token.

    Args:
        gates: Layer → router, as `routers` gives them.

    Yields:
        Layer → chosen experts, of the last forward. A router that hands out no indices
        of experts is left out.
    """
    routing: Routing = {}

    def hook(layer: int, experts: int) -> Callable[..., None]:
        def note(_m: nn.Module, _a: object, out: Any) -> None:
            given = out if isinstance(out, tuple) else (out,)
            ids = next((t for t in given if not t.is_floating_point()), None)
            if ids is None:
                return
            ids = ids.detach().reshape(-1, ids.shape[-1]).long()
            none = torch.zeros(len(ids), experts, dtype=torch.bool, device=ids.device)
            # Out of place: under `jvp` the ids are wrapped, and `none` is not.
            routing[layer] = none.scatter(1, ids, True)

        return note

    handles = []
    try:
        for layer, gate in gates.items():
            experts: Any = gate.num_experts
            handles.append(gate.register_forward_hook(hook(layer, experts)))
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def flipped(before: Routing, after: Routing) -> dict[int, Tensor]:
    """Layer → the tokens whose experts differ, bool [tokens].

    Raises:
        ArgumentError: If the two are not of the same layers, tokens and experts.

    Example:
        >>> one = {0: torch.tensor([[True, False], [True, False]])}
        >>> other = {0: torch.tensor([[True, False], [False, True]])}
        >>> flipped(one, other)[0].tolist()
        [False, True]
    """
    shapes = [{i: tuple(t.shape) for i, t in run.items()} for run in (before, after)]
    if shapes[0] != shapes[1]:
        raise ArgumentError(
            f"Expected two runs of one model on the same tokens, got {shapes[0]} and "
            f"{shapes[1]}."
        )
    return {layer: (before[layer] != after[layer]).any(-1) for layer in before}
