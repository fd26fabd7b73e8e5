"""The tolerance of the kernels catches what it claims to: bugs put in on purpose.

Each bug is a low-rank shift that is wrong in one way, at a shift of realistic size (one
twentieth of the activation), where the common fixed tolerances let most of them pass.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_bounds import Case, bound, exact
from torch import Tensor

from equiv import kernels
from equiv.kernels.activations import ACTIVATIONS


def case(dtype: torch.dtype, size: float = 0.05) -> Case:
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    index = torch.randint(-1, 3, (40,), generator=source)
    return Case(
        random(40, 200).to(dtype),
        (random(3, 12, 200) / 200**0.5).to(dtype),
        (size * random(3, 12, 200) / 12**0.5).to(dtype),
        (0.5 * random(3, 12)).to(dtype),
        index,
        1 + 0.2 * random(40),
        "gelu",
    )


def run(case: Case) -> Tensor:
    return kernels.low_rank_shift(
        case.h,
        case.down,
        case.up,
        case.bias,
        case.index,
        case.scale,
        activation=case.activation,
    )


def no_bias(case: Case) -> Tensor:
    return run(replace(case, bias=None))


def no_scale(case: Case) -> Tensor:
    return run(replace(case, scale=None))


def wrong_steer_in_one_row(case: Case) -> Tensor:
    index = case.index.clone()
    row = int((index >= 0).nonzero()[5])
    index[row] = (index[row] + 1) % 3
    return run(replace(case, index=index))


def last_column_lost(case: Case) -> Tensor:
    down = case.down.clone()
    down[..., -1] = 0
    return run(replace(case, down=down))


def last_rank_lost(case: Case) -> Tensor:
    up = case.up.clone()
    up[:, -1] = 0
    return run(replace(case, up=up))


def the_other_gelu(case: Case) -> Tensor:
    return run(replace(case, activation="gelu_tanh"))


def silu_for_gelu(case: Case) -> Tensor:
    return run(replace(case, activation="silu"))


def one_row_steered_a_little(case: Case) -> Tensor:
    """By a thousandth, where none was asked for."""
    assert case.scale is not None
    index, scale = case.index.clone(), case.scale.clone()
    row = int((index < 0).nonzero()[0])
    index[row], scale[row] = 0, 1e-3
    return run(replace(case, index=index, scale=scale))


def cut_off_instead_of_rounded(case: Case) -> Tensor:
    wide = run(replace(case, h=case.h.float()))
    lost = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 1}[case.h.dtype]
    cut = (wide.view(torch.int32) >> lost << lost).view(torch.float32)
    return torch.where((case.index >= 0)[:, None], cut.to(case.h.dtype), case.h)


def everything_in_half(case: Case) -> Tensor:
    """Z, φ(z) and the shift rounded to the dtype of h on the way."""
    out, dtype = case.h.clone(), case.h.dtype
    assert case.bias is not None and case.scale is not None
    for t, number in enumerate(case.index.tolist()):
        if number >= 0:
            z = (case.down[number].float() @ case.h[t].float()).to(dtype)
            a = ACTIVATIONS[case.activation](z + case.bias[number])
            a = a * case.scale[t].to(dtype)
            out[t] = case.h[t] + (a.float() @ case.up[number].float()).to(dtype)
    return out


BUGS: tuple[Callable[[Case], Tensor], ...] = (
    no_bias,
    no_scale,
    wrong_steer_in_one_row,
    last_column_lost,
    last_rank_lost,
    the_other_gelu,
    silu_for_gelu,
    one_row_steered_a_little,
    cut_off_instead_of_rounded,
    everything_in_half,
)
# In float32 a last bit that is cut off is less than what the sums may cost.
HIDDEN = {(torch.float32, cut_off_instead_of_rounded)}


def caught(found: Tensor, case: Case) -> bool:
    return bool(((found.double() - exact(case)).abs() > bound(case)).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bound_catches_bugs(dtype: torch.dtype) -> None:
    right = case(dtype)
    assert not caught(run(right), right)
    for bug in BUGS:
        if dtype == torch.float32 and bug is everything_in_half:
            continue  # float32 is what is right there
        assert caught(bug(right), right) == ((dtype, bug) not in HIDDEN), bug.__name__


def test_fixed_tolerances_do_not() -> None:
    """Why there is a bound: of ten bugs, these pass tolerances that are in use."""
    right, missed = case(torch.bfloat16), {}
    truth = exact(right)
    for name, (rtol, atol) in {"6e-2": (6e-2, 6e-2), "3e-2": (3e-2, 2e-2)}.items():
        missed[name] = sum(
            bool(
                ((bug(right).double() - truth).abs() <= atol + rtol * truth.abs()).all()
            )
            for bug in BUGS
        )
    assert all(count >= 5 for count in missed.values()), missed
