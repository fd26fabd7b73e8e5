"""The part of an update that belongs to one stage: dense differences and factors."""

from collections import Counter

from torch import Tensor, nn

from equiv.model.factors import takes_factors
from equiv.model.stages import Stage, StagedModel
from equiv.update.entries import factored_at
from equiv.update.low_rank import LowRank
from equiv.update.update import Update


def low_rank_names(model: nn.Module, update: Update) -> list[str]:
    """Names of the update's entries that can be applied beside their weights.

    A tied weight is used by more than one module; its update has to be dense. No entry
    is read for this.
    """
    modules = dict(model.named_modules())
    own = dict(model.named_parameters())
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        name
        for name in update.deltas
        if factored_at(update.deltas, name)
        and name.endswith(".weight")
        and uses[id(own[name])] == 1
        and takes_factors(modules[name.rpartition(".")[0]])
    ]


class StageUpdate:
    """The update of one stage in the compute dtype: dense part and factors."""

    def __init__(self, cut: StagedModel, stage: Stage, update: Update, low: set[str]):
        own = {
            name: update.deltas[name] for name in stage.names if name in update.deltas
        }
        if stage.name in ("embed", "bridge"):
            cut.check_update(stage, own)
        self.dense: dict[str, Tensor] = {}
        self.low: dict[str, tuple[Tensor, Tensor]] = {}
        for name, delta in own.items():
            if isinstance(delta, LowRank) and name in low:
                self.low[name] = (delta.left.to(cut.dtype), delta.right.to(cut.dtype))
            else:
                full = delta.dense() if isinstance(delta, LowRank) else delta
                self.dense[name] = full.to(cut.dtype)

    def __bool__(self) -> bool:
        return bool(self.dense or self.low)
