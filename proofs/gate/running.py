"""The code that runs each claim, read without running it: `equiv/theory/claims/`."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = "equiv/theory/claims"
_NAME = re.compile(r"claim_(\d\d)_\w+")


@dataclass(frozen=True)
class Code:
    """What a decorator `@claim(number, …)` says, and where.

    `file` is relative to the repository; `as_written` is the source's own statement
    where it does not hold, or empty.
    """

    number: int
    title: str
    as_written: str
    file: str


def codes(repository: Path) -> list[Code]:
    """Every claim that has code, by number."""
    found = []
    for path in sorted((repository / FOLDER).glob("claim_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found += list(_decorators(node, f"{FOLDER}/{path.name}"))
    return sorted(found, key=lambda code: code.number)


def _decorators(node: ast.FunctionDef, file: str) -> Iterator[Code]:
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "claim":
            says = {
                word.arg: ast.literal_eval(word.value)
                for word in mark.keywords
                if word.arg in ("title", "as_written")
            }
            number = ast.literal_eval(mark.args[0])
            yield Code(number, says.get("title", ""), says.get("as_written", ""), file)


def code_errors(found: list[Code]) -> Iterator[str]:
    """Every claim once, titled, in a file that is found by its number."""
    numbers = [code.number for code in found]
    yield from (
        f"claim {n}: two files run it" for n in set(numbers) if numbers.count(n) > 1
    )
    firsts: dict[str, int] = {}
    for code in found:
        firsts.setdefault(code.file, code.number)
        if not code.title:
            yield f"claim {code.number}: no title in {code.file}"
    for file, number in firsts.items():
        name = _NAME.fullmatch(Path(file).stem)
        if name is None or int(name[1]) != number:
            yield f"{file}: expected the name claim_{number:02}_….py, for its claim"
