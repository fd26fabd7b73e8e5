"""`equiv.check`: the one verb. Measures everything and returns a `Report`."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import nn

from equiv.arguments import as_layers
from equiv.measuring import Measurement
from equiv.model.families import find_blocks
from equiv.model.guard import check_model, measured
from equiv.model.sites import SITES
from equiv.progress import progress_bar, step
from equiv.report.report import Report
from equiv.settings import as_settings, with_sites
from equiv.steering.forms.form import FORMS
from equiv.update.inputs import inputs_for
from equiv.update.sources import resolve


def check(
    model: nn.Module,
    delta_w: object,
    inputs: object = None,
    *,
    sites: Sequence[str] | None = SITES,
    layers: Iterable[SupportsIndex] | None = None,
    forms: Sequence[str] = FORMS,
    rank: int = 8,
    target: str = "block",
    at: str = "both",
    max_remainder: float | None = 0.1,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    derivative: str = "forward",
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Measure how far moving activations can stand in for a weight update.

    Args:
        model: A Hugging Face model of a known family, or any module. It is left
            exactly as it was.
        delta_w: The update: a mapping of parameter name → difference, an
            `equiv.Update`, a tuned model, a `PeftModel` (also one around this very
            model), or a path or hub id of any of these.
        inputs: `None` (drawn from the seed: good for the calculus only), `"samples"`
            (sampled from the base and the tuned model), texts or conversations with
            `tokenizer`, a `Path` of a file of them, a `datasets.Dataset`, a tensor, a
            mapping of keyword arguments, or an iterable of those. For an
            encoder–decoder also what its decoder reads: `labels` or `decoder_input_ids`
            beside the ids, or rows with a text and a target.
        sites: Where to measure and steer, by name or pattern such as "mlp_*"; see
            `equiv.model.sites`. For a plain module, names of submodules. `None` for
            all.
        layers: Blocks that become rows; `None` for all. An encoder–decoder's are
            numbered through, the encoder's first.
        forms: Forms of steering to fit: "vector", "affine".
        rank: Rank of the affine map; ranks 1 and full are measured beside it.
        target: "block": fits aim at the block output's shift, so that sites can be
            compared; "shift": at the site's own.
        at: "both", "base" or "midpoint": where the derivative is taken. `holds` judges
            the base, with "midpoint" the midpoint.
        max_remainder: Largest relative remainder at full size for `holds`; `None` asks
            for the order alone.
        tokenizer: Tokenizer for texts and conversations.
        dtype: Compute dtype; `None` means order and superposition in float64 on at
            most 256 tokens, the rest in float32 with float64 sums (in float64 where
            the update is so small that float32's rounding would show).
        derivative: "forward": exact, by forward mode or, where an operation has no
            rule for it, by two reverse passes. "central": differences of two forwards,
            for models with an operation that has neither; every row says so, and the
            error they bring is about 4e-11 of the shift in float64, 2e-5 in float32.
        seed: Draws inputs, the held-out quarter and the bootstrap.
        progress: Whether to show a progress bar.

    Returns:
        The report.

    Raises:
        ArgumentError: If an argument is outside its set.
        UpdateError: If the update cannot be used.
        InputsError: If the inputs cannot be fed to the model.
        SiteError: If a layer or site does not exist.
        UnsupportedModelError: If the model cannot be measured.
        ForwardModeError: If an operation has no derivative, or a wrong one.

    Example:
        >>> from equiv import Update
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> report = check(model, Update.random(model, relative_norm=0.01, seed=0))
        >>> report.holds
        True
    """
    settings = as_settings(
        sites, forms, rank, target, at, max_remainder, dtype, seed, derivative
    )
    check_model(model)
    update = resolve(model, delta_w)
    blocks = find_blocks(model)
    if settings.sites in (None, SITES):
        settings = replace(settings, sites=blocks.sites if blocks else None)
    chosen = as_layers(layers, len(blocks.modules) if blocks else 1)
    with measured(model), progress_bar(progress) as bar:
        kind, batches = inputs_for(model, update, inputs, tokenizer, settings.seed)
        settings = with_sites(settings, model, batches, blocks)
        run = Measurement(model, update, settings, batches, chosen, kind, bar)
        step(bar, "inputs")
        return run.report(run.calculus())
