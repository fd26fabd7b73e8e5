"""A toy transformer of pre-norm blocks in float64, its sites open to steering.

    a = Attn(N h),  x′ = h + a,  y = GLU(N x′),  h ← x′ + y

Attention is causal, with rotary positions and, where keys and values have fewer heads
than queries, groups of query heads that share one. `post_norm` puts a norm between the
MLP and the stream, as Gemma-2 does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from equiv.theory.toys import Draw, Tensors, Weights, glu, rms_norm

HEAD = 4  # width of one head

# (layer, site, activation [tokens, d]) → what the run goes on with.
Steer = Callable[[int, str, Tensor], Tensor]


@dataclass(frozen=True)
class Heads(Tensors):
    """Weights of attention with H query heads and G heads of keys and values.

    Attributes:
        query: W_q, [H · HEAD, d].
        key: W_k, [G · HEAD, d].
        value: W_v, [G · HEAD, d].
        output: W_o, [d, H · HEAD].
        value_bias: b_v, [G · HEAD].
        output_bias: b_o, [d].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    value_bias: Tensor
    output_bias: Tensor


@dataclass(frozen=True)
class Block:
    """One block: attention, MLP, and whether a norm follows the MLP."""

    attention: Heads
    mlp: Weights
    post_norm: bool = False

    def plus(self, other: "Block", scale: float = 1.0) -> "Block":
        """W + scale · other."""
        return Block(
            self.attention.plus(other.attention, scale),
            self.mlp.plus(other.mlp, scale),
            self.post_norm,
        )

    def moved(self, changes: Mapping[str, Tensor]) -> "Block":
        """With something added to some tensors, by name."""
        return Block(
            self.attention.moved(changes), self.mlp.moved(changes), self.post_norm
        )

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Weights without biases, by name."""
        both = {**vars(self.attention), **vars(self.mlp)}
        return {name: w for name, w in both.items() if not name.endswith("bias")}


def draw_heads(
    draw: Draw, width: int, heads: int, groups: int, *, biases: bool = False
) -> Heads:
    """Weights of attention."""
    keep = float(biases)
    return Heads(
        draw.matrix(heads * HEAD, width),
        draw.matrix(groups * HEAD, width),
        draw.matrix(groups * HEAD, width),
        draw.matrix(width, heads * HEAD),
        keep * draw.normal(groups * HEAD),
        keep * draw.normal(width),
    )


def draw_block(draw: Draw, width: int = 8, *, post_norm: bool = False) -> Block:
    """A block with two query heads that share one head of keys and values."""
    return Block(
        draw_heads(draw, width, 2, 1, biases=True),
        draw.glu(width, 2 * width, biases=True),
        post_norm,
    )


def pattern(w: Heads, x: Tensor) -> Tensor:
    """What each head looks at, [H, tokens, tokens], rows summing to 1."""
    query, key = _rotated(linear(x, w.query)), _rotated(linear(x, w.key))
    key = key.repeat_interleave(len(query) // len(key), 0)
    scores = query @ key.transpose(1, 2) / HEAD**0.5
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def values(w: Heads, x: Tensor) -> Tensor:
    """What each query head reads, [H, tokens, HEAD]."""
    value = _heads(linear(x, w.value, w.value_bias))
    return value.repeat_interleave(w.query.shape[0] // w.value.shape[0], 0)


def mixed(w: Heads, looks: Tensor, x: Tensor) -> Tensor:
    """What the heads hand to W_o when they look like this, [tokens, H · HEAD]."""
    return (looks @ values(w, x)).transpose(0, 1).flatten(1)


def heads(w: Heads, x: Tensor) -> Tensor:
    """What the heads hand to W_o, side by side, [tokens, H · HEAD]."""
    return mixed(w, pattern(w, x), x)


def attention(w: Heads, x: Tensor) -> Tensor:
    """The attention sub-layer, [tokens, d]."""
    return linear(heads(w, x), w.output, w.output_bias)


def keep(layer: int, site: str, activation: Tensor) -> Tensor:
    """No steering."""
    return activation


def adding(changes: dict[tuple[int, str], Tensor]) -> Steer:
    """Steering that adds something at some (layer, site)."""

    def steer(layer: int, site: str, activation: Tensor) -> Tensor:
        change = changes.get((layer, site))
        return activation if change is None else activation + change

    return steer


def run(blocks: Sequence[Block], h: Tensor, steer: Steer = keep) -> Tensor:
    """The stream after all blocks.

    `steer` sees attn_heads, attn_out, resid_mid, mlp_in, mlp_raw (the MLP module's
    output), mlp_out (what is added to the stream: the same unless a norm lies between)
    and block_out.
    """
    for layer, block in enumerate(blocks):
        w = block.attention
        read = steer(layer, "attn_heads", heads(w, rms_norm(h)))
        skip = h + steer(layer, "attn_out", linear(read, w.output, w.output_bias))
        skip = steer(layer, "resid_mid", skip)
        written = glu(block.mlp, steer(layer, "mlp_in", rms_norm(skip)))
        written = steer(layer, "mlp_raw", written)
        if block.post_norm:
            written = rms_norm(written)
        h = steer(layer, "block_out", skip + steer(layer, "mlp_out", written))
    return h


def traced(
    blocks: Sequence[Block], h: Tensor, steer: Steer = keep
) -> dict[tuple[int, str], Tensor]:
    """The activation at every (layer, site), as the run goes on with it."""
    found: dict[tuple[int, str], Tensor] = {}

    def noted(layer: int, site: str, activation: Tensor) -> Tensor:
        found[layer, site] = steer(layer, site, activation)
        return found[layer, site]

    run(blocks, h, noted)
    return found


def kl(logits: Tensor, other: Tensor) -> float:
    """KL(softmax of the first ‖ softmax of the second), the mean over tokens."""
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _heads(x: Tensor) -> Tensor:
    """[tokens, H · HEAD] → [H, tokens, HEAD]."""
    return x.unflatten(1, (-1, HEAD)).transpose(0, 1)


def _rotated(x: Tensor) -> Tensor:
    """Heads with their two halves turned by an angle that grows with the position."""
    first, second = _heads(x).chunk(2, -1)
    speed = 100.0 ** -torch.arange(0, 1, 2 / HEAD, dtype=x.dtype)
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * speed
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
