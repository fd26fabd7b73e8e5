"""Running claims: what a test gets, what becomes of what it returns, files and text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import equiv
from equiv.testing.models import transformer
from equiv.theory import AsWritten, ClaimResult, Findings, Judged, Verdict
from equiv.theory.judging import identity
from equiv.theory.norms import Fisher, as_norm
from equiv.theory.registry import claim, from_file
from equiv.theory.text import explained, plain, shown
from equiv.theory.trained import study

MINE = '''
import equiv
from equiv.theory import ClaimResult, Verdict

@equiv.theory.claim("mine", formula="1 = 1", source="this project"{more})
def mine({needs}):
    """Because."""
{body}
'''
HOLDS = "    return ClaimResult(Verdict.HOLDS, 'it does')"


def own(folder: Path, body: str = HOLDS, needs: str = "", more: str = "") -> list[Any]:
    path = folder / "my_claims.py"
    path.write_text(MINE.format(needs=needs, body=body, more=more))
    return from_file(path)


def model_and_updates() -> tuple[Any, list[equiv.Update]]:
    model = transformer("llama", dtype=torch.float32)
    return model, [equiv.Update.random(model, 0.001, seed=n) for n in (0, 1)]


def test_a_claim_gets_what_it_names(tmp_path: Path) -> None:
    body = """
    assert setting.model is model and setting.update is update and seed == 3
    assert sum(batch.tokens for batch in inputs) > 0 and setting.random
    assert {site for _, site in shifts} > {"attn_heads", "mlp_hidden", "block_out"}
    assert report.derivative_holds and tokenizer is None
    return ClaimResult(Verdict.HOLDS, norm.name, evidence={"n": len(shifts)})"""
    needs = "setting, model, update, inputs, tokenizer, report, shifts, norm, seed"
    model, updates = model_and_updates()
    made = own(tmp_path, body, needs)
    found = equiv.theory.run(made, model, updates, norm="fisher", seed=3)
    assert [*found["mine"].results] == [update.source for update in updates]
    assert found["mine"].says == "Fisher"
    assert found["mine"].to_dict()["evidence"] == {
        update.source: {"n": 14} for update in updates
    }
    assert found.subject["random_inputs"] and found.sound


def test_measurements_are_shared(tmp_path: Path) -> None:
    body = """
    return ClaimResult(Verdict.HOLDS, "", evidence={"id": id(shifts)})"""
    model, (update, _) = model_and_updates()
    (first,) = own(tmp_path, body, "shifts")
    found = equiv.theory.run([first, first], model, update)
    ids = {judged.to_dict()["evidence"]["id"] for judged in found}
    assert len(found) == 2 and len(ids) == 1


def test_inputs_that_can_be_read_once_are_kept(tmp_path: Path) -> None:
    body = """
    assert len(inputs) == 2 and len(shifts[0, "block_out"].base) == 4
    return ClaimResult(Verdict.HOLDS, "yes")"""
    model, updates = model_and_updates()
    batches = iter([torch.randint(3, 32, (2, n)) for n in (5, 7)])
    needs = "inputs, shifts"
    found = equiv.theory.run(own(tmp_path, body, needs), model, updates, batches)
    assert found["mine"].verdict is Verdict.HOLDS


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("    raise equiv.SiteError('no such site')", Verdict.INCONCLUSIVE),
        ("    return ClaimResult(Verdict.FAILS, 'no')", Verdict.FAILS),
        ("    return ClaimResult(Verdict.NOT_APPLICABLE, '')", Verdict.NOT_APPLICABLE),
        (HOLDS, Verdict.HOLDS),
    ],
)
def test_verdicts(tmp_path: Path, body: str, verdict: Verdict) -> None:
    found = equiv.theory.run(own(tmp_path, body))
    assert found["mine"].verdict is verdict
    assert found.sound == (verdict in (Verdict.HOLDS, Verdict.NOT_APPLICABLE))
    if verdict is Verdict.INCONCLUSIVE:
        assert found["mine"].says == "Not decided: no such site"


def test_a_bug_in_a_claim_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        equiv.theory.run(own(tmp_path, "    1 / 0"))


@pytest.mark.parametrize(
    ("body", "more", "says"),
    [
        ("    return 3", "", "return a ClaimResult, got int"),
        ("    return ClaimResult(Verdict.CONDITIONAL, '')", "", "names none"),
        (HOLDS, ", as_written='1 = 2'", "as_written"),
    ],
)
def test_results_have_to_be_whole(
    tmp_path: Path, body: str, more: str, says: str
) -> None:
    with pytest.raises(equiv.ArgumentError, match=says):
        equiv.theory.run(own(tmp_path, body, more=more))


@pytest.mark.parametrize(
    ("needs", "more", "says"),
    [
        ("modle", "", "asks for `modle`; a claim can ask for model, update"),
        ("", ", kind='guess'", "kind"),
        ("", ", kind='trained'", "if and only if"),
        ("", ", study='x'", "if and only if"),
    ],
)
def test_wrong_claims_are_refused(
    tmp_path: Path, needs: str, more: str, says: str
) -> None:
    with pytest.raises(equiv.ArgumentError, match=says):
        own(tmp_path, HOLDS, needs, more)


def test_numbers_are_the_theorys_and_names_the_users() -> None:
    with pytest.raises(equiv.ArgumentError, match="a name as the id"):
        claim(99, formula="", source="paper")(lambda: ClaimResult(Verdict.HOLDS, ""))
    with pytest.raises(equiv.ArgumentError, match="source"):
        claim("x", formula="", source="hearsay")(lambda: None)  # type: ignore


def test_calls_that_make_no_sense(tmp_path: Path) -> None:
    model, (update, _) = model_and_updates()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"claims": [0]}, "no claim 0; there are 1 to 49"),
        ({"claims": [1], "model": model}, "both a model and an update"),
        ({"claims": [1], "norm": "maximum"}, "norm"),
        ({"claims": [1], "seed": -1}, "seed"),
        (
            {
                "claims": own(tmp_path, HOLDS, "update"),
                "model": model,
                "update": [update, update],
            },
            "sources that differ",
        ),
    ]
    for arguments, says in wrong:
        with pytest.raises(equiv.ArgumentError, match=says):
            equiv.theory.run(**arguments)
    with pytest.raises(equiv.ArgumentError, match="was not run"):
        equiv.theory.run([1])[2]
    for path in (tmp_path, tmp_path / "none.py"):
        with pytest.raises(equiv.FileFormatError, match="Python file"):
            from_file(path)
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(equiv.FileFormatError, match="registers no claim"):
        from_file(empty)


def test_a_file_is_read_anew(tmp_path: Path) -> None:
    for word in ("first", "second"):
        body = f"    return ClaimResult(Verdict.HOLDS, {word!r})"
        assert equiv.theory.run(own(tmp_path, body))["mine"].says.lower() == word


def a_claim(**fields: Any) -> Any:
    made: dict[str, Any] = {"formula": "a = b", "source": "blog", "kind": "exact"}

    def test() -> ClaimResult:
        return ClaimResult(Verdict.HOLDS, "")

    test.__module__ = f"tests.{len(fields)}.{id(fields)}"
    claim("it", **(made | fields))(test)
    from equiv.theory import registry

    return registry._REGISTERED[test.__module__]["it"]


def test_the_worst_verdict_counts() -> None:
    order = ("fails", "inconclusive", "holds with conditions", "holds")
    results = {
        word: ClaimResult(Verdict(word), word) for word in (*order, "not applicable")
    }
    for word in (*order, "not applicable"):
        assert Judged(a_claim(), results).verdict is Verdict(word)
        del results[word]


def test_json_and_page_hold_everything(tmp_path: Path) -> None:
    result = ClaimResult(
        Verdict.CONDITIONAL,
        "it does <b>",
        {"width": 3.0},
        {"gap": 0.5, "by layer": {"0": [1.0, float("nan")], "1": [2.0, 3.0]}},
        AsWritten(Verdict.FAILS, "it is not", {"a": 1, "b": 2}),
    )
    made = a_claim(as_written="a = c", derivation="One.\n\nTwo.", title="they agree")
    found = Findings((Judged(made, {"": result}),), equiv.theory.run([1]).subject)
    path, page = tmp_path / "found.json", tmp_path / "found.html"
    found.to_json(path)
    found.to_html(page)
    (entry,) = json.loads(path.read_text())["claims"]
    assert entry["id"] == "it" and entry["verdict"] == "holds with conditions"
    assert entry["conditions"] == {"width": 3.0}
    assert entry["evidence"]["by layer"]["0"] == [1.0, "NaN"]
    assert entry["as_written"]["counterexample"] == {"a": 1, "b": 2}
    assert entry["as_written"]["statement"] == "A = c"
    text = page.read_text()
    for part in ("It does &lt;b&gt;", "by layer: 0", "A = c", "<p>Two.</p>", "width"):
        assert part in text
    for said in ("<script", "http"):
        assert said not in text
    table = plain(found)
    assert "They agree" in table and "as written: A = c" in table
    assert "1 holds with conditions; 1 fails as written" in table


def test_an_explanation_has_derivation_and_evidence() -> None:
    from rich.console import Console

    console = Console(width=90)
    with console.capture() as capture:
        console.print(explained(equiv.theory.run([18])[18]))
    text = capture.get()
    for part in ("Assumes:", "Source: blog", "Why", "Q is oblique", "norm of Q"):
        assert part in text
    assert "P(x′ + y) = x′, and A P h replaces A y. A P h is A x′, not A y" in text
    assert "relative error  1.41" in text


def test_long_lists_are_cut_in_text_only() -> None:
    assert shown(list(range(9))) == "0, 1, 2, 3, 4, 5, 6, 7, … (1 more)"
    assert shown([[1.0, 2.0], [3.0, 4.0]]) == "1, 2; 3, 4"
    assert shown(None) == "–" and shown("word") == "word"


def test_an_identity_names_what_is_wrong() -> None:
    found = identity({"a": 1e-16, "b": float("nan")}, "fine", differ={"c": 1e-9})
    assert found.verdict is Verdict.FAILS
    assert found.says == (
        "b: expected no difference, got nan; c: expected a difference, got 1e-09"
    )
    assert identity({"a": 0.0}, "fine", conditions={"n": 1}).verdict.value == (
        "holds with conditions"
    )


def test_fisher_sees_no_common_part() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    change = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    p = logits.softmax(-1)
    matrix = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.einsum("ti,tij,tj->t", change, matrix, change)
    torch.testing.assert_close(Fisher().squared(change, logits), expected)
    torch.testing.assert_close(Fisher().squared(change + 3, logits), expected)
    assert as_norm(Fisher()).name == "fisher"


def test_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(seeds: Any) -> dict[str, Any]:
        return {"losses": [seed / 2 for seed in seeds]}

    known = {"mine": study.Study("mine", 1, losses)}
    monkeypatch.setattr(study, "studies", lambda: known)
    with pytest.raises(equiv.ArgumentError, match="yours"):
        study.train(["yours"], tmp_path)
    made = own(tmp_path, TRAINED, "results", ", kind='trained', study='mine'")
    missing = equiv.theory.run(made, results=tmp_path)
    assert missing["mine"].verdict is Verdict.INCONCLUSIVE
    study.train(["mine"], tmp_path, seeds=(2, 4))
    found = equiv.theory.run(made, results=tmp_path)
    assert found["mine"].to_dict()["evidence"] == {
        "losses": [1.0, 2.0],
        "seeds": [2, 4],
    }
    content = json.loads((tmp_path / "mine.json").read_text())
    assert content["study"] == "mine" and "torch" in content["versions"]
    del content["results"]
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(equiv.FileFormatError, match="no `results`"):
        study.results("mine", tmp_path)


TRAINED = "    return ClaimResult(Verdict.HOLDS, 'yes', evidence=results)"
