"""The progress bar of a check."""

from typing import Any


def progress_bar(show: bool) -> Any:
    """A progress bar on standard error; the full pass adds a step per stage."""
    from tqdm import tqdm

    layout = "{desc:<28} {bar:30} {n_fmt:>3}/{total_fmt} {elapsed}"
    return tqdm(total=3, disable=not show, bar_format=layout, desc="equiv check")


def step(bar: Any, done: str) -> None:
    """Show what is done now."""
    bar.set_description(f"equiv check: {done}", refresh=False)
    bar.update()
