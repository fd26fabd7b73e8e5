"""How strongly steering is best applied: a fit can be too strong, worse than none."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from equiv.arguments import as_dtype
from equiv.behaviour.evaluating import evaluated
from equiv.errors import ArgumentError
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import SiteKey
from equiv.steering.forms.form import Steering
from equiv.steering.forms.steering_set import SteeringSet
from equiv.update.sources import resolve

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def calibrate(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    steering: Mapping[SiteKey, Steering],
    *,
    strengths: Sequence[float] = STRENGTHS,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
) -> SteeringSet:
    """The steering at the strength that comes nearest to the tuned model.

    Strength 0, no steering, is always tried. Give inputs that the steering was not
    fitted on, and measure it (`equiv.evaluate`) on yet others.

    Args:
        model: A Hugging Face model of a known family, or any module.
        delta_w: The update, in any form that `equiv.check` takes.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`.
        steering: (layer, site) → steering, applied to every token.
        strengths: Strengths to try beside 0.
        tokenizer: Tokenizer for texts.
        dtype: Compute dtype, torch.float32 or torch.float64.

    Returns:
        The scaled steering, with `about["strength"]`; at strength 0 it has no entries.

    Raises:
        ArgumentError: If no strengths are given.
        EquivError: As `equiv.evaluate`.

    Example:
        >>> from equiv.steering.forms.vector import Vector
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
        >>> twice = {(0, "0"): Vector(torch.tensor([2.0, -2.0]))}
        >>> update = {"0.bias": torch.tensor([1.0, -1.0])}
        >>> calibrate(model, update, torch.randn(5, 2), twice).about["strength"]
        0.5
    """
    check_model(model)
    if not len(strengths):
        raise ArgumentError("Expected at least one strength, got none.")
    update, dtype = resolve(model, delta_w), as_dtype(dtype)
    batches = from_inputs(model, inputs, tokenizer)
    given = SteeringSet(steering)
    if isinstance(steering, SteeringSet):
        given = steering
    candidates = [given.scaled(strength) for strength in strengths]
    with measured(model):
        found = evaluated(model, update, batches, candidates, dtype, seed=0)
    best, strength, chosen = found[0].unsteered, 0.0, replace(given, entries={})
    for one, at, candidate in zip(found, strengths, candidates, strict=True):
        if one.steered < best:
            best, strength, chosen = one.steered, at, candidate
    return replace(chosen, about={**given.about, "strength": float(strength)})
