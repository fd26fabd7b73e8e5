"""`Update`: ΔW by parameter name."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from equiv.arguments import as_integers, as_number, as_seed
from equiv.errors import UpdateError, UpdateMismatchError
from equiv.update.low_rank import Delta, LowRank, norm_of

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Update:
    """A weight update: parameter name → difference (a tensor, or low-rank factors).

    Attributes:
        deltas: The differences, each in the shape of its parameter.
        base_norms: Frobenius norms of the parameters they belong to, where known.
        source: Where it came from, in a few words.

    Example:
        >>> update = Update.from_dict({"weight": torch.tensor([[3.0, 4.0]])})
        >>> update.norm(), update.scaled(0.5).norm()
        (5.0, 2.5)
    """

    deltas: Mapping[str, Delta]
    base_norms: Mapping[str, float]
    source: str = "update"

    def __repr__(self) -> str:
        count = len(self.deltas)
        return f"Update({self.source}: {count} parameters, norm {self.norm():.3g})"

    @classmethod
    def from_dict(
        cls, deltas: Mapping[str, Delta], *, source: str = "update"
    ) -> "Update":
        """An update from parameter name → difference.

        Raises:
            UpdateError: If it is no mapping or empty, or an entry is no dense floating
                tensor or not finite.
        """
        if not isinstance(deltas, Mapping):
            raise UpdateError(
                "Expected a mapping of parameter name → difference, got "
                f"{type(deltas).__name__}."
            )
        if not deltas:
            raise UpdateError(
                "The update is empty: expected at least one parameter name → tensor."
            )
        for name, delta in deltas.items():
            _check_delta(name, delta)
        return cls(dict(deltas), {}, source)

    @classmethod
    def from_state_dicts(
        cls,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        *,
        source: str = "fine-tune",
    ) -> "Update":
        """Tuned − base, in float64, where the two differ.

        Raises:
            UpdateMismatchError: If the two have different names or shapes.
            UpdateError: If they are equal everywhere.
        """
        if missing := sorted(base.keys() ^ tuned.keys()):
            side = "tuned" if missing[0] in base else "base"
            raise UpdateMismatchError(
                f"Expected the same parameters on both sides, but {len(missing)} are "
                f"on one side only: `{missing[0]}` is missing from {side}."
            )
        deltas: dict[str, Delta] = {}
        norms: dict[str, float] = {}
        for name, weight in base.items():
            other = tuned[name]
            if weight.shape != other.shape:
                raise UpdateMismatchError(
                    f"`{name}` has shape {tuple(weight.shape)} in base and "
                    f"{tuple(other.shape)} in tuned. Resized embeddings cannot be "
                    "compared: resize the base in the same way first."
                )
            if not weight.is_floating_point() or torch.equal(weight, other):
                continue
            difference = other.detach().double() - weight.detach().double().to(
                other.device
            )
            deltas[name] = difference
            norms[name] = norm_of(weight.detach())
        if not deltas:
            raise UpdateError(
                "The update is empty: base and tuned are equal everywhere."
            )
        update = cls.from_dict(deltas, source=source)
        return cls(update.deltas, norms, source)

    @classmethod
    def between(cls, base: nn.Module, tuned: nn.Module) -> "Update":
        """Tuned − base for two models of one architecture.

        Raises:
            UpdateMismatchError: If their parameters differ in name or shape, or their
                buffers in value.
            UpdateError: If one is no model, they are one and the same, or equal
                everywhere.
        """
        for name, model in (("base", base), ("tuned", tuned)):
            if not isinstance(model, nn.Module):
                raise UpdateError(
                    f"Expected `{name}` to be a `torch.nn.Module`, got "
                    f"{type(model).__name__}. For state dicts there is "
                    "`Update.from_state_dicts`."
                )
        if base is tuned:
            raise UpdateError(
                "Base and tuned are the same object, so their difference is zero. Pass "
                "a copy made before training (`copy.deepcopy(model)`)."
            )
        _check_buffers(base, tuned)
        return cls.from_state_dicts(
            dict(base.named_parameters()),
            dict(tuned.named_parameters()),
            source=f"fine-tune of {type(base).__name__}",
        )

    @classmethod
    def from_peft(
        cls, adapted: "PeftModel | str | Path", base: nn.Module | None = None
    ) -> "Update":
        """The update that a PEFT adapter makes; plain LoRA stays in factors.

        Args:
            adapted: A `PeftModel`, or the directory of an adapter in safetensors.
            base: The base. Needed for a directory unless it holds plain LoRA or BEFT,
                and for adapters that changed the base's own weights (`bias="all"`,
                PiSSA).

        Raises:
            UpdateError: If it is no adapter, is merged, or of a kind that cannot be
                merged.
            FileFormatError: If the directory holds no adapter in safetensors.
        """
        from equiv.update.adapters import from_directory, from_model, is_peft

        if isinstance(adapted, (str, Path)):
            return from_directory(adapted, base)
        if not is_peft(adapted):
            raise UpdateError(
                "Expected a `PeftModel` or the directory of an adapter, got "
                f"{type(adapted).__name__}. A tuned model goes to "
                "`Update.between(base, tuned)`."
            )
        return from_model(adapted, base)

    @classmethod
    def random(cls, model: nn.Module, relative_norm: float, seed: int) -> "Update":
        """Independent normal differences, each `relative_norm` times its parameter.

        Parameters that are zero everywhere are left alone.

        Raises:
            ArgumentError: If the norm is not positive and finite, or the seed none.
        """
        relative_norm = as_number(
            "relative_norm",
            relative_norm,
            "a finite number > 0",
            lambda found: 0 < found < math.inf,
        )
        seed = as_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        deltas: dict[str, Delta] = {}
        norms: dict[str, float] = {}
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            size = norm_of(weight.detach())
            if size == 0:
                continue
            deltas[name] = (noise * (relative_norm * size / noise.norm())).to(
                weight.device
            )
            norms[name] = size
        source = f"random update, relative norm {relative_norm:g}, seed {seed}"
        return cls(cls.from_dict(deltas).deltas, norms, source)

    def scaled(self, t: float) -> "Update":
        """T times the update.

        Raises:
            ArgumentError: If t is no finite number.
        """
        t = as_number("t", t)
        deltas = {
            name: delta.scaled(t) if isinstance(delta, LowRank) else delta * t
            for name, delta in self.deltas.items()
        }
        return Update(deltas, self.base_norms, f"{t:g} × {self.source}")

    def restricted(
        self,
        *,
        layers: Iterable[int] | None = None,
        names: str | Iterable[str] | None = None,
    ) -> "Update":
        """The part of the update in some layers or parameters.

        Args:
            layers: Block indices: keeps names with such a number between two dots.
            names: Glob pattern or patterns on the full parameter name.

        Raises:
            UpdateError: If nothing is left.
            ArgumentError: If `layers` are no integers.
        """
        kept = dict(self.deltas)
        if layers is not None:
            wanted = set(as_integers("layers", layers))
            kept = {n: d for n, d in kept.items() if _layer_of(n) in wanted}
        if names is not None:
            patterns = [names] if isinstance(names, str) else list(names)
            kept = {
                n: d
                for n, d in kept.items()
                if any(fnmatchcase(n, p) for p in patterns)
            }
        if not kept:
            raise UpdateError(
                f"Nothing of the update is left: no parameter among {len(self.deltas)} "
                f"is in layers={layers!r}, names={names!r}."
            )
        norms = {name: norm for name, norm in self.base_norms.items() if name in kept}
        return Update(kept, norms, f"part of {self.source}")

    def norm(self) -> float:
        """Frobenius norm over all entries."""
        return math.sqrt(sum(norm_of(delta) ** 2 for delta in self.deltas.values()))

    def relative_norm(self, model: nn.Module | None = None) -> float:
        """Norm relative to that of the parameters it touches.

        Raises:
            UpdateError: If the base is not known and no model is given.
        """
        norms = dict(self.base_norms)
        if model is not None:
            weights = dict(model.named_parameters(remove_duplicate=False))
            norms = {n: norm_of(weights[n].detach()) for n in self.deltas}
        if not self.deltas.keys() <= norms.keys():
            raise UpdateError(
                "The weights that this update belongs to are not known. Pass the "
                "model: `update.relative_norm(model)`."
            )
        base = math.sqrt(sum(norms[name] ** 2 for name in self.deltas))
        return self.norm() / base if base else math.inf


def _check_buffers(base: nn.Module, tuned: nn.Module) -> None:
    """Refuse models whose stored buffers (running means, say) differ."""
    mine, theirs = (_stored_buffers(model) for model in (base, tuned))
    for name in mine.keys() & theirs.keys():
        a, b = mine[name], theirs[name]
        rounding = max(torch.finfo(x.dtype).eps for x in (a, b))
        same = a.shape == b.shape and torch.allclose(
            a.double(), b.double().to(a.device), rtol=rounding, atol=0, equal_nan=True
        )
        if not same:
            raise UpdateMismatchError(
                f"`{name}` differs between base and tuned, but it is a buffer: it has "
                "no derivative here, and without it the tuned model would be another "
                "one. Copy the base's buffers into the tuned model, or tune with its "
                "norms in eval mode."
            )


def _stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: value
        for name, value in model.state_dict().items()
        if name not in parameters and value.is_floating_point()
    }


def _layer_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _check_delta(name: str, delta: object) -> None:
    if not isinstance(name, str):
        raise UpdateError(f"Expected parameter names as keys, got {name!r}.")
    parts = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise UpdateError(
                f"Expected a tensor for `{name}`, got {type(part).__name__}."
            )
        if part.layout != torch.strided:
            raise UpdateError(
                f"Expected a dense tensor for `{name}`, got layout {part.layout}: call "
                "`.to_dense()`."
            )
        if not part.is_floating_point():
            raise UpdateError(
                f"Expected a floating dtype for `{name}`, got {part.dtype}."
            )
        if part.is_meta:
            raise UpdateError(
                f"`{name}` of the update is on the meta device: no values."
            )
        if not bool(torch.isfinite(part).all()):
            count = int((~torch.isfinite(part)).sum())
            raise UpdateError(
                f"`{name}` of the update has {count} NaN or infinite entries. Expected "
                "finite numbers: did the fine-tuning diverge?"
            )
