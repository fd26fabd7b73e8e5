"""What a check was asked for, in the one form that is used inside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from equiv.arguments import (
    as_choice,
    as_dtype,
    as_integer,
    as_names,
    as_number,
    as_seed,
)
from equiv.errors import SiteError
from equiv.model.batches import Batch
from equiv.model.choosing import block_sites, module_sites
from equiv.model.families import Blocks
from equiv.model.sites import SITES, Site
from equiv.shift.calculus import Curve, RowKey
from equiv.shift.derivative import CHOICES
from equiv.shift.radius import TOLERANCE
from equiv.steering.fits.chain import TARGETS, Spec
from equiv.steering.forms.form import FORMS

_AT = ("both", "base", "midpoint")


@dataclass(frozen=True)
class Settings:
    """The arguments of `equiv.check`, which explains them."""

    sites: tuple[str, ...] | None
    forms: tuple[str, ...]
    rank: int
    target: str
    at: str
    max_remainder: float | None
    dtype: torch.dtype | None
    seed: int
    derivative: str = "forward"

    @property
    def midpoint(self) -> bool:
        """Whether the derivative is taken at the midpoint too."""
        return self.at != "base"

    @property
    def order_dtype(self) -> torch.dtype:
        """Compute dtype of order and superposition."""
        return self.dtype or torch.float64

    def full_dtype(self, curves: Mapping[RowKey, Curve]) -> torch.dtype:
        """Float32 unless its rounding would be taken for the update's remainder."""
        small = any(curve.needs_float64(TOLERANCE) for curve in curves.values())
        return self.dtype or (torch.float64 if small else torch.float32)

    def specs(self, sites: Sequence[str], width: int | None) -> list[Spec]:
        """The fitted rungs of the ladder, per site."""
        made = []
        for site in sites:
            if "vector" in self.forms:
                made.append(Spec(site, "vector", None, self.target))
            if "affine" in self.forms:
                ranks = sorted({1, min(self.rank, width or self.rank)})
                for rank in (*ranks, None):
                    made.append(Spec(site, "affine", rank, self.target))
        return made


def as_settings(
    sites: Sequence[str] | None,
    forms: Sequence[str],
    rank: int,
    target: str,
    at: str,
    max_remainder: float | None,
    dtype: torch.dtype | None,
    seed: int,
    derivative: str = "forward",
) -> Settings:
    """Arguments of `equiv.check`, checked.

    Raises:
        ArgumentError: If one is outside its set.
        SiteError: If there is no site among `sites`.
    """
    chosen = None if sites is None else as_names("sites", sites, SITES)
    chosen = chosen and tuple(dict.fromkeys(Site(name).key for name in chosen))
    if chosen == ():
        raise SiteError("Expected at least one site, got none.")
    if max_remainder is not None:
        expected = "a number >= 0, or None to ask for the order alone"
        max_remainder = as_number(
            "max_remainder", max_remainder, expected, lambda value: value >= 0
        )
    named = as_names("forms", forms, FORMS)
    return Settings(
        chosen,
        tuple(as_choice("forms", form, FORMS) for form in named),
        as_integer("rank", rank, 1),
        as_choice("target", target, TARGETS),
        as_choice("at", at, _AT),
        max_remainder,
        None if dtype is None else as_dtype(dtype),
        as_seed(seed),
        as_choice("derivative", derivative, CHOICES),
    )


def with_sites(
    settings: Settings,
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Blocks | None,
) -> Settings:
    """The settings with the sites that the model has for the names and patterns.

    Raises:
        SiteError: If there is none for one of them.
    """
    if settings.sites is None:
        return settings
    if blocks is not None:
        return replace(settings, sites=block_sites(blocks, settings.sites))
    dtype = settings.order_dtype
    return replace(settings, sites=module_sites(model, batches, dtype, settings.sites))
