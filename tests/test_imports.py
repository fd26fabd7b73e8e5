"""How the house is built: imports go one way and are light, names are kept."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import equiv

ROOT = Path(equiv.__file__).parent
# From the ground up: a room may import from itself and from rooms before it.
ROOMS = (
    "errors",
    "arguments",
    "writing",
    "fields",
    "kernels",
    "model",
    "update",
    "shift",
    "steering",
    "behaviour",
    "targets",
    "report",
    "designing",
    "settings",
    "progress",
    "measuring",
    "checking",
    "gate",
    "tasks",
    "adapt",
    "demo",
    "testing",
    "theory",
    "cli",
)
PUBLIC = (
    "check",
    "shifts",
    "Shift",
    "fit",
    "fit_sequential",
    "fit_downstream",
    "reach",
    "Reach",
    "steer",
    "sweep",
    "save",
    "load",
    "to_weights",
    "to_steering",
    "WeightEdit",
    "Steering",
    "calibrate",
    "evaluate",
    "read_texts",
    "fit_behaviour",
    "fit_steering",
    "Evaluation",
    "Site",
    "SteeringSet",
    "Vector",
    "Affine",
    "LoReFT",
    "LowRankMLP",
    "Heads",
    "Overwrite",
    "Offset",
    "Custom",
    "Update",
    "Report",
    "design",
    "Design",
    "EquivError",
    "assert_same",
    "compare",
    "diagnose",
    "Agreement",
    "Diagnosis",
    "Completions",
    "TopK",
)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Modules of `equiv` that a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return [name for name in found if name.split(".")[0] == "equiv"]


def test_imports_go_one_way() -> None:
    files = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]
    assert len(files) > 40
    for path in files:
        place = ROOMS.index(room_of(path))
        for name in imported(path):
            room = name.split(".")[1]
            assert ROOMS.index(room) <= place, f"{path} imports {name}"


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_public_names_are_no_modules() -> None:
    """Importing a module of the same name would put it in the function's place."""
    code = f"""
import importlib, inspect, json, pkgutil
import equiv
for found in pkgutil.walk_packages(equiv.__path__, "equiv."):
    if "demo.train" not in found.name:
        importlib.import_module(found.name)
print(json.dumps([n for n in {PUBLIC!r} if inspect.ismodule(getattr(equiv, n))]))
"""
    assert json.loads(fresh(code)) == []
    for name in PUBLIC:
        assert callable(getattr(equiv, name))


def test_importing_is_light() -> None:
    """Heavy packages are imported where they are used."""
    heavy = ("transformers", "peft", "pandas", "matplotlib", "scipy.stats", "jinja2")
    heavy = (*heavy, "typer", "hypothesis", "torch._dynamo", "triton", "gguf")
    code = f"""
import sys, equiv
print([name for name in {heavy!r} if name in sys.modules])
"""
    assert fresh(code) == "[]"


def test_every_public_name_is_documented() -> None:
    for name in PUBLIC:
        text = getattr(equiv, name).__doc__
        assert text and len(text) > 60, name
    for name in ("check", "shifts", "fit", "fit_sequential", "steer"):
        text = getattr(equiv, name).__doc__
        for part in ("Args:", "Raises:", "Example:"):
            assert part in text, (name, part)


def test_errors_are_children_of_one() -> None:
    from equiv import errors

    for name, kind in vars(errors).items():
        if isinstance(kind, type):
            assert issubclass(kind, (equiv.EquivError, Warning)), name
            assert getattr(equiv, name) is kind
            assert kind.__doc__
    assert issubclass(equiv.NotEquivalentError, AssertionError)
