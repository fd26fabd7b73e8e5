"""`@equiv.theory.claim(…)`: how a function becomes a claim, and where claims are found.

Claims of the theory have numbers and live in `equiv/theory/claims/`, one file each. A
user's own have names and live in any Python file:

    import equiv

    @equiv.theory.claim(
        "small-update", formula="‖ΔW‖ ≤ 0.1 ‖W‖", source="this project"
    )
    def small(update, model):
        ...
        return equiv.theory.ClaimResult(equiv.theory.Verdict.HOLDS, "3 % of the norm")

which `equiv claims my_claims.py MODEL UPDATE` runs.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from equiv.arguments import as_choice
from equiv.errors import ArgumentError, FileFormatError
from equiv.theory.setting import OFFERED
from equiv.theory.values import Claim, ClaimResult, Kind, sentence

Test = Callable[..., ClaimResult]

_OWN = "equiv.theory.claims"
_SOURCES = ("paper", "blog", "code", "others", "this project")
# Every claim registered so far, by the name of the module that did it.
_REGISTERED: dict[str, dict[int | str, Claim]] = {}


def claim(
    id: int | str,
    *,
    formula: str,
    source: str,
    title: str = "",
    assumptions: str = "none",
    falsified_by: str = "",
    kind: str = "model",
    derivation: str = "",
    as_written: str = "",
    study: str = "",
) -> Callable[[Test], Test]:
    """Make a function a claim. The function itself stays as it is.

    Args:
        id: A name for a claim of your own; numbers are those of the theory.
        formula: The statement in one formula.
        source: "paper", "blog" or "code" of its authors, "others" or "this project",
            perhaps with a reference: "blog: section 2".
        title: The statement in a few words; the function's name by default.
        assumptions: What it needs.
        falsified_by: What would show it wrong.
        kind: "exact" (toys in float64, no model), "model", or "trained".
        derivation: Why it should hold; the function's docstring by default.
        as_written: The statement as its source makes it, where that does not hold;
            then the result has `as_written` too.
        study: For "trained": whose results it reads.

    Raises:
        ArgumentError: If an argument is outside its set, the id is taken, or the
            function asks for something that no setting has.

    Example:
        >>> @claim("two", formula="1 + 1 = 2", source="this project", kind="exact")
        ... def two():
        ...     return ClaimResult(Verdict.HOLDS, "it is")
        >>> from equiv.theory.values import Verdict
        >>> two().says
        'it is'
    """

    def register(test: Test) -> Test:
        made = Claim(
            id=id,
            title=sentence(title or test.__name__.replace("_", " ")),
            formula=formula,
            assumptions=assumptions,
            source=source,
            falsified_by=falsified_by,
            kind=Kind(as_choice("kind", kind, tuple(Kind))),
            derivation=inspect.cleandoc(derivation or test.__doc__ or ""),
            as_written=as_written,
            study=study,
            test=test,
            needs=_needs(test),
        )
        _check(made)
        _REGISTERED.setdefault(test.__module__, {})[id] = made
        return test

    return register


def shipped() -> list[Claim]:
    """The claims of the theory, by number."""
    package = importlib.import_module(_OWN)
    for found in pkgutil.iter_modules(package.__path__, f"{_OWN}."):
        importlib.import_module(found.name)
    claims = [
        claim
        for module, registered in _REGISTERED.items()
        if _is_own(module)
        for claim in registered.values()
    ]
    return sorted(claims, key=lambda claim: int(claim.id))


def from_file(path: Path) -> list[Claim]:
    """The claims that a Python file of the user's registers; the file is run.

    Raises:
        FileFormatError: If it is no Python file, or registers no claim.
    """
    name = f"equiv_claims_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileFormatError(f"Expected a Python file of claims, got {path}.")
    module = importlib.util.module_from_spec(spec)
    _REGISTERED.pop(name, None)
    with _importable(name, module):
        spec.loader.exec_module(module)
    found = list(_REGISTERED.get(name, {}).values())
    if not found:
        raise FileFormatError(
            f"{path} registers no claim: put @equiv.theory.claim(…) on a function."
        )
    return found


@contextmanager
def _importable(name: str, module: object) -> Iterator[None]:
    """Dataclasses in the file look their module up by name while it is run."""
    sys.modules[name] = module  # pyright: ignore[reportArgumentType]
    try:
        yield
    except BaseException:
        del sys.modules[name]
        raise


def _is_own(module: str) -> bool:
    return module.startswith(f"{_OWN}.")


def _needs(test: Test) -> tuple[str, ...]:
    """What a test asks for, by the names of its parameters."""
    names = tuple(inspect.signature(test).parameters)
    unknown = [name for name in names if name not in OFFERED]
    if unknown:
        raise ArgumentError(
            f"The claim {test.__name__} asks for `{unknown[0]}`; a claim can ask for "
            f"{', '.join(OFFERED)}."
        )
    return names


def _check(made: Claim) -> None:
    own = _is_own(made.test.__module__)
    if isinstance(made.id, int) != own:
        raise ArgumentError(
            f"Expected {'a number' if own else 'a name'} as the id of a claim in "
            f"{made.test.__module__}, got {made.id!r}."
        )
    as_choice("source", re.split("[:;]", made.source)[0], _SOURCES)
    if (made.kind is Kind.TRAINED) != bool(made.study):
        raise ArgumentError(
            f"Claim {made.id!r}: a claim has a `study` if and only if its kind is "
            f'"trained", got kind {made.kind.value!r} and study {made.study!r}.'
        )
    known = _REGISTERED.get(made.test.__module__, {})
    if made.id in known:
        raise ArgumentError(f"There are two claims {made.id!r} in one file.")
