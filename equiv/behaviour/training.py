"""`equiv.fit_behaviour`: steering trained towards the tuned model's output.

What is lowered is the distance that `equiv.evaluate` reports: mean KL(tuned ‖ steered)
over the tokens, or the squared relative difference of the output where there are no
logits. A quarter of the sequences takes no part; there the best step is chosen, and
the strength, no steering at all and the start as it was given among them, so the result
is worse than neither on these sequences. (A start that was fitted on all of the inputs
has seen them, and is favoured there; on the demo it was the better start all the same.)

The descent is SciPy's L-BFGS over all sequences that are trained on, every tensor in
units of its own size: no rate has to be chosen, and it is the same every time.
Gradients are summed batch by batch, and the tuned model's output is made anew for each
and not kept, so memory is that of one batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from equiv.arguments import as_dtype, as_integer, as_seed
from equiv.behaviour.calibrating import STRENGTHS
from equiv.behaviour.distance import Distances, kl_divergence
from equiv.behaviour.outputs import Outputs
from equiv.behaviour.trainable import Numbers, Trainable, as_trainable
from equiv.errors import ArgumentError, InputsError
from equiv.model.batches import split
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import SiteKey
from equiv.model.stages import staged
from equiv.shift.measures import counted
from equiv.shift.stage_update import low_rank_names
from equiv.steering.applying.apply import by_layer
from equiv.steering.forms.form import Steering
from equiv.steering.forms.steering_set import SteeringSet, as_set
from equiv.update.sources import resolve

STEPS = 80
PATIENCE = 20  # so many steps in vain, on the sequences that choose, are the last
HISTORY = 20  # steps that L-BFGS remembers: a copy of all numbers for each, twice
HELD_OUT = 0.25


def fit_behaviour(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    start: Mapping[SiteKey, Steering],
    *,
    steps: int = STEPS,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: bool = False,
) -> SteeringSet:
    """Train steering by gradient until the output is nearest to the tuned model's.

    Args:
        model: A Hugging Face model of a known family, or any module; it is left as it
            was.
        delta_w: The update, in any form that `equiv.check` takes.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`; three
            quarters are trained on, one quarter chooses.
        start: (layer, site) → steering to start from, as a closed-form fit gives it.
        steps: Steps of the descent at most, each a pass or more over what is trained
            on.
        tokenizer: Tokenizer for texts.
        dtype: Compute dtype, torch.float32 or torch.float64.
        seed: Draws the quarter.
        progress: Whether to show a progress bar.

    Returns:
        The steering, in `dtype`. `about["behaviour"]` has the distances on the quarter
        that chooses, `unsteered`, at the `start` and `steered`; the `measure` ("kl" or
        "output"), the `steps` taken up to what was chosen, its `strength`, the `seed`.
        At strength 0 there are no entries.

    Raises:
        ArgumentError: If there is nothing to train, the steering is for some positions
            only, or an argument is outside its set.
        InputsError: If there are fewer than two sequences.
        EquivError: As `equiv.check`.

    Example:
        >>> from equiv.steering.forms.vector import Vector
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> update = {"0.bias": torch.tensor([0.5, -0.5])}
        >>> start = {(0, "0"): Vector(torch.tensor([0.3, -0.3]))}
        >>> fitted = fit_behaviour(model, update, torch.randn(40, 2), start)
        >>> torch.allclose(fitted[0, "0"].vector, update["0.bias"], atol=0.02)
        True
    """
    check_model(model)
    steps, seed, dtype = as_integer("steps", steps, 1), as_seed(seed), as_dtype(dtype)
    given = as_set(start)
    _check_start(given, dtype)
    update = resolve(model, delta_w)
    batches = split(from_inputs(model, inputs, tokenizer), HELD_OUT, seed)
    if not any(batch.held_out for batch in batches):
        raise InputsError(
            "Expected at least two sequences, to train on some and choose on others; "
            "got one."
        )
    low = low_rank_names(model, update)
    sites = tuple(dict.fromkeys(site for _, site in given))
    with (
        measured(model),
        staged(model, batches, dtype, sites=sites, low_names=low) as cut,
    ):
        for key in given:
            cut.check_site(*key)
        run = _Training(Outputs(cut, update, low))
        chosen, about = run.train(given, steps, progress)
    figures = {**about, "seed": seed}
    known = {**given.about, "target": "behaviour", "behaviour": figures}
    return replace(chosen, about=known)


def _check_start(given: SteeringSet, dtype: torch.dtype) -> None:
    if not given:
        raise ArgumentError("Expected steering to start from, got none.")
    if given.positions != "all":
        raise ArgumentError(
            f"Expected steering of all positions, got {given.positions!r}: in whole "
            "texts nothing says where the prompt ends."
        )
    for key, value in given.items():
        as_trainable(key, value, dtype)


@dataclass(frozen=True)
class _Seen:
    """Steering that was looked at, and its distance on the held-out part."""

    steering: SteeringSet
    distance: float
    step: int = 0
    strength: float = 1.0


class _Training:
    """One training under way."""

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs
        batches = outputs.cut.batches
        self.fitting = [i for i, batch in enumerate(batches) if not batch.held_out]
        self.held_out = [i for i, batch in enumerate(batches) if batch.held_out]
        self.measure = ""

    def train(
        self, given: SteeringSet, steps: int, progress: bool
    ) -> tuple[SteeringSet, dict[str, object]]:
        """The best steering seen, at its best strength, and how it was found."""
        from tqdm import tqdm

        nothing = replace(given, entries={})
        none = _Seen(nothing, self.distance(nothing), strength=0.0)
        start = _Seen(given, self.distance(given))
        with tqdm(total=steps, disable=not progress, desc="equiv fit_behaviour") as bar:
            trained = self._descend(self._weaker(start), steps, bar)
        chosen = min(none, self._weaker(trained), key=lambda seen: seen.distance)
        return chosen.steering, {
            "measure": self.measure,
            "unsteered": none.distance,
            "start": start.distance,
            "steered": chosen.distance,
            "steps": chosen.step,
            "strength": chosen.strength,
        }

    def _weaker(self, seen: _Seen) -> _Seen:
        """The same at the strength that leaves least, its own among them."""
        tried = [seen]
        for strength in STRENGTHS:
            if strength != 1:
                steering = seen.steering.scaled(strength)
                tried.append(
                    _Seen(steering, self.distance(steering), seen.step, strength)
                )
        return min(tried, key=lambda one: one.distance)

    def _descend(self, opening: _Seen, steps: int, bar: Any) -> _Seen:
        """The best that a descent passes, where it starts included."""
        from scipy.optimize import minimize

        given, dtype = opening.steering, self.outputs.cut.dtype
        parts = {key: as_trainable(key, given[key], dtype) for key in given}
        numbers = Numbers(parts.values())
        best, step = opening, 0

        def value(point: np.ndarray) -> tuple[float, np.ndarray]:
            numbers.set(point)
            loss, whole = self._loss(parts)
            return loss / whole, numbers.gradient() / whole

        def look(point: np.ndarray) -> None:
            nonlocal best, step
            step += 1
            numbers.set(point)
            now = replace(
                given, entries={k: part.frozen() for k, part in parts.items()}
            )
            distance = self.distance(now)
            if distance < best.distance:
                best = _Seen(now, distance, step)
            bar.update()
            bar.set_postfix_str(f"{self.measure} held out {best.distance:.3g}")
            if step - best.step == PATIENCE:
                raise StopIteration

        options = {"maxiter": steps, "maxcor": HISTORY, "ftol": 0.0, "gtol": 0.0}
        start = numbers.zero()
        minimize(
            value, start, jac=True, method="L-BFGS-B", callback=look, options=options
        )
        return best

    def _loss(self, parts: Mapping[SiteKey, Trainable]) -> tuple[float, float]:
        """(distance, what it is relative to) over what is trained on.

        The gradient of the distance is left on the parameters.
        """
        loss, whole = 0.0, 0.0
        for batch in self.fitting:
            tuned, mask = (
                self.outputs.tuned(batch),
                self.outputs.cut.batches[batch].mask,
            )
            wanted = counted(tuned, mask)
            with torch.enable_grad():
                steers = by_layer({key: part.current() for key, part in parts.items()})
                found = counted(self.outputs.steered(batch, steers), mask)
                if self.outputs.has_classes(tuned):
                    own = kl_divergence(wanted, found)[0].sum()
                else:
                    own = (wanted - found).square().sum()
                own.backward()
            loss += float(own.detach())
            kl = self.outputs.has_classes(tuned)
            whole += len(wanted) if kl else float(wanted.square().sum())
        return loss, whole or 1.0

    def distance(self, steering: SteeringSet) -> float:
        """On the held-out part, as `equiv.evaluate` measures it; ∞ if not finite."""
        steers, found = by_layer(steering), None
        for batch in self.held_out:
            tuned = self.outputs.tuned(batch)
            found = found or Distances(has_logits=self.outputs.has_classes(tuned))
            own = self.outputs.cut.batches[batch]
            found.add(tuned, self.outputs.steered(batch, steers), own.mask, None)
        assert found is not None
        self.measure = "kl" if found.has_logits else "output"
        return found.mean if math.isfinite(found.mean) else math.inf
