"""Claim 7: the sequential oracle is exact, simultaneous offsets are not."""

from collections.abc import Sequence

from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import (
    Block,
    Steer,
    adding,
    draw_block,
    keep,
    kl,
    run,
    traced,
)
from equiv.theory.toys import Draw
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, TOKENS, LAYERS, VOCABULARY = 8, 6, 6, 11
SMALL = 2.0**-8
SITE = "block_out"

# Layer → the state after that block, [tokens, d].
Stream = dict[int, Tensor]


@claim(
    7,
    title="the sequential oracle gives the tuned run; offsets added at once do not",
    formula="h̃_l + (h_FT,l − h̃_l) = h_FT,l at every l; h̃_l + (h_FT,l − h_l) ≠ h_FT,l",
    assumptions="the oracle sees the state of the steered run; two blocks or more",
    source="blog: the oracle overwrites the stream",
    falsified_by="a sequential KL above rounding, or a simultaneous KL of 0",
    kind="exact",
    as_written="adding h_FT − h_base at every layer gives h_FT",
    derivation="""
        With the offset taken from the state that the steered run is really in, each
        layer is set to the tuned activation, and so is the last.

        Offsets of the unsteered run already hold what earlier layers' updates do
        downstream. Added at all layers at once they count that again: to first order
        the excess is Σ_l (L − l) J_(L←l) δ_l, l = 0…L − 1 (claim 40). It is of the size
        of the shift itself, so this can be worse than no steering.
    """,
)
def oracles(seed: int) -> ClaimResult:
    """Six blocks; a small update, and one a third as large as the weights."""
    draw = Draw(seed)
    base = [draw_block(draw, WIDTH) for _ in range(LAYERS)]
    change = [draw_block(draw, WIDTH) for _ in range(LAYERS)]
    h, head = draw.normal(TOKENS, WIDTH), draw.normal(VOCABULARY, WIDTH)

    def tuned(scale: float) -> list[Block]:
        return [b.plus(c, scale) for b, c in zip(base, change, strict=True)]

    def kl_ratio(scale: float) -> float:
        target, plain = run(tuned(scale), h) @ head.T, run(base, h) @ head.T
        steered = simultaneous(base, tuned(scale), h)[LAYERS - 1] @ head.T
        return kl(target, steered) / kl(target, plain)

    plain, target = stream(base, h), stream(tuned(0.3), h)
    overwritten = sequential(base, tuned(0.3), h)
    added = simultaneous(base, tuned(0.3), h)
    last = LAYERS - 1
    return identity(
        {"sequential against tuned": relative(overwritten[last], target[last])},
        "The sequential oracle is the tuned run",
        differ={"simultaneous against tuned": relative(added[last], target[last])},
        evidence={
            "simultaneous KL over unsteered KL, large update": kl_ratio(0.3),
            "simultaneous KL over unsteered KL, small update": kl_ratio(SMALL),
            "simultaneous, by block": _distances(added, plain, target),
            "sequential, by block": _distances(overwritten, plain, target),
        },
        as_written=_as_written(),
    )


def stream(blocks: Sequence[Block], h: Tensor, steer: Steer = keep) -> Stream:
    """The state after every block."""
    found = traced(blocks, h, steer)
    return {layer: state for (layer, site), state in found.items() if site == SITE}


def sequential(base: Sequence[Block], tuned: Sequence[Block], h: Tensor) -> Stream:
    """Offsets from the state of the steered run."""
    target = stream(tuned, h)

    def steer(layer: int, site: str, activation: Tensor) -> Tensor:
        if site != SITE:
            return activation
        return activation + (target[layer] - activation)

    return stream(base, h, steer)


def simultaneous(base: Sequence[Block], tuned: Sequence[Block], h: Tensor) -> Stream:
    """Offsets of the unsteered run, at every block at once."""
    before, after = stream(base, h), stream(tuned, h)
    offsets = {(layer, SITE): after[layer] - before[layer] for layer in before}
    return stream(base, h, adding(offsets))


def _distances(steered: Stream, plain: Stream, target: Stream) -> list[float]:
    """How far from the tuned state: 1 is as far as without steering."""
    return [
        float((steered[n] - target[n]).norm() / (plain[n] - target[n]).norm())
        for n in target
    ]


def _as_written() -> AsWritten:
    """Two blocks on one number: h ← h, tuned h ← h + 1, from h = 0."""
    tuned = [1.0, 2.0]
    offsets = [after - before for after, before in zip(tuned, [0.0, 0.0], strict=True)]
    state = 0.0
    for offset in offsets:
        state = state + offset
    return AsWritten(
        Verdict.FAILS if state != tuned[-1] else Verdict.HOLDS,
        "true of one layer; at all layers at once it counts earlier layers again",
        {"tuned states": tuned, "offsets": offsets, "steered end": state},
    )
