"""`equiv.fit_steering`: one verb for every target that steering can be fitted to.

    block       the shift of the block's output, wherever what is written reaches it
                unchanged; elsewhere the site's own
    shift       the site's own shift
    downstream  the shift at a later site, through the Jacobian
    behaviour   the tuned model's output, by gradient from the block's closed form

Each has a function of its own that takes more arguments: `fit_sequential` for the first
two, `fit_downstream`, `fit_behaviour`.
"""

from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch
from torch import nn

from equiv.arguments import as_choice
from equiv.behaviour.training import fit_behaviour
from equiv.errors import ArgumentError
from equiv.model.sites import Site
from equiv.steering.fits.plan import Planned
from equiv.steering.fits.sequential import fit_sequential
from equiv.steering.forms.custom import Custom
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.jacobian.downstream import fit_downstream

TARGETS = ("block", "shift", "downstream", "behaviour")


def fit_steering(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    *,
    site: str | Site = "block_out",
    form: str | nn.Module | Custom = "affine",
    rank: int | None = 8,
    target: str = "block",
    at: str | tuple[SupportsIndex, str] | None = None,
    plan: Iterable[Planned] | None = None,
    layers: Iterable[SupportsIndex] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: bool = False,
) -> SteeringSet:
    """Fit steering that stands in for a weight update, in every layer.

    Args:
        model: A Hugging Face model of a known family, or any module.
        delta_w: The update, in any form that `equiv.check` takes.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`; all of
            them are fitted on.
        site: Where the steering reads and writes.
        form: "vector", "linear", "affine", "loreft", "mlp" or "heads", or a module;
            "downstream" takes the first three.
        rank: Rank of the map; `None` for full rank.
        target: "block", "shift", "downstream" or "behaviour"; see the module.
        at: The later site, for "downstream": "logits", (layer, name), or a name for one
            in the steer's own layer.
        plan: What to fit where (`equiv.design` makes one), instead of one site, form
            and rank in all `layers`; not with "downstream".
        layers: Layers that get steering; `None` for all.
        tokenizer: Tokenizer for texts.
        dtype: Compute dtype, torch.float32 or torch.float64.
        seed: Draws what is set apart for choosing (ridge, steps, strength).
        progress: Whether to show a progress bar, where it takes long.

    Returns:
        (layer, site) → steering, ready for `equiv.steer`, `equiv.evaluate` and
        `equiv.save`; `about` says how it was fitted.

    Raises:
        ArgumentError: If an argument is outside its set, or `at` is missing or idle,
            or there is a plan for "downstream".
        EquivError: As `equiv.check`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> update = {"1.bias": torch.tensor([1.0, -1.0])}
        >>> x = torch.randn(9, 2)
        >>> fitted = fit_steering(model, update, x, site="1", form="vector")
        >>> torch.allclose(fitted[0, "1"].vector.float(), update["1.bias"], atol=1e-6)
        True
    """
    target = as_choice("target", target, TARGETS)
    if (at is not None) != (target == "downstream"):
        raise ArgumentError(
            'Expected `at`, the later site, with target="downstream" and only there; '
            f"got at={at!r} with target={target!r}."
        )
    if target == "downstream":
        assert at is not None
        if plan is not None:
            raise ArgumentError('Expected no `plan` with target="downstream".')
        return fit_downstream(
            model,
            delta_w,
            inputs,
            site=site,
            at=at,
            form=str(form),
            rank=rank,
            layers=layers,
            tokenizer=tokenizer,
            dtype=dtype,
            progress=progress,
        )
    closed = "block" if target == "behaviour" else target
    fitted = fit_sequential(
        model,
        delta_w,
        inputs,
        site=site,
        form=form,
        rank=rank,
        target=closed,
        plan=plan,
        layers=layers,
        tokenizer=tokenizer,
        dtype=dtype,
        seed=seed,
    )
    if target != "behaviour":
        return fitted
    return fit_behaviour(
        model,
        delta_w,
        inputs,
        fitted,
        tokenizer=tokenizer,
        dtype=dtype,
        seed=seed,
        progress=progress,
    )
