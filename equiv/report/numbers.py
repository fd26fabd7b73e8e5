"""Numbers for people: never `0.00` for what is not zero, never `100 %` for less."""

import math

# Up to here a large figure is written out; beyond, in powers of ten.
_WRITTEN_OUT = 1e7


def figure(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` significant digits; tiny ones in powers of ten.

    Example:
        >>> figure(0.43021), figure(0.0), figure(2.3e-7), figure(None)
        ('0.43', '0', '2.3e-07', '–')
        >>> figure(12345.6), figure(-0.5)
        ('12,346', '−0.5')
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "nan"
    text = f"{value:.{digits}g}"
    if "e+" in text and abs(value) < _WRITTEN_OUT:
        text = f"{value:,.0f}"
    return _signed(text)


def percent(share: float | None) -> str:
    """A share as percent: 0 % and 100 % only when truly so.

    Example:
        >>> percent(0.8612), percent(0.9996), percent(1.0), percent(0.0004)
        ('86 %', '99.96 %', '100 %', '0.04 %')
        >>> percent(-0.2), percent(0.0), percent(1 - 1e-9), percent(1e-9)
        ('−20 %', '0 %', '>99.99 %', '<0.01 %')
    """
    if share is None:
        return "–"
    value = 100 * share
    for digits in range(3):
        text = f"{value:.{digits}f}"
        at_edge = float(text) in (0.0, 100.0) and value not in (0.0, 100.0)
        if not at_edge:
            return f"{0 if value == 0 else _signed(text)} %"
    if abs(value) < 1:
        return "<0.01 %" if value > 0 else ">−0.01 %"
    return ">99.99 %" if value < 100 else "<100.01 %"


def between(low: float, high: float) -> str:
    """An interval of shares, as percent; digits enough to tell its ends apart.

    Example:
        >>> between(-0.004, 0.72), between(0.0102, 0.0138), between(0.5, 0.5)
        ('−0.4 to 72 %', '1.0 to 1.4 %', '50 %')
    """
    ends = [percent(end).removesuffix(" %") for end in (low, high)]
    for digits in (1, 2):
        finer = [f"{100 * end:.{digits}f}" for end in (low, high)]
        if ends[0] != ends[1] or {float(end) for end in finer} & {0.0, 100.0}:
            break
        if finer[0] != finer[1]:
            ends = [_signed(end) for end in finer]
    return f"{' to '.join(dict.fromkeys(ends))} %"


def scale(t: float) -> str:
    """A scale of the update, two significant digits.

    Example:
        >>> scale(0.3571), scale(4.0)
        ('0.36', '4')
    """
    return f"{t:.2g}"


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    Example:
        >>> counted(1, "layer"), counted(1200, "token")
        ('1 layer', '1,200 tokens')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _signed(text: str) -> str:
    """With a minus sign instead of a hyphen; exponents stay as they are."""
    return f"−{text[1:]}" if text.startswith("-") else text
