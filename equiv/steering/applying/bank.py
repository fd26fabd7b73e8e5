"""Many steers that write one site, each for some rows: one launch per form.

A bank of hundreds of steers would cost hundreds of shifts of the whole batch, if each
were computed for all rows as in `rows`, which says what is meant. Here those of one
form are stacked once, and a batch costs one pass of a kernel (`equiv.kernels`) for each
form that the bank has:

    fixed vectors                        h + v[index]
    affine, LoReFT, low-rank MLP         h + upᵀ φ(down x + inner), ranks filled up with
                                         zeros; one group per φ and per site read

A bias b that is added behind φ is one rank more, which reads nothing: its row of `down`
is zero, of `inner` one, of `up` b / φ(1). Any other steer (heads, oracles, a user's
own, one that reads two sites, one that is being trained) is computed for all rows.

Each row gets one steer, so that groups do not meet: after each, the rows of the others
are still what they were, bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equiv.kernels import low_rank_shift, stack_ranks, vector_shift
from equiv.kernels.activations import ACTIVATIONS
from equiv.model.sites import Sites
from equiv.steering.applying.placed import Place, Placed
from equiv.steering.applying.rows import Bank, steered_rows
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.mlp import LowRankMLP
from equiv.steering.forms.vector import Vector

Kind = tuple[object, ...]  # what steers of one group have in common
Parts = tuple[Tensor, ...]  # of one steer: v; or down [r, d], up [r, e], inner [r]


@dataclass(frozen=True, eq=False)
class Group:
    """Steers that are applied together.

    Attributes:
        read: The site that they read.
        activation: φ; `None` of vectors, which read nothing.
        kept: A dtype of activations in which the weights can stay, those of the model
            included; in others they are float32, or float64.
        forms: The steers.
        slots: Number of a steer, plus one → its place among them, or −1; `None` where
            they are the whole bank in its order, and the number is the place.
        at: Their tensors, stacked, and the slots, where the activations are.
    """

    read: str
    activation: str | None
    kept: torch.dtype | None
    forms: tuple[Steering, ...]
    slots: Tensor | None
    at: dict[Place, tuple[Parts, Tensor | None]] = field(default_factory=dict)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Stack the tensors where activations of this dtype will be."""
        to = dtype if self.kept == dtype else torch.promote_types(dtype, torch.float32)
        # Tensors made in inference mode could not be used outside it later.
        with torch.inference_mode(False), torch.no_grad():
            each = [[p.to(device, to) for p in _parts(form)] for form in self.forms]
            parts = tuple(stack_ranks(own) for own in zip(*each, strict=True))
            slots = None if self.slots is None else self.slots.to(device)
            self.at[device, dtype] = parts, slots

    def shifted(self, h: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """The activation with each row's own steer of this group added."""
        if (h.device, h.dtype) not in self.at:
            self.prepare(h.device, h.dtype)
        parts, slots = self.at[h.device, h.dtype]
        own = index if slots is None else slots[index + 1]
        own = own.reshape(*own.shape, *[1] * (h.ndim - 1 - own.ndim))
        if self.activation is None:
            return vector_shift(h, parts[0][:, 0], own)
        down, up, inner = parts
        return low_rank_shift(
            h,
            down,
            up,
            inner[..., 0],
            own,
            read=None if x is h else x,
            activation=self.activation,
        )


class StackedBank:
    """A bank with the steers of each form stacked.

    Args:
        bank: Number → site that is read → steer.
        count: How many numbers there are; not all need be in this bank.

    Attributes:
        groups: Those that are.
        rest: The others, by number.
    """

    def __init__(self, bank: Mapping[int, Mapping[str, Placed]], count: int) -> None:
        found: dict[Kind, dict[int, Steering]] = {}
        self.rest: dict[int, Mapping[str, Placed]] = {}
        for number, steers in bank.items():
            kind, form = _known(steers)
            if kind is None:
                self.rest[number] = steers
            else:
                found.setdefault(kind, {})[number] = form
        self.groups: list[Group] = []
        for kind, members in found.items():
            if len(members) > 1:
                self.groups.append(_group(kind, members, count))
            else:  # nothing to stack
                self.rest |= {number: bank[number] for number in members}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Stack tensors where the activations will most likely be."""
        for group in self.groups:
            group.prepare(device, dtype)

    def steered(
        self, h: Tensor, seen: Sites, used: Sequence[int], index: Tensor
    ) -> Tensor:
        """Each row or token of `h` with its own steer added.

        Args:
            h: The activation that is written, [batch, *rest, e].
            seen: Site → activation that is read.
            used: The numbers in `index`, and maybe more.
            index: Number of each row, [batch], or token, [batch, *rest]; −1 for none.
        """
        out = h
        for group in self.groups:
            out = group.shifted(out, seen[group.read] if group.read else h, index)
        rest: Bank = {n: self.rest[n] for n in used if n in self.rest}
        return steered_rows(out, seen, rest, index) if rest else out


def _known(steers: Mapping[str, Placed]) -> tuple[Kind | None, Any]:
    """The group of a steer, and its form; no group if it has to be called."""
    if len(steers) != 1:
        return None, None
    ((read, placed),) = steers.items()
    form = placed.steering
    if not isinstance(form, Vector | Affine | LoReFT | LowRankMLP):
        return None, None
    tensors = [t for t in vars(form).values() if isinstance(t, Tensor)]
    if any(t.requires_grad or t.is_meta or not t.is_floating_point() for t in tensors):
        return None, None
    dtypes = {t.dtype for t in tensors}
    kept = dtypes.pop() if len(dtypes) == 1 else None
    if isinstance(form, Vector):
        return ("", None, kept, form.vector.shape), form
    if isinstance(form, LoReFT):  # W − R is a difference that half precision rounds
        return (read, "identity", None, form.rotation.shape[1:]), form
    activation = form.activation if isinstance(form, LowRankMLP) else "identity"
    if form.bias is not None and float(_unit(activation)) != 1:
        kept = None  # and so is b / φ(1)
    return (read, activation, kept, form.down.shape[1], form.up.shape[0]), form


def _unit(activation: str) -> Tensor:
    """φ(1)."""
    return ACTIVATIONS[activation](torch.ones((), dtype=torch.float64))


def _parts(form: Steering) -> Parts:
    """The tensors of a steer, ranks first; nothing is rounded here but to float64."""
    if isinstance(form, Vector):
        return (form.vector[None],)
    if isinstance(form, LoReFT):
        down = form.weight.double() - form.rotation.double()
        return down, form.rotation, form.bias[:, None]
    assert isinstance(form, Affine | LowRankMLP)
    down, up, inner, activation = form.down, form.up.T, None, "identity"
    if isinstance(form, LowRankMLP):
        inner, activation = form.inner, form.activation
    inner = down.new_zeros(len(down)) if inner is None else inner
    if form.bias is not None:
        row = form.bias.double() / float(_unit(activation))
        down = torch.cat([down, down.new_zeros(1, down.shape[1])])
        up = torch.cat([up.double(), row[None]])
        inner = torch.cat([inner, inner.new_ones(1)])
    return down, up, inner[:, None]


def _group(kind: Kind, members: Mapping[int, Steering], count: int) -> Group:
    read, activation, kept, *_ = kind
    slots = None
    if list(members) != list(range(count)):
        slots = torch.full((count + 1,), -1)
        for slot, number in enumerate(members):
            slots[number + 1] = slot
    return Group(
        read=str(read),
        activation=activation if isinstance(activation, str) else None,
        kept=kept if isinstance(kept, torch.dtype) else None,
        forms=tuple(members.values()),
        slots=slots,
    )
