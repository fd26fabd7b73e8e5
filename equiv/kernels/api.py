"""The public functions: arguments checked, brought to one shape, dispatched."""

import torch
from torch import Tensor

from equiv.arguments import as_choice
from equiv.errors import ArgumentError
from equiv.kernels import composite, operators
from equiv.kernels.activations import ACTIVATIONS
from equiv.kernels.checks import (
    arguments,
    check_in_place,
    check_parts,
    forward_mode,
    underived,
)
from equiv.kernels.differentiable import CandidateShifts, LowRank, VectorShift
from equiv.kernels.rows import uncast

FUSED, REFERENCE = "fused", "reference"
IMPLEMENTATIONS = (REFERENCE, FUSED)
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def implementation(h: Tensor, impl: str | None = None) -> str:
    """Which implementation `impl` comes to for activations `h`.

    `None` is "fused" on a CUDA device in the dtypes the kernels have (bfloat16,
    float16, float32), else "reference". An explicit choice is kept, or refused.

    Raises:
        ArgumentError: If there is no such implementation, or no kernel for `h`.

    Example:
        >>> implementation(torch.zeros(2, 3))
        'reference'
    """
    if impl is None:
        fused = h.device.type == "cuda" and h.dtype in FUSED_DTYPES
        return FUSED if fused else REFERENCE
    as_choice("impl", impl, IMPLEMENTATIONS)
    if impl == FUSED and h.dtype not in FUSED_DTYPES:
        raise ArgumentError(
            "Expected activations in bfloat16, float16 or float32 with impl='fused', "
            f"got {h.dtype}; impl='reference' takes any."
        )
    return impl


def vector_shift(
    h: Tensor,
    bank: Tensor,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Add to each row of `h` its own vector of a bank: h + scale · bank[index].

    Args:
        h: Activations [*batch, d], bfloat16, float16, float32 or float64.
        bank: Vectors [n, d], of any floating dtype.
        index: Which vector each row gets, integers that broadcast to the leading axes
            of `h`, such as [batch, 1] for one per sequence; −1 leaves a row as it is,
            bit for bit. `None`: the only one of the bank. On a CUDA device its values
            are not looked at; there a number beyond the bank counts as −1.
        scale: Strength per row, broadcast likewise; `None` for 1.
        impl: "reference", "fused", or `None` as `implementation` says.

    Returns:
        Of the shape and dtype of `h`; summed in at least float32, rounded once.

    Raises:
        ArgumentError: If shapes, dtypes or devices do not fit.

    Example:
        >>> h, bank = torch.zeros(2, 2, 3), torch.tensor([[1.0, 1, 1], [2, 2, 2]])
        >>> vector_shift(h, bank, torch.tensor([[1], [-1]]))[:, 0]
        tensor([[2., 2., 2.],
                [0., 0., 0.]])
    """
    fused = implementation(h, impl) == FUSED
    rows, number, strength = arguments(h, {"bank": bank}, bank, index, scale)
    if rows.numel() == 0:
        return h.clone()
    with uncast(h):
        if forward_mode():
            out = composite.vector_shift(rows, bank, strength, number)
        elif underived(h, bank, scale):
            bank = bank.contiguous()
            out = operators.vector_shift(rows, bank, strength, number, fused)
        else:
            out = VectorShift.apply(rows, bank.contiguous(), strength, number, fused)
    return out.reshape(h.shape)


def vector_shift_(
    h: Tensor,
    bank: Tensor,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """`vector_shift` in place: rows that get none are neither read nor written.

    Args:
        h: Activations [*batch, d], contiguous.
        bank: As there.
        index: As there.
        scale: As there.
        impl: As there.

    Returns:
        `h` itself.

    Raises:
        ArgumentError: As there, and if `h` is not contiguous or a gradient is asked
            for, which what was overwritten could not give.

    Example:
        >>> h = torch.zeros(3, 2)
        >>> _ = vector_shift_(h, torch.ones(1, 2), torch.tensor([-1, 0, -1]))
        >>> h.sum(1)
        tensor([0., 2., 0.])
    """
    fused = implementation(h, impl) == FUSED
    check_in_place(h, bank, scale)
    rows, number, strength = arguments(h, {"bank": bank}, bank, index, scale)
    if rows.numel():
        with uncast(h):
            operators.vector_shift_(rows, bank.contiguous(), strength, number, fused)
    return h


def low_rank_shift(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    read: Tensor | None = None,
    activation: str = "silu",
    impl: str | None = None,
) -> Tensor:
    """Add to each row its own low-rank map: h + scale · upᵀ φ(down h + bias).

    A LoReFT h + Rᵀ (W h + b − R h) is the one with φ the identity, down = W − R and
    up = R; an affine or linear steer likewise.

    Args:
        h: Activations [*batch, d], bfloat16, float16, float32 or float64.
        down: What each steer reads with, [n, r, d].
        up: What each steer writes with, transposed: [n, r, d]. Smaller ranks are
            filled with zeros (`stack_ranks`).
        bias: Of each steer, inside the activation, [n, r].
        index: Which steer each row gets, integers that broadcast to the leading axes
            of `h`; −1 for none. As of `vector_shift`.
        scale: Strength per row, broadcast likewise; `None` for 1.
        read: What the map reads in place of `h`, [*batch, e]; `down` is [n, r, e] then.
        activation: φ: "identity", "silu", "gelu", "gelu_tanh", "relu" or "tanh".
        impl: "reference", "fused", or `None` as `implementation` says.

    Returns:
        Of the shape and dtype of `h`; summed in at least float32, rounded once.

    Raises:
        ArgumentError: If shapes, dtypes or devices do not fit.

    Example:
        >>> h, down = torch.tensor([[3.0, 5.0], [3.0, 5.0]]), torch.eye(2)[None, :1]
        >>> index, none = torch.tensor([0, -1]), torch.zeros(1, 1)
        >>> low_rank_shift(h, down, down, none, index, activation="identity")
        tensor([[6., 5.],
                [3., 5.]])
    """
    fused = implementation(h, impl) == FUSED
    as_choice("activation", activation, tuple(ACTIVATIONS))
    parts = {"down": down, "up": up} | ({} if bias is None else {"bias": bias})
    rows, number, strength = arguments(h, parts, down, index, scale, read)
    if rows.numel() == 0:
        return h.clone()
    base = None if read is None else rows
    rows = rows if read is None else read.reshape(-1, read.shape[-1]).contiguous()
    with uncast(h):
        if forward_mode():
            out = composite.low_rank(
                rows, base, down, up, bias, strength, number, activation
            )
        else:
            bias = None if bias is None else bias.contiguous()
            # Dynamo takes no tensor twice, as `down` and `up` of a projection would be.
            up = (up.view_as(up) if up is down else up).contiguous()
            alone = underived(h, down, up, bias, scale, read)
            call = operators.low_rank if alone else LowRank.apply
            out, _ = call(
                rows,
                base,
                down.contiguous(),
                up,
                bias,
                strength,
                number,
                activation,
                fused,
            )
    return out.reshape(h.shape)


def low_rank_shift_(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    activation: str = "silu",
    impl: str | None = None,
) -> Tensor:
    """`low_rank_shift` in place: rows that get none are neither read nor written.

    Args:
        h: Activations [*batch, d], contiguous.
        down: As there.
        up: As there.
        bias: As there.
        index: As there.
        scale: As there.
        activation: As there.
        impl: As there.

    Returns:
        `h` itself.

    Raises:
        ArgumentError: As there, and if `h` is not contiguous or a gradient is asked
            for.

    Example:
        >>> h, one = torch.tensor([[3.0, 5.0]]), torch.eye(2)[None, :1]
        >>> low_rank_shift_(h, one, one, activation="relu")
        tensor([[6., 5.]])
    """
    fused = implementation(h, impl) == FUSED
    as_choice("activation", activation, tuple(ACTIVATIONS))
    check_in_place(h, down, up, bias, scale)
    parts = {"down": down, "up": up} | ({} if bias is None else {"bias": bias})
    rows, number, strength = arguments(h, parts, down, index, scale)
    if rows.numel():
        bias = None if bias is None else bias.contiguous()
        bank = (down.contiguous(), up.contiguous(), bias)
        with uncast(h):
            operators.low_rank_(rows, *bank, strength, number, activation, fused)
    return h


def candidate_shifts(
    h: Tensor, bank: Tensor, scale: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """Add every vector of a bank to one activation: h + scale[k] · bank[k] for each k.

    Args:
        h: Activations [*batch, d].
        bank: Candidates [n, d].
        scale: Their strengths [n]; `None` for 1.
        impl: "reference", "fused", or `None` as `implementation` says.

    Returns:
        [n, *batch, d] in the dtype of `h`, which is read once for all of them.

    Raises:
        ArgumentError: If shapes, dtypes or devices do not fit.

    Example:
        >>> h, bank = torch.zeros(4, 3), torch.ones(2, 3)
        >>> candidate_shifts(h, bank, torch.tensor([1.0, 5.0]))[:, 0, 0]
        tensor([1., 5.])
    """
    fused = implementation(h, impl) == FUSED
    check_parts(h, {"bank": bank})
    if scale is not None and scale.shape != bank.shape[:1]:
        raise ArgumentError(
            f"Expected `scale` of shape ({bank.shape[0]},), got {tuple(scale.shape)}."
        )
    rows = h.reshape(-1, h.shape[-1]).contiguous()
    with uncast(h):
        if forward_mode():
            out = composite.candidate_shifts(rows, bank, scale)
        elif underived(h, bank, scale):
            out = operators.candidate_shifts(rows, bank.contiguous(), scale, fused)
        else:
            out = CandidateShifts.apply(rows, bank.contiguous(), scale, fused)
    return out.reshape(bank.shape[0], *h.shape)
