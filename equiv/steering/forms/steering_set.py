"""`SteeringSet`: the steers of one model, what they cover, and where they come from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from equiv.errors import ArgumentError
from equiv.model.sites import SiteKey, as_site_key
from equiv.steering.applying.positions import Positions
from equiv.steering.forms.form import Steering


@dataclass(frozen=True, eq=False)
class SteeringSet(Mapping[SiteKey, Steering]):
    """(layer, site) → steering, ready for `equiv.steer`, with what is known of it.

    Attributes:
        entries: The steers.
        positions: Which tokens are steered, as `equiv.steer` takes it.
        about: Where it comes from and what was measured, as JSON could hold it: the
            base model, the update, the ridge of each fit, figures.

    Raises:
        ArgumentError: If the positions are no words that `equiv.steer` knows.
        SiteError: If a key is no site.

    Example:
        >>> import torch
        >>> from equiv.steering.forms.vector import Vector
        >>> v = Vector(torch.ones(4))
        >>> both = SteeringSet({(0, "block_out"): v, (1, "block_out"): v})
        >>> len(both), both.num_parameters
        (2, 8)
    """

    entries: Mapping[SiteKey, Steering]
    positions: str = "all"
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Positions.parse(self.positions)
        known = {as_site_key(key): value for key, value in self.entries.items()}
        object.__setattr__(self, "entries", dict(sorted(known.items())))

    def __getitem__(self, key: SiteKey) -> Steering:
        """The steer at (layer, site); the site also as a `Site`."""
        return self.entries[as_site_key(key)]

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        sites = sorted({site for _, site in self.entries})
        return (
            f"SteeringSet({len(self.entries)} steers at {', '.join(sites) or 'no site'}"
            f", {self.num_parameters:,} parameters)"
        )

    @property
    def num_parameters(self) -> int:
        """Numbers in all steers together."""
        return sum(steering.num_parameters for steering in self.entries.values())

    def scaled(self, strength: float) -> "SteeringSet":
        """Every steer `strength` times as strong."""
        made = {key: value.scaled(strength) for key, value in self.entries.items()}
        return replace(self, entries=made)


def as_set(steering: object) -> SteeringSet:
    """Steering as a set; a mapping gets the positions "all" and nothing known of it.

    Raises:
        ArgumentError: If it is no mapping.
        SiteError: If a key is no site.
    """
    if isinstance(steering, SteeringSet):
        return steering
    if not isinstance(steering, Mapping):
        raise ArgumentError(
            "Expected a mapping of (layer, site) → steering, got "
            f"{type(steering).__name__}."
        )
    return SteeringSet(steering)
