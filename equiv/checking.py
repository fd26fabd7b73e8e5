"""`equiv.check`: the one verb. Measures everything and returns a `Report`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex, overload

import torch
from torch import nn

from equiv.arguments import as_layers
from equiv.measuring.measurement import Measurement
from equiv.model.batches import Batch
from equiv.model.families import find_blocks
from equiv.model.guard import check_model, measured
from equiv.model.sites import SITES
from equiv.progress import progress_bar
from equiv.report.report import Report
from equiv.settings import as_settings, with_sites
from equiv.steering.forms.form import FORMS
from equiv.update.inputs import inputs_for
from equiv.update.several import OneUpdate, resolve_by_name
from equiv.update.update import Update


@overload
def check(
    model: nn.Module,
    delta_w: OneUpdate,
    inputs: object = ...,
    *,
    sites: Sequence[str] | None = ...,
    layers: Iterable[SupportsIndex] | None = ...,
    forms: Sequence[str] = ...,
    rank: int = ...,
    target: str = ...,
    at: str = ...,
    max_remainder: float | None = ...,
    tokenizer: Any = ...,
    dtype: torch.dtype | None = ...,
    derivative: str = ...,
    seed: int = ...,
    progress: bool = ...,
) -> Report: ...


@overload
def check(
    model: nn.Module,
    delta_w: Mapping[str, OneUpdate],
    inputs: object = ...,
    *,
    sites: Sequence[str] | None = ...,
    layers: Iterable[SupportsIndex] | None = ...,
    forms: Sequence[str] = ...,
    rank: int = ...,
    target: str = ...,
    at: str = ...,
    max_remainder: float | None = ...,
    tokenizer: Any = ...,
    dtype: torch.dtype | None = ...,
    derivative: str = ...,
    seed: int = ...,
    progress: bool = ...,
) -> dict[str, Report]: ...


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
) -> Report | dict[str, Report]:
    """Measure how far moving activations can stand in for a weight update.

    Args:
        model: A Hugging Face model of a known family, or any module. It is left
            exactly as it was.
        delta_w: The update: a mapping of parameter name → difference, an
            `equiv.Update`, a tuned model, a `PeftModel` (also one around this very
            model), or a path or hub id of any of these. Several, by name, as a mapping
            of name → update: they share the checks of the model and the inputs, and
            are held in memory together, but each is measured by itself, one after the
            other, so that the rest of the memory does not grow with their number.
        inputs: `None` (drawn from the seed: good for the calculus only), `"samples"`
            (sampled from the base and the tuned model: of several, each is measured on
            its own), texts or conversations with `tokenizer`, a `Path` of a file of
            them, a `datasets.Dataset`, a tensor, a mapping of keyword arguments, or an
            iterable of those. For an encoder–decoder also what its decoder reads:
            `labels` or `decoder_input_ids` beside the ids, or rows with a text and a
            target.
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
        The report; of several updates name → report, in their order, each the report
        that a call of its own gives.

    Raises:
        ArgumentError: If an argument is outside its set.
        UpdateError: If an update cannot be used, or if updates and entries of one are
            mixed; nothing is measured then.
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
    updates, several = resolve_by_name(model, delta_w)
    blocks = find_blocks(model)
    if settings.sites in (None, SITES):
        settings = replace(settings, sites=blocks.sites if blocks else None)
    chosen = as_layers(layers, len(blocks.modules) if blocks else 1)
    found: dict[str, Report] = {}
    with progress_bar(progress, len(updates)) as bar:
        fed = _fed(model, tuple(updates.values()), inputs, tokenizer, settings.seed)
        for name, update in updates.items():
            bar.name = name
            with measured(model):
                kind, batches = next(fed)
                own = with_sites(settings, model, batches, blocks)
                run = Measurement(model, update, own, batches, chosen, kind, bar)
                bar.step("inputs")
                found[name] = run.report(run.calculus())
    return found if several else found[""]


def _fed(
    model: nn.Module,
    updates: Sequence[Update],
    inputs: object,
    tokenizer: Any,
    seed: int,
) -> Iterator[tuple[str, list[Batch]]]:
    """What each update is measured on: samples are its own, all else is read once."""
    if isinstance(inputs, str) and inputs == "samples":
        for update in updates:
            yield inputs_for(model, update, inputs, tokenizer, seed)
        return
    read = inputs_for(model, updates[0], inputs, tokenizer, seed)
    yield from [read] * len(updates)
