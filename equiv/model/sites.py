"""Sites: the mathematical places where a shift is measured and steering is added.

- `attn_out`: the tensor the attention sub-layer **adds to the residual stream**, after
  a sandwich norm or scale where the model has one. Steering here passes through the
  skip *and* the MLP.
- `cross_out`, in decoder blocks that attend to an encoder: the tensor that this
  cross-attention **adds to the residual stream**, after `attn_out` and before the MLP.
- `mlp_in`: the MLP's input, after its norm. Steering here passes only through the MLP.
  Texts call both of these "pre-MLP".
- `mlp_out`: the tensor the MLP sub-layer **adds to the residual stream** ("post-MLP").
- `block_out`: the residual stream after both additions ("post-block"). In post-norm
  blocks (BERT) it is after the last norm of the block, and the writes are the tensors
  added before it.
- `logits` or `output`: what the model returns; measured, never steered.

Asked for by name only, since they are measured more rarely or are wider:

- `attn_heads`: what the attention heads hand to the output projection, one head after
  the other, [batch, seq, heads · head_dim].
- `resid_mid`: the residual stream between the sub-layers, in front of the MLP.
  Steering here passes through the skip and the MLP, as at `attn_out`; what differs is
  what is read.
- `mlp_hidden`: what the MLP's activation hands to its last projection, [batch, seq, f].

What a steer reads and where it writes are two choices: `Site("block_out",
read="resid_mid")`, as text "resid_mid->block_out".

A module without blocks has one layer, 0, whose sites are its submodules' outputs, by
name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from equiv.arguments import index_of, shown
from equiv.errors import SiteError

SITES = ("attn_out", "mlp_in", "mlp_out", "block_out")
# Every site of a block, in the order in which it computes them.
FLOW = (
    "attn_heads",
    "attn_out",
    "cross_out",
    "resid_mid",
    "mlp_in",
    "mlp_hidden",
    "mlp_out",
    "block_out",
)
# TransformerLens' names for the same tensors. Its `ln2.hook_normalized` is not
# `mlp_in`: the norm's weight comes after it.
ALIASES = {
    "attn.hook_z": "attn_heads",
    "hook_attn_out": "attn_out",
    "hook_cross_attn_out": "cross_out",
    "hook_resid_mid": "resid_mid",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_hidden",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "block_out",
}
_ARROW = "->"
LOGITS = "logits"
OUTPUT = "output"
EMBED = "embed"  # the first block's input; part of the engine, not a site to steer
STREAM = "stream"  # what stages hand on beside an encoder's output; see `memory.py`

SiteKey = tuple[int, str]  # (layer, site), the site as `Site.key` writes it
Sites = dict[str, Tensor]  # site → activation
Steer = Mapping[
    str, Callable[[Tensor], Tensor]
]  # site → what is added, of what it reads


@dataclass(frozen=True)
class Site:
    """Where a steer reads and where it writes.

    Attributes:
        name: The site; both, unless `read` or `write` says otherwise.
        read: The site whose activation the steer is a function of.
        write: The site that its shift is added to.

    Example:
        >>> Site("block_out", read="resid_mid").key
        'resid_mid->block_out'
        >>> Site("resid_mid->block_out").write, Site("hook_mlp_out").key
        ('block_out', 'mlp_out')
    """

    name: str
    read: str = ""
    write: str = ""

    def __post_init__(self) -> None:
        before, arrow, after = self.name.partition(_ARROW)
        for field, own in (("read", before), ("write", after if arrow else before)):
            given = getattr(self, field) or own.strip()
            object.__setattr__(self, field, ALIASES.get(given, given))
        object.__setattr__(self, "name", self.key)

    @property
    def key(self) -> str:
        """As text: the site, or read->write where they differ."""
        same = self.read == self.write
        return self.write if same else f"{self.read}{_ARROW}{self.write}"


def as_site_key(value: object) -> SiteKey:
    """(layer, site as text) from a pair, or from a name such as blocks.0.hook_mlp_out.

    Raises:
        SiteError: If it is neither.

    Example:
        >>> as_site_key((3, Site("block_out", read="resid_mid")))
        (3, 'resid_mid->block_out')
        >>> as_site_key("blocks.3.hook_resid_post")
        (3, 'block_out')
    """
    if isinstance(value, str):
        known, _, rest = value.partition(".")
        layer, _, hook = rest.partition(".")
        if known == "blocks" and layer.isdigit() and hook in ALIASES:
            return int(layer), ALIASES[hook]
    elif isinstance(value, tuple) and len(value) == 2:
        layer, site = index_of(value[0]), value[1]
        if layer is not None and isinstance(site, (str, Site)):
            return layer, site.key if isinstance(site, Site) else Site(site).key
    raise SiteError(
        'Expected a pair (layer, site) of an integer and a name, as in (0, "block_out")'
        f", got {shown(value)}."
    )


def read_and_written(sites: Iterable[str]) -> tuple[str, ...]:
    """The sites that some steers read and write, each once.

    Example:
        >>> read_and_written(["mlp_out", "resid_mid->block_out"])
        ('mlp_out', 'resid_mid', 'block_out')
    """
    pairs = (Site(site) for site in sites)
    return tuple(dict.fromkeys(n for pair in pairs for n in (pair.read, pair.write)))


def check_flow(site: Site) -> None:
    """Refuse a site of a block that does not exist, or reads after it writes.

    Raises:
        SiteError: If so.
    """
    for name in (site.read, site.write):
        if name not in FLOW:
            raise SiteError(f"Expected a site in {', '.join(FLOW)}, got {name!r}.")
    if FLOW.index(site.read) > FLOW.index(site.write):
        raise SiteError(
            f"A steer cannot read {site.read} and write {site.write}: the block "
            f"computes {site.write} first."
        )


@dataclass(frozen=True)
class Place:
    """Where a site is in the modules: the input or the (first) output of `module`.

    Attributes:
        module: The module.
        side: Which of the two.
        scale: What is multiplied with it there before it is added to the stream.
        in_place: Whether the block goes on to change the tensor itself.
        shaped_by: Module whose input has the shape [batch, seq, d] that the tensor
            lacks, being [batch · seq, d]; `None` where it has it.
    """

    module: nn.Module
    side: Literal["input", "output"]
    scale: float = 1.0
    in_place: bool = False
    shaped_by: nn.Module | None = None


def first_tensor(output: object) -> Tensor:
    """The hidden state in what a module returned: itself, or a tuple's first entry."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        "expected a tensor or a tuple that starts with one, got a "
        f"{type(output).__name__}"
    )


def with_first(output: object, tensor: Tensor) -> object:
    """`output` with its hidden state replaced by `tensor`."""
    if isinstance(output, Tensor):
        return tensor
    assert isinstance(output, Sequence)
    made = (tensor, *output[1:])
    if hasattr(output, "_make"):  # a named tuple, whose names are asked for
        return output._make(made)  # pyright: ignore
    return list(made) if isinstance(output, list) else made


def is_activation(output: object) -> TypeGuard[Tensor]:
    """Whether a module's output is one floating tensor with a feature axis."""
    return (
        isinstance(output, torch.Tensor)
        and output.is_floating_point()
        and output.ndim >= 2
    )


def activation_of(output: object) -> Tensor | None:
    """The activation in what a module returned; `None` where it is not one.

    It is the output itself, or the first entry of a tuple or list without another that
    could carry the stream: beside it there are indices, flags or nothing.

    Example:
        >>> x = torch.ones(2, 3)
        >>> activation_of((x, None, [torch.tensor(1)])) is x, activation_of((x, x))
        (True, None)
    """
    if is_activation(output):
        return output
    if not isinstance(output, (tuple, list)) or not output:
        return None
    first, others = output[0], tree_leaves(list(output[1:]))
    alone = all(isinstance(other, _PLAIN) or _is_index(other) for other in others)
    return first if alone and is_activation(first) else None


_PLAIN = (bool, int, float, str, type(None))


def _is_index(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not (
        value.is_floating_point() or value.is_complex()
    )


def model_output(output: object) -> Tensor:
    """Logits, else the last hidden state, else the (first) tensor."""
    for name in (LOGITS, "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Mapping):
        output = tuple(output.values())
    elif is_dataclass(output) and not isinstance(output, type):
        output = tuple(getattr(output, field.name) for field in fields(output))
    return first_tensor(output)
