"""Studies: trainings whose results claims about trained models are judged from.

A study trains models, several seeds with controls, and returns what it measured as a
mapping that JSON can hold. Its results are committed in `results/NAME.json` and read
from there; `equiv claims --train` runs it again.

To add one, put a function into a module of `equiv/theory/trained/studies/`:

    @study("sites", minutes=12)
    def sites(seeds: Sequence[int]) -> Mapping[str, Value]:
        return {"misfit": {"block_out": [0.31, …], "mlp_out": [0.44, …]}}

and name it in the claims that read it, of which there may be several:

    @claim(17, kind="trained", study="sites", …)
    def sites_at_equal_rank(results: Mapping[str, Value]) -> ClaimResult: …

The file holds `format`, `study`, `seeds`, `versions` and `results`; the test gets the
latter with `seeds` added, lists in the order of the seeds.
"""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from equiv.errors import ArgumentError, FileFormatError
from equiv.report.files import read_format, write_fields
from equiv.theory.values import Value

Training = Callable[[Sequence[int]], Mapping[str, Value]]

FORMAT = 1
SEEDS = (0, 1, 2, 3, 4)
_STUDIES = "equiv.theory.trained.studies"
_VERSIONS = ("torch", "transformers", "numpy", "scipy")
_REGISTERED: dict[str, "Study"] = {}


@dataclass(frozen=True)
class Study:
    """A training that can be run again.

    Attributes:
        name: Name of its file of results.
        minutes: About how long it takes on two cores.
        train: From seeds to results.
    """

    name: str
    minutes: float
    train: Training


def study(name: str, *, minutes: float) -> Callable[[Training], Training]:
    """Make a function a study. The function itself stays as it is.

    Raises:
        ArgumentError: If there is one of that name.
    """

    def register(train: Training) -> Training:
        if name in _REGISTERED:
            raise ArgumentError(f"There are two studies {name!r}.")
        _REGISTERED[name] = Study(name, minutes, train)
        return train

    return register


def studies() -> dict[str, Study]:
    """All studies, by name."""
    package = importlib.import_module(_STUDIES)
    for found in pkgutil.iter_modules(package.__path__, f"{_STUDIES}."):
        importlib.import_module(found.name)
    return dict(sorted(_REGISTERED.items()))


def results(name: str, folder: Path | None = None) -> dict[str, Value]:
    """What a study found, with the `seeds` it used.

    Args:
        name: The study.
        folder: Where its file is; the one that is shipped by default.

    Raises:
        FileFormatError: If there is no such file, or it is damaged.
    """
    path = _path(name, folder)
    if not path.exists():
        raise FileFormatError(
            f"There are no results of the study {name!r}: `equiv claims --train` makes "
            f"{path}."
        )
    content = read_format(path, "study", FORMAT)
    if missing := {"seeds", "results"} - content.keys():
        raise FileFormatError(f"Study {name!r}: its file has no `{min(missing)}`.")
    return {**content["results"], "seeds": content["seeds"]}


def train(
    names: Iterable[str],
    folder: Path | None = None,
    seeds: Sequence[int] = SEEDS,
) -> None:
    """Run studies and write their results, each when it is done.

    Args:
        names: The studies.
        folder: Where to write; over the shipped files by default.
        seeds: One model of each kind per seed.

    Raises:
        ArgumentError: If there is no such study.
    """
    known = studies()
    for name in names:
        if name not in known:
            raise ArgumentError(f"Expected a study in {[*known]}, got {name!r}.")
        found = known[name].train(seeds)
        content = {
            "format": FORMAT,
            "study": name,
            "seeds": list(seeds),
            "versions": {p: importlib.metadata.version(p) for p in _VERSIONS},
            "results": dict(found),
        }
        write_fields(content, _path(name, folder))


def _path(name: str, folder: Path | None) -> Path:
    shipped = files("equiv.theory.trained").joinpath("results")
    return (folder or Path(str(shipped))) / f"{name}.json"
