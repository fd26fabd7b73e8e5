"""docs/findings.md: what testing the theory found, written from results.

    equiv claims --json benchmarks/results/claims.json
    python -m benchmarks.findings

The words are in `templates/findings/`, one file per section, without a number in them:
those come from the results. A section names the claims that it rests on, as
`holds(18)` or `fails_as_written(18)`, and nothing is written if one was judged
otherwise. A section that rests on a claim not among the results is left out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.findings_pictures import PICTURES, drawn
from benchmarks.findings_results import AbsentError, Results, read
from equiv.report.numbers import between, counted, figure, percent
from equiv.report.prose import joined
from equiv.theory.text import shown
from equiv.theory.values import Kind, sentence

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "findings.md"
FOLDER = ROOT / "docs" / "findings"
TEMPLATES = ROOT / "benchmarks" / "templates" / "findings"

# So many conditions are named in the table of all claims.
CONDITIONS = 3
# The sections of each part of the document, in their order.
PARTS: Mapping[str, Sequence[str]] = {
    "opening": (
        "opening_equivalence",
        "opening_linear",
        "opening_reach",
        "opening_oracle",
        "opening_sites",
        "opening_joint",
    ),
    "wrong": (
        "projector",
        "unreachable",
        "site_order",
        "linear_error",
        "fixed_vectors",
        "constraint",
    ),
    "seen": ("orders", "reach", "coverage", "sites", "oracles", "joint", "methods"),
}


def command(*numbers: int) -> str:
    """What to type to see claims and their figures.

    Example:
        >>> command(18), command(18, 19)
        ('`equiv claims 18 --explain`', '`equiv claims 18 19 --explain`')
    """
    return f"`equiv claims {' '.join(map(str, numbers))} --explain`"


def picture(name: str, says: str) -> str:
    """A picture of docs/findings/, with words for those who do not see it."""
    if name not in PICTURES:
        raise KeyError(name)
    return f"![{says}]({FOLDER.name}/{name}.svg)"


def cell(text: str) -> str:
    """Text that a cell of a table can hold: one line, its bars escaped."""
    return " ".join(text.replace("|", r"\|").split())


def figures(values: Mapping[str, Any]) -> str:
    """Names and figures in one line.

    Example:
        >>> figures({"x′": 1.0, "y": [1.0, -2.0]})
        'x′ = 1; y = (1, −2)'
    """
    return "; ".join(f"{name} = {vector(value)}" for name, value in values.items())


def conditions(entry: Mapping[str, Any]) -> str:
    """What a verdict rests on, the same for several updates once; some of it if long.

    Example:
        >>> conditions({"kind": "exact", "conditions": {"full rank": True, "d": 8}})
        'full rank: yes; d: 8'
    """
    found = entry["conditions"]
    tables = found.values() if entry["kind"] == Kind.MODEL else [found]
    named = {
        f"{name}: {shown(value)}": None
        for table in tables
        for name, value in table.items()
    }
    more = len(named) - CONDITIONS
    return "; ".join([*named][:CONDITIONS]) + (f"; and {more} more" * (more > 0))


def vector(value: Any) -> str:
    """A figure, a list of them in brackets, or a mean over seeds with its interval.

    Example:
        >>> vector({"mean": 0.5, "95 % interval": [0.4, 0.6], "n": 5})
        '0.5 (95 % interval 0.4 to 0.6, n = 5)'
    """
    if isinstance(value, Mapping) and "95 % interval" in value:
        low, high = (figure(end, 2) for end in value["95 % interval"])
        centre = figure(value["mean"])
        return f"{centre} (95 % interval {low} to {high}, n = {value['n']})"
    text = shown(value)
    return f"({text})" if isinstance(value, list) else text


def orders(found: Iterable[float]) -> str:
    """From the lowest order to the highest, or one where they look the same.

    Example:
        >>> orders([2.001, 1.999]), orders([2.001, 1.98])
        ('2.00', '1.98 to 2.00')
    """
    low, high = f"{min(values := list(found)):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def flowing(section: str) -> str:
    """A section with each paragraph on one line, figures kept with their units."""
    parts = [part.strip() for part in section.split("\n\n") if part.strip()]
    flat = [part if part[0] == "|" else " ".join(part.split()) for part in parts]
    return joined("\n\n".join(flat))


def environment(results: Results) -> jinja2.Environment:
    """Templates, with the results and their figures as words."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.tests["contains"] = lambda text, part: part in text
    made.filters |= {
        "figure": figure,
        "percent": percent,
        "order": "{:.2f}".format,
        "orders": orders,
        "between": lambda ends: between(*ends),
        "span": lambda ends: " to ".join(figure(end, 2) for end in ends),
        "counted": counted,
        "vector": vector,
        "figures": figures,
        "conditions": conditions,
        "sentence": sentence,
        "cell": cell,
    }
    made.globals |= {
        "claim": results.claim,
        "holds": results.holds,
        "fails": results.fails,
        "fails_as_written": results.fails_as_written,
        "command": command,
        "picture": picture,
        "study": results.study,
    }
    return made


def document(results: Results) -> str:
    """The text of docs/findings.md.

    Raises:
        ContradictionError: If words say of a claim what the results do not.
    """
    templates = environment(results)
    parts = {part: list(_written(templates, names)) for part, names in PARTS.items()}
    whole = templates.get_template("findings.md.j2")
    return whole.render(
        parts,
        claims=results.claims,
        updates=results.updates,
        others=list(results.listed()),
        answer=results.answer,
    )


def _written(templates: jinja2.Environment, names: Sequence[str]) -> Iterator[str]:
    """The sections whose claims are there."""
    for name in names:
        try:
            yield flowing(templates.get_template(f"{name}.md.j2").render())
        except AbsentError:
            continue


def main() -> None:
    results = read()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in drawn(results).items():
        (FOLDER / f"{name}.svg").write_text(text)
    DOCUMENT.write_text(document(results))


if __name__ == "__main__":
    main()
