"""`equiv.fit_sequential`: steering per layer, each fitted on the steered stream."""

from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch
from torch import nn

from equiv.arguments import as_choice, as_dtype, as_layers, as_rank, as_ridge
from equiv.model.families import find_blocks
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.stages import staged
from equiv.shift.propagate import propagate
from equiv.shift.stage_update import low_rank_names
from equiv.shift.traces import TUNED, Point
from equiv.steering.chain import TARGETS, Chain, Spec
from equiv.steering.fits import RIDGE
from equiv.steering.forms import FORMS
from equiv.steering.steering_set import SteeringSet
from equiv.update.sources import resolve


def fit_sequential(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    *,
    site: str = "block_out",
    form: str = "affine",
    rank: int | None = 8,
    target: str = "block",
    layers: Iterable[SupportsIndex] | None = None,
    tokenizer: Any = None,
    ridge: float = RIDGE,
    first_position: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> SteeringSet:
    """Fit steering at one site of every layer, from the first layer to the last.

    Block l is fitted on the stream that is already steered below it, so that it makes
    up for what is still missing there and nothing is counted twice. Layers below the
    first that the update touches get no steering.

    Args:
        model: A Hugging Face model of a known family, or any module.
        delta_w: The update, in any form that `equiv.check` takes.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`; all of
            them are fitted on.
        site: Where the steering reads and writes.
        form: "vector" or "affine".
        rank: Rank of the affine map; `None` for full rank.
        target: "block" or "shift"; see `equiv.check`.
        layers: Layers that get steering; `None` for all.
        tokenizer: Tokenizer for texts.
        ridge: Relative ridge of the fits.
        first_position: Whether the first token of each sequence is fitted; `None`:
            unless it is a sink (see `equiv.steering.sinks`).
        dtype: Compute dtype of the activations, torch.float32 or torch.float64; the
            fits are solved in float64.

    Returns:
        (layer, site) → steering, ready for `equiv.steer`.

    Raises:
        EquivError: As `equiv.check`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity())
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> fitted = fit_sequential(model, {"0.weight": torch.eye(2)}, x, site="0",
        ...                         form="vector")
        >>> torch.allclose(fitted[0, "0"](x)[0], x.mean(0), atol=1e-6)
        True
    """
    check_model(model)
    spec = Spec(
        site,
        as_choice("form", form, FORMS),
        as_rank(rank),
        as_choice("target", target, TARGETS),
        as_ridge(ridge),
        first_position,
    )
    dtype = as_dtype(dtype)
    blocks = find_blocks(model)
    chosen = as_layers(layers, len(blocks.modules) if blocks else 1)
    update = resolve(model, delta_w)
    batches = from_inputs(model, inputs, tokenizer)
    low = low_rank_names(model, update)
    with (
        measured(model),
        staged(model, batches, dtype, sites=(site,), low_names=low) as cut,
    ):
        chain = Chain(cut, spec, layers=chosen)
        points = (Point(0.0), TUNED)
        for stage, tensors, traces in propagate(cut, update, points, low=low):
            if stage.name == "embed":
                for trace in traces:
                    chain.enter(trace.batch, trace.values[0.0][stage.output])
            elif stage.name != "head":
                chain.step(stage, tensors, list(traces))
            else:
                break
    return SteeringSet(chain.steering)
