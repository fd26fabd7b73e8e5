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
    norm        a `Norm`: Euclidean unless the caller chose another
    seed        an integer: draw from it and from nothing else
    results     for claims about trained models: what their study found

`report` and `shifts` are measured when the first test asks for them, once for all. A
test that names none of the first seven needs no model, and is run once however many
updates there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from equiv.checking import check
from equiv.model.batches import Batch, at_most
from equiv.model.choosing import block_sites
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.report.report import Report
from equiv.shift.activations import Shift, Shifts
from equiv.theory.norms import Norm
from equiv.update.inputs import inputs_for
from equiv.update.sources import resolve
from equiv.update.update import Update

OF_MODEL = ("model", "update", "inputs", "tokenizer", "report", "shifts", "setting")
# What a test may ask for.
OFFERED = (*OF_MODEL, "norm", "seed", "results")
SHIFT_TOKENS = 1024


@dataclass(frozen=True)
class Setting:
    """One model, one update, one set of inputs.

    Attributes:
        name: What the update is called in findings.
        given: The inputs as the caller gave them.
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
    def shifts(self) -> dict[tuple[int, str], Shift]:
        """Exact, first-order and midpoint shifts at every site."""
        blocks = find_blocks(self.model)
        few = at_most(self.inputs, SHIFT_TOKENS, self.seed)
        found = Shifts(
            self.model,
            self.update,
            few,
            torch.float64,
            block_sites(blocks, ["*"]) if blocks else None,
            tuple(range(len(blocks.modules) if blocks else 1)),
        )
        return {(shift.layer, shift.site): shift for shift in found}


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
    given = list(inputs) if isinstance(inputs, Iterator) else inputs
    fitted = resolve(model, update)
    return Setting(name or fitted.source, model, fitted, given, tokenizer, norm, seed)
