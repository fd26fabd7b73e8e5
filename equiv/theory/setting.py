"""What a claim is tested in: a model, an update, inputs, and what is measured of them.

A test gets what its parameters name:

    model       the base model, in eval mode; leave it as it is
    update      the `equiv.Update`, fitted to the model
    inputs      a list of `Batch`: small batches, nothing padded that came unpadded
    tokenizer   the one given, or None
    report      what `equiv.check` says on these inputs: orders, radii, fits, ladder
    shifts      (layer, site) → `equiv.Shift`, every site, float64, on at most
                `SHIFT_TOKENS` tokens
    setting     all of this as one object, and `setting.random`: whether the inputs are
                drawn token ids, good for the calculus only
    norm        a `Norm`: Euclidean unless the caller chose another; changes are
                measured in it by `setting.squared` and `setting.share`
    seed        an integer: draw from it and from nothing else
    results     for claims about trained models: what their study found

`report` and `shifts` are measured when the first test asks for them, once for all. A
test that names none of the first seven needs no model, and is run once however many
updates there are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from equiv.checking import check
from equiv.errors import SiteError, UpdateError
from equiv.model.batches import Batch, at_most
from equiv.model.blocks import Blocks
from equiv.model.choosing import block_sites
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.model.stages import StagedModel, staged
from equiv.report.report import Report
from equiv.shift.activations import Shift, Shifts
from equiv.shift.calculus import Curve, RowKey, Selection, curves
from equiv.shift.stage_update import low_rank_names
from equiv.theory.carrying import carried
from equiv.theory.norms import Norm
from equiv.theory.parts import in_blocks
from equiv.update.inputs import inputs_for
from equiv.update.sources import resolve
from equiv.update.update import Update

OF_MODEL = ("model", "update", "inputs", "tokenizer", "report", "shifts", "setting")
# What a test may ask for.
OFFERED = (*OF_MODEL, "norm", "seed", "results")
SHIFT_TOKENS = 1024
CURVE_TOKENS = 256
# Of small updates the coarser of these lie above rounding, of large ones the finer
# below the radius.
CURVE_SCALES = tuple(2.0**-k for k in range(3, 11))


@dataclass(frozen=True)
class Setting:
    """One model, one update, one set of inputs.

    Attributes:
        name: What the update is called in findings.
        given: The inputs as the caller gave them; they are read more than once.
    """

    name: str
    model: nn.Module
    update: Update
    given: object
    tokenizer: Any
    norm: Norm
    seed: int

    @property
    def setting(self) -> "Setting":
        """This, for tests that want all of it."""
        return self

    @property
    def random(self) -> bool:
        """Whether the inputs are drawn token ids."""
        return self.given is None

    @cached_property
    def inputs(self) -> list[Batch]:
        """The inputs as batches."""
        with measured(self.model):
            found = inputs_for(
                self.model, self.update, self.given, self.tokenizer, self.seed
            )
        return found[1]

    @cached_property
    def report(self) -> Report:
        """Everything that `equiv.check` measures."""
        return check(
            self.model,
            self.update,
            self.given,
            tokenizer=self.tokenizer,
            seed=self.seed,
        )

    @cached_property
    def few(self) -> list[Batch]:
        """The inputs that `shifts` is measured on."""
        return at_most(self.inputs, SHIFT_TOKENS, self.seed)

    @cached_property
    def in_blocks(self) -> "Setting":
        """The same with only the part of the update that lies in the blocks.

        Itself where all of it does.

        Raises:
            UnsupportedModelError: If the model has no blocks.
            UpdateError: If nothing of the update lies in them.
        """
        part = in_blocks(self.model, self.update)
        if part is None:
            raise UpdateError("The update changes no block.")
        return self if part is self.update else replace(self, update=part)

    @cached_property
    def curves(self) -> dict[RowKey, Curve]:
        """Remainders by scale, (layer, site, scope) → curve, at every site, float64."""
        with self.opened() as (cut, low):
            sites = self._sites or cut.stages[0].sites
            chosen = Selection(frozenset(cut.layers), sites)
            return curves(
                cut, self.update, low=low, selection=chosen, scales=CURVE_SCALES
            )

    @contextmanager
    def opened(self) -> Iterator[tuple[StagedModel, list[str]]]:
        """The model in stages on `CURVE_TOKENS` tokens, every site, in float64.

        Yields:
            The model, and the names of weights whose factors are applied beside them.
        """
        few = at_most(self.few, CURVE_TOKENS, self.seed)
        low = low_rank_names(self.model, self.update)
        dtype, sites = torch.float64, self._sites
        with (
            measured(self.model),
            staged(self.model, few, dtype, sites=sites, low_names=low) as cut,
        ):
            yield cut, low

    def squared(self, layer: int, site: str, change: Tensor) -> Tensor:
        """The squared length of a change at a site, per token, in the chosen norm.

        A norm that is defined on logits gets the change carried to them, to first
        order and at the base: what it would do to the model's answer.

        Args:
            layer: Index of the block.
            site: Name of the site.
            change: [sequences, tokens, d], laid out like the tensors of a `Shift`.

        Returns:
            [tokens that count], float64.
        """
        base = self.shifts[layer, site]
        if not self.norm.of_logits:
            return self.norm.squared(change, base.base)[base.mask]
        rows = self._rows()
        parts = [
            change[[rows.index(n) for n in batch.index], : batch.mask.shape[1]]
            for batch in self.few
        ]
        found = carried(self.model, self.few, layer, site, parts)
        lengths = {
            n: self.norm.squared(moved[i], output[i])[batch.mask[i]]
            for batch, (moved, output) in zip(self.few, found, strict=True)
            for i, n in enumerate(batch.index)
        }
        return torch.cat([lengths[n] for n in rows])

    def share(self, layer: int, site: str, rest: Tensor, whole: Tensor) -> float:
        """‖rest‖/‖whole‖ over all tokens, both changes at one site."""
        sizes = [self.squared(layer, site, part).sum() for part in (rest, whole)]
        return float((sizes[0] / sizes[1]).sqrt())

    def _rows(self) -> list[int]:
        """Which of the caller's sequences the rows of `shifts` are."""
        return sorted(n for batch in self.few for n in batch.index)

    @cached_property
    def shifts(self) -> dict[tuple[int, str], Shift]:
        """Exact, first-order and midpoint shifts at every site."""
        blocks = find_blocks(self.model)
        found = Shifts(
            self.model,
            self.update,
            self.few,
            torch.float64,
            self._sites,
            tuple(range(len(blocks.modules) if blocks else 1)),
        )
        return {(shift.layer, shift.site): shift for shift in found}

    @property
    def _sites(self) -> tuple[str, ...] | None:
        """The sites that all of the model's blocks have; `None` if it has no blocks.

        Some models have blocks of two kinds: mixtures of experts have no `mlp_hidden`.
        """
        blocks = find_blocks(self.model)
        if blocks is None:
            return None
        return tuple(s for s in block_sites(blocks, ["*"]) if _everywhere(blocks, s))


def _everywhere(blocks: Blocks, site: str) -> bool:
    """Whether all blocks have a site that should have it."""
    try:
        for layer in blocks.layers_with(site):
            blocks.place(layer, site)
    except SiteError:
        return False
    return True


def setting(
    name: str,
    model: nn.Module,
    update: object,
    inputs: object,
    tokenizer: Any,
    norm: Norm,
    seed: int,
) -> Setting:
    """A setting from whatever `equiv.check` takes.

    Raises:
        EquivError: If the update does not fit the model.
    """
    fitted = resolve(model, update)
    return Setting(name or fitted.source, model, fitted, inputs, tokenizer, norm, seed)
