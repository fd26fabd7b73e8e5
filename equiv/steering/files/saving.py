"""Steering in a file of its own: one safetensors file, with what is known of it.

The tensors are named layer/site/part. The metadata is JSON, under the one key `equiv`:

    format     "steering"
    version    of this format, 1
    sha256     digest of the tensors and of this JSON, with zeros in place of itself
    positions  which tokens are steered, as `equiv.steer` takes it
    entries    per steer: layer (from 0), site, read and write, form, dtype, its parts
               among the tensors, and the activation of a low-rank MLP
    about      what is known of it: `base`, the model it is for, and `update`, what it
               was made from, each with a digest (see `digests`); figures measured

What is read back is equal, bit for bit and dtype for dtype. Reading runs no code.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from equiv.errors import ArgumentError, FileFormatError
from equiv.model.families import model_type
from equiv.model.sites import SiteKey
from equiv.steering.files.contents import packed, unpacked
from equiv.steering.files.digests import bare, update_digest, weights_digest
from equiv.steering.files.notes import as_notes, from_notes
from equiv.steering.forms.form import Steering
from equiv.steering.forms.steering_set import SteeringSet, as_set
from equiv.update.update import Update
from equiv.writing import write_bytes


def save(
    steering: Mapping[SiteKey, Steering],
    path: str | Path,
    *,
    model: nn.Module | None = None,
    update: Update | None = None,
) -> None:
    """Write steering to one safetensors file; the file is whole or absent.

    Args:
        steering: (layer, site) → steering, with what it says of itself.
        path: The file.
        model: The model that it steers: its name and the digest of its weights are
            kept, so that `load` can tell it from others.
        update: What the steering was made from; its source and digest are kept.

    Raises:
        ArgumentError: If a steer is no map of numbers (a `Custom`, an `Overwrite`, an
            `Offset`), or the folder does not exist.

    Example:
        >>> import tempfile, torch
        >>> from equiv.steering.forms.vector import Vector
        >>> steering = {(0, "mlp_out"): Vector(torch.ones(4))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(steering, f"{folder}/steering.safetensors")
        ...     load(f"{folder}/steering.safetensors")[0, "mlp_out"]
        Vector(vector=tensor([1., 1., 1., 1.]))
    """
    chosen = as_set(steering)
    about = as_notes({**chosen.about, **_origin(model, update)})
    write_bytes(Path(path), packed(chosen, chosen.positions, about))


def load(path: str | Path, *, model: nn.Module | None = None) -> SteeringSet:
    """Read steering that `equiv.save` wrote; no code is run.

    Args:
        path: The file.
        model: The model that is to be steered: it has to be the one that the file was
            saved for, in any dtype (see `equiv.steering.files.digests.weights_digest`).

    Returns:
        The steering, with `about["base"]` and `about["update"]` where it was saved
        with them.

    Raises:
        FileFormatError: If the file is missing, damaged, changed since it was written,
            of another format or version, or for another model; the message says which.

    Example:
        See `equiv.save`.
    """
    path = Path(path)
    entries, content = unpacked(path)
    found = SteeringSet(entries, content.positions, from_notes(content.about))
    if model is not None:
        _check_model(found, model, path)
    return found


def _origin(model: object, update: object) -> dict[str, dict[str, object]]:
    """What is kept of the model and the update."""
    found: dict[str, dict[str, object]] = {}
    if model is not None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                "Expected `model` to be a `torch.nn.Module`, got "
                f"{type(model).__name__}."
            )
        inner = bare(model)
        config = getattr(inner, "config", None)
        found["base"] = {
            "model": type(inner).__name__,
            "family": model_type(inner),
            "name": getattr(config, "_name_or_path", "") or None,
            "revision": getattr(config, "_commit_hash", None),
            "sha256": weights_digest(model),
        }
    if update is not None:
        if not isinstance(update, Update):
            raise ArgumentError(
                "Expected `update` to be an `equiv.Update`, got "
                f"{type(update).__name__}."
            )
        found["update"] = {"source": update.source, "sha256": update_digest(update)}
    return found


def _check_model(found: SteeringSet, model: nn.Module, path: Path) -> None:
    base = found.about.get("base")
    if not isinstance(base, Mapping) or "sha256" not in base:
        raise FileFormatError(
            f"{path} does not say which model it is for: it was saved without `model=`."
        )
    if (actual := weights_digest(model)) != base["sha256"]:
        name = f" {base['name']}" if base.get("name") else ""
        raise FileFormatError(
            f"{path} is for another model: {base.get('model')}{name} with weights "
            f"{base['sha256'][:12]}…, but this {type(model).__name__} has "
            f"{actual[:12]}…. Without `model` it is read all the same."
        )
