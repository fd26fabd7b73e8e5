"""What the study of fine-tunes measures, against brute force on a tiny net."""

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import equiv
from equiv.theory.trained.controls import CONTROLS, equal_norm, same_spectrum
from equiv.theory.trained.gains import gains
from equiv.theory.trained.joining import joined
from equiv.theory.trained.nets import (
    Nets,
    Recipe,
    Training,
    held_out,
    nets,
    new_base,
)
from equiv.theory.trained.oracle_shape import coverage, directions, participation
from equiv.theory.trained.oracles import oracle_changes
from equiv.theory.trained.output_changes import output_changes
from equiv.theory.trained.readings import READS, misfit, truncated
from equiv.theory.trained.studies.fine_tunes import SITES, Sizes, of_nets
from equiv.theory.trained.studies.oracles_by_depth import (
    VARIANTS,
    of_seed,
    with_post_norms,
)
from equiv.theory.trained.studies.oracles_by_depth import Sizes as DepthSizes

FEW = Training(12, 16, 3e-3)
TINY = Recipe(16, 2, FEW, FEW, FEW, scored=20)
SEQUENCES = 48


@cache
def made() -> Nets:
    return nets(0, TINY)


@pytest.fixture(scope="module", autouse=True)
def trained() -> None:
    """Trained before any test turns gradients off."""
    made()


def update() -> equiv.Update:
    return equiv.Update.between(made().base, made().full)


@cache
def found() -> dict[tuple[int, str], equiv.Shift]:
    inputs = held_out(SEQUENCES)
    shifts = equiv.shifts(
        made().base, update(), inputs, sites=SITES, dtype=torch.float64
    )
    return {(shift.layer, shift.site): shift for shift in shifts}


@torch.no_grad()
def by_hooks(model: Any, site: str, layer: int) -> Tensor:
    """A site's activations by a plain hook on the plain model, [tokens, d]."""
    inputs = held_out(SEQUENCES)
    block = model.model.layers[layer]
    taken: list[Tensor] = []
    if site == "resid_mid":
        handle = block.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: taken.append(args[0])
        )
    else:
        module = {
            "attn_out": block.self_attn.o_proj,
            "mlp_in": block.post_attention_layernorm,
            "mlp_out": block.mlp,
            "block_out": block,
        }[site]
        handle = module.register_forward_hook(lambda _, __, out: taken.append(out))
    model(**inputs)
    handle.remove()
    return taken[0][inputs["attention_mask"].bool()].double()


@pytest.mark.parametrize("site", READS)
@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.claim(17)
def test_misfits_are_those_of_least_squares(site: str, rank: int | None) -> None:
    layer, counts = 1, held_out(SEQUENCES)["attention_mask"].sum(1)
    x = by_hooks(made().base, site, layer).numpy()
    tuned, base = (by_hooks(m, "block_out", layer) for m in (made().full, made().base))
    y = (tuned - base).numpy()
    n = int(counts[: SEQUENCES * 3 // 4].sum())
    (x, x_held), (y, y_held) = np.split(x, [n]), np.split(y, [n])
    centre, target = x.mean(0), y.mean(0)
    # Ridge regression as plain least squares on more rows.
    ridge = 1e-3 * ((x - centre) ** 2).sum() / x.shape[1]
    rows = np.vstack([x - centre, math.sqrt(ridge) * np.eye(x.shape[1])])
    right = np.vstack([y - target, np.zeros((x.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(rows, right, rcond=None)[0]
    if rank is not None:
        kept = np.linalg.svd(rows @ weight, full_matrices=False)[2][:rank]
        weight = weight @ kept.T @ kept
    left = y_held - target - (x_held - centre) @ weight
    expected = (left**2).sum() / (y_held**2).sum()
    # Hooks see float32.
    assert misfit(found(), layer, site, rank) == pytest.approx(expected, rel=1e-3)


@pytest.mark.claim(27)
def test_the_truncated_oracle_is_a_projection() -> None:
    tuned, base = (by_hooks(m, "block_out", 1) for m in (made().full, made().base))
    counts = held_out(SEQUENCES)["attention_mask"].sum(1)
    delta = (tuned - base).numpy()
    n = int(counts[: SEQUENCES * 3 // 4].sum())
    seen, held = np.split(delta, [n])
    values, vectors = np.linalg.eigh(np.cov(seen.T))
    leading = vectors[:, np.argsort(-values)[:3]]
    rest = held - seen.mean(0)
    left = rest - rest @ leading @ leading.T
    expected = (left**2).sum() / (held**2).sum()
    assert truncated(found(), 1, 3) == pytest.approx(expected, rel=1e-3)
    assert truncated(found(), 1, 16) < 1e-20


@pytest.mark.claim(21)
def test_coverage_is_that_of_plain_hooks_and_of_the_report() -> None:
    layer = 1

    def norm(site: str) -> float:
        tuned, base = (by_hooks(m, site, layer) for m in (made().full, made().base))
        return float((tuned - base).norm())

    def size(site: str) -> float:
        return float(by_hooks(made().base, site, layer).norm())

    mlp, skip = norm("mlp_out"), norm("resid_mid")
    written = size("mlp_out")
    expected = {
        "δMLP over δblock": mlp / norm("block_out"),
        "δskip share": skip / (mlp + skip),
        "MLP share": written / (written + size("attn_out")),
        "MLP over block": written / size("block_out"),
    }
    assert coverage(found(), layer, local=False) == pytest.approx(expected, rel=1e-3)
    report = equiv.check(
        made().base, update(), held_out(SEQUENCES), sites=SITES[-2:], forms=()
    )
    for row in report.coverage:
        own = coverage(found(), row.layer, local=row.scope == "local")
        assert row.shift_mlp_share == pytest.approx(1 - own["δskip share"], rel=1e-3)
        assert row.shift_mlp_over_block == pytest.approx(
            own["δMLP over δblock"], rel=1e-3
        )
        assert row.activation_mlp_share == pytest.approx(own["MLP share"], rel=1e-3)


@pytest.mark.claim(24)
def test_spread_is_that_of_the_covariance() -> None:
    tuned, base = (by_hooks(m, "block_out", 0) for m in (made().full, made().base))
    values = np.linalg.eigvalsh(np.cov((tuned - base).numpy().T))[::-1]
    shift = found()[0, "block_out"]
    delta = shift.exact[shift.mask]
    assert participation(delta) == pytest.approx(
        values.sum() ** 2 / (values**2).sum(), rel=1e-3
    )
    needed = next(
        k for k in range(1, 17) if values[:k].sum() >= 0.9 * values.sum() - 1e-12
    )
    assert directions(delta) == needed


@pytest.mark.claim(24, 47)
@pytest.mark.parametrize("name", CONTROLS)
def test_controls_have_the_size_of_the_update(name: str) -> None:
    control = CONTROLS[name](update(), 3)
    again, other = CONTROLS[name](update(), 3), CONTROLS[name](update(), 4)
    assert control.deltas.keys() == update().deltas.keys()
    for key, delta in update().deltas.items():
        drawn = control.deltas[key]
        assert isinstance(drawn, Tensor) and isinstance(delta, Tensor)
        assert drawn.shape == delta.shape
        assert float(drawn.norm()) == pytest.approx(float(delta.norm()), rel=1e-6)
        assert torch.equal(drawn, again.deltas[key])  # pyright: ignore
        assert not torch.equal(drawn, other.deltas[key])  # pyright: ignore
        cosine = float((drawn * delta).sum() / delta.norm() / drawn.norm())
        assert abs(cosine) < 6 / delta.numel() ** 0.5


@pytest.mark.claim(24)
def test_one_control_keeps_the_spectrum_and_the_other_does_not() -> None:
    lora = equiv.Update.from_peft(made().lora, made().base)
    for name, delta in lora.deltas.items():
        values = lora.singular_values(name)
        kept = torch.linalg.svdvals(same_spectrum(lora, 0).deltas[name])  # pyright: ignore
        flat = torch.linalg.svdvals(equal_norm(lora, 0).deltas[name])  # pyright: ignore
        assert kept[: len(values)].tolist() == pytest.approx(values.tolist(), abs=1e-6)
        assert float(flat[8]) > 0.1 * float(flat[0]) and min(delta.shape) == 16


@torch.no_grad()
@pytest.mark.claim(42)
def test_output_changes_are_those_of_plain_logits() -> None:
    inputs, t = held_out(12), 0.25
    moved = copy.deepcopy(made().base)
    for name, p in moved.named_parameters():
        p += t * update().deltas[name].float()  # pyright: ignore
    mask = inputs["attention_mask"].bool()
    z, other = (m(**inputs).logits[mask].double() for m in (made().base, moved))
    p, q = z.softmax(-1), other.softmax(-1)
    kl = (q * (q / p).log()).sum(-1)
    dz = other - z
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    square = torch.einsum("ti,tij,tj->t", dz, fisher, dz) / 2
    change = output_changes(made().base, update(), inputs, [t])[t]
    torch.testing.assert_close(change.kl, kl, rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(change.exact, square, rtol=1e-2, atol=1e-7)
    step = output_changes(made().base, update(), inputs, [1e-4])[1e-4]
    slope = change.first_order / t**2
    torch.testing.assert_close(step.exact / 1e-8, slope, rtol=1e-2, atol=1e-6)
    ends: list[Tensor] = []
    for model in (made().base, moved):
        block = model.model.layers[-1]
        handle = block.register_forward_hook(lambda *args: ends.append(args[-1]))
        model(**inputs)
        handle.remove()
    size = (ends[1] - ends[0])[mask].double().norm(dim=-1)
    torch.testing.assert_close(change.stream, size, rtol=1e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.claim(29)
def test_gains_are_those_of_a_dense_jacobian() -> None:
    model = copy.deepcopy(made().base).double()
    inputs = {name: value[:1] for name, value in held_out(1).items()}
    length = int(inputs["attention_mask"].sum())
    inputs = {name: value[:, :length] for name, value in inputs.items()}
    block, taken = model.model.layers[1], {}
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: taken.update(h=args[0], kwargs=kwargs), with_kwargs=True
    )
    model(**inputs, use_cache=False)
    handle.remove()
    h, step = taken["h"], 1e-4
    width = h.shape[-1]
    jacobian = torch.zeros(length, width, length, width, dtype=torch.float64)
    for token in range(length):
        for i in range(width):
            v = torch.zeros_like(h)
            v[0, token, i] = step
            ends = [block(h + s * v, **taken["kwargs"])[0] for s in (1, -1)]
            jacobian[:, :, token, i] = (ends[0] - ends[1]) / (2 * step)
    # E‖(J v)_t‖² is the squared norm of J's rows at t, for normal v.
    square = jacobian.square().sum((1, 2, 3)) / width
    unit = torch.eye(length * width, dtype=torch.float64).reshape(jacobian.shape)
    rest = (jacobian - unit).square().sum((1, 2, 3)) / width
    draws = 400
    gain = gains(made().base, inputs, seed=0, draws=draws)[1]
    torch.testing.assert_close(gain.rho, h[0].square().mean(-1).sqrt())
    torch.testing.assert_close(gain.gain, square.sqrt(), rtol=0.1, atol=0)
    torch.testing.assert_close(gain.excess, rest.sqrt(), rtol=0.1, atol=0)


def _shapes(table: Any) -> Any:
    if isinstance(table, dict):
        return {key: _shapes(inner) for key, inner in table.items()}
    return np.shape(table)


def test_the_study_has_the_shape_that_claims_read() -> None:
    sizes = Sizes(sequences=24, few=8, ranks=(2, None), mlp_rank=2)
    rows = [of_nets(nets(seed, TINY), sizes) for seed in (0, 1)]
    results = joined(rows)
    for name in ("all weights", "LoRA"):
        for site in READS:
            for rank in ("2", "full"):
                assert np.shape(results["misfit"][name][site][rank]) == (2, 2)
        for scope in ("local", "propagated"):
            shares = results["coverage"][name][scope]["δskip share"]
            assert np.shape(shares) == (2, 2) and 0 < np.min(shares) < np.max(shares)
        for control in ("update", *CONTROLS):
            spread = results["spread"][name][control]
            assert np.min(spread["participation"]) >= 1
            assert np.shape(spread["k90"]) == np.shape(results["size"][name][control])
        for form in ("affine", "SiLU", "truncated oracle"):
            assert np.shape(results["by form"][name][form]) == (2, 2)
        output = results["output"][name]
        assert np.shape(output["exact over KL"]) == np.shape(output["scales"])
        assert set(output["rank correlation"]) == {"exact", "first order", "stream"}
        assert np.shape(results["accuracy"][name]["new"]) == (2,)
        control = results["control"][name]
        for key, trained in (
            ("misfit", results["misfit"][name]),
            ("coverage", results["coverage"][name]),
            ("by form", results["by form"][name]),
            ("output", output),
        ):
            assert _shapes(control[key]) == _shapes(trained)
            assert control[key] != trained
    assert np.shape(results["misfit of W_d alone"]["mlp_out"]["2"]) == (2, 2)
    assert np.shape(results["gain"]["excess with 1/rho"]) == (2, 2)
    assert results["width"] == [16, 16]


@torch.no_grad()
@pytest.mark.claim(23)
def test_an_oracle_is_an_overwritten_activation() -> None:
    base, tuned, inputs = made().base, made().full, held_out(8)
    mask = inputs["attention_mask"].bool()
    found = oracle_changes(base, tuned, inputs)

    def kl(logits: Tensor, other: Tensor) -> float:
        p, q = (x[mask].double().softmax(-1) for x in (logits, other))
        return float((p * (p / q).log()).sum(-1).mean())

    target, plain = tuned(**inputs).logits, base(**inputs).logits
    for site, name in (("mlp_out", "mlp"), ("mlp_in", "post_attention_layernorm")):
        taken: list[Tensor] = []
        module = tuned.model.layers[0].get_submodule(name)
        handle = module.register_forward_hook(lambda *args, t=taken: t.append(args[-1]))
        tuned(**inputs)
        handle.remove()
        module = base.model.layers[0].get_submodule(name)
        handle = module.register_forward_hook(lambda *_, t=taken: t[0])
        steered = base(**inputs).logits
        handle.remove()
        expected = kl(target, steered) / kl(target, plain) - 1
        assert found[site][0] == pytest.approx(expected, abs=2e-3)


@pytest.mark.claim(23)
def test_the_depth_study_has_the_shape_that_its_claim_reads() -> None:
    sizes = DepthSizes(TINY, sequences=8)
    rows = joined([of_seed(seed, sizes) for seed in (0, 1)])
    for name in VARIANTS:
        change = rows[name]["change"]
        assert np.shape(change["mlp_in"]) == (2, 2)
        last = [row[-1] for row in change["block_out"]]
        assert last == pytest.approx([-1, -1], abs=1e-3)  # the head is the base's
        assert np.shape(rows[name]["accuracy"]["tuned"]["new"]) == (2,)


def test_variants_differ_in_one_thing() -> None:
    models = {
        name: with_post_norms(new_base(0, TINY, phi), norms)
        for name, (phi, norms) in VARIANTS.items()
    }
    for model in models.values():
        for one, two in zip(
            models["SiLU"].model.layers[1].mlp.parameters(),
            [p for p in model.model.layers[1].mlp.parameters() if p.ndim == 2],
            strict=True,
        ):
            assert torch.equal(one, two)
    normed = models["GELU, post-norms"].model.layers[0]
    x = torch.randn(3, 16)
    plain = models["GELU"].model.layers[0].mlp(x)
    torch.testing.assert_close(
        normed.mlp(x), plain / (plain.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    )
