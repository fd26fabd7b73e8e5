"""What layers add to the output and what steering leaves of it, by brute force."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import witness
from torch import Tensor
from torch.func import jvp

import equiv
from equiv.behaviour import spectra as measured_spectra
from equiv.model.batches import split
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import FLOW, Site
from equiv.model.stages import staged
from equiv.shift.output_metric import OutputMetric
from equiv.shift.probes import Probing
from equiv.steering.fits.moments import Moments, Regression
from equiv.steering.fits.spectrum import misfits
from equiv.testing.models import transformer

SITES = tuple(site for site in FLOW if site != "cross_out")  # of one stack

IDS = torch.randint(3, 32, (16, 7), generator=torch.Generator().manual_seed(0))
SEED = 3


def metric(logits: Tensor, changes: Tensor) -> Tensor:
    """Σ_tokens aᵀ F b of every two changes [n, …, vocab], with F written out."""
    p = torch.softmax(logits, -1)
    f = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    return torch.einsum("j...v,...vw,k...w->jk", changes, f, changes)


def derivative(model: Any, key: tuple[int, str], change: Tensor, call: Any) -> Tensor:
    """J e: of the logits, when t · e is added at a site of the live model, at t = 0."""

    def run(t: Tensor) -> Tensor:
        with equiv.steer(model, {key: equiv.Offset(t * change)}):
            return model(**call).logits

    zero = torch.zeros((), dtype=torch.float64)
    with witness.own_arithmetic(), torch.no_grad():
        return jvp(run, (zero,), (torch.ones_like(zero),))[1]


def signs(shape: torch.Size, count: int) -> list[Tensor]:
    """The probes of one batch, as drawn from the seed."""
    source = torch.Generator().manual_seed(SEED)
    drawn = [torch.randint(0, 2, shape, generator=source) for _ in range(count)]
    return [2.0 * entry.double() - 1 for entry in drawn]


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_contributions_are_the_derivatives_of_each_layers_part(family: str) -> None:
    model = transformer(family, seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    found = equiv.check(model, update, IDS, forms=(), at="base").contributions
    assert found is not None and found.measure == "kl"
    assert found.stages == (-1, 0, 1, 2)
    blocks = [update.restricted(layers=[layer]) for layer in range(2)]
    inside = {name for part in blocks for name in part.deltas}
    # Tied weights are in the embedding and in the head: only together a part.
    ends = update.restricted(names=[n for n in update.deltas if n not in inside])
    call = {"input_ids": IDS}
    parts = (ends, *blocks)
    changes = [witness.whole_jvp(model, part, call)[1]["logits"] for part in parts]
    base = witness.tuned_activations(model, update, call, 0.0)["logits"]
    products = metric(base, torch.stack(changes))
    shares = products / products.sum()
    both = found.share(-1) + found.share(2)
    mine = [both, found.share(0), found.share(1)]
    assert mine == pytest.approx(shares.sum(1).tolist(), abs=1e-9)
    assert found.alone[1:3] == pytest.approx(shares.diag()[1:].tolist(), abs=1e-9)
    assert sum(found.shares) == pytest.approx(1, abs=1e-12)


def test_contributions_without_logits_are_plain_products() -> None:
    model = transformer("bert", seed=1).bert
    update = equiv.Update.random(model, 0.1, seed=2).restricted(layers=[0, 1])
    found = equiv.check(model, update, IDS, forms=(), at="base").contributions
    assert found is not None and found.measure == "output" and found.stages == (0, 1)
    changes = []
    for layer in range(2):
        part = update.restricted(layers=[layer])
        s = equiv.shifts(model, part, IDS, dtype=torch.float64)
        changes.append(s[1, "block_out"].first_order.flatten())
    products = torch.stack(changes) @ torch.stack(changes).T
    expected = products.sum(1) / products.sum()
    assert found.shares == pytest.approx(expected.tolist(), abs=1e-9)


def test_the_metric_is_kl_to_second_order() -> None:
    source = torch.Generator().manual_seed(0)
    z, c = torch.randn(2, 5, 8, generator=source, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])
    found = OutputMetric(True, z, mask)
    t = 1e-4
    p, q = torch.log_softmax(z, -1), torch.log_softmax(z + t * c, -1)
    kl = (p.exp() * (p - q)).sum(-1)[mask].sum()
    # The next term is of third order: relative to this one, of the size of t.
    assert float(2 * kl / t**2) == pytest.approx(
        float((c * found.times(c)).sum()), rel=10 * t
    )
    basis = torch.eye(z.numel()).double().reshape(-1, *z.shape)
    squares = sum(float((found.root(u) * c).sum()) ** 2 for u in basis)
    assert squares == pytest.approx(float((c * found.times(c)).sum()), rel=1e-12)


@pytest.mark.parametrize("family", ["llama", "olmo2", "bert"])
def test_probes_say_what_the_output_feels(family: str) -> None:
    """g · e, from one pass back, is u · R J e, from the live model."""
    model, count = transformer(family, seed=1), 2
    update = equiv.Update.random(model, 0.1, seed=2)
    ids = IDS[:3]
    call, every = {"input_ids": ids}, frozenset(SITES)
    batches = from_inputs(model, ids)
    with measured(model), staged(model, batches, torch.float64, sites=SITES) as cut:
        probing = Probing(cut, update, every, every, (), count)
        felt = dict(probing.backwards(SEED))
    base = witness.tuned_activations(model, update, call, 0.0)
    tuned = witness.tuned_activations(model, update, call)
    logits = base["logits"]
    found = OutputMetric(True, logits, torch.ones(ids.shape, dtype=torch.bool))
    source = torch.Generator().manual_seed(1)
    for layer in range(2):
        shift = probing.passed[layer][0].shift
        witness.close(shift, tuned[layer, "block_out"] - base[layer, "block_out"])
        for site in SITES:
            size = base[layer, site].shape
            change = torch.randn(size, generator=source, dtype=torch.float64)
            moved = derivative(model, (layer, site), change, call)
            for g, u in zip(felt[layer][0], signs(logits.shape, count), strict=True):
                seen = (g[site] * change).flatten(1).sum(1)
                expected = (found.root(u) * moved).flatten(1).sum(1)
                witness.close(seen, expected)


@pytest.mark.parametrize("target", ["block", "shift"])
def test_spectra_are_what_fits_leave(target: str, monkeypatch: Any) -> None:
    """Every rank and site: fitted by numpy, added to the live model, seen by probes."""
    monkeypatch.setattr(measured_spectra, "PROBES", 2)
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    sites = ("attn_out", "mlp_out", "resid_mid->block_out", "mlp_hidden")
    report = equiv.check(
        model,
        update,
        IDS,
        sites=sites,
        target=target,
        at="base",
        dtype=torch.float64,
        seed=SEED,
    )
    parts: dict[bool, list[int]] = {False: [], True: []}
    for batch in split(from_inputs(model, IDS), 0.25, SEED):
        parts[batch.held_out] += batch.index
    ids = {flag: IDS[sorted(rows)] for flag, rows in parts.items()}
    base, tuned = (
        {
            f: witness.tuned_activations(model, update, {"input_ids": i}, t)
            for f, i in ids.items()
        }
        for t in (0.0, 1.0)
    )
    logits, call = base[True]["logits"], {"input_ids": ids[True]}
    found = OutputMetric(True, logits, torch.ones(ids[True].shape, dtype=torch.bool))
    roots = [found.root(u) for u in signs(logits.shape, 2)]

    def seen(key: tuple[int, str], change: Tensor) -> np.ndarray:
        """What the probes see of a change, [probes, sequences]."""
        moved = derivative(model, key, change, call)
        return np.array([(r * moved).flatten(1).sum(1).tolist() for r in roots])

    assert len(report.spectra) == 2 * len(sites)
    for spectrum in report.spectra:
        pair, layer = Site(spectrum.site), spectrum.layer
        through = target == "block" and pair.write in ("mlp_out", "block_out")
        assert spectrum.target == ("block" if through else "shift")
        aimed = "block_out" if through else pair.write
        x, y = (
            {f: a[layer, site].flatten(0, 1).numpy() for f, a in acts.items()}
            for site, acts in ((pair.read, base), (aimed, base))
        )
        y = {f: tuned[f][layer, aimed].flatten(0, 1).numpy() - y[f] for f in y}
        assert len(spectrum.affine) == min(x[True].shape[1], y[True].shape[1])
        shift = tuned[True][layer, "block_out"] - base[True][layer, "block_out"]
        whole = seen((layer, "block_out"), shift)
        for rank in (0, 1, 3):
            if rank:
                weight, bias = witness.reduced_rank_regression(
                    x[False], y[False], rank, 1e-3
                )
                fitted = x[True] @ weight + bias
            else:
                fitted = np.broadcast_to(y[False].mean(0), y[True].shape)
            left = ((y[True] - fitted) ** 2).sum() / (y[True] ** 2).sum()
            mine = spectrum.affine[rank - 1] if rank else spectrum.vector
            assert mine == pytest.approx(left, rel=1e-3)  # four digits are kept
            added = torch.tensor(fitted).reshape(base[True][layer, pair.write].shape)
            rest = whole - seen((layer, pair.write), added)
            mine = spectrum.output_affine[rank - 1] if rank else spectrum.output_vector
            expected = (rest**2).sum() / (whole**2).sum()
            assert mine == pytest.approx(expected, rel=1e-3)


def test_every_rank_at_once_is_each_rank_by_itself() -> None:
    source = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 90, 6, generator=source, dtype=torch.float64)
    y = 0.5 + x @ torch.randn(6, 4, generator=source).double() + noise[:, :4]
    parts = []
    for rows in (slice(0, 60), slice(60, 90)):
        moments = Moments()
        moments.add(x[rows], y[rows])
        parts.append(moments)
    regression = Regression(parts[0], 1e-2)
    for moments in parts:
        found = misfits(regression, moments, 64)
        assert found is not None and len(found[1]) == 4
        assert found[0] == pytest.approx(moments.misfit(regression.vector()))
        for rank, share in enumerate(found[1], 1):
            own = moments.misfit(regression.affine(rank))
            assert share == pytest.approx(own, rel=1e-9)
    nothing = Moments()
    nothing.add(x, 0 * y)
    assert misfits(regression, nothing, 4) is None


def test_spectra_say_how_large_a_steer_is() -> None:
    model = transformer("gpt2", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2).restricted(layers=[0])
    sites = ("mlp_hidden", "mlp_hidden->block_out", "block_out")
    report = equiv.check(model, update, IDS, sites=sites, at="base")
    for spectrum in (s for s in report.spectra if s.layer == 0):
        for form, rank in (("vector", None), ("affine", 2)):
            one = equiv.fit_sequential(
                model, update, IDS, site=spectrum.site, form=form, rank=rank, layers=[0]
            )
            assert spectrum.num_parameters(rank) == one.num_parameters


def test_an_update_that_begins_higher_has_no_spectra_below() -> None:
    model = transformer("llama", seed=1, num_hidden_layers=3)
    update = equiv.Update.random(model, 0.1, seed=2).restricted(layers=[1])
    report = equiv.check(
        model, update, IDS, sites=("mlp_out", "block_out"), forms=("vector",), at="base"
    )
    keys = [(s.layer, s.site) for s in report.spectra]
    assert keys == [(n, s) for n in (1, 2) for s in ("mlp_out", "block_out")]
    assert report.contributions is not None
    assert report.contributions.stages == (1,)
    tuned = copy.deepcopy(model)
    for name, delta in witness.dense(update).items():
        tuned.get_parameter(name).data += delta
    vectors = equiv.check(model, tuned, IDS, forms=("vector",), at="base").spectra
    assert {s.affine for s in vectors} == {()}
    assert {s.output_affine for s in vectors} == {()}
