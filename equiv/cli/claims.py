"""`equiv claims`: test the theory, on the shipped model, on another, or one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equiv.cli.commands import HtmlFile, JsonFile
from equiv.cli.steering import app
from equiv.cli.writing import check_outputs, write_outputs
from equiv.errors import ArgumentError

if TYPE_CHECKING:
    from equiv.theory import Claim

_STATUS = (
    "Exit status: 0 when the claims were tested, whatever the verdicts; 1 when a claim "
    "of your own file fails or cannot be decided, or an exact identity fails; 2 for "
    "wrong usage or data, 3 for an internal error."
)


@app.command(epilog=_STATUS)
def claims(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CLAIM] [FILE.py] [MODEL UPDATE]",
            help="A claim's number; a Python file of claims of your own; a model and "
            "its update, paths or hub ids. Without a model, the shipped one and its "
            "two fine-tunes.",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="13,14", help="Only these claims, by number."),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts for MODEL, as for `equiv check`. Without it, random token ids.",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Use at most this many texts, the first ones.")
    ] = 512,
    norm: Annotated[
        str,
        typer.Option(help='What changes are measured in: "euclidean" or "fisher".'),
    ] = "euclidean",
    explain: Annotated[
        bool, typer.Option("--explain", help="Print derivation and evidence.")
    ] = False,
    train: Annotated[
        bool,
        typer.Option(
            "--train", help="First train again what claims about training read."
        ),
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where results of training are read, and written by --train; by "
            "default those that are shipped.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws whatever is drawn.")] = 0,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Test every claim of the theory and print what was found.

    A file of your own claims is run alone, or with the numbers named beside it.
    """
    from rich.console import Console, Group

    from equiv.theory import run
    from equiv.theory.text import WIDTH, explained, rendered

    check_outputs(json, html)
    wanted, source = _sorted(what or [])
    chosen = _chosen(wanted, only)
    if train:
        _train(chosen, results)
    model, update, texts, tokenizer = _loaded(source, inputs, limit)
    found = run(
        chosen,
        model,
        update,
        texts,
        tokenizer=tokenizer,
        norm=norm,
        seed=seed,
        results=results,
        progress=True,
    )
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width)
    if explain:
        console.print(Group(*(part for j in found for part in (explained(j), ""))))
    else:
        console.print(rendered(found))
    write_outputs(json, found.to_json, html, found.to_html)
    raise typer.Exit(0 if found.sound else 1)


def _sorted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What names claims (numbers, a Python file), and what names model and update."""
    named = [w for w in words if w.isdecimal() or w.endswith(".py")]
    source = [w for w in words if w not in named]
    if len(source) not in (0, 2):
        raise ArgumentError(
            f"Expected a model and its update, or neither, got {', '.join(source)}."
        )
    return named, source


def _chosen(named: Sequence[str], only: str | None) -> list["Claim"]:
    """Claims of the user's files and by number; all that are shipped if none is named.

    Raises:
        ArgumentError: If there is no such claim.
    """
    from equiv.theory import from_file, shipped

    asked = [*named, *(only.replace(",", " ").split() if only else [])]
    own = [c for word in asked if word.endswith(".py") for c in from_file(Path(word))]
    known = {str(claim.id): claim for claim in shipped()}
    ends = list(known)
    numbers = [word for word in asked if not word.endswith(".py")]
    for number in numbers:
        if number not in known:
            raise ArgumentError(
                f"There is no claim {number}; there are {ends[0]} to {ends[-1]}."
            )
    picked = [known[number] for number in numbers]
    return [*own, *picked] if asked else list(known.values())


def _train(chosen: Sequence["Claim"], folder: Path | None) -> None:
    """Run the studies that the claims read; say how long that takes."""
    from equiv.theory.trained import study

    known = study.studies()
    names = list(dict.fromkeys(claim.study for claim in chosen if claim.study))
    if not names:
        raise ArgumentError("--train: none of these claims reads results of training.")
    minutes = sum(known[name].minutes for name in names)
    typer.echo(
        f"Training for {', '.join(names)}: about {minutes:.0f} minutes", err=True
    )
    study.train(names, folder)


def _loaded(
    source: Sequence[str], inputs: str | None, limit: int
) -> tuple[Any, Any, Any, Any]:
    """(model, update, texts, tokenizer), all `None` for the shipped model."""
    from equiv.cli.loading import load_tokenizer, read_texts
    from equiv.model.loading import load_saved

    if not source:
        if inputs is not None:
            raise ArgumentError("--inputs needs MODEL and UPDATE.")
        return None, None, None, None
    texts = None if inputs is None else read_texts(Path(inputs), limit)
    tokenizer = None if texts is None else load_tokenizer(source[0])
    return load_saved(source[0]), source[1], texts, tokenizer
