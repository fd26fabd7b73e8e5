"""The progress bar of a check."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STEPS = 3  # of one update, beside the stages of its full pass
_WIDTH = 28


class Progress:
    """A bar on standard error, and the name of the update it is at."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self.name = ""

    def more(self, steps: int) -> None:
        """There are more steps to come."""
        self._bar.total += steps

    def step(self, done: str) -> None:
        """Show what is done now."""
        what = f"{self.name}: {done}" if self.name else f"equiv check: {done}"
        self._bar.set_description(what[-_WIDTH:], refresh=False)
        self._bar.update()


@contextmanager
def progress_bar(show: bool, updates: int = 1) -> Iterator[Progress]:
    """Progress of a check of so many updates."""
    from tqdm import tqdm

    layout = f"{{desc:<{_WIDTH}}} {{bar:30}} {{n_fmt:>3}}/{{total_fmt}} {{elapsed}}"
    total = _STEPS * updates
    with tqdm(
        total=total, disable=not show, bar_format=layout, desc="equiv check"
    ) as bar:
        yield Progress(bar)
