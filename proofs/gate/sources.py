"""The Coq files as text: what they declare, and what they may not contain."""

import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

# Ways to leave something unproved, to switch off a check of the kernel, or to declare
# a constant that the probe would not print.
FORBIDDEN = re.compile(
    r"\b(Admitted|admit|Admit|give_up|Abort|Axioms?|Parameters?|Conjectures?|Load"
    r"|Declare\s+ML|bypass_check|Unset\s+(Guard|Positivity|Universe)\s+Checking"
    r"|Redirect|Primitive|Inductive|CoInductive|Variant|Record|Structure|Class|Instance"
    r"|Corollary|Fact|Remark|Proposition|Example|Program|Obligations?|Module)\b"
)
# `Let` is local to a section; the rest would be axioms outside one.
SECTION_ONLY = re.compile(
    r"^\s*(?:(?:Local|Global|#\[\w+\])\s+)*(Variables?|Hypothes[ie]s|Context|Let)\b"
)
SECTION = re.compile(r"^\s*Section\b")
SECTION_END = re.compile(r"^\s*End\b")
KEYWORDS = r"(Theorem|Lemma|Definition|Fixpoint)"
# Every declaration starts a line; one that is indented or prefixed would be missed.
ANY_DECLARATION = re.compile(rf"(?<![\w.]){KEYWORDS}\s+[\w']+")
DECLARATION = re.compile(rf"^{KEYWORDS}\s+([\w']+)", re.M)
DEFINITION = re.compile(r"^(?:Definition|Fixpoint)\s+([\w']+)", re.M)
THEOREM = re.compile(r"^Theorem\s+([\w']+)", re.M)
NOTATION = re.compile(
    r"^\s*(?:Local\s+)?(?:Notation|Infix|Coercion|Canonical)\b.*", re.M
)
REQUIRE = re.compile(r"^From Equiv Require(?: Import)?((?:\s+\w+)+)\.", re.M)


def strip_comments(text: str) -> str:
    """The Coq source without its (nested) comments; line breaks are kept."""
    depth, out, i = 0, [], 0
    while i < len(text):
        if text.startswith("(*", i):
            depth, i = depth + 1, i + 2
        elif depth and text.startswith("*)", i):
            depth, i = depth - 1, i + 2
        else:
            if not depth or text[i] == "\n":
                out.append(text[i])
            i += 1
    return "".join(out)


def sources(root: Path) -> list[Path]:
    """The Coq files, by name."""
    return sorted((root / "theories").glob("*.v"))


def code(path: Path) -> str:
    """One Coq file without its comments."""
    return strip_comments(path.read_text())


def compile_order(root: Path) -> list[str]:
    """Module names, each after the modules it requires."""
    graph = {
        p.stem: set(" ".join(REQUIRE.findall(code(p))).split()) for p in sources(root)
    }
    return list(TopologicalSorter(graph).static_order())


def source_errors(path: Path) -> Iterator[str]:
    """Nothing open, no assumption outside a section, every declaration explained."""
    text, plain = path.read_text(), code(path)
    if not text.startswith("(** "):
        yield f"{path.name}: no header comment"
    if bad := FORBIDDEN.search(plain):
        yield f"{path.name}: {bad[0]}"
    depth = 0
    for line in plain.splitlines():
        depth += bool(SECTION.match(line)) - bool(SECTION_END.match(line))
        if depth == 0 and SECTION_ONLY.match(line):
            yield f"{path.name}: assumption outside a section: {line.strip()}"
    declared = list(DECLARATION.finditer(plain))
    if len(declared) != len(ANY_DECLARATION.findall(plain)):
        yield f"{path.name}: a declaration does not start its line"
    for found in DECLARATION.finditer(text):
        if not text[: found.start()].rstrip().endswith("*)"):
            yield f"{path.name}: {found[2]} has no comment above it"
