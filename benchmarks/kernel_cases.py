"""What is timed of the kernels: cases, contestants, and the float64 truth of each."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from equiv import kernels

OURS = "equiv"
POPULARITIES = ("uniform", "zipf", "skewed", "identical")


@dataclass
class Case:
    """One operation at one size.

    Attributes:
        name: With its sizes.
        group: The row of the table of targets that it belongs to; "" for none.
        contestants: By name, `OURS` first; each returns the shifted activations.
        truth: Rows to look at, and in float64 what they should be and may be off by.
        graph: Whether it is so short that it is timed inside a CUDA graph.
    """

    name: str
    group: str
    contestants: dict[str, Callable[[], Tensor]]
    truth: Callable[[], tuple[Tensor, Tensor, Tensor]]
    graph: bool = False
    setting: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Where:
    """Device, dtype, implementation, and how others are compiled."""

    device: str
    dtype: torch.dtype
    impl: str
    compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None
    tuned: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None

    @property
    def said(self) -> dict[str, object]:
        """For the result."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "impl": self.impl}

    def random(self, *shape: int, size: float = 1.0, seed: int = 0) -> Tensor:
        """Drawn on the device."""
        source = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(shape, generator=source, device=self.device)
        return (size * drawn).to(self.dtype)


def popular(kind: str, count: int, n: int, device: str) -> Tensor:
    """An index of `count` entries into n steers, in one of the usual distributions."""
    source = torch.Generator().manual_seed(0)
    weights = {
        "uniform": torch.ones(n),
        "zipf": 1 / torch.arange(1, n + 1) ** 1.5,
        "skewed": torch.tensor([9.0 * n] + [1.0] * (n - 1)),
        "identical": torch.tensor([1.0] + [0.0] * (n - 1)),
    }[kind]
    return torch.multinomial(weights, count, True, generator=source).to(device)


def vector_case(
    where: Where, rows: int, d: int, n: int = 32, *, share: float = 1.0
) -> Case:
    """H + scale · bank[index] per token; with a share below 1 in place, the rest −1."""
    h, bank = where.random(rows, d), where.random(n, d, seed=1)
    index = popular("uniform", rows, n, where.device)
    scale = torch.linspace(0.5, 1.5, rows, device=where.device)
    if share < 1:
        step = round(1 / share)
        places = torch.arange(rows, device=where.device) % step == 0
        index = torch.where(places, index, -1)
    mask, narrow = index >= 0, scale.to(where.dtype)

    def plain(h: Tensor, bank: Tensor) -> Tensor:
        shifted = h + narrow[:, None] * bank[index.clamp_min(0)]
        return torch.where(mask[:, None], shifted, h)

    def in_place() -> Tensor:
        return kernels.vector_shift_(h, bank, index, scale, impl=where.impl)

    def indexed() -> Tensor:
        h[mask] += narrow[mask, None] * bank[index[mask]]
        return h

    made: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: kernels.vector_shift(h, bank, index, scale, impl=where.impl)
    }
    if share < 1:
        made = {OURS: in_place, "h[mask] += …": indexed}
    made["eager where"] = lambda: plain(h, bank)
    _compiled(made, where, plain, h, bank)
    made["plain h + v"] = lambda: h + bank[0]

    start = h.clone()

    def truth() -> tuple[Tensor, Tensor, Tensor]:
        at = _some(rows, where.device)
        v = bank[index[at].clamp_min(0)].double() * scale[at, None].double()
        v = torch.where(mask[at, None], v, 0)
        exact = start[at].double() + v
        u = torch.finfo(where.dtype).eps / 2
        off = u * exact.abs() + 2.0**-22 * (v.abs() + exact.abs())
        return at, exact, off

    place = f", {share:.0%} in place" if share < 1 else ""
    return Case(
        name=f"vector {rows} × {d}, bank {n}{place}",
        group="vector in place" if share < 1 else "vector",
        contestants=made,
        truth=truth,
        setting={**where.said, "rows": rows, "hidden": d, "bank": n, "share": share},
    )


def low_rank_case(
    where: Where,
    batch: int,
    seq: int,
    d: int,
    n: int,
    r: int,
    *,
    kind: str = "uniform",
    per_token: bool = False,
    graph: bool = False,
    gather: bool = False,
) -> Case:
    """H + scale · upᵀ silu(down h + bias), the steer per sequence or per token."""
    h = where.random(batch, seq, d)
    down = where.random(n, r, d, size=d**-0.5, seed=1)
    up = where.random(n, r, d, size=0.1 * r**-0.5, seed=2)
    bias = where.random(n, r, size=0.5, seed=3)
    entries = (batch, seq) if per_token else (batch, 1)
    count = entries[0] * entries[1]
    index = popular(kind, count, n, where.device).reshape(entries)
    first = index[:, 0]

    def bmm(h: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        z = torch.baddbmm(bias[first][:, None], h, down[first].mT)
        return torch.baddbmm(h, functional.silu(z), up[first])

    def gathered() -> Tensor:
        own = index.expand(batch, seq)
        z = torch.einsum("bsd,bsrd->bsr", h, down[own]) + bias[own]
        return h + torch.einsum("bsr,bsrd->bsd", functional.silu(z), up[own])

    made: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: kernels.low_rank_shift(
            h, down, up, bias, index, activation="silu", impl=where.impl
        )
    }
    if not per_token:
        made["eager gather + bmm"] = lambda: bmm(h, down, up, bias)
        _compiled(made, where, bmm, h, down, up, bias)
    if gather:
        made["per-token gather"] = gathered
    made["plain h + v"] = lambda: h + up[0, 0]

    def truth() -> tuple[Tensor, Tensor, Tensor]:
        at = _some(batch * seq, where.device)
        own = index.expand(batch, seq).reshape(-1)[at]
        x = h.reshape(-1, d)[at].double()
        exact, off = torch.empty_like(x), torch.empty_like(x)
        for one in own.unique().tolist():
            mine = own == one
            dn, u, b = (t[one].double() for t in (down, up, bias))
            a = functional.silu(x[mine] @ dn.T + b)
            exact[mine] = x[mine] + a @ u
            dz = 8 * d**0.5 * 2.0**-24 * (x[mine].abs() @ dn.abs().T + b.abs())
            da = 1.1 * dz + (2.0**-18) * a.abs() + 2.0**-25
            total = da @ u.abs() + 2.0**-19 * (a.abs() @ u.abs() + x[mine].abs())
            rounding = torch.finfo(where.dtype).eps / 2
            off[mine] = total + rounding * (exact[mine].abs() + total)
        return at, exact, off

    name = f"low rank {batch} × {seq} × {d}, bank {n} {kind}, rank {r}"
    group = "low rank, decode" if graph else f"low rank, rank {r}"
    return Case(
        name=f"{name}{', per token' if per_token else ''}",
        group="" if per_token or kind != "uniform" else group,
        contestants=made,
        truth=truth,
        graph=graph,
        setting={
            **where.said,
            "batch": batch,
            "seq": seq,
            "hidden": d,
            "bank": n,
            "rank": r,
            "popularity": kind,
            "per_token": per_token,
        },
    )


def candidates_case(where: Where, rows: int, d: int, n: int) -> Case:
    """H + scale[k] · bank[k] for every k."""
    h, bank = where.random(rows, d), where.random(n, d, seed=1)
    scale = torch.linspace(0.5, 1.5, n, device=where.device)

    def plain(h: Tensor, bank: Tensor) -> Tensor:
        return (h[None] + (scale[:, None] * bank)[:, None]).to(h.dtype)

    ready = (scale[:, None] * bank).to(where.dtype)
    made: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: kernels.candidate_shifts(h, bank, scale, impl=where.impl),
        "eager h[None] + v[:, None]": lambda: h[None] + ready[:, None],
    }
    _compiled(made, where, plain, h, bank)

    def truth() -> tuple[Tensor, Tensor, Tensor]:
        flat = _some(rows * n, where.device)
        v = scale[flat // rows, None].double() * bank[flat // rows].double()
        exact = h[flat % rows].double() + v
        u = torch.finfo(where.dtype).eps / 2
        return flat, exact, u * exact.abs() + 2.0**-22 * (v.abs() + exact.abs())

    return Case(
        name=f"candidates {n} on {rows} × {d}",
        group="candidates",
        contestants=made,
        truth=truth,
        setting={**where.said, "rows": rows, "hidden": d, "bank": n},
    )


def check(case: Case) -> float:
    """How far the kernel is off, in units of what it may be off.

    Raises:
        SystemExit: If it is wrong: then there is nothing to time.
    """
    found = case.contestants[OURS]()
    at, exact, off = case.truth()
    rows = found.reshape(-1, found.shape[-1])[at].double()
    ratio = float(((rows - exact).abs() / off).max())
    if not ratio <= 1:
        raise SystemExit(
            f"{case.name} is wrong, so nothing is timed: {ratio:.3g} of its bound."
        )
    return ratio


def _some(rows: int, device: str) -> Tensor:
    """At most 512 rows, first and last among them."""
    return torch.linspace(0, rows - 1, min(rows, 512), device=device).long()


def _compiled(
    made: dict[str, Callable[[], Tensor]],
    where: Where,
    function: Callable[..., Tensor],
    *arguments: Tensor,
) -> None:
    if where.compiled is not None:
        compiled = where.compiled(function)
        made["torch.compile"] = lambda: compiled(*arguments)
    if where.tuned is not None:
        tuned = where.tuned(function)
        made["torch.compile, max-autotune"] = lambda: tuned(*arguments)
