"""The gate of the proofs refuses what it should.

Without Coq: the checks of lists, index and sources run on a copy of the folder with one
thing broken, the checks of Coq's answers on answers typed in.
"""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPLICATION = "equiv/theory/claims/claim_18_block_out_replication.py"
ORACLE = "proofs/theories/oracle.v"
THEOREMS = "proofs/theorems.toml"
CLAIMS = "proofs/claims.toml"
BLOCKS = "tests/test_proofs_blocks.py"
README = "proofs/README.md"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """The gate can be imported, as `proofs/check.py` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "proofs")
        yield


def gate(part: str) -> ModuleType:
    return importlib.import_module(f"gate.{part}")


def errors(root: Path) -> list[str]:
    """What the gate says of the folder `root / proofs`, Coq apart."""
    folder = root / "proofs"
    return list(gate("listing").listing_errors(folder)) or list(
        gate("index").index_errors(folder)
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the proofs, of the tests that name them and of claims' code."""
    keep = shutil.ignore_patterns("__pycache__", "*.vo*", "*.glob", ".*.aux")
    shutil.copytree(ROOT / "proofs", tmp_path / "proofs", ignore=keep)
    claims = gate("running").FOLDER
    shutil.copytree(ROOT / claims, tmp_path / claims, ignore=keep)
    (tmp_path / "tests").mkdir()
    for pattern in gate("listing").PATTERNS:
        for path in (ROOT / "tests").glob(pattern):
            shutil.copy(path, tmp_path / "tests")
    return tmp_path


def test_lists_index_sources_and_tests_agree() -> None:
    assert errors(ROOT) == []


# what is broken: file, text, its replacement, words of the message
BREAKAGES = {
    "unfinished proof": (
        ORACLE,
        "Proof. by move=> E; elim: n => //= n ->. Qed.",
        "Admitted.",
        "oracle.v: Admitted",
    ),
    "axiom": (ORACLE, "Section Oracle.", "Axiom a : False.\nSection Oracle.", "Axiom"),
    "assumption outside a section": (
        ORACLE,
        "Section Oracle.",
        "#[local] Variable cheat : False.\nSection Oracle.",
        "assumption outside a section",
    ),
    "declaration that the probe would miss": (
        ORACLE,
        "Lemma hybrid_prefix",
        "Local Lemma hybrid_prefix",
        "does not start its line",
    ),
    "no header": (ORACLE, "(** The oracle:", "(* The oracle:", "no header comment"),
    "no sentence above a theorem": (
        ORACLE,
        "(** Sequential oracle: overwriting at every block gives the tuned run. *)\n",
        "",
        "sequential_oracle has no comment above it",
    ),
    "theorem renamed": (
        ORACLE,
        "Theorem oracle_exact",
        "Theorem oracle_exakt",
        "no theorem oracle_exact",
    ),
    "theorem not listed": (
        ORACLE,
        "Lemma hybrid_prefix",
        "Theorem hybrid_prefix",
        "theorem hybrid_prefix has no entry",
    ),
    "test gone": (
        BLOCKS,
        '@pytest.mark.theorem("oracle.one-layer", "oracle.one-layer-exact")\n',
        "",
        "oracle.one-layer: no test carries this id",
    ),
    "test of an unknown theorem": (
        BLOCKS,
        '@pytest.mark.theorem("error.tight")',
        '@pytest.mark.theorem("error.tight", "error.light")',
        "no theorem or claim error.light",
    ),
    "unknown axioms": (THEOREMS, 'axioms = "none"', 'axioms = "any"', "axioms = any"),
    "field missing": (
        THEOREMS,
        'assumptions = "none"\n',
        "",
        "expected the non-empty fields",
    ),
    "field empty": (THEOREMS, 'assumptions = "none"\n', 'assumptions = ""\n', "empty"),
    "identifier used twice": (
        THEOREMS,
        'id = "oracle.exact"',
        'id = "oracle.sequential"',
        "two entries with id oracle.sequential",
    ),
    "claim without the witness it says": (
        CLAIMS,
        'theorems = ["lora.collinear"]',
        "theorems = []",
        "claim 38: proved, but no witness",
    ),
    "claim of an unknown theorem": (
        CLAIMS,
        'theorems = ["lora.collinear"]',
        'theorems = ["lora.colinear"]',
        "claim 38: no theorem lora.colinear",
    ),
    "unknown status": (
        CLAIMS,
        'status = "tested"',
        'status = "likely"',
        "status likely",
    ),
    "claim whose code has another number": (
        REPLICATION,
        "@claim(\n    18,",
        "@claim(\n    17,",
        "expected the name claim_17_",
    ),
    "claim that nothing runs": (
        REPLICATION,
        "@claim(\n    18,",
        "@later(\n    18,",
        "claim 18: nothing in equiv/theory/claims/ runs it",
    ),
    "claim without a title": (REPLICATION, "    title=", "    name=", "no title in"),
    "claim whose code forgets the source's statement": (
        REPLICATION,
        '    as_written="P',
        '    written="P',
        "claim 18, as written: equiv/theory/claims/claim_18_block_out_replication.py",
    ),
    "claim whose code has no test": (
        "tests/test_theory_exact.py",
        "@pytest.mark.claim(38, 43, 45)",
        "@pytest.mark.claim(43, 45)",
        "claim 38",
    ),
    "claims out of order": (CLAIMS, "number = 2\n", "number = 4\n", "in order"),
    "index of something else": (
        README,
        "`oracle.exact`",
        "`oracle`",
        "the index is not that of the lists",
    ),
    "index lost": (README, "<!-- end of index -->", "", "once each"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_breakage_is_found(copy: Path, breakage: str) -> None:
    file, old, new, message = BREAKAGES[breakage]
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    found = errors(copy)
    assert any(message in error for error in found), found


def test_every_theorem_of_a_claim_is_linked_in_the_index() -> None:
    listing = gate("listing").read(ROOT / "proofs")
    rows = list(gate("index").tables(listing))
    for theorem in listing.theorems:
        assert sum(row.startswith(f"| `{theorem.id}` |") for row in rows) == 1
    for claim in listing.claims:
        (row,) = [row for row in rows if row.startswith(f"| {claim.key} |")]
        assert all(f"[`{name}`]" in row for name in claim.theorems)


def test_links_of_the_index_lead_somewhere() -> None:
    targets = {
        part.partition(")")[0] for part in (ROOT / README).read_text().split("](")[1:]
    }
    assert len(targets) > 30
    assert [t for t in targets if not (ROOT / "proofs" / t).is_file()] == []


def test_comments_do_not_count() -> None:
    strip = gate("sources").strip_comments
    assert strip("a (* Admitted (* nested *) *) b") == "a  b"
    assert strip("a (* two\nlines *) b") == "a \n b"


@pytest.mark.parametrize(
    ("printed", "names"),
    [
        ("Closed under the global context", set()),
        (
            "Axioms:\nboolp.choice : forall T,\n  T -> T\nClassic.em\n  : forall P, P",
            {"boolp.choice", "Classic.em"},
        ),
        ("Axioms:\nfoo is assumed to be guarded.", {"foo"}),
    ],
)
def test_axioms_are_read_from_what_coq_prints(printed: str, names: set[str]) -> None:
    assert gate("coq").axioms_of(printed) == names


@pytest.mark.parametrize(
    ("axioms", "printed", "message"),
    [
        ("none", "Axioms:\ncheat : False", "unexpected axioms ['cheat']"),
        ("reals", "Axioms:\ncheat : False", "unexpected axioms ['cheat']"),
        ("none", "Axioms:\nClassical_Prop.classic : P", "unexpected axioms"),
        ("reals", "Closed under the global context", "needs no axioms"),
        ("reals", "Axioms:\nClassical_Prop.classic : P", None),
        ("none", "Closed under the global context", None),
    ],
)
def test_axioms_are_compared(axioms: str, printed: str, message: str | None) -> None:
    entry = gate("listing").Theorem("id", "t", "theories/f.v", "says", "none", axioms)
    found = list(gate("coq").axiom_errors([entry], {"axioms f.t": printed}))
    assert not found if message is None else message in found[0]


def test_statements_are_compared() -> None:
    compare = gate("coq").golden_errors
    old = "-- Coq 8.16.1\n\n-- statement f.t\nt : P\n"
    assert list(compare(old, old)) == []
    (weaker,) = compare(old, old.replace("t : P", "t : (forall Q, Q) -> P"))
    assert "+t : (forall Q, Q) -> P" in weaker
    (other,) = compare(old, old.replace("8.16.1", "8.20.1"))
    assert "written by Coq 8.16.1, this is Coq 8.20.1" in other
    (none,) = compare("", old)
    assert "written by nobody" in none


CHEAT = """(** Two ways to prove anything. *)
Section Cheat.
Variable cheat : forall P : Prop, P.

(** 1 = 2 *)
Theorem by_variable : 1 = 2.
Proof. exact (cheat _). Qed.
End Cheat.

(** 1 = 2 *)
Theorem by_axiom : 1 = 2.
Admitted.
"""


def coq_is_there() -> bool:
    """Coq with the libraries that the probe imports."""
    if shutil.which("coqc") is None:
        return False
    where = subprocess.run(["coqc", "-where"], capture_output=True, text=True).stdout
    libraries = Path(where.strip()) / "user-contrib" / "mathcomp"
    return all((libraries / part).is_dir() for part in ("algebra", "analysis"))


@pytest.mark.skipif(not coq_is_there(), reason="asks Coq itself, which is not there")
def test_coq_shows_both_ways_to_cheat(tmp_path: Path) -> None:
    (tmp_path / "theories").mkdir()
    (tmp_path / "theories" / "cheat.v").write_text(CHEAT)
    names = ("by_variable", "by_axiom")
    entries = [
        gate("listing").Theorem(n, n, "theories/cheat.v", "1 = 2", "none", "none")
        for n in names
    ]
    parts = gate("coq").probe(tmp_path, entries)
    # an axiom is seen by the first check, a section's hypothesis only by the second
    found = list(gate("coq").axiom_errors(entries, parts))
    assert found == ["by_axiom: unexpected axioms ['by_axiom']"]
    assert "(forall P : Prop, P) -> 1" in parts["statement cheat.by_variable"]
    assert "1" in parts["statement cheat.by_axiom"]


def test_a_proof_that_hangs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coq = gate("coq")
    monkeypatch.setattr(coq, "TIMEOUT_S", 0.2)
    with pytest.raises(coq.CoqError, match=r"sleep\(30\): no end after 0\.2 s"):
        coq._run([sys.executable, "-c", "import time; time.sleep(30)"], tmp_path)


def test_missing_coq_is_said(tmp_path: Path) -> None:
    coq = gate("coq")
    with pytest.raises(coq.CoqError, match="packages to install"):
        coq._run(["no-such-coqc"], tmp_path)
