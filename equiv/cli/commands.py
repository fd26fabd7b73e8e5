"""The commands themselves, as typer sees them."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from equiv.cli.writing import check_outputs, write_outputs

app = typer.Typer(
    help=(
        "How far can moving a model's activations stand in for updating its weights?"
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write what was found as JSON."),
]
HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write what was found as one HTML page."
    ),
]
FieldName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which field of JSONL is the text or conversation. Without it the first "
        "there is of text, question, messages and prompt.",
    ),
]
_STATUS = (
    "Exit status: 0 when what was asked for is met, 1 when it is not met or could not "
    "be decided, 2 for wrong usage or data, 3 for an internal error."
)
_SAME_STATUS = (
    "Exit status: 0 when the two are the same, 1 when they are not, 2 for wrong usage "
    "or data, 3 for an internal error."
)


@app.command(epilog=_STATUS)
def check(
    base: Annotated[str, typer.Argument(help="The base model: a path or hub id.")],
    updates: Annotated[
        list[str],
        typer.Argument(
            metavar="UPDATE...",
            help="The update: a tuned model or an adapter, path or hub id, or a "
            "safetensors file of differences. Several get a report each, in files "
            "with -1, -2 … in their names; the exit status is the worst.",
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts to measure on: one per line, or JSONL with a `text` (or "
            "`question`) field, for an encoder–decoder with a `target` beside it; or "
            '"samples". Without it, random token ids: good for '
            "the calculus only.",
        ),
    ] = None,
    field: FieldName = None,
    max_remainder: Annotated[
        float | None,
        typer.Option(help="Ask for a relative remainder of at most this everywhere."),
    ] = None,
    min_recovered: Annotated[
        float | None,
        typer.Option(
            help="Ask that steering recovers at least this share, up to 1, of the "
            "behaviour. Needs --inputs."
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE",
            help="Where to measure and steer, or read->write; may be given several "
            "times. Without it attn_out, mlp_in, mlp_out and block_out.",
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the affine steering.")] = 8,
    limit: Annotated[
        int, typer.Option(min=1, help="Use at most this many texts, the first ones.")
    ] = 512,
    at: Annotated[
        str, typer.Option(help='Where to linearise: "both", "base" or "midpoint".')
    ] = "both",
    derivative: Annotated[
        str,
        typer.Option(
            help='"forward": exact; "central": finite differences, for models with an '
            "operation that cannot be differentiated."
        ),
    ] = "forward",
    seed: Annotated[int, typer.Option(help="Draws the held-out quarter.")] = 0,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure how far steering can stand in for an update of a model.

    Without a threshold the derivative must be right (second order) at every layer and
    site; thresholds ask for more.
    """
    from equiv.checking import check as check_updates
    from equiv.cli import check as checked
    from equiv.cli.loading import check_field, load_tokenizer, read_texts
    from equiv.model.loading import load_saved
    from equiv.model.sites import SITES

    named, count = checked.by_name(updates), len(updates)
    check_outputs(*checked.files_of(json, count), *checked.files_of(html, count))
    checked.check_share(min_recovered, inputs)
    check_field(field, inputs)
    texts = None
    if inputs is not None and inputs != "samples":
        texts = read_texts(Path(inputs), limit, field)
    model = load_saved(base)
    tokenizer = None if texts is None else load_tokenizer(base)
    found = check_updates(
        model,
        named,
        inputs if texts is None else texts,
        sites=tuple(site) if site else SITES,
        tokenizer=tokenizer,
        max_remainder=max_remainder,
        rank=rank,
        at=at,
        derivative=derivative,
        seed=seed,
        progress=True,
    )
    reports = found if isinstance(found, dict) else {base: found}
    checked.show(reports, json, html)
    raise typer.Exit(0 if checked.met(reports, min_recovered) else 1)


@app.command(epilog=_SAME_STATUS)
def compare(
    expected: Annotated[
        str,
        typer.Argument(
            help="What it has to be: a model, path or hub id; or a model with an "
            "update, as BASE+UPDATE."
        ),
    ],
    actual: Annotated[
        str,
        typer.Argument(
            help="What is tested: a model, path or hub id, or a completions endpoint "
            "as URL#MODEL, such as http://127.0.0.1:8000/v1#mine."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --update: say also which part of an update of this model "
            "ACTUAL really got. The exit status does not depend on it.",
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            metavar="UPDATE",
            help="The update of --base, as for `equiv check`.",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts to compare outputs on, for the tokenizer beside EXPECTED: one "
            "per line, or JSONL with a `text` (or `question`) field. Without it, two "
            "models are compared by their weights alone, an endpoint on random token "
            "ids.",
        ),
    ] = None,
    field: FieldName = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            help="Relative tolerance. Without it, what rounding explains is tolerated."
        ),
    ] = None,
    atol: Annotated[
        float | None, typer.Option(help="Absolute tolerance, beside --rtol.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Use at most this many texts, the first ones.")
    ] = 512,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Tell whether one model is another, to rounding, and if not, what differs."""
    from equiv.cli.compare import compared, show
    from equiv.gate.files import write_json
    from equiv.gate.html import write_html

    check_outputs(json, html)
    agreement, diagnosis = compared(
        expected, actual, base, update, inputs, limit, rtol, atol, field
    )
    show(agreement, diagnosis)
    both = {"agreement": agreement, "diagnosis": diagnosis}
    write_outputs(json, partial(write_json, **both), html, partial(write_html, **both))
    raise typer.Exit(0 if agreement.same else 1)


@app.command()
def demo(json: JsonFile = None, html: HtmlFile = None) -> None:
    """Measure a small shipped Llama and two real fine-tunes of it, full and LoRA."""
    from equiv.cli.demo import run

    check_outputs(json, html)
    report = run()
    write_outputs(json, report.to_json, html, report.to_html)
