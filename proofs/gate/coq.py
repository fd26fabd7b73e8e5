"""What Coq says: everything compiled, axioms read, statements compared.

Why compare statements: a hypothesis of a section becomes a premise of the theorem
without being an axiom, so `Variable cheat : forall P, P` shows in the closed statement
and nowhere else. Why compare definitions: a theorem keeps its statement when a
definition under it is weakened.
"""

import difflib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gate.listing import Theorem, read
from gate.sources import DEFINITION, NOTATION, code, compile_order, sources

TIMEOUT_S = 300  # a call of coqc: a looping rewrite hangs, it does not fail

# Classical logic and the real numbers, as the Coq libraries assume them.
REALS = {
    "boolp.propositional_extensionality",
    "boolp.functional_extensionality_dep",
    "boolp.constructive_indefinite_description",
    "ClassicalDedekindReals.sig_not_dec",
    "ClassicalDedekindReals.sig_forall_dec",
    "Classical_Prop.classic",
    "Epsilon.epsilon_statement",
    "FunctionalExtensionality.functional_extensionality_dep",
}
ALLOWED: dict[str, set[str]] = {"none": set(), "reals": REALS}

PREAMBLE = """\
From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import reals topology normedtype derive.
From Equiv Require Import {modules}.
Import GRing.Theory Num.Theory numFieldNormedType.Exports.
Local Open Scope ring_scope.
Unset Printing Implicit Defensive.
Set Printing Width 100.
"""


class CoqError(Exception):
    """Coq is missing, failed, or did not finish; the message says which."""


def _run(command: list[str], directory: Path) -> str:
    """Standard output of a command that must succeed within the time limit."""
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except FileNotFoundError:
        raise CoqError(
            "coqc not found: see README.md for the packages to install"
        ) from None
    except subprocess.TimeoutExpired:
        raise CoqError(f"{command[-1]}: no end after {TIMEOUT_S} s") from None
    if done.returncode:
        raise CoqError(f"{command[-1]}: status {done.returncode}\n{done.stderr}")
    return done.stdout


def coqc(directory: Path, file: str) -> str:
    """Compile one file; its standard output."""
    return _run(["coqc", "-w", "none", "-R", ".", "Equiv", file], directory)


def probe_source(root: Path, theorems: list[Theorem]) -> str:
    """One file that prints every statement, its axioms, and every definition.

    `idtac` writes the marks by which the output is cut apart again.
    """
    lines = [PREAMBLE.format(modules=" ".join(p.stem for p in sources(root)))]

    def show(mark: str, command: str) -> None:
        lines.extend([f'Goal True. idtac "@@ {mark}". Abort.', command])

    for entry in theorems:
        show(f"statement {entry.qualified}", f"Check {entry.qualified}.")
        show(f"axioms {entry.qualified}", f"Print Assumptions {entry.qualified}.")
    for path in sources(root):
        for name in DEFINITION.findall(code(path)):
            show(f"definition {path.stem}.{name}", f"Print {path.stem}.{name}.")
    return "\n".join(lines) + "\n"


def probe(root: Path, theorems: list[Theorem]) -> dict[str, str]:
    """Everything that Coq says about theorems and definitions, by mark."""
    with tempfile.TemporaryDirectory() as tmp:
        directory = Path(tmp)
        for path in sources(root):
            shutil.copy(path, directory)
        for module in compile_order(root):
            coqc(directory, f"{module}.v")
        (directory / "probe.v").write_text(probe_source(root, theorems))
        output = coqc(directory, "probe.v")
    parts = re.split(r"^@@ (.*)\n", output, flags=re.M)[1:]
    return {m: body.strip() for m, body in zip(parts[::2], parts[1::2], strict=True)}


def axioms_of(printed: str) -> set[str]:
    """The names in the output of Print Assumptions: everything that starts a line."""
    if printed == "Closed under the global context":
        return set()
    return set(re.findall(r"^(?!Axioms:)([^\s:]+)", printed, re.M))


def golden_text(root: Path, parts: dict[str, str]) -> str:
    """The contents of statements.txt: version, statements, definitions, notations."""
    version = _run(["coqc", "--print-version"], root).split()[0]
    notations = [
        f"-- notation in {path.stem}\n{line.strip()}"
        for path in sources(root)
        for line in NOTATION.findall(code(path))
    ]
    shown = [
        f"-- {mark}\n{re.sub(r'[ ]+$', '', body, flags=re.M)}"
        for mark, body in parts.items()
        if not mark.startswith("axioms ")
    ]
    return "\n\n".join([f"-- Coq {version}", *shown, *notations]) + "\n"


def axiom_errors(theorems: list[Theorem], parts: dict[str, str]) -> Iterator[str]:
    """Axioms that are not allowed, and axioms announced but not needed."""
    for entry in theorems:
        found = axioms_of(parts[f"axioms {entry.qualified}"])
        if extra := found - ALLOWED[entry.axioms]:
            yield f"{entry.id}: unexpected axioms {sorted(extra)}"
        if entry.axioms != "none" and not found:
            yield f"{entry.id}: needs no axioms, but theorems.toml says otherwise"


def golden_errors(old: str, new: str) -> Iterator[str]:
    """Where the statements are not those of statements.txt."""
    first = old.partition("\n")[0], new.partition("\n")[0]
    if first[0] != first[1]:
        yield (
            f"statements.txt was written by {first[0][3:] or 'nobody'}, this is "
            f"{first[1][3:]}, which may print the same statement in other words: "
            "check with that version, or read the difference after --update"
        )
    elif old != new:
        lines = difflib.unified_diff(
            old.splitlines(), new.splitlines(), "statements.txt", "now", "", "", 2, ""
        )
        yield "statements or definitions changed; if intended, run with --update\n" + (
            "\n".join(lines)
        )


def coq_errors(root: Path, update: bool) -> Iterator[str]:
    """Unexpected axioms, and changes of statements; `update` accepts the latter."""
    theorems, golden = read(root).theorems, root / "statements.txt"
    parts = probe(root, theorems)
    yield from axiom_errors(theorems, parts)
    new = golden_text(root, parts)
    if update:
        golden.write_text(new)
    else:
        yield from golden_errors(golden.read_text() if golden.exists() else "", new)
