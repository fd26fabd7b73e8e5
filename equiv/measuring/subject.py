"""What a report is about: the model, the update, the inputs and the settings."""

import importlib.metadata

from torch import nn

from equiv.model.stages import StagedModel
from equiv.report.values import Subject
from equiv.settings import Settings
from equiv.shift.radius import TOLERANCE
from equiv.update.update import Update

_PACKAGES = ("equiv", "torch", "transformers", "peft")


def subject_of(
    cut: StagedModel, update: Update, settings: Settings, kind: str, few: int
) -> Subject:
    """The subject of a report.

    Args:
        cut: The model, cut into stages for the full pass.
        update: The update, under the model's own names.
        settings: What was asked for.
        kind: Where the inputs come from.
        few: How many tokens the calculus was measured on.
    """
    model, batches = cut.model, cut.batches
    return Subject(
        model=f"{type(model).__name__}",
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_layers=cut.num_layers,
        d_model=width_of(model),
        update=update.source,
        update_norm=update.norm(),
        update_relative_norm=update.relative_norm(model),
        update_names=len(update.deltas),
        inputs=kind,
        sequences=sum(b.sequences for b in batches),
        tokens=sum(b.tokens for b in batches),
        held_out_sequences=sum(b.sequences for b in batches if b.held_out),
        calculus_tokens=few,
        seed=settings.seed,
        at=settings.at,
        target=settings.target,
        rank=settings.rank,
        max_remainder=settings.max_remainder,
        tolerance=TOLERANCE,
        versions=_versions(),
        encoder_layers=cut.blocks.first if cut.blocks else 0,
    )


def width_of(model: nn.Module) -> int | None:
    """Width of the stream, where a configuration says so."""
    config = getattr(model, "config", None)
    return getattr(config, "hidden_size", None)


def _versions() -> tuple[tuple[str, str], ...]:
    found = []
    for name in _PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)
