"""`equiv compare`: a saved model against a saved or a served one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from equiv.cli.loading import check_field, load_tokenizer, read_texts
from equiv.errors import ArgumentError
from equiv.gate.comparing import compare
from equiv.gate.diagnosing import diagnose
from equiv.gate.endpoint import Completions
from equiv.gate.sides import TopK
from equiv.gate.values import Agreement, Diagnosis
from equiv.gate.wording import WIDTH, agreement_rendered, diagnosis_rendered
from equiv.model.loading import load_saved

_SERVED = ("http://", "https://")


def compared(
    expected: str,
    actual: str,
    base: str | None,
    update: str | None,
    inputs: str | None,
    limit: int,
    rtol: float | None,
    atol: float | None,
    field: str | None,
) -> tuple[Agreement, Diagnosis | None]:
    """The comparison, and the diagnosis where there are a base and an update.

    Args:
        expected: A model: path or hub id; or a base and its update, as BASE+UPDATE.
        actual: A model likewise, or an endpoint as URL#MODEL.
        base: A model: path or hub id.
        update: An update of the base: path or hub id.
        inputs: A file of texts.
        limit: How many of its texts are used at most.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        field: Which field of JSON objects in the file is the text.

    Raises:
        EquivError: If any of these is not what it should be.
    """
    if (base is None) != (update is None):
        given, lacks = (
            ("--update", "--base") if base is None else ("--base", "--update")
        )
        raise ArgumentError(f"{given} needs {lacks}: a diagnosis takes both.")
    for name, value in (("EXPECTED", expected), ("--base", base)):
        if value is not None and value.startswith(_SERVED):
            raise ArgumentError(
                f"Expected a path or hub id as {name}, got an address: only ACTUAL "
                "may be an endpoint."
            )
    served = actual.startswith(_SERVED)
    check_field(field, inputs)
    texts = None if inputs is None else read_texts(Path(inputs), limit, field)
    source, added = _split(expected)
    tokenizer = load_tokenizer(source) if served or texts is not None else None
    side = _endpoint(actual, tokenizer) if served else actual
    wanted = source if added is None else (source, added)
    agreement = compare(side, wanted, texts, rtol=rtol, atol=atol, tokenizer=tokenizer)
    if base is None:
        return agreement, None
    return agreement, diagnose(
        load_saved(base), update, side, texts, tokenizer=tokenizer
    )


def _split(expected: str) -> tuple[str, str | None]:
    """(model, update) of BASE+UPDATE; a path that is there is itself.

    Example:
        >>> _split("base+adapter"), _split("org/model")
        (('base', 'adapter'), ('org/model', None))
    """
    if Path(expected).exists():
        return expected, None
    pairs = [
        (expected[:i], expected[i + 1 :]) for i, c in enumerate(expected) if c == "+"
    ]
    pairs = [(base, update) for base, update in pairs if base and update]
    there = [pair for pair in pairs if Path(pair[0]).exists()]
    return next(iter([*there, *pairs]), (expected, None))


def show(agreement: Agreement, diagnosis: Diagnosis | None) -> None:
    """Print what was found."""
    console = Console(highlight=False)
    width = min(WIDTH, max(80, console.width))
    console.print(agreement_rendered(agreement), width=width)
    if diagnosis is not None:
        console.print("")
        console.print(diagnosis_rendered(diagnosis), width=width)


def _endpoint(text: str, tokenizer: Any) -> Callable[[Tensor], TopK]:
    """The endpoint that URL#MODEL names; it goes by that name in what is found."""
    url, _, model = text.partition("#")
    if not model:
        raise ArgumentError(
            "Expected an endpoint as URL#MODEL, such as http://127.0.0.1:8000/v1#mine, "
            "got no #MODEL."
        )
    completions = Completions(url, model, tokenizer=tokenizer)

    def ask(ids: Tensor) -> TopK:
        return completions(ids)

    ask.__name__ = text
    return ask
