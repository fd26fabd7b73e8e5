"""`equiv.theory.run`: test claims, on toys, on a model, on results of training."""

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from equiv.arguments import as_seed
from equiv.errors import ArgumentError, EquivError
from equiv.theory import registry
from equiv.theory.findings import Findings, Judged
from equiv.theory.norms import Norm, as_norm
from equiv.theory.setting import OF_MODEL, Setting, setting
from equiv.theory.trained import study
from equiv.theory.values import Claim, ClaimResult, Value, Verdict

# Texts of the demo that claims are tested on.
SEQUENCES = 160
_UNDECIDED = (Verdict.INCONCLUSIVE, Verdict.NOT_APPLICABLE)
_VERSIONS = ("torch", "transformers")


def run(
    claims: Iterable[int | Claim] | None = None,
    model: nn.Module | None = None,
    update: object = None,
    inputs: object = None,
    *,
    tokenizer: Any = None,
    norm: str | Norm = "euclidean",
    seed: int = 0,
    results: Path | None = None,
    progress: bool = False,
) -> Findings:
    """Test claims of the theory, or claims of your own.

    Args:
        claims: Numbers or claims; all that are shipped by default.
        model: The base model; by default the shipped Llama, with both its fine-tunes
            and its texts.
        update: An update of it, in any form that `equiv.check` takes, or a list of
            them.
        inputs: As for `equiv.check`; random token ids by default.
        tokenizer: Tokenizer for texts.
        norm: "euclidean", "fisher", or a `Norm`: what claims measure changes in.
        seed: Draws whatever is drawn.
        results: Folder of results of trained models; what is shipped by default.
        progress: Whether to show a progress bar.

    Returns:
        One entry per claim. A test that cannot be carried out, such as for a model of
        no known family, is `inconclusive` and says why.

    Raises:
        ArgumentError: If there is no such claim, or a test returns something else
            than it should.
        EquivError: If the update does not fit the model.

    Example:
        >>> found = run([1])
        >>> found[1].verdict.value
        'holds'
    """
    chosen = _chosen(claims)
    if (model is None) != (update is None):
        raise ArgumentError("Expected both a model and an update, or neither.")
    measure, seed = as_norm(norm), as_seed(seed)
    alone = {"norm": measure, "seed": seed}
    settings: list[Setting] = []
    if any(_needs_model(claim) for claim in chosen):
        settings = _settings(model, update, inputs, tokenizer, measure, seed)
    judged = []
    for claim in _shown(chosen, progress):
        if _needs_model(claim):
            found = {s.name: _test(claim, s, results) for s in settings}
        else:
            found = {"": _test(claim, alone, results)}
        judged.append(Judged(claim, found))
    return Findings(tuple(judged), _subject(settings, measure, seed))


def _chosen(claims: Iterable[int | Claim] | None) -> list[Claim]:
    if claims is None:
        return registry.shipped()
    chosen, known = [], {}
    for wanted in claims:
        if isinstance(wanted, Claim):
            chosen.append(wanted)
            continue
        known = known or {claim.id: claim for claim in registry.shipped()}
        if wanted not in known:
            raise ArgumentError(
                f"There is no claim {wanted!r}; there are {min(known)} to {max(known)}."
            )
        chosen.append(known[wanted])
    return chosen


def _needs_model(claim: Claim) -> bool:
    return any(name in OF_MODEL for name in claim.needs)


def _settings(
    model: nn.Module | None,
    update: object,
    inputs: object,
    tokenizer: Any,
    norm: Norm,
    seed: int,
) -> list[Setting]:
    """One per update."""
    if model is None:
        from equiv.demo import loading

        base, words = loading.load_base(), loading.load_tokenizer()
        lines = loading.texts(SEQUENCES)
        tuned = {"LoRA": loading.LORA, "all weights": loading.load_tuned()}
        return [
            setting(name, base, update, lines, words, norm, seed)
            for name, update in tuned.items()
        ]
    if isinstance(inputs, Iterator):
        inputs = list(inputs)
    updates = update if isinstance(update, (list, tuple)) else [update]
    made = [setting("", model, u, inputs, tokenizer, norm, seed) for u in updates]
    if len({s.name for s in made}) < len(made):
        names = ", ".join(s.name for s in made)
        raise ArgumentError(f"Expected updates with sources that differ, got {names}.")
    return made


def _test(claim: Claim, source: Any, results: Path | None) -> ClaimResult:
    """What the test finds; what the library refuses is a result too."""
    try:
        found = claim.test(**_arguments(claim, source, results))
    except EquivError as error:
        return ClaimResult(Verdict.INCONCLUSIVE, f"not decided: {error}")
    _check(claim, found)
    return found


def _arguments(claim: Claim, source: Any, results: Path | None) -> dict[str, Any]:
    """What the test asks for, from a setting or from a mapping."""
    made = {}
    for name in claim.needs:
        if name == "results":
            made[name] = study.results(claim.study, results)
        elif isinstance(source, dict):
            made[name] = source[name]
        else:
            made[name] = getattr(source, name)
    return made


def _check(claim: Claim, found: object) -> None:
    """That a result is whole: an error here is one of the claim's author."""
    if not isinstance(found, ClaimResult):
        raise ArgumentError(
            f"Claim {claim.id!r}: expected its test to return a ClaimResult, got "
            f"{type(found).__name__}."
        )
    if found.verdict is Verdict.CONDITIONAL and not found.conditions:
        raise ArgumentError(f"Claim {claim.id!r} {found.verdict}, but names none.")
    decided = found.verdict not in _UNDECIDED
    if decided and bool(claim.as_written) != (found.as_written is not None):
        raise ArgumentError(
            f"Claim {claim.id!r}: a result judges the statement `as_written` if and "
            "only if the claim has one."
        )


def _shown(claims: Sequence[Claim], progress: bool) -> Iterator[Claim]:
    from tqdm import tqdm

    with tqdm(claims, disable=not progress, desc="equiv claims") as bar:
        for claim in bar:
            bar.set_description(f"equiv claims: {claim.id}")
            yield claim


def _subject(settings: Sequence[Setting], norm: Norm, seed: int) -> dict[str, Value]:
    return {
        "model": type(settings[0].model).__name__ if settings else None,
        "updates": [s.name for s in settings],
        "random_inputs": any(s.random for s in settings),
        "norm": norm.name,
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }
