"""Renderings of a report: equal when read back, whole or absent, and of one mind."""

import dataclasses
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from gallery import NAMES, PAIRS, PLAIN, reports

import equiv
from equiv.behaviour.ladder import OFFSETS
from equiv.report import html, plot
from equiv.report.numbers import figure, percent
from equiv.report.prose import joined
from equiv.report.report import Report
from equiv.report.values import Scope
from equiv.testing.models import transformer
from equiv.writing import write_text


@pytest.mark.parametrize("name", NAMES)
def test_json_is_strict_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    reports()[name].to_json(path)
    assert Report.from_json(path) == reports()[name]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["answer"] == reports()[name].headline
    assert list(tmp_path.iterdir()) == [path]


def test_json_keeps_what_it_has_no_numbers_for(tmp_path: Path) -> None:
    report = reports()["module"]
    first = dataclasses.replace(
        report.rows[0], remainder=math.inf, norm_base=float("-inf")
    )
    odd = dataclasses.replace(report, rows=(first,))
    odd.to_json(tmp_path / "odd.json")
    assert Report.from_json(tmp_path / "odd.json") == odd


def test_a_file_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    path.write_text("what was here")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        reports()["llama"].to_json(path)
    assert path.read_text() == "what was here"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(equiv.ArgumentError, match="does not exist"):
        write_text(tmp_path / "no" / "file", "text")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: c.pop("format"), "no `format`"),
        (lambda c: c.update(format=99), "report format 99"),
        (lambda c: c.pop("rows"), "lacks 'rows'"),
        (lambda c: c.update(extra=1), "no field 'extra'"),
        (lambda c: c["rows"][0].update(layer="one"), "expected int"),
        (lambda c: c["rows"][0].update(scope="sideways"), "sideways"),
        (lambda c: c["subject"].pop("model"), "lacks 'model'"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, says: str) -> None:
    path = tmp_path / "report.json"
    reports()["module"].to_json(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(equiv.FileFormatError, match=re.escape(says)):
        Report.from_json(path)
    path.write_text("{")
    with pytest.raises(equiv.FileFormatError, match="is not JSON"):
        Report.from_json(path)
    with pytest.raises(equiv.FileFormatError, match="does not exist"):
        Report.from_json(tmp_path / "other.json")


class _Page(HTMLParser):
    """Tags that are opened and closed, ids, and whatever a browser would load."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data"):
                self.links.append(value or "")
        assert tag not in ("script", "link", "iframe", "img", "object")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole_and_self_contained(name: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    reports()[name].to_html(path)
    text = path.read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    inside = [link for link in page.links if not link.startswith("data:image/png;")]
    assert all(link.startswith("#") for link in inside)
    assert {link[1:] for link in inside} <= set(page.ids)
    for used in re.findall(r"url\(#([^)]+)\)", text):
        assert used in page.ids
    assert not re.search(r"@import|url\((?!#)", text)
    assert "None" not in text and "nan" not in text
    assert joined(reports()[name].headline) in unescape(text)
    again = tmp_path / "again.html"
    reports()[name].to_html(again)
    assert again.read_text() == text  # the same report makes the same page


def test_the_page_escapes_names(tmp_path: Path) -> None:
    report = reports()["module"]
    subject = dataclasses.replace(report.subject, update="<script>alert(1)</script>")
    page = tmp_path / "page.html"
    dataclasses.replace(report, subject=subject).to_html(page)
    assert "<script>" not in page.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_frame_has_every_row(name: str) -> None:
    frame = reports()[name].to_frame()
    rows = reports()[name].rows
    assert len(frame) == len(rows)
    assert list(frame["site"]) == [row.site for row in rows]
    assert list(frame["order_verdict"]) == [row.order.verdict.value for row in rows]
    kept = frame["remainder"].dropna()
    assert list(kept) == [r.remainder for r in rows if r.remainder is not None]


def test_every_table_becomes_a_frame() -> None:
    report = reports()["llama"]
    fits, steered = report.to_frame("fits"), report.to_frame("behaviour")
    assert list(fits["misfit_held_out"]) == [f.misfit_held_out for f in report.fits]
    assert list(steered["rung"]) == [b.rung for b in report.behaviour]
    assert len(report.to_frame("coverage")) == len(report.coverage)
    assert len(report.to_frame("spectra")) == len(report.spectra)
    with pytest.raises(equiv.ArgumentError, match="Expected `table` in rows, coverage"):
        report.to_frame("notes")


def test_the_picture_is_not_crushed_by_offsets_that_are_far_below() -> None:
    report = reports()["llama"]
    far = [
        dataclasses.replace(b, recovered=-40.0) if b.rung == OFFSETS else b
        for b in report.behaviour
    ]
    (axes,) = dataclasses.replace(report, behaviour=tuple(far)).plot().axes
    assert axes.get_ylim()[0] > -2
    assert [text.get_text() for text in axes.texts] == ["↓ −4000 %"] * 4


def test_what_is_read_and_what_is_written_stand_apart() -> None:
    """Two columns where they differ anywhere, else one; oracles read nothing."""
    for name in NAMES:
        for table in _tables(name):
            if "steering" in table[0] or "form" in table[0]:
                assert ("writes" in table[0]) == (name in PAIRS)
        first_lines = [line.split() for line in str(reports()[name]).splitlines()]
        assert any(line[:1] == ["writes"] for line in first_lines) == (name in PAIRS)
    (behaviour,) = (t for t in _tables("pairs") if "steering" in t[0])
    pairs = {tuple(row[:2]) for row in behaviour[2:] if row[2] == "affine r8"}
    assert pairs == {("resid_mid", "block_out"), ("block_out", "block_out")}
    oracles = [row[:2] for row in behaviour if row[2] == "exact oracle"]
    assert oracles == [["", "block_out"]]
    (axes,) = reports()["pairs"].plot().axes
    legend = axes.get_legend()
    assert legend is not None
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["resid_mid → block_out", "block_out"]
    lines = [
        c.lines[0].get_ydata()[-1]  # type: ignore[attr-defined]
        for c in axes.containers
        if c.get_label() in named
    ]
    assert lines[0] == lines[1]  # one oracle, in both columns


def test_prose_names_what_is_read_and_written() -> None:
    report = reports()["pairs"]
    only = [b for b in report.behaviour if b.site != "block_out"]
    said = str(dataclasses.replace(report, behaviour=tuple(only)))
    assert "reading resid_mid, writing block_out" in " ".join(said.split())


def test_the_ladder_has_a_line_per_site() -> None:
    report = reports()["llama"]
    axes = report.plot().axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == [
        "attn_out",
        "mlp_in",
        "mlp_out",
        "block_out",
    ]
    ticks = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
    assert ticks == [
        "unsteered",
        "vector",
        "affine r1",
        "affine r8",
        "affine full",
        "first-order oracle",
        "midpoint oracle",
        "exact oracle",
        "simultaneous offsets",
    ]
    rows = [b for b in report.behaviour if b.site == "block_out" and b.layers == "all"]
    line = axes.containers[-2].lines[0]  # type: ignore[attr-defined]
    assert axes.containers[-2].get_label() == "block_out"
    assert list(line.get_ydata())[1:] == [row.recovered for row in rows[:-1]]
    added = axes.containers[-1].lines[0]  # type: ignore[attr-defined]
    assert list(added.get_ydata()) == [rows[-1].recovered]
    with pytest.raises(equiv.ArgumentError, match="no behaviour to plot"):
        reports()["random"].plot()


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_the_rows_figures(name: str) -> None:
    report = reports()[name]
    texts = {t.get_text() for axes in plot.heat_map(report).axes for t in axes.texts}
    shown = [r for r in report.rows if r.scope is Scope.PROPAGATED]
    for row in shown:
        if row.remainder is not None:
            assert figure(row.remainder, 2) in texts
    curves = plot.taylor(report).axes
    assert curves and any(axes.lines for axes in curves)


def test_an_exact_remainder_is_drawn_as_such() -> None:
    """Nothing above rounding: a panel that says so, and no warning of empty axes."""
    (axes,) = plot.taylor(reports()["head"]).axes
    assert "zero to rounding" in {text.get_text() for text in axes.texts}
    assert axes.get_xlim()[0] < 2**-9 and axes.get_xlim()[1] < 2
    assert 'id="taylor-' in html.to_html(reports()["head"])


def test_pictures_name_their_layers() -> None:
    (figure_legend,) = plot.taylor(reports()["llama"]).legends
    named = [text.get_text() for text in figure_legend.get_texts()]
    assert named == ["from the base", "from the midpoint", "layer 0", "layer 1"]
    (figure_legend,) = plot.taylor(reports()["part"]).legends
    named = [text.get_text() for text in figure_legend.get_texts()]
    assert named == ["from the base", "layer 1"]
    drawn = [
        line for axes in plot.taylor(reports()["part"]).axes for line in axes.lines
    ]
    assert {line.get_linestyle() for line in drawn} == {"-", ":"}
    for name in NAMES:
        for axes in plot.heat_map(reports()[name]).axes:
            assert axes.get_ylabel() == ("site" if name in PLAIN else "layer")
            for site in (label.get_text() for label in axes.get_xticklabels()):
                assert site in {row.site for row in reports()[name].rows}


def _tables(name: str) -> list[list[list[str]]]:
    """Cells of every table of a page, row by row, heads first."""
    found = []
    for table in re.findall(
        r"<table>(.*?)</table>", html.to_html(reports()[name]), re.S
    ):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
        cells = [re.findall(r"<t[hd](.*?)>(.*?)</t[hd]>", row, re.S) for row in rows]
        wide = [
            sum(int((re.findall(r'colspan="(\d)"', a) or ["1"])[0]) for a, _ in row)
            for row in cells
        ]
        tall = sum("rowspan" in a for a, _ in cells[0])
        assert len(set(wide[1 + bool(tall) :])) == 1
        assert wide[0] == wide[-1] and (not tall or wide[1] == wide[0] - tall)
        found.append([[content for _, content in row] for row in cells])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_tables_have_a_name_for_every_column(name: str) -> None:
    for table in _tables(name):
        heads = table[0] + (table[1] if "from the base" in table[0] else [])
        assert all(heads)
        assert not any("predicted" in head for head in heads)
        assert ("layer" in heads or "layers" in heads) == (name not in PLAIN)
        assert ("from the midpoint" in heads) == (
            "from the base" in heads and name != "part"
        )
    page = html.to_html(reports()[name])
    assert ("passes through the rest of the block" in page) == (
        bool(reports()[name].behaviour) and name not in (*PLAIN, "pairs")
    )
    assert ("midpoint" in page) == (name != "part")
    assert ("95&nbsp;%<br>interval" in page) == any(
        row.recovered_low is not None for row in reports()[name].behaviour
    )


def test_no_vector_is_said_to_have_few_tokens() -> None:
    (fits,) = (t for t in _tables("llama") if "form" in t[0])
    verdicts = {row[2]: row[-1] for row in fits[1:]}
    assert verdicts["vector"] == "measured" and verdicts["affine r8"] == "few tokens"
    (fits,) = (t for t in _tables("head") if "form" in t[0])
    assert {row[-1] for row in fits[1:]} == {"no shift"}


def test_sizes_are_shown_per_layer() -> None:
    report = reports()["llama"]
    (table,) = (t for t in _tables("llama") if "adds" in t[0])
    assert len(table) == 1 + len(report.spectra)
    parts = report.contributions
    assert parts is not None
    for cells, spectrum in zip(table[1:], report.spectra, strict=True):
        assert cells[:3] == [
            str(spectrum.layer),
            percent(parts.share(spectrum.layer)),
            spectrum.reads,
        ]
        assert cells[3] == figure(spectrum.output_vector, 2)
        assert cells[4] == figure(spectrum.output_affine[0], 2)
    said = " ".join(str(report).split())
    assert "effect on the output that is left by steering" in said
    assert "adds" not in str(reports()["random"])


def test_pages_need_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in ("jinja2", "pandas", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: html.write_html(reports()["llama"], tmp_path / "x.html"),
        reports()["llama"].to_frame,
        reports()["llama"].plot,
    ):
        with pytest.raises(equiv.MissingExtraError, match=r"equiv\[report\]"):
            call()
    assert not list(tmp_path.iterdir())


def test_the_loss_is_shown_where_there_are_labels() -> None:
    model = transformer("llama", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    ids = torch.randint(3, 32, (16, 9), generator=torch.Generator().manual_seed(0))
    report = equiv.check(model, update, {"input_ids": ids, "labels": ids})
    none = next(b for b in report.behaviour if b.rung == "unsteered")
    assert none.loss is not None and none.loss_tuned is not None
    said = f"Loss on the labels: {figure(none.loss)} unsteered, "
    assert said in " ".join(str(report).split())
    page = html.to_html(report)
    assert f"<td>{figure(none.loss)}</td>" in page
    assert f"loss on the labels is {figure(none.loss_tuned)} nats" in page
    plain = html.to_html(equiv.check(model, update, ids))
    assert "loss" not in plain.split("<h2>Behaviour</h2>")[1]
