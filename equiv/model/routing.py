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
from torch.func import functional_call

from equiv.errors import ArgumentError, UnsupportedModelError
from equiv.model.batches import Batch
from equiv.model.blocks import Blocks
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.packed import unpacked
from equiv.model.precision import arithmetic

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
        Layer → chosen experts, of the last forward.
    """
    routing: Routing = {}

    def hook(layer: int, experts: int) -> Callable[..., None]:
        def note(_m: nn.Module, _a: object, out: Any) -> None:
            ids = next(t for t in out if not t.is_floating_point())
            ids = ids.reshape(-1, ids.shape[-1])
            chosen = torch.zeros(len(ids), experts, dtype=torch.bool, device=ids.device)
            routing[layer] = chosen.scatter_(1, ids.long(), True)

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


def flipped_shares(
    model: nn.Module,
    update: Mapping[str, Tensor],
    inputs: object,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
) -> dict[int, float]:
    """The share of tokens that the full update sends to other experts, per layer.

    The tuned model's layers see what its layers below have made of the tokens, as they
    do when it is used. Tokens under the attention mask are not counted.

    Args:
        model: A Hugging Face model of a known family; without mixtures: no layers.
        update: Parameter name → difference, of the parameter's shape.
        inputs: As for `equiv.check`.
        tokenizer: Tokenizer for texts.
        dtype: Compute dtype.

    Returns:
        Layer → share, for the layers that are mixtures.

    Raises:
        UnsupportedModelError: If the model's blocks are not known.
        InputsError: As `equiv.check`.

    Example:
        >>> from equiv.testing.models import transformer
        >>> model, ids = transformer("mixtral"), torch.tensor([[3, 4, 5, 6]])
        >>> gate = model.model.layers[0].mlp.gate.weight
        >>> flipped_shares(model, {"model.layers.0.mlp.gate.weight": 0 * gate}, ids)
        {0: 0.0, 1: 0.0}
    """
    blocks = find_blocks(model)
    if blocks is None:
        raise UnsupportedModelError(
            f"Expected a Hugging Face model of a known family, got a "
            f"{type(model).__name__}."
        )
    gates = routers(blocks)
    batches = from_inputs(model, inputs, tokenizer)
    moved = dict.fromkeys(gates, 0)
    with measured(model), arithmetic(dtype):
        base = {name: _cast(own, dtype) for name, own in model.named_parameters()}
        tuned = {
            name: base[name] + delta.to(base[name]) for name, delta in update.items()
        }
        # A forward may write into buffers: never into the caller's.
        base |= {n: _cast(own, dtype).clone() for n, own in model.named_buffers()}
        for batch in batches:
            runs = [
                _routed(model, gates, {**base, **own}, batch) for own in ({}, tuned)
            ]
            counts = batch.mask.reshape(-1)
            for layer, tokens in flipped(*runs).items():
                moved[layer] += int(tokens[counts].sum())
    total = sum(batch.tokens for batch in batches)
    return {layer: count / total for layer, count in moved.items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return unpacked(tensor).to(dtype) if tensor.is_floating_point() else tensor


def _routed(
    model: nn.Module,
    gates: Mapping[int, nn.Module],
    tensors: Mapping[str, Tensor],
    batch: Batch,
) -> Routing:
    """Which experts the model with these weights chooses for a batch."""
    dtype = next(iter(tensors.values())).dtype
    arguments = {
        name: _cast(value, dtype) if isinstance(value, Tensor) else value
        for name, value in batch.arguments.items()
    }
    with chosen_experts(gates) as routing:
        functional_call(model, dict(tensors), (), arguments)
    return routing
