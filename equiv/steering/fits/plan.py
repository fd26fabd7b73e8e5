"""Which steer goes where: what a fit is asked for, one entry per layer and site."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Planned:
    """One steer that is to be fitted.

    Attributes:
        layer: Index of the block.
        site: Where it reads and writes, as `Site.key`.
        form: "vector", "linear", "affine", "loreft", "mlp" or "heads".
        rank: Rank of the map; `None` for full rank, or where the form has none.
    """

    layer: int
    site: str
    form: str
    rank: int | None
