"""What all pictures share: a blank figure, colours, clean axes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from equiv.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe–Ito colours, told apart by people with any colour vision; markers besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"


def blank(width: float, height: float) -> "Figure":
    """A figure that belongs to nobody's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "Pictures need matplotlib: pip install 'equiv[report]'."
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def clean(axes: "Axes") -> None:
    """No frame above and to the right; faint lines behind the data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def shades(layers: Iterable[int]) -> dict[int, Any]:
    """A shade per layer, the same in every picture of a report, darker below."""
    from matplotlib import colormaps

    known = sorted(set(layers))
    shade = colormaps["viridis"]
    return {n: shade(0.9 * i / max(1, len(known) - 1)) for i, n in enumerate(known)}
