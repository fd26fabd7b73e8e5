"""The tuned model at any scale of the update, and the base under steering: outputs.

Both are paths: functions of the scale t from batches to outputs. Their derivatives in
t are had by forward mode, their second ones by central differences of these, never by
nested `jvp`, which is silently wrong through `F.layer_norm`.

    tuned(t)      the model at W + tΔW
    steered(t)    the base with t · s_l(h̃_l) added at block_out of each steered block

`s_l` is a `Steering`, or a tensor laid out like those of `setting.shifts`: an offset
per token, whatever the state h̃_l of the steered run is there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from equiv.model.batches import Batch
from equiv.model.factors import UnusedFactorsError
from equiv.model.guard import measured
from equiv.model.sites import LOGITS
from equiv.model.stages import Stage, StagedModel, staged
from equiv.shift.activations import Shift
from equiv.shift.derivative import derived
from equiv.shift.measures import counted
from equiv.shift.stage_update import StageUpdate, low_rank_names
from equiv.steering.forms.form import Steering
from equiv.theory.divergence import divergence
from equiv.theory.norms import Norm
from equiv.theory.orders import ROUNDING
from equiv.theory.parts import blocks_of
from equiv.theory.setting import Setting
from equiv.update.update import Update

# (batch, t, step): the output at t + step, where only the step may carry a tangent.
Path = Callable[[int, float, Tensor], Tensor]
# A central difference is off by e²/6 times the third derivative of what is differenced,
# and by 1e-16 / e of rounding: both near 1e-9 where derivatives are of one size.
STEP = 2.0**-14
# Many scales and several steers are run on this much of the setting's few.
TOKENS = 256


class Runs:
    """Outputs of one model on few tokens; use `runs(setting)`.

    Attributes:
        cut: The model, ready to be run.
        base: Its output, batch by batch.
    """

    def __init__(self, cut: StagedModel, low: set[str], rows: Sequence[int]) -> None:
        self.cut, self._low, self._rows = cut, low, list(rows)
        self._tensors = [cut.tensors(stage) for stage in cut.stages]
        self._inputs = [self._streams(batch) for batch in self.batches]
        self.base = [streams.pop() for streams in self._inputs]

    @property
    def classes(self) -> bool:
        """Whether outputs are logits of several classes."""
        return self.cut.output_site == LOGITS and self.base[0].shape[-1] > 1

    @property
    def batches(self) -> range:
        """Indices of the batches."""
        return range(len(self.cut.batches))

    def tuned(self, update: Update) -> Path:
        """The model at W + tΔW."""
        try:
            return self._tuned(update)
        except UnusedFactorsError as unused:
            # The weight is used in some way that a hook cannot see: make it dense.
            self._low -= unused.names
            return self.tuned(update)

    def _tuned(self, update: Update) -> Path:
        stages = self.cut.stages
        changes = [StageUpdate(self.cut, stage, update, self._low) for stage in stages]
        first = next((n for n, change in enumerate(changes) if change), len(stages))

        def path(batch: int, t: float, step: Tensor) -> Tensor:
            hidden = self._entering(first, batch)
            for n, stage in enumerate(stages[first:], first):
                own, change = self._tensors[n], changes[n]
                dense = {
                    name: own[name] + (t + step) * delta
                    for name, delta in change.dense.items()
                }
                hidden, _ = self.cut.run(
                    stage,
                    {**own, **dense},
                    hidden,
                    batch,
                    low=change.low,
                    scale=t + step,
                    at=t,
                )
            assert hidden is not None
            return hidden

        path(0, 1.0, torch.zeros(()))  # finds out about factors
        return path

    def steered(self, steers: Mapping[int, Steering | Tensor]) -> Path:
        """The base with t times a steer added at block_out of some layers."""
        stages = self.cut.stages
        inside = [stage.name == "block" and stage.layer in steers for stage in stages]
        first = inside.index(True) if any(inside) else len(stages)

        def path(batch: int, t: float, step: Tensor) -> Tensor:
            hidden = self._entering(first, batch)
            for n, stage in enumerate(stages[first:], first):
                steer = None
                if inside[n]:
                    shift = self._shift(steers[stage.layer], stage, batch)
                    steer = {"block_out": lambda h, s=shift: (t + step) * s(h)}
                own = self._tensors[n]
                hidden, _ = self.cut.run(stage, own, hidden, batch, steer=steer)
            assert hidden is not None
            return hidden

        return path

    def _streams(self, batch: int) -> list[Tensor]:
        """What the base's stages give, from the first to the last."""
        given = []
        for stage, own in zip(self.cut.stages, self._tensors, strict=True):
            before = given[-1] if given else None
            given.append(self.cut.run(stage, own, before, batch)[0])
        return given

    def _entering(self, stage: int, batch: int) -> Tensor | None:
        """What a stage is given where nothing below it moves; behind all, the output.

        A run starts there: what lies below is the base's.
        """
        if stage == len(self.cut.stages):
            return self.base[batch]
        return self._inputs[batch][stage - 1] if stage else None

    def rounding(self, norm: Norm) -> float:
        """What a difference of outputs is right to, in a norm over all tokens."""
        return ROUNDING * size(self, norm, lambda batch: self.base[batch])

    def counted(self, output: Tensor, batch: int) -> Tensor:
        """The output at the tokens that count, [tokens, d]."""
        return counted(output, self.cut.batches[batch].mask)

    def _shift(
        self, steer: Steering | Tensor, stage: Stage, batch: int
    ) -> Callable[[Tensor], Tensor]:
        if isinstance(steer, Steering):
            return steer
        index = [self._rows.index(n) for n in self.cut.batches[batch].index]
        own = steer[index, : self.cut.mask(stage, batch).shape[1]]
        return lambda _: own


@contextmanager
def runs(setting: Setting) -> Iterator[Runs]:
    """The setting's model on its few tokens, in float64; it is left as it is.

    Raises:
        UnsupportedModelError: If it has no blocks.
    """
    model = setting.model
    blocks_of(model)
    low = low_rank_names(model, setting.update)
    rows = sorted(n for batch in setting.few for n in batch.index)
    batches = _whole(setting.few)
    dtype, sites = torch.float64, ("block_out",)
    with (
        measured(model),
        staged(model, batches, dtype, sites=sites, low_names=low) as cut,
    ):
        yield Runs(cut, set(low), rows)


def output(path: Path, batch: int, t: float) -> Tensor:
    """What a path gives at a scale."""
    return path(batch, t, torch.zeros((), dtype=torch.float64))


def slope(path: Path, batch: int, t: float = 0.0) -> Tensor:
    """Its derivative there."""
    zero = torch.zeros((), dtype=torch.float64)
    along = torch.ones_like(zero)
    return derived(lambda step: path(batch, t, step), (zero,), (along,))[1]


def bend(path: Path, batch: int, step: float = STEP) -> Tensor:
    """Its second derivative at t = 0."""
    ahead, behind = slope(path, batch, step), slope(path, batch, -step)
    return (ahead - behind) / (2 * step)


def _whole(batches: Sequence[Batch]) -> list[Batch]:
    """Whole sequences, the first ones, of at most `TOKENS` tokens, but at least one.

    Offsets belong to tokens of whole sequences: none is cut.
    """
    picked, room = [], TOKENS
    for batch in batches:
        rows = []
        for row, count in enumerate(batch.counts):
            if count <= room or room == TOKENS:
                rows.append(row)
                room -= count
        if rows:
            picked.append(batch.select(rows))
    return picked


def local_offsets(setting: Setting) -> dict[int, Tensor]:
    """First-order shifts of each block's own update at its block_out, by layer.

    Raises:
        UnsupportedModelError: If the model has no blocks.
    """
    return {n: shift.local_first_order for n, shift in at_block_out(setting).items()}


def propagated_offsets(setting: Setting) -> dict[int, Tensor]:
    """First-order shifts at block_out by all updates up to there, by layer.

    Raises:
        UnsupportedModelError: If the model has no blocks.
    """
    return {n: shift.first_order for n, shift in at_block_out(setting).items()}


def at_block_out(setting: Setting) -> dict[int, Shift]:
    """Shifts at block_out, by layer.

    Raises:
        UnsupportedModelError: If the model has no blocks.
    """
    blocks_of(setting.model)
    shifts = setting.shifts.items()
    return {layer: shift for (layer, site), shift in shifts if site == "block_out"}


def size(made: Runs, norm: Norm, change: Callable[[int], Tensor]) -> float:
    """The length of a change of the output, over all tokens that count.

    Args:
        made: The runs.
        norm: What it is measured in.
        change: From the batch to the change, [batch, seq, vocabulary or d].
    """
    total = 0.0
    for batch in made.batches:
        base = made.counted(made.base[batch], batch)
        total += float(norm.squared(made.counted(change(batch), batch), base).sum())
    return total**0.5


def apart(made: Runs, tuned: Path, path: Path, t: float = 1.0) -> float:
    """The divergence of a path from the tuned one, the mean over tokens."""
    parts = [
        divergence(
            made.counted(output(tuned, batch, t), batch),
            made.counted(output(path, batch, t), batch),
            made.classes,
        )
        for batch in made.batches
    ]
    return float(torch.cat(parts).mean())
