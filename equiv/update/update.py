"""`Update`: ΔW by parameter name."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from equiv.arguments import as_integers, as_number, as_seed
from equiv.errors import UpdateError
from equiv.update.diff import UpdateDiff, diff_of
from equiv.update.differences import check_buffers, differences
from equiv.update.entries import check_delta, mapped, norm_at, some
from equiv.update.low_rank import Delta, LowRank
from equiv.update.noise import noise
from equiv.update.spectra import matrix_at, singular_values, stable_rank
from equiv.update.summary import Summary, layer_of, summary_of
from equiv.update.sums import added
from equiv.update.ties import norms_in

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
        >>> import torch
        >>> update = Update.from_dict({"weight": torch.tensor([[3.0, 4.0]])})
        >>> update.norm(), (0.5 * update).norm(), (update - update).norm()
        (5.0, 2.5, 0.0)
    """

    deltas: Mapping[str, Delta]
    base_norms: Mapping[str, float]
    source: str = "update"

    def __repr__(self) -> str:
        count = len(self.deltas)
        return f"Update({self.source}: {count} parameters, norm {self.norm():.3g})"

    def __str__(self) -> str:
        return str(self.summary())

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
            check_delta(name, delta)
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
        deltas, norms = differences(base, tuned)
        return cls(deltas, norms, source)

    @classmethod
    def between(
        cls, base: "nn.Module | str | Path", tuned: "nn.Module | str | Path"
    ) -> "Update":
        """Tuned − base: two models of one architecture, or their folders.

        Folders hold safetensors, in one file or in shards; of a training run, any
        `checkpoint-…` folder. They are read one weight at a time, now and again
        whenever an entry is looked at: leave them, and a model compared with one, as
        they are. Of two folders the update has the names in their files.

        Raises:
            UpdateMismatchError: If their parameters differ in name or shape, or their
                buffers in value.
            UpdateError: If one is no model, they are one and the same, or equal
                everywhere.
            FileFormatError: If a folder holds no weights in safetensors.
        """
        from equiv.update.checkpoints import as_models, from_folders

        if isinstance(tuned, (str, Path)):
            return from_folders(base, tuned)
        base, tuned = as_models(base, tuned)
        if base is tuned:
            raise UpdateError(
                "Base and tuned are the same object, so their difference is zero. Pass "
                "a copy made before training (`copy.deepcopy(model)`)."
            )
        check_buffers(base, tuned)
        return cls.from_state_dicts(
            dict(base.named_parameters()),
            dict(tuned.named_parameters()),
            source=f"fine-tune of {type(base).__name__}",
        )

    @classmethod
    def from_peft(
        cls,
        adapted: "PeftModel | nn.Module | str | Path",
        base: nn.Module | None = None,
    ) -> "Update":
        """The update that a PEFT adapter makes; plain LoRA stays in factors.

        Args:
            adapted: A `PeftModel`, a model of transformers with adapters in it, or the
                directory of an adapter in safetensors.
            base: The base. Needed for a directory unless it holds plain LoRA or BEFT,
                and for adapters that changed the base's own weights (`bias="all"`,
                PiSSA).

        Raises:
            UpdateError: If it is no adapter, is merged, or of a kind that cannot be
                merged.
            FileFormatError: If the directory holds no adapter in safetensors.
        """
        from equiv.update.adapters import from_directory, from_model, has_adapters

        if isinstance(adapted, (str, Path)):
            return from_directory(adapted, base)
        if not has_adapters(adapted):
            raise UpdateError(
                "Expected a `PeftModel` or the directory of an adapter, got "
                f"{type(adapted).__name__} without any. A tuned model goes to "
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
        deltas, norms = noise(model, relative_norm, seed)
        source = f"random update, relative norm {relative_norm:g}, seed {seed}"
        return cls(cls.from_dict(deltas).deltas, norms, source)

    def scaled(self, t: float) -> "Update":
        """T times the update, in float64.

        Raises:
            ArgumentError: If t is no finite number.
        """
        t = as_number("t", t)

        def change(_: str, delta: Delta) -> Delta:
            return delta.scaled(t) if isinstance(delta, LowRank) else delta.double() * t

        deltas = mapped(self.deltas, change, abs(t))
        return Update(deltas, self.base_norms, f"{t:g} × {self._operand()}")

    def __mul__(self, t: float) -> "Update":
        """`update * t`; see `scaled`."""
        return self.scaled(t)

    __rmul__ = __mul__

    def __neg__(self) -> "Update":
        """What undoes the update."""
        return replace(self.scaled(-1), source=f"−{self._operand()}")

    def __add__(self, other: "Update") -> "Update":
        """Both updates at once; factors stay factors, side by side.

        An entry that one of the two lacks is zero there.

        Raises:
            UpdateMismatchError: If they belong to different models.
            UpdateError: If factors from a folder lie on a square weight and the other
                does not say which way round it is.
        """
        if not isinstance(other, Update):
            return NotImplemented
        return self._with(other, f"{self.source} + {other.source}")

    def __sub__(self, other: "Update") -> "Update":
        """This update without the other; see `+`."""
        if not isinstance(other, Update):
            return NotImplemented
        source = f"{self.source} − {other._operand()}"
        return self._with(other.scaled(-1), source)

    def _with(self, other: "Update", source: str) -> "Update":
        norms = {**other.base_norms, **self.base_norms}
        return Update(added(self.deltas, other.deltas), norms, source)

    def _operand(self) -> str:
        """The source, in brackets where it is a sum."""
        is_sum = " + " in self.source or " − " in self.source
        return f"({self.source})" if is_sum else self.source

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
        kept = list(self.deltas)
        if layers is not None:
            wanted = set(as_integers("layers", layers))
            kept = [name for name in kept if layer_of(name) in wanted]
        if names is not None:
            patterns = [names] if isinstance(names, str) else list(names)
            kept = [n for n in kept if any(fnmatchcase(n, p) for p in patterns)]
        if not kept:
            raise UpdateError(
                f"Nothing of the update is left: no parameter among {len(self.deltas)} "
                f"is in layers={layers!r}, names={names!r}."
            )
        norms = {name: norm for name, norm in self.base_norms.items() if name in kept}
        deltas = some(self.deltas, {name: name for name in kept})
        return Update(deltas, norms, f"part of {self._operand()}")

    def norm(self) -> float:
        """Frobenius norm over all entries."""
        return math.hypot(*(norm_at(self.deltas, name) for name in self.deltas))

    def relative_norm(self, model: nn.Module | None = None) -> float:
        """Norm relative to that of the parameters it touches.

        Raises:
            UpdateError: If the base is not known and no model is given.
            UpdateMismatchError: If the model lacks one of the parameters.
        """
        norms = self.base_norms if model is None else norms_in(model, self.deltas)
        if not self.deltas.keys() <= norms.keys():
            raise UpdateError(
                "The weights that this update belongs to are not known. Pass the "
                "model: `update.relative_norm(model)`."
            )
        base = math.hypot(*(norms[name] for name in self.deltas))
        return self.norm() / base if base else math.inf

    def singular_values(self, name: str) -> Tensor:
        """Singular values of one matrix of the update, float64, from the largest down.

        Of factors they come from QR and a small SVD, and the matrix is never made.

        Raises:
            UpdateMismatchError: If the update has no such entry.
            UpdateError: If the entry is no matrix.
        """
        return singular_values(matrix_at(self.deltas, name))

    def stable_rank(self, name: str) -> float:
        """‖Δ‖²_F / ‖Δ‖²₂ of one matrix: how many directions carry it.

        Raises:
            UpdateMismatchError: If the update has no such entry.
            UpdateError: If the entry is no matrix.
        """
        return stable_rank(self.singular_values(name))

    def summary(
        self, model: nn.Module | None = None, *, spectra: bool = False
    ) -> Summary:
        """Which blocks and kinds of weight the update touches; print it for a table.

        Args:
            model: The base, for norms relative to its weights.
            spectra: Whether to give stable ranks; of a dense matrix that takes an SVD.

        Raises:
            UpdateMismatchError: If the model lacks one of the parameters.

        Example:
            >>> import torch
            >>> deltas = {f"h.{i}.up.weight": (i + 1) * torch.eye(2) for i in range(2)}
            >>> print(Update.from_dict(deltas, source="mine").summary(spectra=True))
            mine
            2 parameters, blocks 0–1, norm 3.16
            <BLANKLINE>
            weight  blocks  count  form   norm  share of norm²  stable rank
            up      0–1         2  dense  3.16           100 %          2.0
        """
        norms = self.base_norms if model is None else norms_in(model, self.deltas)
        return summary_of(self.source, self.deltas, norms, spectra=spectra)

    def diff(self, other: "Update") -> UpdateDiff:
        """This update beside another: what only one of them moves, and their cosine.

        Raises:
            UpdateMismatchError: If they belong to different models.
            UpdateError: If the other is no update.

        Example:
            >>> import torch
            >>> one = Update.from_dict({"a": torch.ones(2)}, source="one")
            >>> two = Update.from_dict({"b": torch.ones(1)}, source="two")
            >>> print(one.diff(one + two))
            in both: 1, cosine 0.816
            only in one + two: 1 (b)
        """
        if not isinstance(other, Update):
            raise UpdateError(f"Expected an `Update`, got {type(other).__name__}.")
        return diff_of((self.source, self.deltas), (other.source, other.deltas))
