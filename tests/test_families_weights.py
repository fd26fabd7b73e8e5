"""Weight edits in every family: exact where the rules hold, else refused by name."""

from typing import Any

import pytest
import torch

import equiv
from equiv.model.families import find_blocks
from equiv.model.sites import model_output
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.vector import Vector
from equiv.testing.models import EVERY_FAMILY, FAMILIES, PAIRED, example, transformer

# Mixtures, parallel blocks, scaled writes, blocks without attention or with two.
WITHOUT_RULES = {
    *PAIRED,
    *("cohere", "cohere2", "falcon", "gpt_neox", "gptj", "phi"),
    *("deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"),
    *("granite", "mamba", "mamba2"),
}
WITH_RULES = sorted({*EVERY_FAMILY} - WITHOUT_RULES - {*FAMILIES})


@pytest.mark.parametrize("family", WITH_RULES)
@torch.no_grad()
def test_an_edit_does_what_the_steering_does(family: str) -> None:
    model: Any = transformer(family, seed=1)
    call, generator = example(model), torch.Generator().manual_seed(0)
    plain = model_output(model(**call))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).double()

    exact = 0
    for site, width in {
        "attn_heads": 16,
        "attn_out": 16,
        "mlp_in": 16,
        "mlp_hidden": 24,
    }.items():
        for steer in (
            Vector(drawn(width)),
            Affine(drawn(2, width), drawn(width, 2), None),
        ):
            try:
                edited = equiv.to_weights({(1, site): steer}, model).apply(model)
            except equiv.NoExactFormError:
                assert site == "attn_out"  # a norm stands between
                continue
            with equiv.steer(model, {(1, site): steer}):
                expected = model_output(model(**call))
            found = model_output(edited(**call))
            # Some norms of these models round to float32 whatever their dtype.
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            assert float((expected - plain).norm() / plain.norm()) > 1e-3
            exact += 1
    assert exact >= 6


@pytest.mark.parametrize("family", sorted(WITHOUT_RULES))
def test_where_no_rule_holds_none_is_applied(family: str) -> None:
    model = transformer(family)
    blocks = find_blocks(model)
    assert blocks is not None
    with pytest.raises(equiv.UnsupportedModelError, match="no rule is for them"):
        equiv.to_weights({(1, "block_out"): Vector(torch.ones(16))}, model)
    name = next(n for n, _ in model.named_parameters() if n.startswith(blocks.path))
    update = {name: torch.ones_like(model.get_parameter(name))}
    with pytest.raises(equiv.UnsupportedModelError, match="no rule is for them"):
        equiv.to_steering(update, model)


@pytest.mark.parametrize("family", ["cohere", "phi", "gptj", "falcon"])
def test_in_parallel_blocks_a_vector_is_the_same_wherever_it_is_written(
    family: str,
) -> None:
    """The MLP does not read what attention adds: all three writes are one sum."""
    model = transformer(family, seed=1)
    call, update = example(model), equiv.Update.random(model, 0.05, seed=2)
    found = [
        equiv.fit_sequential(
            model, update, call, site=site, form="vector", dtype=torch.float64, ridge=0
        )
        for site in ("attn_out", "mlp_out", "block_out")
    ]
    for one in found[1:]:
        for mine, first in zip(one.values(), found[0].values(), strict=True):
            torch.testing.assert_close(mine.vector, first.vector, rtol=0, atol=1e-12)  # pyright: ignore
