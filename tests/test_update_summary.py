"""What an update says of itself: norms, spectra, tables and differences to another."""

import copy
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import witness
from hypothesis import given, settings
from test_update_sums import updates

import equiv
from equiv.testing.models import mlp, transformer
from equiv.update.low_rank import LowRank


@settings(max_examples=60 * witness.SWEEP)
@given(updates())
def test_spectra_are_those_of_the_dense_matrix(update: equiv.Update) -> None:
    """By numpy's SVD of the dense matrix, which is never made here."""
    for name, delta in witness.dense(update).items():
        if delta.ndim != 2:
            with pytest.raises(equiv.UpdateError, match="Expected a matrix"):
                update.stable_rank(name)
            continue
        expected = np.linalg.svd(delta.numpy(), compute_uv=False)
        found = update.singular_values(name).numpy()
        assert found.dtype == np.float64 and (np.diff(found) <= 0).all()
        padded = np.zeros_like(expected)
        padded[: len(found)] = found
        np.testing.assert_allclose(padded, expected, rtol=0, atol=1e-13 * expected[0])
        stable = (expected**2).sum() / expected[0] ** 2
        assert update.stable_rank(name) == pytest.approx(stable, rel=1e-12)


def test_factors_are_not_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    update = equiv.Update.from_dict({"w": LowRank(torch.ones(9, 2), torch.ones(2, 7))})
    monkeypatch.setattr(LowRank, "dense", None)
    assert update.stable_rank("w") == pytest.approx(1)
    assert "rank 2" in str(update.summary(spectra=True))
    assert update.diff(update).cosine == pytest.approx(1)


def test_no_direction_in_zeros() -> None:
    update = equiv.Update.from_dict({"w": torch.zeros(3, 2)})
    assert update.stable_rank("w") == 0
    assert update.diff(update).cosine == 0
    assert "0.00 %" in str(update)
    with pytest.raises(equiv.UpdateMismatchError, match="has no `v`"):
        update.stable_rank("v")


@settings(max_examples=60 * witness.SWEEP)
@given(updates(), updates())
def test_a_diff_names_what_one_of_them_lacks(a: equiv.Update, b: equiv.Update) -> None:
    diff = a.diff(b)
    one, two = witness.dense(a), witness.dense(b)
    assert set(diff.both) == one.keys() & two.keys()
    assert set(diff.only_first) == one.keys() - two.keys()
    assert set(diff.only_second) == two.keys() - one.keys()
    product = sum(float((one[n] * two[n]).sum()) for n in diff.both)
    lengths = [sum(float(d.square().sum()) for d in u.values()) for u in (one, two)]
    expected = product / (lengths[0] * lengths[1]) ** 0.5
    assert diff.cosine == pytest.approx(expected, abs=1e-12)
    assert all(name in str(diff) for name in (*diff.only_first, *diff.only_second))


@settings(max_examples=30 * witness.SWEEP)
@given(updates(), st.booleans())
def test_a_summary_adds_up(update: equiv.Update, spectra: bool) -> None:
    summary = update.summary(spectra=spectra)
    assert sum(part.count for part in summary.parts) == len(update.deltas)
    assert summary.norm == pytest.approx(update.norm(), rel=1e-12)
    dense = witness.dense(update)
    for part in summary.parts:
        name = part.kind if part.kind.endswith("bias") else f"{part.kind}.weight"
        assert part.norm == pytest.approx(float(dense[name].norm()), rel=1e-6)
        assert (part.dense == 0) == isinstance(update.deltas[name], LowRank)


def test_a_table_tells_blocks_kinds_and_sizes() -> None:
    base = transformer("llama", seed=1, num_hidden_layers=4)
    q, head = "model.layers.{}.self_attn.q_proj.weight", "lm_head.weight"
    deltas = {
        q.format(i): LowRank(torch.ones(16, 1), torch.ones(1, 16)) for i in (0, 1, 3)
    }
    update = equiv.Update.from_dict(
        {**deltas, head: 16 * torch.ones(32, 16)}, source="x"
    )
    own = witness.parameters(base)
    relative = [
        100 * (3 * 256 / sum(float(own[n].square().sum()) for n in deltas)) ** 0.5,
        100 * 16 * 512**0.5 / float(own[head].norm()),
    ]
    # ‖ones(16, 16)‖² = 256 three times, 16² · 512 for the head.
    whole = 3 * 256 + 256 * 512
    lines = str(update.summary(base, spectra=True)).splitlines()
    assert lines[0] == "x"
    assert lines[1].startswith(f"4 parameters, blocks 0–1, 3, norm {whole**0.5:.3g} (")
    assert lines[3].split("  ")[0] == "weight" and lines[3].endswith("stable rank")
    q_row, head_row = lines[4].split(), lines[5].split()
    assert q_row == (
        f"self_attn.q_proj 0–1, 3 3 rank 1 27.7 0.6 % {relative[0]:.0f} % 1.0".split()
    )
    assert head_row == f"lm_head – 1 dense 362 99 % {relative[1]:.0f} % 1.0".split()
    assert len(lines) == 6 and len({len(line) for line in lines[3:]}) == 1
    assert "relative norm" not in str(update) and "stable rank" not in str(update)


def test_relative_norms_of_a_folder_s_update(tmp_path: Path) -> None:
    base = transformer("llama", seed=1, dtype=torch.float32)
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data *= 1.25
    tuned.save_pretrained(tmp_path)
    update = equiv.Update.between(base, tmp_path)
    # A quarter of every weight, but for the rounding to float32.
    assert update.relative_norm() == pytest.approx(0.25, rel=1e-6)
    assert update.relative_norm(base) == pytest.approx(0.25, rel=1e-6)
    assert "(25 % of the weights it moves)" in str(update)
    with pytest.raises(equiv.UpdateMismatchError, match="belongs to another model"):
        update.relative_norm(mlp())
    unknown = equiv.Update.from_dict(dict(update.deltas))
    with pytest.raises(equiv.UpdateError, match=r"relative_norm\(model\)"):
        unknown.relative_norm()


def test_numbers_in_a_plain_module_are_no_blocks() -> None:
    text = str(equiv.Update.random(mlp(), 0.01, seed=0))
    assert "block " not in text and text.splitlines()[4].startswith("0 ")
