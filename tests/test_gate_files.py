"""What the gate found, as files: equal when read back, whole or absent, in the open."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import equiv
from equiv.gate import html
from equiv.gate.fates import share_of
from equiv.gate.files import answer, write_json
from equiv.gate.picture import BOTTOM, LEFT, RIGHT, TOP, WIDTH, picture
from equiv.gate.values import (
    Agreement,
    Diagnosis,
    Fate,
    OutputDifference,
    Share,
    WeightDifference,
)

Found = Agreement | Diagnosis
Damage = Callable[[dict[str, Any]], object]


def weight(layer: int, **fields: Any) -> WeightDifference:
    made = WeightDifference(
        name=f"model.layers.{layer}.mlp.up_proj.weight",
        layer=layer,
        entries=1000,
        wrong=10,
        largest=0.25,
        where=(layer, 3),
        tolerance=1e-5,
        looks_like="not applied",
    )
    return dataclasses.replace(made, **fields)


SHAPED = weight(
    3, largest=math.inf, where=(), looks_like="of shape (2, 3), expected (3, 2)"
)
OUTSIDE = dataclasses.replace(weight(4), name="lm_head.weight", layer=None)
OUTPUTS = OutputDifference(423, 12, 0.31, 0.01, 3, 4, 0.98, "not steered anywhere")
SAME = Agreement("merged", "reference", "weights to the rounding of bfloat16", 39)
WRONG = Agreement(
    actual="merged",
    expected="reference",
    rule="weights to the rounding of float32",
    compared=39,
    weights=(SHAPED, *(weight(layer) for layer in range(40)), OUTSIDE),
    outputs=OUTPUTS,
    only_actual=("model.extra",),
    only_expected=("lm_head.bias", "model.norm.weight"),
    looks_like="layer 3 not applied",
)
SERVED = Agreement(
    "http://127.0.0.1:8000/v1#mine", "reference", "outputs to 1e-3", outputs=OUTPUTS
)
SHARES = (
    share_of("layer 0", 1.0, 0.01),
    share_of("layer 1", 0.002, 0.01),
    share_of("layer 2", -1.001, 0.01),
    share_of("layer 3", 2.0, 0.01),
    share_of("layer 4", 0.9, 0.1),
    share_of("layer 5", 73.0, 0.01),
    share_of("layer 6", 1.0, math.inf),
    share_of("layer 7", 0.4, 0.6),
    Share("layer 8", math.nan, math.inf, Fate.OTHER, "changed in another way"),
    share_of("outside the blocks", 1.0, 0.0),
)
KINDS = tuple(
    share_of(name, 1.0, 0.01)
    for name in ("q_proj", "k_proj", "down_proj", "post_attention_layernorm") * 3
)
BY_OUTPUTS = Diagnosis(
    actual="http://127.0.0.1:8000/v1#mine",
    update="LoRA adapter lora",
    evidence="outputs",
    layers=tuple(share for share in SHARES if share.part != "layer 8"),
    kinds=KINDS,
    matrices=(),
    explained=0.9996,
    looks_like="layer 1 not applied",
    forwards=184.0,
)
BY_WEIGHTS = dataclasses.replace(
    BY_OUTPUTS,
    evidence="weights",
    layers=SHARES,
    matrices=tuple(dataclasses.replace(s, part=f"{s.part}.weight") for s in SHARES),
    explained=None,
    forwards=0.0,
)
HIDDEN = dataclasses.replace(
    BY_OUTPUTS,
    layers=SHARES[6:8],
    kinds=(),
    looks_like="not identifiable from these outputs",
)
FOUND: dict[str, Found] = {
    "same": SAME,
    "wrong": WRONG,
    "served": SERVED,
    "by outputs": BY_OUTPUTS,
    # `nan` is no equal of itself, so this one is not read back.
    "by weights": BY_WEIGHTS,
    "hidden": HIDDEN,
}
EQUAL = [name for name in FOUND if name != "by weights"]


def refuse(constant: str) -> None:
    raise AssertionError(constant)


@pytest.mark.parametrize("name", EQUAL)
def test_json_is_strict_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    path, found = tmp_path / "found.json", FOUND[name]
    found.to_json(path)
    assert type(found).from_json(str(path)) == found
    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["format"] == found.format == 1
    story = found.reason if isinstance(found, Agreement) else found.looks_like
    assert story in content["answer"] and "\n" not in content["answer"]
    assert list(tmp_path.iterdir()) == [path]


def test_json_keeps_what_it_has_no_numbers_for(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    BY_WEIGHTS.to_json(path)
    json.loads(path.read_text(), parse_constant=refuse)
    share = Diagnosis.from_json(path).layers[8]
    assert share.coefficient is not None and math.isnan(share.coefficient)
    assert share.uncertainty == math.inf and share.fate is Fate.OTHER


def test_one_file_holds_both(tmp_path: Path) -> None:
    path = tmp_path / "both.json"
    write_json(path, agreement=WRONG, diagnosis=BY_OUTPUTS)
    assert Agreement.from_json(path) == WRONG
    assert Diagnosis.from_json(path) == BY_OUTPUTS
    said = json.loads(path.read_text())["answer"]
    assert said == answer(WRONG, BY_OUTPUTS)
    assert said.startswith("Not the same: `model.layers.3.mlp.up_proj.weight` is of")
    assert said.endswith("LoRA adapter lora: layer 1 not applied")
    SAME.to_json(path)
    with pytest.raises(equiv.FileFormatError, match="holds no diagnosis"):
        Diagnosis.from_json(path)


@pytest.mark.parametrize("suffix", ["json", "html"])
def test_a_file_is_whole_or_absent(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept"
    path.write_text("what was here")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    for found in (WRONG, BY_OUTPUTS):
        with pytest.raises(OSError, match="no space"):
            getattr(found, f"to_{suffix}")(path)
    assert path.read_text() == "what was here"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("found", "damage", "says"),
    [
        (WRONG, lambda c: c.pop("format"), "not a comparison: it has no `format`"),
        (WRONG, lambda c: c.update(format=2), "format 2; this version reads format 1"),
        (WRONG, lambda c: c.pop("agreement"), "holds no agreement"),
        (WRONG, lambda c: c.update(agreement=[]), "the fields of Agreement, got []"),
        (WRONG, lambda c: c["agreement"].pop("rule"), "lacks 'rule'"),
        (WRONG, lambda c: c["agreement"].update(same=True), "no field 'same'"),
        (WRONG, lambda c: c["agreement"].update(compared=1.5), "int, got 1.5"),
        (WRONG, lambda c: c["agreement"].update(weights={}), "a list, got {}"),
        (WRONG, lambda c: c["agreement"]["outputs"].pop("wrong"), "lacks 'wrong'"),
        (
            WRONG,
            lambda c: c["agreement"]["weights"][0].update(largest=10**400),
            "too large",
        ),
        (
            WRONG,
            lambda c: c["agreement"]["weights"][0].update(largest="big"),
            "float, got 'big'",
        ),
        (BY_OUTPUTS, lambda c: c["diagnosis"].pop("layers"), "lacks 'layers'"),
        (BY_OUTPUTS, lambda c: c["diagnosis"].update(explained=True), "got True"),
        (
            BY_OUTPUTS,
            lambda c: c["diagnosis"]["layers"][0].update(fate="lost"),
            "'lost' is not a valid Fate",
        ),
    ],
)
def test_damaged_files_are_refused(
    found: Found, damage: Damage, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    found.to_json(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(equiv.FileFormatError, match=re.escape(says)):
        type(found).from_json(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_bytes(content)
    for kind in (Agreement, Diagnosis):
        with pytest.raises(equiv.FileFormatError, match="is not JSON"):
            kind.from_json(path)
        with pytest.raises(equiv.FileFormatError, match="does not exist"):
            kind.from_json(tmp_path / "other.json")
        with pytest.raises(equiv.FileFormatError, match="Cannot read"):
            kind.from_json(tmp_path)


class _Page(HTMLParser):
    """Tags that are open, and whatever a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "img", "object")
        assert not {name for name, _ in attrs} & {"src", "href", "xlink:href", "id"}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "rect", "circle")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def page_of(found: Found) -> str:
    if isinstance(found, Agreement):
        return html.to_html(found, None)
    return html.to_html(None, found)


@pytest.mark.parametrize("name", FOUND)
def test_the_page_is_whole_and_self_contained(name: str, tmp_path: Path) -> None:
    path, found = tmp_path / "found.html", FOUND[name]
    found.to_html(path)
    text = path.read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert not re.search(r"@import|url\(", text)
    shown = re.sub(r"<[^>]*>", " ", text[text.index("<main>") :])
    assert not re.search(r"\b(None|nan|inf|True|False)\b", shown)
    for table in re.findall(r"<table>(.*?)</table>", text, re.S):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
        assert len({len(re.findall("<t[hd]", row)) for row in rows}) == 1


def test_the_page_says_everything_that_was_found() -> None:
    text = unescape(re.sub(r"<[^>]*>", "", html.to_html(WRONG, BY_WEIGHTS)))
    assert "merged is not reference: layer 1 not applied" in text
    assert "not the same" in text and "update not applied as it should be" in text
    assert WRONG.reason.replace("`", "").split(";")[0] in text
    for row in (*WRONG.weights, *SHARES, *KINDS, *BY_WEIGHTS.matrices):
        assert (row.part if isinstance(row, Share) else row.name) in text
    for name in (*WRONG.only_actual, *WRONG.only_expected):
        assert name in text
    assert "not steered anywhere" in text and "42 of 39 matrices" in text
    assert "read off the weights" in text
    text = html.to_html(None, BY_OUTPUTS)
    assert "found from the outputs" in text and "It cost 184 forwards" in text
    assert "update not identifiable" in html.to_html(None, HIDDEN)
    text = html.to_html(SAME, None)
    assert "<h1>merged is reference</h1>" in text and "All 39 matrices" in text


def test_the_page_escapes_names() -> None:
    bad = "<script>alert(1)</script>"
    named = weight(1, name=bad, looks_like=bad)
    agreement = Agreement(bad, bad, bad, 1, (named,), None, (bad,), (bad,), bad)
    share = Share(bad, 0.5, 0.1, Fate.SCALED, bad)
    diagnosis = dataclasses.replace(
        BY_WEIGHTS, actual=bad, update=bad, layers=(share,), looks_like=bad
    )
    assert "<script" not in html.to_html(agreement, diagnosis)


def test_the_picture_puts_shares_on_their_lines() -> None:
    made = picture(SHARES)
    twice, applied, none, flipped = (guide.y for guide in made.guides)
    assert TOP < twice < applied < none < flipped < BOTTOM
    marks = {share.part: mark for share, mark in zip(SHARES, made.marks, strict=True)}
    assert marks["layer 0"].y == applied and marks["layer 3"].y == twice
    assert marks["layer 1"].y == pytest.approx(none, abs=0.2)
    assert marks["layer 2"].y == pytest.approx(flipped, abs=0.2)
    assert marks["layer 5"].y == TOP and marks["layer 5"].figure == "73"
    for part in ("layer 6", "layer 7", "layer 8"):  # not identifiable, and no number
        assert marks[part].y is None
    unsure = marks["layer 4"]  # two standard errors of 0.1
    assert unsure.y is not None
    assert unsure.low - unsure.y == pytest.approx(0.2 * (none - applied), abs=0.05)
    assert [mark.name for mark in made.marks][-1] == "outside" and made.axis == "layer"


@pytest.mark.parametrize("count", [1, 9, 33, 130])
def test_names_do_not_run_into_each_other(count: int) -> None:
    layers = [share_of(f"layer {i}", 1.0, 0.01) for i in range(count)]
    made = picture([*layers, share_of("outside the blocks", 1.0, 0.01)])
    named = [(mark.x, mark.name) for mark in made.marks if mark.name]
    assert named[0][1] == "0" and named[-1][1] == "outside"
    for (x, name), (other, next_name) in pairwise(named):
        assert other - x > 6 * (len(name) + len(next_name)) / 2
    assert all(LEFT < x < WIDTH - RIGHT for x, _ in named)
    assert made.slant == 0


def test_long_names_are_turned() -> None:
    made = picture(KINDS)
    assert made.slant and all(mark.name for mark in made.marks)
    assert made.height > picture(KINDS[:2]).height and made.axis == ""
    assert picture(KINDS[:2]).slant == 0


def test_pages_need_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(equiv.MissingExtraError, match=r"equiv\[report\]"):
        SAME.to_html(tmp_path / "x.html")
    assert not list(tmp_path.iterdir())
