"""How a report calls things: places, sizes, inputs.

A plain module is one stage without blocks. It has no layers to name, and its inputs
are rows rather than tokens when each of them is one.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from equiv.model.sites import FLOW, LOGITS, OUTPUT, Site
from equiv.report.numbers import counted, percent, scale
from equiv.report.values import FitRow, Radius, Row, Scope, Verdict
from equiv.steering.fits.moments import ENOUGH_TOKENS

if TYPE_CHECKING:
    from equiv.report.report import Report

_KINDS = {
    "random": "random inputs",
    "samples": "samples of both models",
    "texts": "texts",
    "given": "given inputs",
}
ENDS = (LOGITS, OUTPUT)


def is_plain(report: "Report") -> bool:
    """Whether the model has no blocks: then even its output belongs to layer 0."""
    return all(row.layer == 0 for row in report.rows)


def has_midpoint(report: "Report") -> bool:
    """Whether the derivative was taken at the midpoint as well."""
    return report.subject.at != "base"


def moves_only_output(report: "Report") -> bool:
    """Whether the update moves the output and no activation that was measured."""
    rows = [row for row in report.rows if row.scope is Scope.PROPAGATED]
    moved = {
        row.site in ENDS
        for row in rows
        if row.order.verdict is not Verdict.NOT_APPLICABLE
    }
    # Fits see every layer and the block's output, also where those are no rows.
    fitted = any(fit.misfit is not None for fit in report.fits)
    return moved == {True} and not fitted


def end(report: "Report") -> str:
    """What comes after the last site."""
    return "output" if is_plain(report) else "head"


def place(report: "Report", row: Row) -> str:
    """A row's name: `layer 3, mlp_out, local`, `logits (propagated)`."""
    if is_plain(report) or row.site in ENDS:
        return f"{row.site} ({row.scope})"
    return f"layer {row.layer}, {row.site}, {row.scope}"


def at(site: str) -> str:
    """Where a steer reads and writes, in words.

    Example:
        >>> at("mlp_out"), at("resid_mid->block_out")
        ('at mlp_out', 'reading resid_mid, writing block_out')
    """
    pair = Site(site)
    if pair.read == pair.write:
        return f"at {pair.write}"
    return f"reading {pair.read}, writing {pair.write}"


def in_order(sites: Iterable[str]) -> list[str]:
    """Sites, each once, in the order in which a block computes what they write.

    Example:
        >>> in_order(["mlp_out", "block_out", "mlp_out", "cross_out"])
        ['cross_out', 'mlp_out', 'block_out']
    """
    found = dict.fromkeys(sites)
    if not all(Site(site).write in FLOW for site in found):
        return list(found)
    return sorted(found, key=lambda site: FLOW.index(Site(site).write))


def differ(sites: Iterable[str]) -> bool:
    """Whether any steer among these writes another site than it reads."""
    return any(Site(site).read != Site(site).write for site in sites)


def heads(rows: str, sites: Sequence[str]) -> list[str]:
    r"""Heads of a table with a column per site; `rows` is what its rows are.

    Example:
        >>> heads("layer", ["mlp_out", "block_out"])
        ['layer', 'mlp_out', 'block_out']
        >>> heads("layer", ["resid_mid->block_out"])
        ['layer   reads\n       writes', 'resid_mid\nblock_out']
    """
    if not differ(sites):
        return [rows, *sites]
    pairs = [Site(site) for site in sites]
    return [
        f"{rows}   reads\n{' ' * len(rows)}  writes",
        *(f"{pair.read}\n{pair.write}" for pair in pairs),
    ]


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them.

    Example:
        >>> listed(["attn_out"]), listed(["a", "b", "c"])
        ('attn_out', 'a, b and c')
    """
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last


def everywhere(report: "Report") -> str:
    """Where every row is."""
    return "every site" if is_plain(report) else "every layer and site"


def unit(report: "Report") -> str:
    """What one entry of the inputs is called."""
    subject = report.subject
    rows = is_plain(report) and subject.tokens == subject.sequences
    return "row" if rows else "token"


def few(report: "Report", fit: FitRow) -> str:
    """`few tokens` where there are few per dimension of a map; a vector needs none."""
    scarce = fit.form != "vector" and fit.tokens_per_dimension < ENOUGH_TOKENS
    return f"few {unit(report)}s" if scarce else ""


def held_out(report: "Report") -> str:
    """How many sequences no fit has seen, in words."""
    noun = "row" if unit(report) == "row" else "sequence"
    count = report.subject.held_out_sequences
    return f"{count:,} held-out {noun}{'' if count == 1 else 's'}"


def inputs(report: "Report") -> str:
    """What was measured on, in words."""
    subject = report.subject
    kind = _KINDS.get(subject.inputs, subject.inputs)
    size = counted(subject.tokens, unit(report))
    if unit(report) == "token":
        size += f" in {counted(subject.sequences, 'sequence')}"
    held = subject.held_out_sequences
    return f"{kind}: {size}" + (f", {held:,} held out" if held else "")


def subject(report: "Report") -> str:
    """Model, update and inputs in one line."""
    s = report.subject
    size = "one stage" if is_plain(report) else counted(s.num_layers, "layer")
    if s.encoder_layers:
        last = s.num_layers - 1
        size += f" ({_span(0, s.encoder_layers - 1)} the encoder's, "
        size += f"{_span(s.encoder_layers, last)} the decoder's)"
    return (
        f"{s.model}, {s.num_parameters:,} parameters, {size} · "
        f"{s.update}, {percent(s.update_relative_norm)} of the weights' norm · "
        f"{inputs(report)}"
    )


def _span(first: int, last: int) -> str:
    return f"{first} to {last}" if last > first else str(first)


def reach(value: Radius | None) -> str:
    """A radius as a figure: `0.36`, `≥ 4`."""
    if value is None:
        return "–"
    return f"{'≥ ' if value.at_least else ''}{scale(value.value)}"


def radius(value: Radius | None) -> str:
    """A radius in words: `t = 0.36`, `t ≥ 4`."""
    if value is None:
        return "not measured"
    return f"t {'≥' if value.at_least else '='} {scale(value.value)}"
