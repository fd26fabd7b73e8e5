"""Sites: the mathematical places where a shift is measured and steering is added.

- `attn_out`: the tensor the attention sub-layer **adds to the residual stream**, after
  a sandwich norm or scale where the model has one. Steering here passes through the
  skip *and* the MLP.
- `mlp_in`: the MLP's input, after its norm. Steering here passes only through the MLP.
  Texts call both of these "pre-MLP".
- `mlp_out`: the tensor the MLP sub-layer **adds to the residual stream** ("post-MLP").
- `block_out`: the residual stream after both additions ("post-block"). In post-norm
  blocks (BERT) it is after the last norm of the block, and the writes are the tensors
  added before it.
- `logits` or `output`: what the model returns; measured, never steered.

A module without blocks has one layer, 0, whose sites are its submodules' outputs, by
name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

SITES = ("attn_out", "mlp_in", "mlp_out", "block_out")
LOGITS = "logits"
OUTPUT = "output"
EMBED = "embed"  # the first block's input; part of the engine, not a site to steer

SiteKey = tuple[int, str]
Sites = dict[str, Tensor]  # site → activation
Steer = Mapping[str, Callable[[Tensor], Tensor]]  # site → what is added, of it


@dataclass(frozen=True)
class Place:
    """Where a site is in the modules: the input or the (first) output of `module`."""

    module: nn.Module
    side: Literal["input", "output"]


def first_tensor(output: object) -> Tensor:
    """The hidden state in what a module returned: itself, or a tuple's first entry."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"expected a tensor or a tuple that starts with one, got {output!r}"
    )


def with_first(output: object, tensor: Tensor) -> object:
    """`output` with its hidden state replaced by `tensor`."""
    if isinstance(output, Tensor):
        return tensor
    assert isinstance(output, Sequence)
    return (tensor, *output[1:])


def is_activation(output: object) -> TypeGuard[Tensor]:
    """Whether a module's output is one floating tensor with a feature axis."""
    return (
        isinstance(output, torch.Tensor)
        and output.is_floating_point()
        and output.ndim >= 2
    )


def model_output(output: object) -> Tensor:
    """Logits, else the last hidden state, else the (first) tensor."""
    for name in (LOGITS, "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return first_tensor(output)
