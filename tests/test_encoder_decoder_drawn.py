"""Encoder–decoders of drawn configurations, against forwards of W + tΔW."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.support_table import RELATIVE_NORM, Family
from equiv.testing.models import PAIRED


@st.composite
def configurations(draw: Any) -> tuple[str, dict[str, Any]]:
    """A family, and widths, heads and depths that differ between its stacks."""
    family = draw(st.sampled_from(sorted(PAIRED)))
    heads, size = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([4, 8]))
    depth, below = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    hidden, inner = draw(st.sampled_from([5, 24])), draw(st.sampled_from([7, 20]))
    if "t5" in family:
        # Transformers' own cache has as many layers as the encoder.
        return family, {
            "d_model": draw(st.sampled_from([8, 12, 16])),
            "num_heads": heads,
            "d_kv": size,
            "d_ff": hidden,
            "num_layers": max(depth, below),
            "num_decoder_layers": depth,
            "feed_forward_proj": draw(st.sampled_from(["gated-gelu", "gelu"])),
        }
    return family, {
        "d_model": 4 * size,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "encoder_layers": below,
        "decoder_layers": depth,
        "encoder_ffn_dim": hidden,
        "decoder_ffn_dim": inner,
        "scale_embedding": draw(st.booleans()),
    }


@given(configurations(), st.integers(0, 2**16))
@settings(max_examples=10)
def test_a_drawn_encoder_decoder_is_measured_rightly(
    drawn: tuple[str, dict[str, Any]], seed: int
) -> None:
    family, config = drawn
    # Small, since in some of these the next term of the series is large.
    made = Family(family, seed=seed, relative_norm=RELATIVE_NORM / 8, **config)
    captured, derivative, orders, midpoints = made.calculus()
    assert captured < 1e-13 and derivative < 1e-7
    assert all(abs(order - 2) < 0.1 for order in orders)
    assert all(abs(order - 3) < 0.1 for order in midpoints)
