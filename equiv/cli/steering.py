"""`equiv design`, `convert` and `export`: steering that replaces a fine-tune."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from equiv.cli.commands import FieldName, JsonFile, app
from equiv.cli.writing import check_outputs
from equiv.errors import ArgumentError, FileFormatError

_STATUS = (
    "Exit status: 0 when it is written, 1 when no steering was better than none, 2 for "
    "wrong usage or data, 3 for an internal error."
)
PEFT = "peft"
OWN = "steering"


@app.command()
def design(
    report: Annotated[
        Path, typer.Argument(help="What `equiv check --json` wrote, on real inputs.")
    ],
    budget: Annotated[
        int, typer.Option(min=0, help="The most parameters that may be spent.")
    ],
    json: JsonFile = None,
) -> None:
    """Say which layers, sites and ranks to spend a number of parameters on.

    `equiv convert --plan FILE` fits what this wrote with --json.
    """
    from rich.console import Console

    from equiv.designing.design import design as designed
    from equiv.designing.text import rendered
    from equiv.report.report import Report
    from equiv.report.text import WIDTH

    check_outputs(json)
    found = designed(Report.from_json(report), budget)
    console = Console(highlight=False)
    console.print(rendered(found), width=max(WIDTH, min(console.width, 100)))
    if json is not None:
        found.to_json(json)
        typer.echo(f"Wrote {json}")


@app.command(epilog=_STATUS)
def convert(
    update: Annotated[
        str, typer.Argument(help="The update: an adapter or tuned model, path or id.")
    ],
    base: Annotated[
        str, typer.Option(metavar="MODEL", help="The base model: a path or hub id.")
    ],
    inputs: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Texts to fit and to measure on, which the update is for: one per "
            "line, or JSONL with a `text` (or `question`) field.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="What to write.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help=f"What to write: {OWN!r}, a file of equiv's own; or what `equiv "
            "export` writes."
        ),
    ] = OWN,
    site: Annotated[
        str, typer.Option(help="Where it reads and writes; or read->write.")
    ] = "block_out",
    form: Annotated[
        str, typer.Option(help="vector, linear, affine, loreft, mlp or heads.")
    ] = "affine",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the map.")] = 8,
    target: Annotated[
        str, typer.Option(help="block, shift, downstream or behaviour.")
    ] = "block",
    at: Annotated[
        str | None, typer.Option(help="The later site, with --target downstream.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What to fit where, as `equiv design --json` wrote it, instead of "
            "--site, --form and --rank.",
        ),
    ] = None,
    field: FieldName = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Use at most this many texts, the first ones.")
    ] = 512,
    seed: Annotated[int, typer.Option(help="Divides the texts.")] = 0,
) -> None:
    """Turn a fine-tune into steering, and say what that loses.

    Six tenths of the texts are fitted on, two choose the strength, and the last two,
    which nothing has seen, are what the figures are from.
    """
    from rich.console import Console

    from equiv.cli.convert import Wanted, converted, read_plan, rendered
    from equiv.cli.loading import load_tokenizer, read_texts
    from equiv.model.loading import load_saved
    from equiv.report.text import WIDTH
    from equiv.update.sources import resolve

    _check_target(to, output)
    planned = None if plan is None else read_plan(plan)
    texts = read_texts(inputs, limit, field)
    model = load_saved(base)
    resolved = resolve(model, update)
    wanted = Wanted(site, form, rank, target, at, planned, seed)
    steering, found = converted(
        model, resolved, texts, load_tokenizer(base), wanted, progress=True
    )
    console = Console(highlight=False)
    shown = rendered(found, steering, resolved, wanted)
    console.print(shown, width=max(WIDTH, min(console.width, 100)))
    if not steering:
        raise typer.Exit(1)
    if to == OWN:
        from equiv.steering.files.saving import save

        save(steering, output, model=model, update=resolved)
    else:
        _export(steering, output, to, model)
    typer.echo(f"Wrote {output}")


@app.command(epilog=_STATUS)
def export(
    steering: Annotated[Path, typer.Argument(help="A file that equiv wrote.")],
    to: Annotated[
        str, typer.Option(help="gguf, pyreft, lm_eval, easysteer, steerling or peft.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PATH", help="What to write: a file or folder."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model, for --to peft."),
    ] = None,
    drop_layer0: Annotated[
        bool,
        typer.Option(
            "--drop-layer0", help="With --to gguf: leave out the vector of layer 0."
        ),
    ] = False,
) -> None:
    """Write steering for another tool: whole, or refused with the reason."""
    from equiv.model.loading import load_saved
    from equiv.steering.files.saving import load

    _check_target(to, output)
    if to == PEFT and base is None:
        raise ArgumentError(
            "--to peft needs --base: steering becomes weights of a model."
        )
    model = None if base is None else load_saved(base)
    _export(load(steering, model=model), output, to, model, drop_layer0)
    typer.echo(f"Wrote {output}")


def _check_target(to: str, output: Path) -> None:
    """Complain before the work about what cannot be written."""
    from equiv.steering.formats import FORMATS

    known = (OWN, PEFT, *FORMATS)
    if to not in known:
        raise ArgumentError(f"Expected --to in {', '.join(known)}, got {to!r}.")
    if not output.parent.is_dir():
        raise FileFormatError(f"Cannot write {output}: no folder {output.parent}.")


def _export(
    steering: object, output: Path, to: str, model: object, drop_layer0: bool = False
) -> None:
    from equiv.steering.formats import FORMATS

    if to == PEFT:
        from equiv.steering.weights.to_weights import to_weights

        to_weights(steering, model).save_peft(output)  # pyright: ignore
        return
    if to == OWN:
        raise ArgumentError(f"{output}: the steering is in a file of equiv already.")
    family = getattr(getattr(model, "config", None), "model_type", None)
    options = {"drop_layer0": drop_layer0} if to == "gguf" else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        FORMATS[to].write(steering, output, family=family, **options)
    for warning in said:
        typer.echo(f"Note: {warning.message}", err=True)
