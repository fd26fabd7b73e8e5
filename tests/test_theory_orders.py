"""What claims about small updates share: orders, divergences, steered runs."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from witness import SWEEP, close, moved, own_arithmetic, whole_jvp

import equiv
from equiv.testing.models import transformer
from equiv.theory.divergence import divergence, quadratic
from equiv.theory.norms import Euclidean
from equiv.theory.orders import SCALES, decay
from equiv.theory.setting import Setting, setting
from equiv.theory.steered_runs import bend, output, runs, slope


@given(
    power=st.integers(1, 5),
    size=st.floats(1e-6, 1e6),
    bend=st.floats(-1, 1),
)
@settings(max_examples=100 * SWEEP)
def test_an_order_is_that_of_the_lowest_power(
    power: int, size: float, bend: float
) -> None:
    found = decay({t: size * t**power * (1 + bend * t) for t in SCALES})
    assert found is not None
    # log2(1 + bt) changes by less than b t / ln 2 between two scales.
    off = 1.5 * abs(bend) * max(found.scales) / math.log(2) + 1e-9
    assert abs(found.order - power) <= off and found.spread <= 2 * off
    assert abs(found.constant / size - 1) <= abs(bend) * min(SCALES) + 1e-9
    assert found.near(power) and not found.near(power + 1)


def test_what_lies_in_rounding_has_no_order() -> None:
    quadratic = {t: t**2 + 1e-12 for t in (2.0**-k for k in range(1, 25))}
    found = decay(quadratic, floor=1e-12)
    assert found is not None and abs(found.order - 2) < 0.02
    assert min(found.scales) ** 2 > 64e-12
    assert decay({0.1: 1.0, 0.2: 2.0}) is None
    assert decay({0.1: 0.0, 0.2: 0.0, 0.4: math.nan}) is None


@given(seed=st.integers(0, 2**31 - 1), size=st.floats(1e-12, 10))
@settings(max_examples=30 * SWEEP)
def test_a_divergence_is_right_at_any_size(seed: int, size: float) -> None:
    """Against 60 digits."""
    draw = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(4, 7, generator=draw, dtype=torch.float64)
    other = z + size * torch.randn(4, 7, generator=draw, dtype=torch.float64)
    mpmath.mp.dps = 60
    for found, p, q in zip(divergence(z, other), z, other, strict=True):
        expected = exact_kl(p, q)
        # One rounding of each logit is all that is lost: relative to the difference.
        near = 1e-14 * (1 + float(p.abs().max()) / size)
        assert abs(float(found) / expected - 1) <= 20 * near, (found, expected)


def exact_kl(p: Tensor, q: Tensor) -> float:
    rows = [[mpmath.mpf(float(v)) for v in row] for row in (p, q)]
    weights = [[mpmath.exp(v) for v in row] for row in rows]
    probabilities = [[w / sum(own) for w in own] for own in weights]
    first, second = probabilities
    return float(sum(a * mpmath.log(a / b) for a, b in zip(first, second, strict=True)))


def test_a_divergence_is_half_a_square_at_the_end() -> None:
    draw = torch.Generator().manual_seed(0)
    z, c = (torch.randn(5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    p = z.softmax(-1)
    matrix = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    half = torch.einsum("ti,tij,tj->t", c, matrix, c) / 2
    torch.testing.assert_close(quadratic(c, z), half)
    torch.testing.assert_close(
        divergence(z, z + 1e-6 * c) / 1e-12, half, rtol=1e-5, atol=0
    )
    assert torch.equal(quadratic(c, z, classes=False), c.square().sum(-1) / 2)
    assert torch.equal(
        divergence(z, z + c, classes=False), (z + c - z).square().sum(-1) / 2
    )


def drawn(family: str = "llama", size: float = 0.1, **config: Any) -> Setting:
    """A small random model, an update of all its weights, two lengths of sequences."""
    model = transformer(family, seed=1, **config)
    update = equiv.Update.random(model, size, seed=2)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 32, (2, n), generator=draw) for n in (4, 6)]
    return setting("", model, update, ids, None, Euclidean(), 0)


def plain_outputs(
    given: Setting, t: float, ids: Tensor, steers: Mapping[int, Any] | None = None
) -> Tensor:
    """Logits at W + tΔW, by plain hooks that add something to blocks' outputs."""
    model: Any = given.model
    tensors = moved(model, given.update, t)
    blocks = (
        model.transformer.h if hasattr(model, "transformer") else model.model.layers
    )

    def adding(layer: int) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            changed = h + (steers or {})[layer](h)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        return hook

    with ExitStack() as stack, own_arithmetic(), torch.no_grad():
        for layer in steers or {}:
            handle = blocks[layer].register_forward_hook(adding(layer))
            stack.callback(handle.remove)
        return functional_call(model, tensors, (ids,), {"use_cache": False}).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_tuned_run_is_that_of_changed_weights(family: str) -> None:
    given = drawn(family)
    with runs(given) as made:
        path = made.tuned(given.update)
        for n, batch in enumerate(given.few):
            ids = batch.arguments["input_ids"]
            close(made.base[n], plain_outputs(given, 0, ids))
            for t in (0.5, -1.0):
                close(output(path, n, t), plain_outputs(given, t, ids))
            for t in (0.0, 0.5):
                _, tangents = whole_jvp(given.model, given.update, batch.arguments, t)
                close(slope(path, n, t), tangents["logits"])
            e = 1e-3
            ends = [plain_outputs(given, t, ids) for t in (-e, 0, e)]
            second = (ends[0] - 2 * ends[1] + ends[2]) / e**2
            torch.testing.assert_close(bend(path, n), second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_steered_run_is_that_of_plain_hooks(family: str) -> None:
    """An offset per token at one block, a map of what is there at the other."""
    given = drawn(family)
    draw = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=draw) / 4 for s in ((2, 16), (16, 2)))
    offset = given.shifts[0, "block_out"].first_order
    rows = sorted(n for batch in given.few for n in batch.index)
    with runs(given) as made:
        path = made.steered({0: offset, 1: equiv.Affine(down, up)})
        for n, batch in enumerate(given.few):
            at = [rows.index(i) for i in batch.index]

            def plain(t: float, n: int = n, at: list[int] = at) -> Tensor:
                ids = given.few[n].arguments["input_ids"]
                own = offset[at, : ids.shape[1]]
                maps = {
                    0: lambda _: t * own,
                    1: lambda h: t * h @ down.double().T @ up.double().T,
                }
                return plain_outputs(given, 0, ids, maps)

            close(output(path, n, 0.3), plain(0.3))
            e = 1e-3
            first = (plain(e) - plain(-e)) / (2 * e)
            second = (plain(e) - 2 * plain(0) + plain(-e)) / e**2
            torch.testing.assert_close(slope(path, n), first, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(bend(path, n), second, rtol=1e-4, atol=1e-4)


def test_runs_take_whole_sequences() -> None:
    given = drawn()
    with runs(given) as made:
        assert [batch.tokens for batch in made.cut.batches] == [8, 12]
    long = [torch.randint(3, 32, (3, 400))]
    model = transformer("llama", max_position_embeddings=512)
    update = equiv.Update.random(model, 0.1, seed=0)
    given = setting("", model, update, long, None, Euclidean(), 0)
    with runs(given) as made:
        assert [batch.counts for batch in made.cut.batches] == [(400,)]
        assert made.classes and made.counted(made.base[0], 0).shape == (400, 32)


def test_a_model_without_blocks_has_no_runs() -> None:
    model = torch.nn.Linear(2, 2)
    given = setting(
        "",
        model,
        equiv.Update.random(model, 0.1, 0),
        torch.ones(3, 2),
        None,
        Euclidean(),
        0,
    )
    with pytest.raises(equiv.UnsupportedModelError, match="no blocks"), runs(given):
        pass
