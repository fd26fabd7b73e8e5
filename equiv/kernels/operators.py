"""The operators that PyTorch sees: opaque to its compiler, without derivatives.

Each takes `fused`: the Triton kernel, or the reference. Nothing falls back: a kernel
that cannot be had is an error. Private; derivatives are in `differentiable`.
"""

from typing import Protocol

import torch
from torch import Tensor

from equiv.kernels import reference
from equiv.kernels.rows import wide

_LIBRARY = torch.library.Library("equiv", "FRAGMENT")
_LIBRARY.define(
    "vector_shift(Tensor h, Tensor bank, Tensor? scale, Tensor index, bool fused)"
    " -> Tensor"
)
_LIBRARY.define(
    "vector_shift_(Tensor(a!) h, Tensor bank, Tensor? scale, Tensor index, bool fused)"
    " -> ()"
)
_LIBRARY.define(
    "low_rank(Tensor x, Tensor? base, Tensor down, Tensor up, Tensor? bias, "
    "Tensor? scale, Tensor index, str activation, bool fused) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "low_rank_(Tensor(a!) h, Tensor down, Tensor up, Tensor? bias, Tensor? scale, "
    "Tensor index, str activation, bool fused) -> ()"
)
_LIBRARY.define(
    "low_rank_linear(Tensor x, Tensor? base, Tensor down, Tensor up, Tensor? scale, "
    "Tensor index, Tensor gate, str activation, bool fused) -> Tensor"
)
_LIBRARY.define(
    "candidate_shifts(Tensor h, Tensor bank, Tensor? scale, bool fused) -> Tensor"
)


def _vector_shift(
    h: Tensor, bank: Tensor, scale: Tensor | None, index: Tensor, fused: bool
) -> Tensor:
    out = torch.empty_like(h)
    _launcher(fused).vector_shift(h, bank, scale, index, out)
    return out


def _vector_shift_(
    h: Tensor, bank: Tensor, scale: Tensor | None, index: Tensor, fused: bool
) -> None:
    _launcher(fused).vector_shift(h, bank, scale, index, h)


def _low_rank(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    index: Tensor,
    activation: str,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """What is added to is what is read, unless there is a `base`."""
    base = x if base is None else base
    out, z = _fake_low_rank(x, base, down, up, bias, scale, index, activation, fused)
    _launcher(fused).low_rank(x, base, down, up, bias, scale, index, activation, out, z)
    return out, z


def _low_rank_(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    index: Tensor,
    activation: str,
    fused: bool,
) -> None:
    _launcher(fused).low_rank(h, h, down, up, bias, scale, index, activation, h)


def _low_rank_linear(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor | None,
    index: Tensor,
    gate: Tensor,
    activation: str,
    fused: bool,
) -> Tensor:
    out = _fake_low_rank_linear(
        x, base, down, up, scale, index, gate, activation, fused
    )
    _launcher(fused).low_rank(
        x, base, down, up, None, scale, index, activation, out, gate=gate
    )
    return out


def _candidate_shifts(
    h: Tensor, bank: Tensor, scale: Tensor | None, fused: bool
) -> Tensor:
    out = h.new_empty(bank.shape[0], *h.shape)
    _launcher(fused).candidate_shifts(h, bank, scale, out)
    return out


class _Launcher(Protocol):
    """The functions that the reference and the launches of the kernels have."""

    def vector_shift(
        self, h: Tensor, bank: Tensor, scale: Tensor | None, index: Tensor, out: Tensor
    ) -> None: ...

    def low_rank(
        self,
        x: Tensor,
        base: Tensor | None,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        index: Tensor,
        activation: str,
        out: Tensor,
        z: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> None: ...

    def candidate_shifts(
        self, h: Tensor, bank: Tensor, scale: Tensor | None, out: Tensor
    ) -> None: ...


def _launcher(fused: bool) -> _Launcher:
    if not fused:
        return reference
    from equiv.kernels.triton import launching

    return launching


def _fake_low_rank(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    index: Tensor,
    activation: str,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    z = x.new_empty(x.shape[0], down.shape[1], dtype=wide(x.dtype))
    return torch.empty_like(x if base is None else base), z


def _fake_low_rank_linear(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor | None,
    index: Tensor,
    gate: Tensor,
    activation: str,
    fused: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], up.shape[2])


for _name, _function, _fake in (
    ("vector_shift", _vector_shift, lambda h, *_: torch.empty_like(h)),
    ("vector_shift_", _vector_shift_, lambda *_: None),
    ("low_rank", _low_rank, _fake_low_rank),
    ("low_rank_", _low_rank_, lambda *_: None),
    ("low_rank_linear", _low_rank_linear, _fake_low_rank_linear),
    (
        "candidate_shifts",
        _candidate_shifts,
        lambda h, bank, *_: h.new_empty(bank.shape[0], *h.shape),
    ),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # any device
    torch.library.register_fake(f"equiv::{_name}", _fake, lib=_LIBRARY)

vector_shift = torch.ops.equiv.vector_shift.default
vector_shift_ = torch.ops.equiv.vector_shift_.default
low_rank = torch.ops.equiv.low_rank.default
low_rank_ = torch.ops.equiv.low_rank_.default
low_rank_linear = torch.ops.equiv.low_rank_linear.default
candidate_shifts = torch.ops.equiv.candidate_shifts.default
