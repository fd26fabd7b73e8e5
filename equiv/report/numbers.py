"""Numbers for people: never `0.00` for what is not zero, never `100 %` for less."""

import math


def figure(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` significant digits; tiny ones in powers of ten.

    Example:
        >>> figure(0.43021), figure(0.0), figure(2.3e-7), figure(None)
        ('0.43', '0', '2.3e-07', '–')
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "nan"
    return f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share as percent: 0 % and 100 % only when truly so.

    Example:
        >>> percent(0.8612), percent(0.9996), percent(1.0), percent(0.0004)
        ('86 %', '99.96 %', '100 %', '0.04 %')
        >>> percent(-0.2), percent(0.0), percent(1 - 1e-9), percent(1e-9)
        ('-20 %', '0 %', '>99.99 %', '<0.01 %')
    """
    if share is None:
        return "–"
    value = 100 * share
    for digits in range(3):
        text = f"{value:.{digits}f}"
        at_edge = float(text) in (0.0, 100.0) and value not in (0.0, 100.0)
        if not at_edge:
            return f"{0 if value == 0 else text} %"
    if abs(value) < 1:
        return "<0.01 %" if value > 0 else ">-0.01 %"
    return ">99.99 %" if value < 100 else "<100.01 %"


def scale(t: float) -> str:
    """A scale of the update, two significant digits.

    Example:
        >>> scale(0.3571), scale(4.0)
        ('0.36', '4')
    """
    return f"{t:.2g}"
