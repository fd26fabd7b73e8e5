"""Every family against its own forward: derivatives, orders, sums, steering, tokens.

Where the sites are is written down a second time in `benchmarks.support_witness`; the
figures are those of the support table, at another seed.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import equiv
from benchmarks.readme import README, filled
from benchmarks.support_table import BESIDE, Family, Row, markdown
from benchmarks.support_witness import PLACES
from equiv.model.known_families import FAMILIES, TABLE
from equiv.model.known_pairs import PAIRS
from equiv.steering.forms.vector import Vector
from equiv.testing.models import EVERY_FAMILY, example, transformer

RECORDED = Path(__file__).parents[1] / "benchmarks" / "results" / "support.json"


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_family_is_supported(family: str) -> None:
    row = Family(family, seed=3).row()
    assert row.captured < 1e-13
    assert row.derivative < 1e-7  # of fourth order in a step of 3e-4 of the weights
    assert abs(row.order - 2) < 0.06 and abs(row.midpoint - 3) < 0.06
    assert row.superposition < 1e-13
    assert row.probe < 1e-13 and row.steer < 1e-13
    assert row.generate is not False
    assert row.green


@pytest.mark.parametrize(
    "chosen",
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("opt", {"do_layer_norm_before": False}),
        ("falcon", {"parallel_attn": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
        ("qwen2_moe", {"mlp_only_layers": []}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ],
    ids=str,
)
def test_what_a_configuration_chooses_is_supported(
    chosen: tuple[str, dict[str, Any]],
) -> None:
    family, config = chosen
    row = Family(family, seed=4, **config).row()
    assert row.green, row


def test_every_family_has_a_place_a_model_and_a_line() -> None:
    assert sorted(TABLE | PAIRS) == sorted(EVERY_FAMILY) == sorted(PLACES)
    assert len(EVERY_FAMILY) >= 30


def test_the_recorded_table_is_of_these_families_and_green() -> None:
    rows = [
        Row(**{k: v for k, v in row.items() if k != "green"})
        for row in json.loads(RECORDED.read_text())["rows"]
    ]
    assert [row.family for row in rows] == sorted(EVERY_FAMILY)
    assert all(row.green for row in rows)
    assert markdown(rows) == RECORDED.with_suffix(".md").read_text()
    assert README.read_text() == filled(README.read_text())


def test_a_row_that_is_wrong_is_not_green() -> None:
    row = Row("any", ("block_out",), 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, True)
    assert row.green and not dataclasses.replace(row, generate=False).green
    for field in ("captured", "derivative", "order", "midpoint", "probe", "steer"):
        assert not dataclasses.replace(row, **{field: 1.0}).green


def test_sites_that_a_block_lacks_are_named() -> None:
    ids = torch.tensor([[3, 4, 5]])
    for family, site, says in [
        ("cohere", "resid_mid", "read the same stream"),
        ("mixtral", "mlp_hidden", "mixture of experts"),
        ("mamba", "attn_out", "It has block_out"),
    ]:
        model = transformer(family)
        update = equiv.Update.random(model, 0.01, seed=0)
        with (
            pytest.raises(equiv.SiteError, match=says),
            equiv.steer(model, {(1, site): Vector(torch.ones(16))}),
        ):
            pass
        with pytest.raises(equiv.SiteError, match=says):
            list(equiv.shifts(model, update, ids, sites=(site,)))


def test_default_sites_are_those_that_the_blocks_have() -> None:
    model = transformer("mamba", seed=1)
    update = equiv.Update.random(model, 0.001, seed=0)
    found = equiv.check(model, update, example(model), forms=("vector",), seed=0)
    assert {row.site for row in found.rows} >= {"block_out"}
    assert found.holds


@pytest.mark.parametrize("family", ["vit", "mixtral"])
def test_a_whole_check_holds(family: str) -> None:
    """Images among the inputs, and blocks that lack a site."""
    model = transformer(family, seed=6)
    update = equiv.Update.random(model, 0.001, seed=0)
    calls = [example(model, seed=seed) for seed in range(3)]
    found = equiv.check(model, update, calls, forms=("vector",), dtype=torch.float64)
    assert found.holds
    assert {row.site for row in found.rows} >= {"attn_out", "mlp_out", "block_out"}


def test_experts_without_a_derivative_are_computed_one_by_one_and_put_back() -> None:
    model = transformer("mixtral", seed=5, dtype=torch.float32)
    update = equiv.Update.random(model, 0.001, seed=0)
    expected = equiv.shifts(model, update, example(model))[1, "block_out"]
    model.set_experts_implementation("grouped_mm")
    found = equiv.shifts(model, update, example(model))[1, "block_out"]
    assert torch.equal(found.first_order, expected.first_order)
    assert model.config._experts_implementation == "grouped_mm"


def test_what_reaches_blocks_beside_the_stream_is_refused() -> None:
    model = transformer("deberta-v2", seed=2)
    name = f"{BESIDE[0]}.weight"
    update = {name: torch.ones_like(model.get_parameter(name))}
    with pytest.raises(
        equiv.UnsupportedModelError, match=rf"{name}.*beside the stream"
    ):
        list(equiv.shifts(model, update, example(model)))


def test_families_that_files_may_name_add_their_modules_as_they_are() -> None:
    assert "opt" not in FAMILIES and "granite" not in FAMILIES
    assert {"llama", "cohere", "gemma3_text", "bert"} <= set(FAMILIES)
    assert all(known.attn_out and known.mlp_out for known in FAMILIES.values())
