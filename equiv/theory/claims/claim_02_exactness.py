"""Claim 2: which updates leave no remainder at all."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear, silu

from equiv.theory.judging import identity
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import Heads, attention, draw_heads, mixed, pattern
from equiv.theory.toys import Draw, T, Weights, derivative, glu
from equiv.theory.values import ClaimResult

WIDTH, INNER, TOKENS = 16, 40, 6


@claim(
    2,
    title="updates of W_d, W_u, W_o or W_v alone leave no remainder",
    formula=(
        "y(W + ΔW) − y(W) − Dy[ΔW] = 0 for each alone; "
        "= ΔW_d (φ(a_g) ⊙ ΔW_u u) for W_u with W_d"
    ),
    assumptions="at the module's own output, same input before and after",
    source="this project",
    falsified_by="any other remainder; no remainder for W_g or W_q",
    kind="exact",
    derivation="""
        y is affine in W_d, and in W_u, when the other two matrices stay: nothing is
        left beyond first order, at any size. Bilinear in both, it leaves the product of
        the two changes and nothing higher. W_g goes through φ, so it leaves a
        remainder of second order.

        With the attention pattern as it is, attention is bilinear in W_v and W_o in the
        same way; W_q and W_k move the pattern through a softmax.

        Downstream of the module, or after a norm on what it writes, none of this holds:
        the next function bends.
    """,
)
def exactness(seed: int) -> ClaimResult:
    """Remainders of updates as large as the weights."""
    draw = Draw(seed)
    mlp, change = (draw.glu(WIDTH, INNER, biases=True) for _ in range(2))
    heads, turn = (draw_heads(draw, WIDTH, 4, 2, biases=True) for _ in range(2))
    u = draw.normal(TOKENS, WIDTH)

    def of_mlp(*names: str, cross: Tensor | None = None) -> float:
        return left(lambda w: glu(w, u), mlp, change.only(*names), cross)

    def of_heads(*names: str, cross: Tensor | None = None) -> float:
        return left(lambda w: attention(w, u), heads, turn.only(*names), cross)

    both, pair = up_down(mlp, change, u), value_output(heads, turn, u)
    return identity(
        {
            "W_d alone": of_mlp("down", "down_bias"),
            "W_u alone": of_mlp("up", "up_bias"),
            "W_o alone": of_heads("output", "output_bias"),
            "W_v alone": of_heads("value", "value_bias"),
            "W_u with W_d, less the cross term": of_mlp("up", "down", cross=both),
            "W_v with W_o, less the cross term": of_heads(
                "value", "output", cross=pair
            ),
        },
        "W_d, W_u, W_o, W_v leave nothing, pairs exactly one cross term",
        differ={
            "W_g alone": of_mlp("gate"),
            "W_q alone": of_heads("query"),
            "W_k alone": of_heads("key"),
            "W_u with W_d": of_mlp("up", "down"),
            "W_v with W_o": of_heads("value", "output"),
        },
    )


def left(run: Callable[[T], Tensor], at: T, update: T, cross: Tensor | None) -> float:
    """What first order, and a cross term, miss: as a share of the exact shift."""
    exact = run(at.plus(update)) - run(at)
    rest = exact - derivative(run, at, update)
    rest = rest if cross is None else rest - cross
    return float(rest.norm() / exact.norm())


def up_down(w: Weights, update: Weights, u: Tensor) -> Tensor:
    """ΔW_d (φ(a_g) ⊙ ΔW_u u)."""
    gate = silu(linear(u, w.gate, w.gate_bias))
    return linear(gate * linear(u, update.up), update.down)


def value_output(w: Heads, update: Heads, x: Tensor) -> Tensor:
    """ΔW_o applied to what the pattern mixes of ΔW_v x."""
    return linear(mixed(update.only("value"), pattern(w, x), x), update.output)
