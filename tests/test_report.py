"""Renderings of a report: equal when read back, whole or absent, and of one mind."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import equiv
from equiv.report import html, plot
from equiv.report.files import write_text
from equiv.report.numbers import figure, percent
from equiv.report.report import Report
from equiv.report.text import _percentage
from equiv.report.values import Scope
from equiv.testing.models import mlp, transformer


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    ids = torch.randint(3, 32, (12, 9), generator=torch.Generator().manual_seed(0))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    llama = transformer("llama", seed=1, dtype=torch.float32)
    bert = transformer("bert", seed=1, dtype=torch.float32)
    net = mlp((4, 8, 8, 3), dtype=torch.float32)

    def update(model: torch.nn.Module) -> equiv.Update:
        return equiv.Update.random(model, 0.05, seed=2)

    return {
        "llama": equiv.check(llama, update(llama), ids),
        "part": equiv.check(
            llama, update(llama).restricted(layers=[1]), ids, at="base"
        ),
        "random": equiv.check(llama, update(llama)),
        "bert": equiv.check(bert, update(bert), ids),
        "module": equiv.check(net, update(net), x),
        "single": equiv.check(llama, update(llama), ids[:1]),
        "fails": equiv.check(
            mlp((4, 8, 3), "relu"), update(mlp((4, 8, 3))).scaled(30), x.double()
        ),
    }


NAMES = ("llama", "part", "random", "bert", "module", "single", "fails")


@pytest.mark.parametrize("name", NAMES)
def test_json_is_strict_and_comes_back_equal(
    reports: dict[str, Report], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    reports[name].to_json(path)
    assert Report.from_json(path) == reports[name]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["answer"] == reports[name].headline
    assert list(tmp_path.iterdir()) == [path]


def test_json_keeps_what_it_has_no_numbers_for(
    reports: dict[str, Report], tmp_path: Path
) -> None:
    report = reports["module"]
    first = dataclasses.replace(
        report.rows[0], remainder=math.inf, norm_base=float("-inf")
    )
    odd = dataclasses.replace(report, rows=(first,))
    odd.to_json(tmp_path / "odd.json")
    assert Report.from_json(tmp_path / "odd.json") == odd


def test_a_file_is_whole_or_absent(
    reports: dict[str, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    path.write_text("what was here")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        reports["llama"].to_json(path)
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
def test_damaged_files_are_refused(
    reports: dict[str, Report], tmp_path: Path, damage, says: str
) -> None:
    path = tmp_path / "report.json"
    reports["module"].to_json(path)
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


@pytest.mark.parametrize("name", NAMES)
def test_text_starts_with_the_answer_and_fits_the_width(
    reports: dict[str, Report], name: str
) -> None:
    text = str(reports[name])
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    joined = " ".join(text.split())
    assert joined.startswith(" ".join(reports[name].headline.split()))
    assert "…" not in text  # nothing is cut off
    assert "nan" not in text and "None" not in text


@pytest.mark.parametrize("name", NAMES)
def test_text_says_the_figures_of_the_report(
    reports: dict[str, Report], name: str
) -> None:
    text = str(reports[name])
    for row in reports[name].rows:
        if row.scope is Scope.PROPAGATED and row.remainder is not None:
            assert _percentage(row.remainder) in text
    for entry in reports[name].behaviour:
        if entry.layers == "all":
            assert percent(entry.recovered) in text


def test_the_headline_of_each_kind(reports: dict[str, Report]) -> None:
    headline = {name: report.headline for name, report in reports.items()}
    assert re.match(
        r"Steering (replaces \d+ % of|does not replace) this update.*KL .*; first "
        r"order holds to t = [\d.]+ from the base, ",
        headline["llama"],
    )
    assert "not measured: random inputs" in headline["random"]
    assert "output difference" in headline["module"]
    assert "fewer than two sequences" in headline["single"]
    assert "not established" in headline["fails"]
    assert not reports["fails"].derivative_holds


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
def test_the_page_is_whole_and_self_contained(
    reports: dict[str, Report], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    reports[name].to_html(path)
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
    assert reports[name].headline.split(":")[0].split("‖")[0][:40] in text
    again = tmp_path / "again.html"
    reports[name].to_html(again)
    assert again.read_text() == text  # the same report makes the same page


def test_the_page_escapes_names(reports: dict[str, Report], tmp_path: Path) -> None:
    report = reports["module"]
    subject = dataclasses.replace(report.subject, update="<script>alert(1)</script>")
    page = tmp_path / "page.html"
    dataclasses.replace(report, subject=subject).to_html(page)
    assert "<script>" not in page.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_frame_has_every_row(reports: dict[str, Report], name: str) -> None:
    frame = reports[name].to_frame()
    rows = reports[name].rows
    assert len(frame) == len(rows)
    assert list(frame["site"]) == [row.site for row in rows]
    assert list(frame["order_verdict"]) == [row.order.verdict.value for row in rows]
    kept = frame["remainder"].dropna()
    assert list(kept) == [r.remainder for r in rows if r.remainder is not None]


def test_the_ladder_has_a_line_per_site(reports: dict[str, Report]) -> None:
    report = reports["llama"]
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
    ]
    drawn = axes.containers[3].lines[0].get_ydata()  # type: ignore[attr-defined]
    rows = [b for b in report.behaviour if b.site == "block_out" and b.layers == "all"]
    assert list(drawn)[1:] == [row.recovered for row in rows]
    with pytest.raises(equiv.ArgumentError, match="no behaviour to plot"):
        reports["random"].plot()


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_the_rows_figures(reports: dict[str, Report], name: str) -> None:
    report = reports[name]
    texts = {t.get_text() for axes in plot.heat_map(report).axes for t in axes.texts}
    shown = [r for r in report.rows if r.scope is Scope.PROPAGATED]
    for row in shown:
        if row.remainder is not None:
            assert figure(max(row.remainder, 1e-6), 2) in texts
    curves = plot.taylor(report).axes
    assert curves and any(axes.lines for axes in curves)


def test_pages_need_their_extra(
    reports: dict[str, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in ("jinja2", "pandas", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: html.write_html(reports["llama"], tmp_path / "x.html"),
        reports["llama"].to_frame,
        reports["llama"].plot,
    ):
        with pytest.raises(equiv.MissingExtraError, match=r"equiv\[report\]"):
            call()
    assert not list(tmp_path.iterdir())
