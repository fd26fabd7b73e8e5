"""Where the shares of an update stand in a picture; the page draws it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from equiv.gate.values import Fate, Share
from equiv.report.numbers import figure

WIDTH = 940.0
# Room for the guide lines' names on the left.
LEFT, RIGHT = 100.0, 10.0
TOP, BOTTOM = 26.0, 250.0
GUIDES = ((2, "twice 2"), (1, "applied 1"), (0, "not applied 0"), (-1, "flipped −1"))
# Shares between these are drawn where they are; the figure beside says the others.
LOWEST, HIGHEST = -1.3, 2.3
# Standard errors that a bar reaches to either side.
BAR = 2.0
# Pixels that a figure, one character of a name, and a layer's number take.
FIGURE, CHARACTER, NUMBER = 40.0, 6.7, 20.0
# Degrees by which names are turned where they would run into each other.
SLANT = 30.0


@dataclass(frozen=True)
class Guide:
    """A line across, at a share that has a name."""

    y: float
    name: str


@dataclass(frozen=True)
class Mark:
    """One share: a point with its bar, or a blank where it is not identifiable.

    `name` and `figure` are empty where they would run into others.
    """

    x: float
    y: float | None
    high: float
    low: float
    name: str
    figure: str
    title: str
    fate: Fate


@dataclass(frozen=True)
class Picture:
    """Shares side by side, `step` apart; names are turned by `slant` degrees."""

    height: float
    guides: tuple[Guide, ...]
    marks: tuple[Mark, ...]
    step: float
    slant: float
    axis: str


def picture(shares: Sequence[Share]) -> Picture:
    """Lay out the shares of layers or of kinds of weight.

    Example:
        >>> made = picture([Share("layer 0", 1.0, 0.0, Fate.APPLIED)])
        >>> made.axis, made.marks[0].name, made.marks[0].y == made.guides[1].y
        ('layer', '0', True)
    """
    step = (WIDTH - LEFT - RIGHT) / max(1, len(shares))
    layers = any(share.part.startswith("layer ") for share in shares)
    names = _of_layers(shares, step) if layers else [share.part for share in shares]
    longest = max((CHARACTER * len(name) for name in names), default=0.0)
    slant = SLANT if longest > step and not layers else 0.0
    below = longest * math.sin(math.radians(slant))
    return Picture(
        height=BOTTOM + 30 + below + (14 if layers else 0),
        guides=tuple(Guide(_height(value), name) for value, name in GUIDES),
        marks=tuple(
            _mark(share, LEFT + (i + 0.5) * step, name, step > FIGURE)
            for i, (share, name) in enumerate(zip(shares, names, strict=True))
        ),
        step=step,
        slant=slant,
        axis="layer" if layers else "",
    )


def _of_layers(shares: Sequence[Share], step: float) -> list[str]:
    """Numbers of layers, as many as there is room for; "outside" for the rest."""
    names = [share.part.removeprefix("layer ") for share in shares]
    others = [i for i, name in enumerate(names) if not name.isdigit()]
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**6) if n * step > NUMBER)
    room = CHARACTER * len("outside") / 2 + NUMBER / 2
    return [
        "outside"
        if i in others
        else name
        if int(name) % every == 0 and all(abs(i - o) * step > room for o in others)
        else ""
        for i, name in enumerate(names)
    ]


def _mark(share: Share, x: float, name: str, figures: bool) -> Mark:
    value, error = share.coefficient, share.uncertainty or 0.0
    told = f"{share.part}: {share.reason or share.fate.value}"
    if value is None or math.isnan(value):
        return Mark(x, None, TOP, BOTTOM, name, "", told, share.fate)
    outside = not LOWEST <= value <= HIGHEST
    return Mark(
        x=x,
        y=_height(value),
        high=_height(value + BAR * error),
        low=_height(value - BAR * error),
        name=name,
        figure=figure(round(value, 3) + 0.0) if figures or outside else "",
        title=f"{told} ({value:.4f} ± {error:.2g})",
        fate=share.fate,
    )


def _height(value: float) -> float:
    """Where a share stands, from above; those outside the picture at its edge."""
    clipped = min(max(value, LOWEST), HIGHEST)
    share = (HIGHEST - clipped) / (HIGHEST - LOWEST)
    return round(TOP + (BOTTOM - TOP) * share, 2)
