"""An update in a few lines: which blocks and kinds of weight it touches, how much."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from equiv.update.entries import Deferred, norm_at, shape_at
from equiv.update.low_rank import Delta, LowRank
from equiv.update.spectra import singular_values, stable_rank


@dataclass(frozen=True)
class Part:
    """One kind of weight in an update, over all blocks.

    Attributes:
        kind: The name inside its block ("self_attn.q_proj"; a bias says so), or the
            whole name of a parameter outside the blocks.
        layers: The blocks it is in; empty outside them.
        count: How many parameters.
        ranks: Ranks of the factors that are there, in ascending order; none if dense.
        dense: How many are dense.
        norm: Frobenius norm over all of them.
        base_norm: That of the weights they belong to, where known.
        stable_ranks: Smallest and largest ‖Δ‖²_F / ‖Δ‖²₂ of their matrices, if asked.
    """

    kind: str
    layers: tuple[int, ...]
    count: int
    ranks: tuple[int, ...]
    dense: int
    norm: float
    base_norm: float | None
    stable_ranks: tuple[float, float] | None


@dataclass(frozen=True)
class Summary:
    """What an update touches; printing it shows a table.

    Attributes:
        source: Where the update came from.
        parts: One entry per kind of weight, in the order of the model.
        norm: Frobenius norm of the update.
        base_norm: That of the weights it touches, where known.
    """

    source: str
    parts: tuple[Part, ...]
    norm: float
    base_norm: float | None

    def __str__(self) -> str:
        count = sum(part.count for part in self.parts)
        layers = sorted({layer for part in self.parts for layer in part.layers})
        said = f"{count} parameter{'s' if count > 1 else ''}"
        if layers:
            said += f", block{'s' if len(layers) > 1 else ''} {spans(layers)}"
        said += f", norm {self.norm:.3g}"
        if self.base_norm:
            said += f" ({_percent(self.norm / self.base_norm)} of the weights it moves)"
        return f"{self.source}\n{said}\n\n" + _aligned(_rows(self))


def summary_of(
    source: str,
    deltas: Mapping[str, Delta],
    base_norms: Mapping[str, float],
    *,
    spectra: bool = False,
) -> Summary:
    """The summary of an update's entries; stable ranks need an SVD of each matrix."""
    kinds: dict[str, list[str]] = {}
    for name in deltas:
        kinds.setdefault(kind_of(name), []).append(name)
    parts = [
        _part(kind, names, deltas, base_norms, spectra) for kind, names in kinds.items()
    ]
    norm = math.hypot(*(part.norm for part in parts))
    return Summary(source, tuple(parts), norm, _base_norm(deltas, base_norms))


def _part(
    kind: str,
    names: Sequence[str],
    deltas: Mapping[str, Delta],
    base_norms: Mapping[str, float],
    spectra: bool,
) -> Part:
    layers = {layer for name in names if (layer := _block_of(name)) is not None}
    ranks = [rank for name in names if (rank := _rank(deltas, name)) is not None]
    stable = [
        stable_rank(singular_values(deltas[name]))
        for name in names
        if spectra and len(shape_at(deltas, name)) == 2
    ]
    return Part(
        kind=kind,
        layers=tuple(sorted(layers)),
        count=len(names),
        ranks=tuple(sorted(set(ranks))),
        dense=len(names) - len(ranks),
        norm=math.hypot(*(norm_at(deltas, name) for name in names)),
        base_norm=_base_norm(names, base_norms),
        stable_ranks=(min(stable), max(stable)) if stable else None,
    )


def _rank(deltas: Mapping[str, Delta], name: str) -> int | None:
    """Rank of an entry in factors; what is on disk is dense."""
    if isinstance(deltas, Deferred) and deltas.entries[name].norm is not None:
        return None
    delta = deltas[name]
    return delta.left.shape[1] if isinstance(delta, LowRank) else None


def _base_norm(
    names: Sequence[str] | Mapping[str, Delta], norms: Mapping[str, float]
) -> float | None:
    if not all(name in norms for name in names):
        return None
    return math.hypot(*(norms[name] for name in names))


def layer_of(name: str) -> int | None:
    """The block's index in a parameter's name: the first part that is a number."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _block_of(name: str) -> int | None:
    """The block's index; a number that no name stands before is no block's."""
    return None if name.partition(".")[0].isdigit() else layer_of(name)


def kind_of(name: str) -> str:
    """A parameter's name without its block and the word weight.

    Example:
        >>> kind_of("model.layers.3.mlp.experts.0.up_proj.weight")
        'mlp.experts.*.up_proj'
        >>> [kind_of(n) for n in ("lm_head.weight", "layers.0.attn.bias", "0.weight")]
        ['lm_head', 'attn.bias', '0']
    """
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    if block:
        parts = ["*" if part.isdigit() else part for part in parts[block + 1 :]]
    if len(parts) > 1 and parts[-1] == "weight":
        parts.pop()
    return ".".join(parts)


def spans(layers: Sequence[int]) -> str:
    """Ascending numbers with their runs drawn together.

    Example:
        >>> spans([0, 1, 2, 5, 7, 8])
        '0–2, 5, 7–8'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def _rows(summary: Summary) -> list[list[str]]:
    """Head and body of the table; columns that would be empty are left out."""
    relative = any(part.base_norm for part in summary.parts)
    stable = any(part.stable_ranks for part in summary.parts)
    head = ["weight", "blocks", "count", "form", "norm", "share of norm²"]
    head += ["relative norm"] * relative + ["stable rank"] * stable
    rows = [head]
    for part in summary.parts:
        share = (part.norm / summary.norm) ** 2 if summary.norm else 0.0
        row = [part.kind, spans(part.layers) or "–", str(part.count), _form(part)]
        row += [f"{part.norm:.3g}", _percent(share)]
        if relative:
            row += [_percent(part.norm / part.base_norm) if part.base_norm else "–"]
        if stable:
            row += [_range(part.stable_ranks)]
        rows.append(row)
    return rows


def _form(part: Part) -> str:
    ranks = f"rank {spans(part.ranks)}" if part.ranks else ""
    dense = "" if not part.dense else "dense"
    return " and ".join(word for word in (ranks, dense) if word)


def _range(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return "–"
    low, high = (f"{end:.1f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    digits = 0 if share >= 0.1 else 1 if share >= 0.001 else 2
    return f"{100 * share:.{digits}f} %"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, 1, 3}  # words; the rest are numbers
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
