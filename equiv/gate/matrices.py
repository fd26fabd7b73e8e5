"""Weights against weights, element by element, to the rounding of their dtype."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from equiv.gate.faults import faults, layer_of
from equiv.gate.rounding import (
    half_ulp,
    product_error,
    unit_roundoff,
    weight_bound,
)
from equiv.gate.sides import Side
from equiv.gate.values import WeightDifference
from equiv.update.low_rank import LowRank

# A fault explains a matrix when it leaves at most this share of the wrong entries.
EXPLAINED = 0.01
# Wrong entries that a fault has to explain before all are looked at.
SAMPLE = 4096
# Roundings of the whole weight in merges that rescale it (DoRA: norm, share, product).
MERGED = 4.0
# Entries may each lie within their bound and yet all lean one way. In a right merge the
# leanings are rounding errors of random sign: their sum is beyond this many standard
# errors in one of a billion matrices.
LEANING = 6.0


def different(
    actual: Side,
    expected: Side,
    rtol: float | None = None,
    atol: float | None = None,
) -> tuple[list[WeightDifference], int]:
    """The matrices that differ, worst first, and how many were compared.

    Args:
        actual: A side with weights.
        expected: A side with weights.
        rtol: Relative tolerance; `None`: from rounding, unless `atol` is given.
        atol: Absolute tolerance; likewise.
    """
    mine, theirs = actual.weights(), expected.weights()
    found = []
    names = [name for name in theirs if name in mine]
    for name in names:
        if made := _compared(actual, expected, name, rtol, atol):
            found.append(made)
    found += _buffers(actual, expected)
    found.sort(key=lambda row: -row.largest / max(row.tolerance, 1e-300))
    return found, len(names)


def _buffers(actual: Side, expected: Side) -> list[WeightDifference]:
    """Buffers that differ: rotary frequencies, running means."""
    mine, theirs = actual.buffers(), expected.buffers()
    found = []
    for name in mine.keys() & theirs.keys():
        one, two = mine[name].double(), theirs[name].double().to(mine[name].device)
        if one.shape != two.shape:
            shapes = (
                f"a buffer of shape {tuple(one.shape)}, expected {tuple(two.shape)}"
            )
            found.append(_whole(name, one, shapes))
            continue
        bound = half_ulp(two, mine[name].dtype) + half_ulp(two, theirs[name].dtype)
        apart = (one - two).abs()
        wrong = ~(apart <= bound)
        if bool(wrong.any()):
            place = int((apart / bound.clamp_min(1e-300)).argmax())
            where = torch.unravel_index(torch.tensor(place), two.shape)
            found.append(
                WeightDifference(
                    name,
                    layer_of(name),
                    two.numel(),
                    int(wrong.sum()),
                    float(apart.flatten()[place]),
                    tuple(int(i) for i in where),
                    float(bound.flatten()[place]),
                    _rounded(one, two) or "another buffer",
                )
            )
    return found


def _rounded(value: Tensor, exact: Tensor) -> str:
    """Whether a buffer was rounded on its way, and to what."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(value, exact.to(dtype).double()):
            return f"rounded to {str(dtype).removeprefix('torch.')}"
    return ""


def _whole(name: str, value: Tensor, story: str) -> WeightDifference:
    """A difference of all entries, where none can be compared with another."""
    count = value.numel()
    return WeightDifference(
        name, layer_of(name), count, count, math.inf, (), 0.0, story
    )


def _compared(
    actual: Side, expected: Side, name: str, rtol: float | None, atol: float | None
) -> WeightDifference | None:
    value, exact = actual.exact(name), expected.exact(name)
    value = value.to(exact.device)
    if value.shape != exact.shape:
        shapes = f"of shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
        return _whole(name, value, shapes)
    bound = tolerance(actual, expected, name, exact, rtol, atol)
    apart = (value - exact).abs()
    wrong = ~(apart <= bound)  # also where it is NaN
    count = int(wrong.sum())
    by_average = ""
    if not count and rtol is None and atol is None:
        share, _, errors = leaning(actual, expected, name)
        if abs(errors) > LEANING:
            by_average = (
                f"applied times {share:.3g}, by the average of all entries "
                f"({abs(errors):.0f} standard errors)"
            )
    if not count and not by_average:
        return None
    worst = int((apart / bound.clamp_min(1e-300)).nan_to_num(math.inf).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape))
    return WeightDifference(
        name=name,
        layer=layer_of(name),
        entries=exact.numel(),
        wrong=count,
        largest=float(apart.flatten()[worst]),
        where=where,
        tolerance=float(bound.flatten()[worst]),
        looks_like=by_average or story(actual, expected, name, value, wrong),
    )


def leaning(actual: Side, expected: Side, name: str) -> tuple[float, float, float]:
    """How far all entries lean along ΔW together.

    With R the right merge as stored, Σ (actual − R) ΔW is a sum of rounding errors of
    random sign in a right merge.

    Returns:
        (share of ΔW that was applied, its standard error, the sum in standard errors).
    """
    delta = expected.delta(name)
    if delta is None:
        return 1.0, 0.0, 0.0
    right, value = expected.exact(name), actual.exact(name)
    dtype = torch.float64
    if actual.update is None:
        dtype = actual.weights()[name].dtype
        right = right.to(dtype).double()
    delta, value = delta.to(right.device), value.to(right.device)
    size = float(((right - expected.weights()[name].double()) * delta).sum())
    if not size:
        return 1.0, math.inf, 0.0
    along = (value - right) * delta
    spread = float(along.square().sum()) ** 0.5
    total = float(along.sum())
    if spread and abs(total) > LEANING * spread:
        # Equal entries are rounded alike: together they are one error, not many.
        values, counts = torch.unique(along, return_counts=True)
        spread = float((values * counts).square().sum()) ** 0.5
    # A rounding error is spread evenly over ±½ ulp: its variance is a third of that².
    noise = float((half_ulp(right, dtype) * delta).square().sum() / 3) ** 0.5
    return 1 + total / size, noise / abs(size), total / spread if spread else 0.0


def tolerance(
    actual: Side,
    expected: Side,
    name: str,
    exact: Tensor,
    rtol: float | None = None,
    atol: float | None = None,
) -> Tensor:
    """Largest difference allowed, element by element."""
    if rtol is not None or atol is not None:
        return (rtol or 0.0) * exact.abs() + (atol or 0.0)
    if actual.update is not None and expected.update is None:
        return tolerance(expected, actual, name, actual.exact(name))
    dtype = actual.weights()[name].dtype
    if actual.update is None:
        delta = expected.factors(name)
        dense = delta.dense() if isinstance(delta, LowRank) else delta
        bound = weight_bound(exact, dense, dtype, product_error(delta))
        weight = expected.weights()[name]
        if dense is not None and _is_merged(expected):
            bound = bound + MERGED * unit_roundoff(dtype) * exact.abs()
        if delta is not None and _coarser(dtype, weight.dtype):
            # The base may have been rounded to the dtype before the update was added.
            bound = bound + half_ulp(weight.double(), dtype)
    else:  # nothing was stored: both are sums in float64
        bound = half_ulp(exact, torch.float64) * 4
    if expected.update is None and expected.weights()[name].dtype != torch.float64:
        # What is expected was stored too, rounded once itself.
        bound = bound + half_ulp(exact, expected.weights()[name].dtype)
    return bound


def _is_merged(side: Side) -> bool:
    """Whether the update was read off a merge by PEFT, which rounds W + ΔW too."""
    return side.update is not None and side.update.source.endswith(" adapter")


def _coarser(one: torch.dtype, other: torch.dtype) -> bool:
    return torch.finfo(one).eps > torch.finfo(other).eps


def story(actual: Side, expected: Side, name: str, value: Tensor, wrong: Tensor) -> str:
    """What a wrong matrix looks like, by the fault that explains it best.

    Args:
        actual: The side whose matrix is wrong.
        expected: The other side.
        name: The matrix.
        value: What it is, in float64.
        wrong: Its entries outside the bound.
    """
    dtype = actual.weights()[name].dtype
    count = int(wrong.sum())
    places = torch.nonzero(wrong.flatten()).flatten()
    some = places[:: max(1, len(places) // SAMPLE)]
    best, left = "", count
    product = product_error(expected.factors(name))
    for fault in faults(expected, name):
        twice = 2 * product if fault.update is not None else 0.0  # "applied twice"
        look = (value, fault.weight.to(value.device), fault.update, dtype, twice)
        if _outside(*look, some) > EXPLAINED * len(some):
            continue
        remaining = _outside(*look, None)
        if remaining < left:
            best, left = fault.story, remaining
        if not left:
            break
    if best and left <= EXPLAINED * count:
        return best
    scaled = _scale(expected, name, value, dtype, count)
    return scaled or "changed in another way"


def _outside(
    value: Tensor,
    made: Tensor,
    update: Tensor | None,
    dtype: torch.dtype,
    product: Tensor | float,
    places: Tensor | None,
) -> int:
    """How many entries, of all or of some places, are outside a fault's bound."""
    if places is not None:
        value, made = value.flatten()[places], made.flatten()[places]
        update = None if update is None else update.flatten()[places]
        if isinstance(product, Tensor):
            product = product.flatten()[places]
    bound = weight_bound(made, update, dtype, product)
    return int((~((value - made).abs() <= bound)).sum())


def _scale(
    expected: Side, name: str, value: Tensor, dtype: torch.dtype, count: int
) -> str:
    """A constant factor on the update, or on the whole matrix."""
    weight, delta = expected.weights()[name].double(), expected.delta(name)
    start = torch.zeros_like(weight) if delta is None else weight
    along = weight if delta is None else delta.to(weight.device)
    size = float(along.square().sum())
    if not size:
        return ""
    factor = float(((value - start) * along).sum()) / size
    made = start + factor * along
    # The factor itself is only as good as the rounding it was read from.
    product = abs(factor) * product_error(expected.factors(name))
    bound = 2 * weight_bound(made, factor * along, dtype, product)
    wrong = int((~((value - made).abs() <= bound)).sum())
    if wrong > EXPLAINED * count:
        return ""
    return f"{'the matrix' if delta is None else 'applied'} times {factor:.4g}"


def missing(actual: Side, expected: Side) -> tuple[Sequence[str], Sequence[str]]:
    """Parameters that only one side has; tied ones count under every name."""
    mine, theirs = actual.weights().keys(), expected.weights().keys()
    return sorted(mine - theirs), sorted(theirs - mine)
