"""docs/findings.md says what the results say, and refuses to say anything else."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from jinja2 import Environment, nodes

import equiv
from benchmarks.findings import DOCUMENT, FOLDER, PARTS, TEMPLATES, document
from benchmarks.findings_pictures import drawn
from benchmarks.findings_results import (
    AbsentError,
    ContradictionError,
    Results,
    read,
)
from equiv.cli.claims import app

# What names a claim in a template. Numbers in it are those of claims.
NAMING = ("claim", "holds", "fails", "fails_as_written", "command")
SECTIONS = sorted(TEMPLATES.glob("*.md.j2"))


def parsed(template: Path) -> nodes.Template:
    return Environment(trim_blocks=True).parse(template.read_text())


def named(template: Path, *functions: str) -> list[tuple[str, int]]:
    """What a template says of claims: function and number."""
    return [
        (call.node.name, argument.value)
        for call in parsed(template).find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name in functions
        for argument in call.args
        if isinstance(argument, nodes.Const)
    ]


def test_the_document_is_made_from_the_results() -> None:
    assert DOCUMENT.read_text() == document(read())


def test_the_pictures_are_drawn_from_the_results() -> None:
    files = {path.stem: path.read_text() for path in FOLDER.iterdir()}
    assert files == drawn(read())
    shown = re.findall(r"!\[.+?\]\(findings/(\w+)\.svg\)", DOCUMENT.read_text())
    assert sorted(shown) == sorted(files)


def test_results_are_of_the_claims_that_are_shipped() -> None:
    known = {claim.id: claim for claim in equiv.theory.shipped()}
    found = read().claims
    assert found.keys() == known.keys()
    for number, entry in found.items():
        for field in ("title", "formula", "assumptions", "source", "falsified_by"):
            assert entry[field] == getattr(known[number], field), number


def test_nothing_in_the_results_was_left_undecided_by_an_error() -> None:
    says = {number: entry["says"] for number, entry in read().claims.items()}
    assert not [number for number, text in says.items() if "not decided" in text]


@pytest.mark.parametrize("template", SECTIONS, ids=lambda path: path.name)
def test_a_template_has_no_number_of_its_own(template: Path) -> None:
    text = re.sub(
        r"\{\{.*?\}\}|\{%.*?%\}|`[^`]*`", "", template.read_text(), flags=re.S
    )
    assert not re.findall(r"\S*\d\S*", re.sub(r"float\d\d", "", text))
    tree = parsed(template)
    allowed = [
        inner
        for kind in (nodes.Getitem, nodes.Filter)
        for found in tree.find_all(kind)
        for inner in _constants(found)
    ]
    allowed += [
        inner
        for call in tree.find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name in NAMING
        for inner in call.args
    ]
    numbers = [
        constant
        for constant in tree.find_all(nodes.Const)
        if isinstance(constant.value, (int, float))
        and not isinstance(constant.value, bool)
    ]
    assert not [c.value for c in numbers if not any(c is known for known in allowed)]


def _constants(found: nodes.Getitem | nodes.Filter) -> list[nodes.Node]:
    """Positions in lists, and how many digits are shown."""
    if isinstance(found, nodes.Getitem):
        return [found.arg, *found.arg.find_all(nodes.Const)]
    return [word.value for word in found.kwargs if word.key == "digits"]


def test_every_template_is_in_the_document() -> None:
    listed = {f"{name}.md.j2" for names in PARTS.values() for name in names}
    assert {path.name for path in SECTIONS} == listed | {"findings.md.j2"}


def test_every_section_is_in_the_document() -> None:
    headings = [
        heading
        for path in SECTIONS
        for heading in re.findall(r"^#+ .+$", path.read_text(), re.MULTILINE)
    ]
    assert len(headings) > len(PARTS["wrong"]) + len(PARTS["seen"])
    text = DOCUMENT.read_text()
    assert not [heading for heading in headings if heading not in text]
    bullets = text.split("## Statements")[0].count("\n- ")
    assert bullets == len(PARTS["opening"])


JUDGING = [
    (template.name, function, number)
    for template in SECTIONS
    for function, number in named(template, "holds", "fails", "fails_as_written")
]


@pytest.mark.parametrize(("template", "function", "number"), JUDGING)
def test_words_that_the_results_contradict_are_refused(
    template: str, function: str, number: int
) -> None:
    found = read()
    changed = copy.deepcopy(found)
    entry = changed.claim(number)
    where = entry["as_written"] if function == "fails_as_written" else entry
    assert isinstance(where, dict)
    where["verdict"] = "holds" if function != "holds" else "inconclusive"
    with pytest.raises(ContradictionError, match=f"claim {number}"):
        document(changed)


@pytest.mark.parametrize("part", [name for names in PARTS.values() for name in names])
def test_a_section_says_which_claims_it_rests_on_and_goes_with_them(part: str) -> None:
    template = TEMPLATES / f"{part}.md.j2"
    numbers = [number for _, number in named(template, *NAMING[:-1])]
    shown = {number for _, number in named(template, "command")}
    assert numbers and shown <= set(numbers) and shown
    found = read()
    claims = {n: e for n, e in found.claims.items() if n != numbers[0]}
    without = Results(found.updates, found.answer, claims)
    with pytest.raises(AbsentError):
        without.claim(numbers[0])
    text = document(without)
    heading = re.search(r"^### .+$", template.read_text(), re.M)
    assert heading is None or heading[0] not in text
    assert all(line.strip() for line in text.splitlines() if line.startswith("-"))


def test_commands_can_be_typed() -> None:
    group: Any = typer.main.get_command(app)
    lines = set(re.findall(r"`(equiv claims[^`]*)`", DOCUMENT.read_text()))
    assert len(lines) > len(read().claims)
    known = {str(claim.id) for claim in equiv.theory.shipped()}
    for line in lines:
        _, name, *words = shlex.split(line)
        context = group.commands[name].make_context(name, words)
        assert set(context.params["what"] or []) <= known
