"""Claim 5: fixed vectors at mlp_out and at block_out are one, and are biases."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equiv.model.precision import KeepFloat64
from equiv.steering.applying.apply import steer
from equiv.steering.forms.vector import Vector
from equiv.testing.models import transformer
from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import HEAD, Block, adding, draw_block, run
from equiv.theory.toys import Draw
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, TOKENS = 8, 6
PARALLEL = ("gpt_neox",)
FAMILIES = ("llama", "gpt2", "gemma2", "olmo2", *PARALLEL)


@claim(
    5,
    title="a fixed vector at mlp_out, at block_out and as bias of W_d are one",
    formula="x′ + (y + v) = (x′ + y) + v; at attn_out: b_o + v; at a head: b_o + W_o v",
    assumptions="no norm between module and stream; equal to rounding, not bit by bit",
    source="this project; head offsets after LoFiT, scalings after JoLA",
    falsified_by="a mismatch; or equality across a norm after the MLP",
    kind="exact",
    as_written="steering at block_out is more expressive than at mlp_out",
    derivation="""
        Addition is associative: what is added to the MLP's output is added to the
        stream. The last layer of a sub-layer adds its bias in the same place, so a
        vector at mlp_out or attn_out is a bias of W_d or W_o; an offset v of one head
        passes W_o, and a scaling 1 + m of its entries is W_o diag(1 + m).

        Sites differ by what a steer reads there. A fixed vector reads nothing, so it
        cannot tell mlp_out from block_out. A norm between the MLP and the stream
        (Gemma-2, OLMo-2) separates the module's output from what is written; mlp_out,
        as the tensor that is added, stays equal to block_out there too. In parallel
        blocks (GPT-NeoX) attn_out is one with both.
    """,
)
def fixed_vector(seed: int) -> ClaimResult:
    """Two blocks, steered in the first; with and without a norm after the MLP."""
    draw = Draw(seed)
    blocks = [draw_block(draw, WIDTH) for _ in range(2)]
    normed = [replace(block, post_norm=True) for block in blocks]
    h, v = draw.normal(TOKENS, WIDTH), draw.normal(WIDTH)

    def at(site: str, layers: list[Block] = blocks) -> Tensor:
        return run(layers, h, adding({(0, site): v}))

    same, other = of_families(seed)
    return identity(
        {
            "mlp_out, block_out": relative(at("mlp_out"), at("block_out")),
            "mlp_out, bias of W_d": relative(at("mlp_out"), down_bias(blocks, h, v)),
            "attn_out, bias of W_o": relative(at("attn_out"), output(blocks, h, v)),
            **_one_head(draw, blocks, h),
            "with a norm: mlp_out, block_out": relative(
                at("mlp_out", normed), at("block_out", normed)
            ),
            **same,
        },
        "Vectors at mlp_out and block_out and biases do the same",
        differ={
            "with a norm: MLP module, block_out": relative(
                at("mlp_raw", normed), at("block_out", normed)
            ),
            "attn_out, block_out": relative(at("attn_out"), at("block_out")),
            **other,
        },
        as_written=_as_written(),
    )


def down_bias(blocks: Sequence[Block], h: Tensor, vector: Tensor) -> Tensor:
    """The run with the vector added to the first block's b_d."""
    first = blocks[0]
    mlp = replace(first.mlp, down_bias=first.mlp.down_bias + vector)
    return run([replace(first, mlp=mlp), *blocks[1:]], h)


def output(
    blocks: Sequence[Block], h: Tensor, bias: Tensor, columns: Tensor | None = None
) -> Tensor:
    """The run with a bias added to the first block's W_o, and its first columns set."""
    first = blocks[0]
    w = first.attention
    matrix = w.output.clone()
    if columns is not None:
        matrix[:, : columns.shape[1]] = columns
    w = replace(w, output=matrix, output_bias=w.output_bias + bias)
    return run([replace(first, attention=w), *blocks[1:]], h)


def _one_head(draw: Draw, blocks: Sequence[Block], h: Tensor) -> dict[str, float]:
    """The first head of the first block, offset by v or scaled by 1 + m."""
    v, m = draw.normal(HEAD), draw.normal(HEAD)
    columns = blocks[0].attention.output[:, :HEAD]

    def steered(factor: Tensor, vector: Tensor) -> Tensor:
        def steer(layer: int, site: str, activation: Tensor) -> Tensor:
            if (layer, site) != (0, "attn_heads"):
                return activation
            first, rest = activation[:, :HEAD], activation[:, HEAD:]
            return torch.cat([first * factor + vector, rest], 1)

        return run(blocks, h, steer)

    offset = steered(torch.ones_like(v), v)
    scaled = steered(1 + m, torch.zeros_like(v))
    nothing = torch.zeros(h.shape[1], dtype=h.dtype)
    return {
        "head offset, W_o v": relative(offset, output(blocks, h, columns @ v)),
        "head scaling, W_o diag(1 + m)": relative(
            scaled, output(blocks, h, nothing, columns * (1 + m))
        ),
    }


def of_families(seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Differences of logits, between vectors at two sites, that should be 0 or not."""
    same, other = {}, {}
    for family in FAMILIES:
        model = transformer(family, seed=seed % 1000)
        draw = Draw(seed)
        v = Vector(draw.normal(model.config.hidden_size))
        ids = draw.normal(1, TOKENS).argsort(-1) + 3
        at_block = logits(model, ids, "block_out", v)
        same[f"{family}: mlp_out, block_out"] = relative(
            logits(model, ids, "mlp_out", v), at_block
        )
        attention = relative(logits(model, ids, "attn_out", v), at_block)
        where = same if family in PARALLEL else other
        where[f"{family}: attn_out, block_out"] = attention
    return same, other


def logits(model: Any, ids: Tensor, site: str, vector: Vector) -> Tensor:
    """Of a small model, steered in its first block."""
    with torch.no_grad(), KeepFloat64(), steer(model, {(0, site): vector}):
        return model(ids).logits


def _as_written() -> AsWritten:
    """One token, one dimension: x′ = 1, y = 2, v = 1."""
    skip, mlp, vector = 1.0, 2.0, 1.0
    at_mlp, at_block = skip + (mlp + vector), (skip + mlp) + vector
    return AsWritten(
        Verdict.FAILS if at_mlp == at_block else Verdict.HOLDS,
        "not by fixed vectors: they read nothing, and both sites write to the same "
        "stream, so it is one function",
        {
            "x′": skip,
            "y": mlp,
            "v": vector,
            "block with v at mlp_out": at_mlp,
            "block with v at block_out": at_block,
        },
    )
