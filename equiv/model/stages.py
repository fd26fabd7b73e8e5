"""A model ready to be run stage by stage, its sites proven to be where they should."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from equiv.errors import EquivError, InputsError
from equiv.model.batches import Batch
from equiv.model.families import find_blocks
from equiv.model.precision import arithmetic
from equiv.model.probe import prove
from equiv.model.staged_model import Stage as Stage
from equiv.model.staged_model import StagedModel as StagedModel


def _described(batch: Batch) -> str:
    """The arguments of a call with their shapes, for messages."""
    return ", ".join(
        f"{name or 'input'} {tuple(value.shape)}"
        for name, value in batch.arguments.items()
        if isinstance(value, Tensor)
    )


@contextmanager
def staged(
    model: nn.Module,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    *,
    sites: Sequence[str] | None = None,
    low_names: Sequence[str] = (),
) -> Iterator[StagedModel]:
    """Cut a model into stages; nothing of it is left on the model afterwards.

    Args:
        model: The model, ready to be measured (see `guard.measured`).
        batches: The batches that will be run.
        dtype: Compute dtype; parameters are cast stage by stage.
        sites: Sites to capture; `None` means all.
        low_names: Weights that will be given low-rank updates.

    Raises:
        InputsError: If the model cannot be run on the batches.
        SiteError: If a site does not exist.
    """
    cut = prepared(model, batches, dtype, sites)
    with cut.ready(low_names):
        yield cut


def prepared(
    model: nn.Module,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    sites: Sequence[str] | None,
) -> StagedModel:
    """A model cut into stages, to be run inside `ready`; arguments as for `staged`."""
    with arithmetic(dtype):
        cut = StagedModel(model, find_blocks(model), batches, dtype)
        try:
            cut.cut(sites)
            prove(cut)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            if isinstance(error, EquivError):
                raise
            raise InputsError(
                f"{type(model).__name__} cannot be run on these inputs "
                f"({_described(batches[0])}): {str(error).rstrip('.')}."
            ) from error
    return cut
