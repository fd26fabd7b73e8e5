"""Verdicts of claims about fine-tunes, on results with a planted effect, none, less."""

import copy
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest

from equiv.theory import ClaimResult, Verdict
from equiv.theory import claims as folder
from equiv.theory.registry import shipped
from equiv.theory.trained.readings import READS

UPDATES = ("all weights", "LoRA")
# A spread over five seeds, and one that hides any effect planted here.
SEEDS, WILD = (-0.01, 0.0, 0.01, 0.005, -0.005), (-5.0, 5.0, -4.0, 4.5, 0.1)


def accuracy(gain: float, *names: str) -> Any:
    base = [0.5 + seed for seed in SEEDS]
    better = {
        "new": [share + gain + seed for share, seed in zip(base, SEEDS, strict=True)]
    }
    return {"base": {"new": base}, **dict.fromkeys(names, better)}


LEARNED = {"accuracy": accuracy(0.1, *UPDATES)}


def judge(number: int, results: Any) -> ClaimResult:
    (found,) = (claim for claim in shipped() if claim.id == number)
    return found.test({**LEARNED, **controls(results), **results})


def controls(results: Any) -> Any:
    """What random updates do, as results hold it; here the same as the updates."""
    keys = [k for k in ("misfit", "coverage", "by form", "output") if k in results]
    return {"control": {n: {key: results[key][n] for key in keys} for n in UPDATES}}


def table(*by_layer: float, jitter: tuple[float, ...] = SEEDS) -> list[list[float]]:
    """One value per layer, for each seed a little off."""
    return [
        [value + seed * (1 + n / 7) for n, value in enumerate(by_layer)]
        for seed in jitter
    ]


def sites(block: float, mlp: float, jitter: tuple[float, ...] = SEEDS) -> Any:
    """Misfits by site and rank; seeds move mlp_out less than the others."""
    other = {site: {"1": table(0.5, 0.6), "full": table(0.5, 0.5)} for site in READS}
    return other | {
        "block_out": {
            rank: table(block, block, jitter=jitter) for rank in other["mlp_in"]
        },
        "mlp_out": {rank: table(mlp, mlp) for rank in other["mlp_in"]},
    }


def misfits(block: float, mlp: float, alone: float = 0.4, **jitter: Any) -> Any:
    return {
        "misfit": {name: sites(block, mlp, **jitter) for name in UPDATES},
        "misfit of W_d alone": sites(alone, mlp),
    }


@pytest.mark.claim(17)
def test_sites_at_equal_rank() -> None:
    found = judge(17, misfits(0.3, 0.45))
    assert found.verdict is Verdict.HOLDS and not found.conditions
    assert judge(17, misfits(0.45, 0.3)).verdict is Verdict.FAILS
    assert judge(17, misfits(0.3, 0.45, jitter=WILD)).verdict is Verdict.INCONCLUSIVE
    found = judge(17, misfits(0.3, 0.45, alone=0.6))
    assert found.verdict is Verdict.CONDITIONAL
    assert all("W_d alone" in name for name in found.conditions)
    assert found.as_written is not None
    assert found.as_written.verdict is Verdict.HOLDS  # block, mlp, then 0.5
    late = misfits(0.3, 0.6)  # mlp_in and attn_out are better than mlp_out
    written = judge(17, late).as_written
    assert written is not None and written.verdict is Verdict.FAILS
    assert "less mlp_out" in next(iter(written.counterexample))


def coverages(*shares: float, jitter: tuple[float, ...] = SEEDS) -> Any:
    ratios = {
        name: table(*shares, jitter=jitter)
        for name in ("δMLP over δblock", "δskip share", "MLP share", "MLP over block")
    }
    return {
        "coverage": {n: {"local": ratios, "propagated": ratios} for n in UPDATES},
    }


@pytest.mark.claim(21)
def test_coverage() -> None:
    found = judge(21, coverages(0.4, 0.5))
    assert found.verdict is Verdict.HOLDS and found.as_written is not None
    assert found.as_written.verdict is Verdict.HOLDS
    found = judge(21, coverages(0.4, 0.05))
    assert found.verdict is Verdict.CONDITIONAL
    assert {name[-7:] for name in found.conditions} == {"layer 1"}
    assert found.as_written is not None and found.as_written.verdict is Verdict.FAILS
    assert judge(21, coverages(0.02, 0.05)).verdict is Verdict.FAILS
    unsure = judge(21, coverages(0.4, 0.5, jitter=WILD))
    assert unsure.verdict is Verdict.INCONCLUSIVE


def spreads(update: float, norm: float, spectrum: float, **jitter: Any) -> Any:
    def both(value: float, **more: Any) -> Any:
        return {name: table(value, value, **more) for name in ("participation", "k90")}

    kinds = {
        "update": both(update),
        "equal norm": both(norm, **jitter),
        "same spectrum": both(spectrum),
    }
    return {"spread": dict.fromkeys(UPDATES, kinds), "width": [64] * 5}


@pytest.mark.claim(24)
def test_concentrated_oracle() -> None:
    found = judge(24, spreads(5, 15, 10))
    assert found.verdict is Verdict.HOLDS and found.as_written is not None
    assert found.as_written.verdict is Verdict.HOLDS  # 5 of 64
    found = judge(24, spreads(12, 15, 10))
    assert found.verdict is Verdict.CONDITIONAL and found.as_written is not None
    assert found.as_written.verdict is Verdict.FAILS
    assert judge(24, spreads(15, 12, 10)).verdict is Verdict.FAILS
    assert judge(24, spreads(5, 6, 10, jitter=WILD)).verdict is Verdict.INCONCLUSIVE


def forms(affine: float, silu: float, oracle: float, **jitter: Any) -> Any:
    by_form = {
        "affine": table(affine, affine, **jitter),
        "SiLU": table(silu, silu),
        "truncated oracle": table(oracle, oracle),
    }
    return {"by form": dict.fromkeys(UPDATES, by_form)}


@pytest.mark.claim(27)
def test_nonlinear_adapter() -> None:
    assert judge(27, forms(0.4, 0.3, 0.1)).verdict is Verdict.HOLDS
    assert judge(27, forms(0.4, 0.394, 0.1)).verdict is Verdict.FAILS
    assert judge(27, forms(0.3, 0.4, 0.1)).verdict is Verdict.FAILS
    assert judge(27, forms(0.4, 0.3, 0.35)).verdict is Verdict.INCONCLUSIVE
    unsure = judge(27, forms(0.4, 0.3, 0.1, jitter=WILD))
    assert unsure.verdict is Verdict.INCONCLUSIVE
    mixed = forms(0.4, 0.392, 0.1)
    own = {**mixed["by form"]["LoRA"], "affine": table(0.397, 0.42)}
    mixed["by form"] = {"all weights": own, "LoRA": own}
    found = judge(27, mixed)  # one layer gains, on average it is 0.016 or so
    assert found.verdict is Verdict.HOLDS
    own["affine"] = table(0.392, 0.405)
    assert judge(27, mixed).verdict is Verdict.CONDITIONAL


def blocks(rho: tuple[float, ...], gain: tuple[float, ...], *within: float) -> Any:
    return {
        "gain": {
            "rho": table(*rho),
            "gain": table(*gain),
            "excess": table(*gain),
            "gain with 1/rho": table(*within),
            "excess with 1/rho": table(*within),
        }
    }


@pytest.mark.claim(29)
def test_gain_and_norm() -> None:
    found = judge(29, blocks((1, 2), (3, 2), 0.5, 0.6))
    assert found.verdict is Verdict.HOLDS and found.as_written is not None
    assert found.as_written.verdict is Verdict.HOLDS
    found = judge(29, blocks((1, 2), (2, 3), 0.5, -0.6))
    assert found.verdict is Verdict.CONDITIONAL and found.as_written is not None
    assert found.as_written.verdict is Verdict.FAILS
    assert "rho" in found.as_written.counterexample
    assert judge(29, blocks((1, 2), (2, 3), -0.5, -0.6)).verdict is Verdict.FAILS
    assert judge(29, blocks((1, 2), (2, 3), 0, 0)).verdict is Verdict.INCONCLUSIVE


def outputs(at_zero: float, slope: float, ranks: float, stream: float) -> Any:
    scales = [1.0, 0.25, 0.0625]
    ratios = [[at_zero + slope * t for t in scales] for _ in SEEDS]
    found = {
        "scales": [scales] * len(SEEDS),
        "exact over KL": ratios,
        "first order over KL": ratios,
        "rank correlation": {
            "exact": [ranks + seed for seed in SEEDS],
            "first order": [ranks - 0.1 + seed for seed in SEEDS],
            "stream": [stream] * len(SEEDS),
        },
    }
    return {"output": dict.fromkeys(UPDATES, found)}


@pytest.mark.claim(42)
def test_second_order_of_kl() -> None:
    assert judge(42, outputs(1.0, 0.3, 0.9, 0.4)).verdict is Verdict.HOLDS
    assert judge(42, outputs(1.1, 0.3, 0.9, 0.4)).verdict is Verdict.FAILS
    assert judge(42, outputs(0.5, 0.5, 0.9, 0.4)).verdict is Verdict.FAILS
    found = judge(42, outputs(1.0, 0.3, 0.45, 0.4))
    assert found.verdict is Verdict.CONDITIONAL
    assert len(found.conditions) == 2  # first order, both updates


def moved(update: float, norm: float, jitter: tuple[float, ...] = SEEDS) -> Any:
    by_kind = {
        "update": table(update, update, jitter=jitter),
        "equal norm": table(norm, norm),
        "same spectrum": table(norm, norm),
    }
    return {"size": dict.fromkeys(UPDATES, by_kind)}


@pytest.mark.claim(47)
def test_random_updates_move_less() -> None:
    found = judge(47, moved(3.0, 1.0))
    assert found.verdict is Verdict.HOLDS and found.says.endswith("by layer")
    assert judge(47, moved(1.0, 3.0)).verdict is Verdict.FAILS
    assert judge(47, moved(3.0, 2.0, jitter=WILD)).verdict is Verdict.INCONCLUSIVE


@pytest.mark.claim(17, 21, 27, 42)
@pytest.mark.parametrize(
    ("number", "trained", "drawn", "evidence"),
    [
        (17, misfits(0.3, 0.45), misfits(0.45, 0.3), "mlp_out less block_out"),
        (21, coverages(0.4, 0.5), coverages(0.02, 0.03), "δskip share"),
        (27, forms(0.4, 0.3, 0.1), forms(0.3, 0.4, 0.1), "gain"),
        (42, outputs(1, 0, 0.9, 0.4), outputs(1, 0, 0.4, 0.9), "less that of ‖δh‖"),
    ],
)
def test_controls_are_shown_and_do_not_judge(
    number: int, trained: Any, drawn: Any, evidence: str
) -> None:
    found = judge(number, {**trained, **controls(drawn)})
    assert found.verdict is judge(number, trained).verdict is Verdict.HOLDS
    own = found.evidence[evidence].values()
    control = found.evidence[f"{evidence}, random update of equal norm"].values()
    largest = max(figures["mean"] for figures in control)
    assert largest < min(figures["mean"] for figures in own)


def depths(
    phi: float = 0.0,
    norms: float = 0.0,
    last: float = -1.0,
    rise: float = 0.0,
    gain: float = 0.1,
) -> Any:
    """Oracles in four variants; GELU moves `mlp_in` by φ, norms by theirs."""

    def variant(more: float) -> Any:
        return {
            "change": {
                "attn_out": table(-0.2, -0.3),
                "mlp_in": table(-0.1 + more, -0.1 + more),
                "mlp_out": table(-0.2, -0.4),
                "block_out": [[-0.3 + s, -0.5 + rise + s, last] for s in SEEDS],
            },
            "accuracy": accuracy(gain, "tuned"),
        }

    return {
        "SiLU": variant(0.0),
        "GELU": variant(phi),
        "SiLU, post-norms": variant(norms),
        "GELU, post-norms": variant(norms + phi),
        "seeds": [0, 1, 2, 3, 4],
    }


@pytest.mark.claim(23)
def test_oracles_by_depth() -> None:
    found = judge(23, depths())
    assert found.verdict is Verdict.HOLDS and found.as_written is not None
    assert found.as_written.verdict is Verdict.FAILS
    found = judge(23, depths(phi=0.5))
    assert found.verdict is Verdict.FAILS and found.as_written is not None
    assert found.as_written.verdict is Verdict.HOLDS
    assert judge(23, depths(last=-0.9)).verdict is Verdict.FAILS
    assert judge(23, depths(norms=0.4)).verdict is Verdict.HOLDS
    found = judge(23, depths(rise=0.3))
    assert found.verdict is Verdict.CONDITIONAL and len(found.conditions) == 4
    wild = depths()
    wild["GELU"] = copy.deepcopy(wild["GELU"])
    wild["GELU"]["change"]["mlp_in"] = table(-0.1, -0.1, jitter=WILD)
    found = judge(23, wild)
    assert found.verdict is Verdict.INCONCLUSIVE and found.as_written is not None
    assert found.as_written.verdict is Verdict.INCONCLUSIVE


@pytest.mark.claim(17, 21, 24, 27, 47)
@pytest.mark.parametrize(
    ("number", "results"),
    [
        (17, misfits(0.3, 0.45)),
        (21, coverages(0.4, 0.5)),
        (24, spreads(5, 15, 10)),
        (27, forms(0.4, 0.3, 0.1)),
        (47, moved(3.0, 1.0)),
    ],
)
def test_fine_tunes_that_have_not_learned_are_no_evidence(
    number: int, results: Any
) -> None:
    assert judge(number, results).verdict is Verdict.HOLDS
    found = judge(number, {**results, "accuracy": accuracy(0.0, *UPDATES)})
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "not surely better" in found.says and "LoRA" in found.says


@pytest.mark.claim(23)
def test_oracles_of_fine_tunes_that_have_not_learned_are_no_evidence() -> None:
    found = judge(23, depths(gain=0.0))
    assert found.verdict is Verdict.INCONCLUSIVE and "not surely better" in found.says


def module_of(number: int) -> Any:
    (name,) = [
        found.name
        for found in pkgutil.iter_modules(folder.__path__)
        if found.name.startswith(f"claim_{number}_")
    ]
    return importlib.import_module(f"{folder.__name__}.{name}")


def turned(difference: Callable[..., Any]) -> Callable[..., Any]:
    return lambda first, second: difference(second, first)


def off(limit: Callable[..., float]) -> Callable[..., float]:
    return lambda *arguments: 1.01 * limit(*arguments)


# (claim, function of its file, how it is broken, results on which it holds)
BROKEN: list[tuple[int, str, Callable[[Any], Any], Any]] = [
    (17, "difference", turned, misfits(0.3, 0.45)),
    (24, "difference", turned, spreads(5, 15, 10)),
    (27, "difference", turned, forms(0.4, 0.3, 0.1)),
    (42, "limit", off, outputs(1.0, 0.0, 0.9, 0.0)),
]


@pytest.mark.parametrize(("number", "name", "breaking", "results"), BROKEN)
def test_it_fails_when_broken(
    number: int,
    name: str,
    breaking: Callable[[Any], Any],
    results: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = module_of(number)
    assert judge(number, results).verdict is Verdict.HOLDS
    monkeypatch.setattr(module, name, breaking(getattr(module, name)))
    assert judge(number, results).verdict is Verdict.FAILS
